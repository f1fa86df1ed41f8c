"""What `bench quality` measures of one prompt: a row for each method and size."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from laq_gguf.bench.answers import Reply, added, answer, freely, reply_text
from laq_gguf.bench.attention import decode_attention, mass_held
from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.methods import (
    F16,
    Method,
    bounded_size,
    parse_method,
    share_text,
    tokens_of_share,
)
from laq_gguf.bench.metrics import kl_divergence, negative_log_likelihood, top1_agreement
from laq_gguf.bench.prompts import Prompt
from laq_gguf.bench.reading import Reader, Readers
from laq_gguf.bench.results import ResultFile
from laq_gguf.bench.tasks import score

KEY = ("task", "length", "id", "method", "size")


@dataclass(frozen=True)
class Case:
    """A method at a size: a share of bytes, or tokens; neither for the full cache."""

    method: Method
    share: float | None = None
    n_tokens: int | None = None

    @property
    def size(self) -> str | None:
        """The size as rows have it: "1/8", or "128"."""
        if self.share is not None:
            return share_text(self.share)
        return None if self.n_tokens is None else str(self.n_tokens)


@dataclass(frozen=True)
class _Full:
    """What the full f16 cache makes of a prompt, to compare with."""

    reply: Reply
    path: list[int]
    attention: npt.NDArray[np.float32] | None
    seconds: float


class Measurement:
    """Rows into a file, those of one prompt after the other.

    Attributes:
        file: where they go.
    """

    def __init__(self, args: argparse.Namespace, readers: Readers, file: ResultFile) -> None:
        self._args, self._readers, self.file = args, readers, file
        self._methods = [parse_method(name) for name in args.methods]

    def cases(self, prompt: Prompt) -> list[Case]:
        """All there is to measure of a prompt: of one K/V type together, bounded ones last."""
        cases = []
        for method in self._methods:
            if not method.evicts:
                cases.append(Case(method))
            elif self._args.budgets:
                cases += [Case(method, n_tokens=n) for n in self._args.budgets]
            else:
                cases += [Case(method, share=share) for share in self._args.shares]
        kept = [case for case in cases if self._fits(prompt, case)]
        types = list(dict.fromkeys(case.method.type for case in kept))
        return sorted(kept, key=lambda c: (c.method.bounded, types.index(c.method.type)))

    def is_missing(self, prompt: Prompt, case: Case) -> bool:
        """Whether its row is not there yet.

        Raises:
            ValueError: there is one of another prompt of the same name.
        """
        key = {"method": case.method.name, "size": case.size}
        row = self.file.find(**_names(prompt), **key)
        if row is not None and row["prompt"] != prompt.digest:
            raise ValueError(
                f"--out has an answer to another {row['task']}/{row['id']}: --data has changed; "
                "give another --out, or --overwrite"
            )
        return row is None

    def example(self, prompt: Prompt, cases: Sequence[Case]) -> Iterator[Case]:
        """Measure what is missing of a prompt; each case is given back when its row is there."""
        missing = [case for case in cases if self.is_missing(prompt, case)]
        yield from (case for case in cases if case not in missing)
        if not missing:
            return
        full = self._full(prompt)
        read_by = {(F16, False)}
        for case in missing:
            reader = case.method.type, case.method.two_stages
            if reader not in read_by and not case.method.bounded:
                read_by.add(reader)
                self._readers.whole(*reader).read(prompt.tokens)
            self.file.add(self._row(prompt, case, full))
            yield case

    def _fits(self, prompt: Prompt, case: Case) -> bool:
        """Whether the size is one that the method can have; a note says where it cannot."""
        if not case.method.evicts:
            return True
        n, least = self._tokens(prompt, case), case.method.least
        why = f"{least} are always kept" if n < least else ""
        size = bounded_size(n, case.method.config, self._args.bounded_staging)
        if case.method.bounded and (size is None or sum(size) < self._args.bounded_cells):
            why = f"fewer than {self._args.bounded_cells} cells, or too few beside a probe"
        if why:
            self.file.note(f"{case.method.name} has no row at the smallest sizes: {why}")
        return not why

    def _tokens(self, prompt: Prompt, case: Case) -> int:
        n_prompt = len(prompt.tokens)
        if case.share is None:
            assert case.n_tokens is not None
            return min(case.n_tokens, n_prompt)
        cells = [self._readers.bytes_per_cell(t) for t in (F16, case.method.type)]
        n = tokens_of_share(case.share, n_prompt, *cells)
        return n if case.method.bounded else min(n, n_prompt)

    def _full(self, prompt: Prompt) -> _Full:
        begin = time.perf_counter()
        reader = self._readers.whole(F16)
        reader.read(prompt.tokens)
        reader.start(parse_method("full"), None)
        decoder, n_compare = reader.decoder, self._args.n_compare
        n_new = new_tokens(self._args, prompt)
        first = decoder.logits().copy()
        if prompt.path:
            path, tokens = list(prompt.path), []
            logits = np.concatenate([first[None], decoder.decode(path[:-1])])
        else:
            path, rows = freely(decoder, first, min(n_new, n_compare))
            tokens, logits = list(path), np.stack(rows)
        attention = None
        if len(path) > 1:
            attention = decode_attention(decoder.llm, len(prompt.tokens))
        if len(tokens) == n_compare < n_new and not decoder.is_end(tokens[-1]):
            decoder.step(tokens[-1])
            tokens += freely(decoder, decoder.logits().copy(), n_new - n_compare)[0]
        return _Full(Reply(tokens, logits), path, attention, time.perf_counter() - begin)

    def _row(self, prompt: Prompt, case: Case, full: _Full) -> dict[str, Any]:
        begin = time.perf_counter()
        if case.method.bounded:
            reply, decoder, facts = self._answer_bounded(prompt, case, full)
        else:
            reply, decoder, facts = self._answer_whole(prompt, case, full)
        own, f16 = (self._readers.bytes_per_cell(t) for t in (case.method.type, F16))
        n_counted = facts.pop("n_counted")
        kl = kl_divergence(full.reply.logits, reply.logits)
        text = reply_text(decoder, reply.tokens) if reply.tokens else ""
        row = {
            **_names(prompt),
            "method": case.method.name,
            "size": case.size,
            "share": case.share if case.method.evicts else own / f16,
            "type": case.method.type,
            "budget": facts.pop("budget"),
            "kv_bytes": round(n_counted * own),
            "kv_bytes_full": round(len(prompt.tokens) * f16),
            "counts": "all cells" if case.method.bounded else "kept cells",
            "depth": prompt.example.depth,
            "prompt": prompt.digest,
            "n_prompt": len(prompt.tokens),
            "outputs": list(prompt.example.outputs),
            "text": text,
            "score": score(prompt.example, text),
            "top1_agreement": top1_agreement(full.reply.logits, reply.logits),
            "kl": float(kl.mean()),
            "kl_max": float(kl.max()),
            "n_compared": len(kl),
            **facts,
            **reply.cost,
        }
        if prompt.path:
            row["nll"] = negative_log_likelihood(reply.logits, prompt.path)
        is_full = not case.method.evicts and case.method.type == F16
        row["seconds"] = time.perf_counter() - begin + (full.seconds if is_full else 0.0)
        return row

    def _answer_whole(
        self, prompt: Prompt, case: Case, full: _Full
    ) -> tuple[Reply, Decoder, dict[str, Any]]:
        method = case.method
        reader = self._readers.whole(method.type, method.two_stages)
        budget = self._tokens(prompt, case) if method.evicts else None
        before = reader.stats()
        facts: dict[str, Any] = {"budget": budget, "ms_evict": reader.start(method, budget)}
        if method.evicts and method.config.lookahead == "deferred":
            reply = self._follow(reader, method, budget, prompt, full, stepwise=True)
            reader.decoder.flush()  # a reply shorter than the lookahead leaves an eviction waiting
            kept, stats = reader.decoder.llm.kept_positions(), reader.stats()
        else:
            kept, stats = reader.decoder.llm.kept_positions(), reader.stats()
            is_full = method.name in ("full", f"full@{F16}")
            reply = full.reply if is_full else self._follow(reader, method, budget, prompt, full)
        if not method.evicts:
            facts["ms_prefill"] = reader.ms_read
        n_kept = stats["n_resident"] - (stats["n_tokens"] - len(prompt.tokens))
        return (
            Reply(reply.tokens, reply.logits, added(before, reader.stats())),
            reader.decoder,
            {**facts, "n_kept": n_kept, "n_counted": n_kept, **_mass(full, kept)},
        )

    def _follow(
        self,
        reader: Reader,
        method: Method,
        budget: int | None,
        prompt: Prompt,
        full: _Full,
        stepwise: bool = False,
    ) -> Reply:
        def again() -> None:
            reader.start(method, budget)

        n_new = new_tokens(self._args, prompt)
        return answer(reader.decoder, full.path, n_new, again, stepwise=stepwise)

    def _answer_bounded(
        self, prompt: Prompt, case: Case, full: _Full
    ) -> tuple[Reply, Decoder, dict[str, Any]]:
        reader = self._readers.bounded(case.method, self._tokens(prompt, case))
        decoder = reader.decoder
        before = decoder.stats()
        ms = reader.start(prompt.tokens)
        kept, stats = decoder.llm.kept_positions(), decoder.stats()
        assert stats is not None
        reply = answer(decoder, full.path, new_tokens(self._args, prompt), reader.again)
        facts = {
            "budget": decoder.llm.kv_budget,
            "ms_prefill": ms,
            "n_kept": stats["n_resident"],
            "n_counted": stats["n_cells"],
            **_mass(full, kept),
        }
        return Reply(reply.tokens, reply.logits, added(before, decoder.stats())), decoder, facts


def new_tokens(args: argparse.Namespace, prompt: Prompt) -> int:
    """Tokens that an answer may have."""
    n, most = prompt.example.max_new_tokens, args.max_new_tokens
    return n if most is None else min(n, most)


def _names(prompt: Prompt) -> dict[str, Any]:
    example = prompt.example
    return {"task": example.task, "length": example.length, "id": example.id}


def _mass(full: _Full, kept: npt.NDArray[np.int32]) -> dict[str, float | None]:
    if full.attention is None:
        return {"attention_mass": None}
    return {"attention_mass": mass_held(full.attention, kept)}
