"""Multi-turn: questions about one text, one after the other, in a cache that evicts at each turn.

Every method sees the same conversation: the full cache's own answers stand in it. At each turn a
method first answers by itself; then its state goes back, and it is led along the full cache's
answer, whose tokens stay.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from laq_gguf.bench.answers import COUNTERS, Reply, freely, led, read, reply_text, without_end
from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.methods import PSEUDO
from laq_gguf.bench.metrics import kl_divergence, squad_em, squad_f1, top1_agreement
from laq_gguf.bench.options import (
    add_common,
    add_eviction,
    add_resume,
    check_model,
    eviction_options,
    llama_options,
    names,
)
from laq_gguf.bench.prompts import Renderer, chat_renderer, digest, open_tokenizer
from laq_gguf.bench.references import REUSED, References, reference_folder
from laq_gguf.bench.results import ResultFile
from laq_gguf.bench.tables import multiturn_table
from laq_gguf.bench.tasks import read_lines
from laq_gguf.config import round_cells

# each turn evicts the full cache, as if nothing had ever been evicted: what a recall can reach
FROM_FULL = "laq++-from-full"
FILE = Path("multiturn") / "squad_multiturn.jsonl"
LAQ_PP = {"kv_policy": "laq++", **PSEUDO}
RECALL = {**LAQ_PP, "kv_recall": "ram"}
# keyword arguments of laq_gguf.Llama, beside kv_budget
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "laq++-deferred": {"kv_policy": "laq++", "lookahead": "deferred"},
    "laq++-pseudo": LAQ_PP,
    "laq++-recall": RECALL,
    "laq++-recall-deferred": {"kv_policy": "laq++", "kv_recall": "ram"},
    FROM_FULL: LAQ_PP,
    "snapkv": {"kv_policy": "snapkv"},
    "streaming": {"kv_policy": "streaming"},
}
NOTES = (
    "every method sees the conversation with the full cache's answers in it; KL and top-1 are "
    "taken along those, F1 and EM of the method's own answer of the turn",
    "decoded: by the native counter, pseudo and probe tokens and the answer included; decoded "
    "again: of these, what an earlier turn had decoded (sum over the contexts)",
)


@dataclass(frozen=True)
class Chat:
    """Questions about a text, in tokens.

    Attributes:
        index: of the record in its file.
        n_context: tokens of the text alone.
        parts: for each turn, what stands between the answer before it and its own answer: first
            the text and the first question, then the end of an answer and the next question.
        outputs: for each turn, the answers that count as right.
    """

    index: int
    title: str
    n_context: int
    parts: tuple[list[int], ...]
    outputs: tuple[tuple[str, ...], ...]

    @property
    def digest(self) -> str:
        """Tells chats apart."""
        return digest(*self.parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench multiturn`."""
    add_common(parser)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {FILE.as_posix()}")
    parser.add_argument("--limit", type=int, help="the first N texts only")
    parser.add_argument("--turns", type=int, help="the first N questions about a text only")
    parser.add_argument(
        "--methods", type=names(METHODS), default=list(METHODS), help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument(
        "--budget-share", type=float, default=0.25, help="kv_budget, as a share of the text"
    )
    parser.add_argument(
        "--kv-staging", type=int, default=0,
        help="cells beyond the budget; 0 = the whole conversation fits",
    )  # fmt: skip
    add_eviction(parser)
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer, at most")
    add_resume(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out` after every conversation, print the table; return the document.

    Raises:
        ValueError: options or data that cannot be used, or a result file of other settings.
    """
    check_model(args)
    if not 0 < args.budget_share < 1:
        raise ValueError(f"--budget-share lies between 0 and 1, got {args.budget_share}")
    if FROM_FULL in args.methods and args.kv_staging:
        raise ValueError(f"{FROM_FULL} holds the whole conversation: leave out --kv-staging or it")
    file = ResultFile("multiturn", args, ("index", "method", "turn"), NOTES)
    chats = _prepare(args)
    methods = [m for m in args.methods if m != "full"]
    with reference_folder(args.references) as folder:
        document = file.document
        library = f"laq_gguf-{document['versions']['llama-cpp-python']}"
        references = References(folder, document["model"]["sha256"], library)
        with closing(_Run(args, _n_ctx(args, chats), file, references)) as run:
            for i, chat in enumerate(chats):
                run.measure_all(chat, methods)
                print(f"{i + 1}/{len(chats)} {chat.title}", file=sys.stderr)
    file.write()
    print(multiturn_table(file.document))
    return file.document


class _Run:
    """What all methods of a run share."""

    def __init__(
        self, args: argparse.Namespace, n_ctx: int, file: ResultFile, references: References
    ) -> None:
        self.args, self.n_ctx, self.file, self.references = args, n_ctx, file, references
        self._full: Decoder | None = None

    def close(self) -> None:
        """Free the full cache's model."""
        if self._full is not None:
            self._full.close()

    def measure_all(self, chat: Chat, methods: Sequence[str]) -> None:
        """The rows of a conversation that are not there yet."""
        missing = [m for m in methods if not self.is_measured(chat, m)]
        if missing or not self.is_measured(chat, "full"):
            replies = self.full(chat)
            for method in missing:
                self.measure(chat, method, replies)

    def is_measured(self, chat: Chat, method: str) -> bool:
        """Whether all turns of it are there.

        Raises:
            ValueError: there are rows of another conversation.
        """
        rows = [
            self.file.find(index=chat.index, method=method, turn=turn + 1)
            for turn in range(len(chat.parts))
        ]
        if any(row and row["chat"] != chat.digest for row in rows):
            raise ValueError(
                f"--out has answers about another text {chat.index}: --data has changed; give "
                "another --out, or --overwrite"
            )
        return all(rows)

    def full(self, chat: Chat) -> list[Reply]:
        """The full cache's reply of each turn, kept ones where there are."""
        kept = self._kept(chat)
        if kept is None:
            self._full = self._full or Decoder(
                "laq_gguf", str(self.args.model), llama_options(self.args, self.n_ctx)
            )
            for prompt, reply, facts in self._talk(self._full, chat):
                self.references.save(*self._reference(prompt), reply, **facts)
        replies = self._kept(chat)
        assert replies is not None
        if not self.is_measured(chat, "full"):
            if kept is not None:
                self.file.note(REUSED)
            rows = []
            for turn, (reply, facts) in enumerate(replies):
                row = _row(chat, turn, "full", reply, reply.logits, facts)
                rows.append({**row, **reply.cost, "reused": kept is not None})
            self.file.add(*rows)
        return [reply for reply, _ in replies]

    def _talk(self, decoder: Decoder, chat: Chat) -> Any:
        """The conversation in the full cache: for each turn its prompt, the reply, and facts."""
        conversation: list[int] = []
        for turn, part in enumerate(chat.parts):
            conversation += part
            start = time.perf_counter()
            n_new = read(decoder, conversation, is_first=turn == 0)
            ms = 1e3 * (time.perf_counter() - start)
            tokens, rows = freely(decoder, decoder.logits().copy(), self._n_new)
            facts = {"text": reply_text(decoder, tokens), "n_new": n_new}
            facts["seconds"] = time.perf_counter() - start
            facts["words"] = without_end(decoder, tokens)
            yield list(conversation), Reply(tokens, np.stack(rows), {"ms_prefill": ms}), facts
            conversation += facts["words"]

    def _kept(self, chat: Chat) -> list[tuple[Reply, dict[str, Any]]] | None:
        """The kept replies of a conversation; None unless all are there."""
        replies = []
        conversation: list[int] = []
        for part in chat.parts:
            conversation += part
            kept = self.references.load(*self._reference(conversation))
            if kept is None:
                return None
            replies.append(kept)
            conversation += kept[1]["words"]
        return replies

    def _reference(self, prompt: list[int]) -> tuple[list[list[int]], int, int]:
        return [prompt], self._n_new, self._n_new

    @property
    def _n_new(self) -> int:
        return self.args.max_new_tokens

    def measure(self, chat: Chat, method: str, replies: Sequence[Reply]) -> None:
        """The rows of a method for one conversation."""
        budget = int(self.args.budget_share * chat.n_context)
        options = llama_options(self.args, self.n_ctx)
        options.update(
            METHODS[method],
            kv_budget=budget,
            kv_staging=self.args.kv_staging or self.n_ctx,
            **eviction_options(self.args),
        )
        rows = []
        with closing(Decoder("laq_gguf", str(self.args.model), options)) as decoder:
            conversation: list[int] = []
            for turn, (part, reference) in enumerate(zip(chat.parts, replies, strict=True)):
                conversation += part
                if method == FROM_FULL:
                    logits, facts = self._turn_from_full(decoder, conversation, reference, budget)
                else:
                    logits, facts = self._turn(decoder, conversation, reference, is_first=turn == 0)
                row = _row(chat, turn, method, reference, logits, facts)
                rows.append({**row, "budget": budget})
                conversation += without_end(decoder, reference.tokens)
        self.file.add(*rows)

    def _turn(
        self, decoder: Decoder, conversation: list[int], reference: Reply, *, is_first: bool
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """One turn: logits along the reference, and what the turn was like."""
        start, before = time.perf_counter(), _stats(decoder)
        n_new = read(decoder, conversation, is_first=is_first)
        ms = 1e3 * (time.perf_counter() - start)
        first, read_stats = decoder.logits().copy(), _stats(decoder)
        state = decoder.save()
        own, _ = freely(decoder, first, self._n_new)
        decoder.load(state)
        led_from = _stats(decoder)
        logits = led(decoder, first, reference.tokens)
        decoder.flush()
        after = _stats(decoder)
        facts = {
            name: read_stats[name] - before[name] + after[name] - led_from[name]
            for name in (*COUNTERS, "n_decoded")
        }
        dropped = facts["n_pseudo"] + facts["n_probe"]
        facts["n_again"] = facts["n_decoded"] - dropped - n_new - (len(reference.tokens) - 1)
        facts.update({name: after[name] for name in ("n_resident", "n_cells", "kv_bytes")})
        facts.update(
            text=reply_text(decoder, own),
            n_new=n_new,
            ms_prefill=ms,
            seconds=time.perf_counter() - start,
        )
        return logits, facts

    def _turn_from_full(
        self, decoder: Decoder, conversation: list[int], reference: Reply, budget: int
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """As `_turn`, but the cache is whole before and after it."""
        start, before = time.perf_counter(), _stats(decoder)
        decoder.llm.set_eviction(self.n_ctx, kv_policy="full")
        # a state has no logits: the last token is decoded after it
        n_new = read(decoder, conversation[:-1], is_first=decoder.n_tokens == 0)
        whole = decoder.save()
        decoder.llm.set_eviction(budget, kv_policy="laq++")
        decoder.step(conversation[-1])
        decoder.llm._laq.prompt_end()
        first, facts = decoder.logits().copy(), {"ms_prefill": 1e3 * (time.perf_counter() - start)}
        cut = decoder.save()
        own, _ = freely(decoder, first, self._n_new)
        decoder.load(cut)
        logits = led(decoder, first, reference.tokens)
        after = _stats(decoder)
        decoder.load(whole)
        facts |= {name: after[name] - before[name] for name in COUNTERS}
        facts |= {name: after[name] for name in ("n_resident", "n_cells", "kv_bytes")}
        facts |= {"text": reply_text(decoder, own), "n_new": n_new + 1}
        return logits, {**facts, "seconds": time.perf_counter() - start}


def _stats(decoder: Decoder) -> dict[str, Any]:
    stats = decoder.stats()
    assert stats is not None
    return stats


def _row(
    chat: Chat,
    turn: int,
    method: str,
    reference: Reply,
    logits: npt.NDArray[np.float32],
    facts: dict[str, Any],
) -> dict[str, Any]:
    kl = kl_divergence(reference.logits, logits)
    outputs = chat.outputs[turn]
    return {
        "index": chat.index,
        "title": chat.title,
        "chat": chat.digest,
        "method": method,
        "turn": turn + 1,
        "budget": None,
        "n_context": chat.n_context,
        "outputs": list(outputs),
        "f1": squad_f1(facts["text"], outputs),
        "em": squad_em(facts["text"], outputs),
        "top1_agreement": top1_agreement(reference.logits, logits),
        "kl": float(kl.mean()),
        "kl_max": float(kl.max()),
        "n_compared": len(kl),
        **{name: value for name, value in facts.items() if name != "words"},
    }


def _prepare(args: argparse.Namespace) -> list[Chat]:
    path = args.data / FILE
    if not path.is_file():
        raise ValueError(f"no {FILE.as_posix()} in --data")
    records = read_lines(path, {"title", "context", "turns"})[: args.limit]
    with closing(open_tokenizer(str(args.model))) as decoder:
        render = chat_renderer(decoder)
        if render is None:
            raise ValueError("the model has no chat template, which a conversation needs")
        return [make_chat(decoder, render, i, r, args.turns) for i, r in enumerate(records)]


def make_chat(
    decoder: Decoder, render: Renderer, index: int, record: dict[str, Any], n_turns: int | None
) -> Chat:
    """A record in tokens.

    Raises:
        ValueError: the template changes earlier turns when a later one comes.
    """
    turns = record["turns"][:n_turns]
    questions = [turn["question"].strip() for turn in turns]
    first = f"{record['context']}\n\n{questions[0]}"
    head = render([{"role": "user", "content": first}])
    texts = [head]
    for question in questions[1:]:
        answer = "An answer."
        messages = (("user", first), ("assistant", answer), ("user", question))
        text = render([{"role": role, "content": content} for role, content in messages])
        if not text.startswith(head + answer):
            raise ValueError("the model's chat template rewrites earlier turns")
        texts.append(text[len(head + answer) :])
    return Chat(
        index=index,
        title=record["title"],
        n_context=len(decoder.tokenize(record["context"])),
        parts=tuple(decoder.tokenize(text, special=True) for text in texts),
        outputs=tuple(tuple(turn["answers"]) for turn in turns),
    )


def _n_ctx(args: argparse.Namespace, chats: Sequence[Chat]) -> int:
    # an answer, and pseudo and probe tokens, which take cells until they are dropped
    need = max(
        sum(len(part) + args.max_new_tokens for part in chat.parts)
        + args.lookahead_size
        + args.probe_size
        for chat in chats
    )
    return round_cells(need)
