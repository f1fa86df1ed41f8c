"""Peers: the policies of NVIDIA's kvpress on the same GGUF and prompts, at the same bytes.

transformers loads the GGUF with its weights dequantized to f32. Every prompt is read once, question
included, and evicted by every policy to shares of the bytes that its full cache takes. The row
`full` is transformers' full cache beside llama.cpp's: how far the two are apart where nothing is
evicted. All are led along the greedy answer of llama.cpp's full cache, as in `bench quality`.

Needs the extra `peers`: pip install 'laq-gguf[peers]'.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laq_gguf.bench.answers import Reply, freely, reply_text
from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.methods import shares
from laq_gguf.bench.metrics import kl_divergence, top1_agreement
from laq_gguf.bench.options import (
    add_common,
    add_resume,
    check_model,
    integers,
    llama_options,
    names,
)
from laq_gguf.bench.peers_table import peers_table
from laq_gguf.bench.prompts import (
    Prompt,
    chat_renderer,
    open_tokenizer,
    rounds_of,
    task_prompts,
)
from laq_gguf.bench.references import References, reference_folder
from laq_gguf.bench.results import ResultFile
from laq_gguf.bench.tasks import TASKS, score
from laq_gguf.config import round_cells

if TYPE_CHECKING:
    from laq_gguf.bench.peers_cells import Cells
    from laq_gguf.bench.peers_model import PeerModel, Reading

PACKAGES = ("kvpress", "transformers", "torch")
FULL, FULL_SHARE = "full", 1.0


@dataclass(frozen=True)
class Press:
    """A policy of kvpress: its class, and settings that are not the class's defaults."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


PRESSES: dict[str, Press] = {
    "kvpress-snapkv": Press("SnapKVPress"),
    "kvpress-pyramidkv": Press("PyramidKVPress", {"window_size": 8}),
    "kvpress-tova": Press("TOVAPress"),
    "kvpress-expected": Press("ExpectedAttentionPress"),
    "kvpress-keydiff": Press("KeyDiffPress"),
    "kvpress-kvzip": Press("KVzipPress"),
}
NOTES = [
    "share: of the bytes of the prompt's full cache; kv_bytes: of the cells that heads hold, "
    "counted as f16, though transformers keeps them in f32",
    "the question and the reply's beginning (answer_prefix) are part of the prompt that is evicted",
    "kl, top1_agreement: to transformers' own full cache; of the row full: to llama.cpp's; all "
    "along the greedy answer of llama.cpp's full cache",
    "settings of the presses are kvpress's defaults, but PyramidKV's window_size 8: with 64 its "
    "budgets of these prompts are SnapKV's",
    "KVzip masks cells of each head in kvpress; here they are taken out: only what stays counts",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench peers`."""
    add_common(parser)
    parser.add_argument("--data", type=Path, help="folder with ruler/LENGTH/TASK.jsonl")
    asking = {name: task for name, task in TASKS.items() if task.metric}
    parser.add_argument(
        "--tasks", type=names(asking), default=["needles"], help=f"of {', '.join(asking)}"
    )
    parser.add_argument("--length", type=integers, default=[2048], help="of prompts, with commas")
    parser.add_argument("--limit", type=int, help="the first N examples of each task only")
    parser.add_argument("--n-needles", type=int, default=20, help="prompts of the task needles")
    parser.add_argument(
        "--methods", type=names(PRESSES), default=list(PRESSES), help=f"of {', '.join(PRESSES)}"
    )
    parser.add_argument(
        "--shares", type=shares, default=shares("1/4,1/8,1/16"), help="of the full cache's bytes"
    )
    parser.add_argument(
        "--n-compare", type=int, default=16, help="tokens of the full cache's answer compared"
    )
    parser.add_argument(
        "--minutes", type=float, help="begin no further prompt after so long; what is there stays"
    )
    add_resume(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out` after every prompt, print the table; return the document.

    Raises:
        ValueError: the extra is not installed; options that cannot be used, data that is not
            there, or a result file of other settings.
    """
    start = time.monotonic()
    check_model(args)
    versions = peer_versions()
    file = ResultFile("peers", args, ("task", "length", "id", "method", "share"), NOTES)
    if file.document.setdefault("peers", versions) != versions:
        raise ValueError(
            f"--out was measured with {file.document['peers']}, now {versions}: give another "
            "--out, or --overwrite"
        )
    questions, n_ctx = _prepare(args)
    missing = [q for q in questions if not _is_measured(args, file, q)]
    with reference_folder(args.references) as folder:
        library = f"laq_gguf-{file.document['versions']['llama-cpp-python']}"
        references = References(folder, file.document["model"]["sha256"], library)
        with closing(open_tokenizer(str(args.model))) as vocabulary:
            run = _Run(args, file, references, vocabulary, n_ctx)
            for i, question in enumerate(missing):
                if args.minutes is not None and time.monotonic() - start > 60 * args.minutes:
                    print(f"--minutes: {i} of {len(missing)} prompts done", file=sys.stderr)
                    break
                run.measure(question)
                _progress(file, question, i, len(missing))
    file.write()
    print(peers_table(file.document))
    return file.document


def peer_versions() -> dict[str, str]:
    """Versions of the packages of the extra.

    Raises:
        ValueError: one is not installed.
    """
    try:
        return {name: importlib.metadata.version(name) for name in PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed: bench peers needs the extra peers, "
            "pip install 'laq-gguf[peers]'"
        ) from None


@dataclass(frozen=True)
class Question:
    """A prompt and the length that was asked for."""

    length: int
    prompt: Prompt

    @property
    def key(self) -> dict[str, Any]:
        """What tells it from others in a result."""
        example = self.prompt.example
        return {"task": example.task, "length": self.length, "id": example.id}

    @property
    def max_new_tokens(self) -> int:
        return self.prompt.example.max_new_tokens


class _Run:
    """llama.cpp and transformers, loaded when a prompt first needs them."""

    def __init__(
        self,
        args: argparse.Namespace,
        file: ResultFile,
        references: References,
        vocabulary: Decoder,
        n_ctx: int,
    ) -> None:
        self._args, self._file, self._references = args, file, references
        self._vocabulary, self._n_ctx = vocabulary, n_ctx
        self._model: PeerModel | None = None

    def measure(self, question: Question) -> None:
        """Add the rows of one prompt."""
        reference = self._reference(question)
        if self._model is None:
            from laq_gguf.bench.peers_model import PeerModel

            self._model = PeerModel(self._args.model, self._args.threads)
        presses = {name: PRESSES[name] for name in self._args.methods}
        start = time.perf_counter()
        reading = self._model.read(question.prompt.tokens, presses, self._args.shares)
        seconds = time.perf_counter() - start
        kept = {(FULL, FULL_SHARE): reading.full, **reading.kept}
        replies = self._replies(reading, kept, reference, question.max_new_tokens)
        full = replies[FULL, FULL_SHARE]
        rows = []
        for (method, share), reply in replies.items():
            own = reference if method == FULL else full
            row = peer_row(question, method, share, reply, own)
            row.update(sizes(kept[method, share], reading.full), seconds_read=seconds)
            row["text"] = reply_text(self._vocabulary, reply.tokens)
            row["score"] = score(question.prompt.example, row["text"])
            rows.append(row)
        self._file.add(*rows)

    def _replies(
        self, reading: Reading, kept: dict[Any, Cells], reference: Reply, max_new_tokens: int
    ) -> dict[Any, Reply]:
        """The free answer of every cache, and its logits along the reference's answer."""
        assert self._model is not None
        path = reference.tokens[: self._args.n_compare]
        replies = {}
        for group in side_by_side({key: max(c.n for c in cells) for key, cells in kept.items()}):
            rows = [kept[key] for key in group]
            logits = self._model.led(reading, rows, path)
            tokens = self._model.freely(reading, rows, max_new_tokens, self._vocabulary.is_end)
            for key, own_tokens, own_logits in zip(group, tokens, logits, strict=True):
                replies[key] = Reply(own_tokens, own_logits)
        return {key: replies[key] for key in kept}

    def _reference(self, question: Question) -> Reply:
        """llama.cpp's full cache on the question; read now or in an earlier run."""
        prompt, n = question.prompt, self._args.n_compare
        name = [prompt.tokens, prompt.path], n, question.max_new_tokens
        found = self._references.load(*name)
        if found is not None:
            return found[0]
        options = llama_options(self._args, self._n_ctx)
        with closing(Decoder("laq_gguf", str(self._args.model), options)) as decoder:
            start = time.perf_counter()
            decoder.prefill(prompt.tokens)
            cost = {"ms_prefill": 1e3 * (time.perf_counter() - start)}
            tokens, rows = freely(decoder, decoder.logits().copy(), question.max_new_tokens)
            # as many as are compared: rows beyond them would only take room
            reply = Reply(tokens, _stack(rows[:n]), cost)
            seconds = time.perf_counter() - start
            text = reply_text(decoder, tokens)
        self._references.save(*name, reply, text=text, seconds=seconds)
        return reply


def _stack(rows: Sequence[Any]) -> Any:
    import numpy as np

    return np.stack(rows)


def peer_row(
    question: Question, method: str, share: float, reply: Reply, full: Reply
) -> dict[str, Any]:
    """What a cache's logits say, with the fields of a row of `bench quality`.

    Args:
        full: what its logits are compared with, along the same tokens.
    """
    prompt = question.prompt
    kl = kl_divergence(full.logits, reply.logits)
    return {
        **question.key,
        "method": method,
        "share": share,
        "depth": prompt.example.depth,
        "prompt": prompt.digest,
        "n_prompt": len(prompt.tokens),
        "outputs": list(prompt.example.outputs),
        "top1_agreement": top1_agreement(full.logits, reply.logits),
        "kl": float(kl.mean()),
        "kl_max": float(kl.max()),
        "n_compared": len(kl),
    }


def sizes(cells: Cells, full: Cells) -> dict[str, Any]:
    """Cells of a head (mean) and bytes in f16, of a cache and of the full one."""
    from laq_gguf.bench.peers_cells import cells_per_head, held_bytes

    return {
        "budget": round(cells_per_head(cells), 1),
        "kv_bytes": held_bytes(cells),
        "kv_bytes_full": held_bytes(full),
    }


def side_by_side(longest: dict[Any, int]) -> list[list[Any]]:
    """Caches that are decoded as one batch: none is padded to more than twice its cells.

    Args:
        longest: cells of the longest layer of each cache.
    """
    groups: list[list[Any]] = []
    for key in sorted(longest, key=longest.__getitem__, reverse=True):
        if groups and longest[groups[-1][0]] <= 2 * longest[key]:
            groups[-1].append(key)
        else:
            groups.append([key])
    return groups


def _is_measured(args: argparse.Namespace, file: ResultFile, question: Question) -> bool:
    wanted = [(FULL, FULL_SHARE), *((m, s) for m in args.methods for s in args.shares)]
    rows = [file.find(**question.key, method=m, share=s) for m, s in wanted]
    for row in rows:
        if row is not None and row["prompt"] != question.prompt.digest:
            raise ValueError(
                f"--out has an answer to another {row['task']}/{row['id']}: --data has changed; "
                "give another --out, or --overwrite"
            )
    return all(row is not None for row in rows)


def _progress(file: ResultFile, question: Question, i: int, n: int) -> None:
    rows = [r for r in file.document["results"] if r["prompt"] == question.prompt.digest]
    full = next(r for r in rows if r["method"] == FULL)
    found = sum(r["score"] for r in rows if r["method"] != FULL) / max(1, len(rows) - 1)
    where = f"{i + 1}/{n} {full['task']}/{full['length']}/{full['id']}"
    text = f"full {full['score']:.2f}, KL {full['kl']:.4f}; evicted {found:.2f} on average"
    print(f"{where}: {text}", file=sys.stderr, flush=True)


def _prepare(args: argparse.Namespace) -> tuple[list[Question], int]:
    """The questions, first examples of all tasks first, and the context size they need."""
    by_task = []
    with closing(open_tokenizer(str(args.model))) as decoder:
        render = chat_renderer(decoder)
        for name in args.tasks:
            # those with a length of their own are asked once
            for length in args.length if TASKS[name].has_length else [0]:
                prompts = task_prompts(decoder, render, name, length, args)
                by_task.append([Question(length, prompt) for prompt in prompts])
    questions = [question for group in rounds_of(by_task) for question in group]
    if not questions:
        raise ValueError("nothing to ask: --tasks, --limit and --length leave no example")
    need = max(len(q.prompt.tokens) + max(q.max_new_tokens, args.n_compare) for q in questions)
    return questions, round_cells(need)
