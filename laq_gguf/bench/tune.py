"""Tune: the smallest kv_budget that keeps to the full cache, for a model and a text of yours.

The text, or a question about it (--prompt), is read and evicted; then both caches are led along the
same tokens: those that follow in the text, or the full cache's own answer. Budgets are bisected for
the smallest at which the share of tokens where both choose the same one (top-1 agreement) is at
least --target. All tokens compared come after the eviction.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from laq_gguf.bench.answers import freely, led
from laq_gguf.bench.curve_tables import tune_table
from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.metrics import kl_divergence, top1_agreement
from laq_gguf.bench.options import (
    add_common,
    add_eviction,
    add_policy,
    check_model,
    eviction_options,
    llama_options,
    settings,
)
from laq_gguf.bench.prompts import chat_renderer, open_tokenizer
from laq_gguf.bench.provenance import provenance, write_json
from laq_gguf.bench.tasks import read_text
from laq_gguf.config import LaqConfig, round_cells

NOTES = [
    "lookahead pseudo: evicted before the first compared token, which deferred puts off by "
    "lookahead_size tokens",
    "agreement need not rise with every step of the budget: bisection finds a budget that keeps "
    "the target and a smaller one, --step tokens below, that does not",
]


Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """A prompt and the tokens that both caches are led along; None: the full cache's answer."""

    tokens: list[int]
    path: list[int] | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench tune`."""
    add_common(parser)
    parser.add_argument("--text", type=Path, required=True, help="a text like those you work with")
    parser.add_argument("--prompt", help="a question; it goes after each piece of the text")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a piece of the text")
    parser.add_argument("--pieces", type=int, default=3, help="pieces, spread over the text")
    parser.add_argument("--target", type=float, default=0.95, help="top-1 agreement, above 0")
    parser.add_argument("--step", type=int, default=16, help="budgets are multiples of it")
    add_policy(parser)
    parser.add_argument(
        "--kv-staging", type=int, default=0,
        help="cells beyond the budget; 0 = the whole prompt fits",
    )  # fmt: skip
    parser.add_argument("--n-compare", type=int, default=64, help="tokens compared in each piece")
    add_eviction(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out` after each budget, print the table; return the document.

    Raises:
        ValueError: options or files that cannot be used.
    """
    check_model(args)
    if not 0 < args.target <= 1:
        raise ValueError(f"--target is above 0 and at most 1, got {args.target}")
    if min(args.step, args.pieces, args.n_compare, args.length) < 1:
        raise ValueError("--step, --pieces, --n-compare and --length are at least 1")
    config = LaqConfig(kv_policy=args.policy, lookahead="pseudo", **eviction_options(args))
    text = read_text(args.text)
    document = provenance("tune", args.model, {**settings(args), "text": args.text.name})
    document.update(notes=NOTES, results=[])
    rows = document["results"]

    with closing(open_tokenizer(str(args.model))) as vocabulary:
        pieces = make_pieces(vocabulary, text, args)
    n_prompt = max(len(piece.tokens) for piece in pieces)
    document["n_prompts"] = [len(piece.tokens) for piece in pieces]
    n_ctx = round_cells(n_prompt + args.n_compare + args.lookahead_size)

    def measure(budget: int) -> bool:
        row = compare(full, caches.led(budget), budget)
        rows.append({**row, **caches.sizes})
        if args.out:
            write_json(args.out, document)
        print(f"kv_budget {budget}: top-1 {row['top1_agreement']:.3f}, KL {row['kl']:.4f}",
              file=sys.stderr)  # fmt: skip
        return row["top1_agreement"] >= args.target

    with closing(Whole(args, pieces, n_ctx)) as whole:
        full = whole.full()
        caches = Chunked(args, pieces, n_ctx, whole.paths) if args.kv_staging else whole
        low = max(config.n_pinned(), args.step)
        document["kv_budget"] = smallest(measure, low, n_prompt, args.step)
    if args.out:
        write_json(args.out, document)
    print(tune_table(document))
    return document


def smallest(keeps: Callable[[int], bool], low: int, high: int, step: int) -> int | None:
    """The smallest multiple of `step` in [low, high) that keeps the target, by bisection.

    Args:
        keeps: whether a budget does; asked about as many budgets as bisection takes. One that
            does is returned only if the next multiple below it does not, or is below `low`.

    Returns:
        None if none below `high` does: nothing can be evicted.
    """
    first, last = -(-low // step), -(-high // step) - 1
    best = None
    while first <= last:
        middle = (first + last) // 2
        if keeps(middle * step):
            best, last = middle * step, middle - 1
        else:
            first = middle + 1
    return best


def make_pieces(decoder: Decoder, text: str, args: argparse.Namespace) -> list[Piece]:
    """Pieces of the text, spread over it, as prompts.

    Raises:
        ValueError: the text is too short for one.
    """
    tokens = decoder.tokenize(text)
    n_path = 0 if args.prompt else args.n_compare
    need = args.length + n_path
    if len(tokens) < need:
        raise ValueError(
            f"--text has {len(tokens)} tokens, {need} are needed: give a longer one, or lower "
            "--length"
        )
    n = min(args.pieces, len(tokens) // need)
    step = (len(tokens) - need) // max(n - 1, 1)
    render = chat_renderer(decoder) if args.prompt else None
    pieces = []
    for i in range(n):
        part = tokens[i * step : i * step + need]
        if not args.prompt:
            begin = decoder.tokenize("", add_bos=True)
            pieces.append(Piece([*begin, *part[: args.length]], part[args.length :]))
            continue
        message = f"{decoder.text(part)}\n\n{args.prompt}"
        prompt = render([{"role": "user", "content": message}]) if render else message
        own = decoder.tokenize(prompt, add_bos=render is None, special=render is not None)
        pieces.append(Piece(own, None))
    return pieces


class Whole:
    """A cache that holds every piece whole: each is read once, and evicted to every budget.

    Attributes:
        paths: what both caches are led along, of each piece; known after `full`.
        sizes: what the cache held after the last piece.
    """

    def __init__(self, args: argparse.Namespace, pieces: list[Piece], n_ctx: int) -> None:
        """Load the model and read the pieces, but for their last tokens: a state has no logits."""
        self._args, self._pieces, self._n_ctx = args, pieces, n_ctx
        # a policy that scores: what the others need is allocated
        options = {**_options(args, n_ctx), "kv_policy": "laq++", "kv_budget": n_ctx}
        self._decoder = Decoder("laq_gguf", str(args.model), options)
        self._decoder.llm.set_eviction(n_ctx, kv_policy="full")
        self._states = []
        for i, piece in enumerate(pieces):
            print(f"reading piece {i + 1}/{len(pieces)}", file=sys.stderr)
            self._decoder.prefill(piece.tokens[:-1])
            self._states.append(self._decoder.save())
        self.paths: list[list[int]] = []
        self.sizes: dict[str, int] = {}

    def full(self) -> list[Logits]:
        """The full cache's logits along each path, (n, n_vocab)."""
        result = []
        for i, piece in enumerate(self._pieces):
            first = self._start(i, self._n_ctx, "full")
            if piece.path is None:
                path, rows = freely(self._decoder, first, self._args.n_compare)
                result.append(np.stack(rows))
            else:
                path = piece.path
                result.append(self._along(first, path))
            self.paths.append(path)
        return result

    def led(self, budget: int) -> list[Logits]:
        """An evicted cache's logits along each path, (n, n_vocab)."""
        result = []
        for i, path in enumerate(self.paths):
            first = self._start(i, budget, self._args.policy)
            self.sizes = _sizes(self._decoder, budget)
            result.append(self._along(first, path))
        return result

    def _along(self, first: Logits, path: list[int]) -> Logits:
        """Logits (n, n_vocab) along a path, decoded at once: there are cells for all of it."""
        return np.concatenate([first[None], self._decoder.decode(path[:-1])])

    def _start(self, i: int, budget: int, policy: str) -> Logits:
        """Bring the cache to the end of a piece and evict it; the logits of the next token."""
        decoder = self._decoder
        decoder.load(self._states[i])
        decoder.llm.set_eviction(budget, kv_policy=policy)
        decoder.step(self._pieces[i].tokens[-1])
        first = decoder.logits().copy()
        decoder.llm._laq.prompt_end()
        return first

    def close(self) -> None:
        """Free the model."""
        self._decoder.close()


class Chunked:
    """A cache of budget and --kv-staging cells, made for each budget, which reads in chunks."""

    def __init__(
        self, args: argparse.Namespace, pieces: list[Piece], n_ctx: int, paths: list[list[int]]
    ) -> None:
        self._args, self._pieces, self._n_ctx, self._paths = args, pieces, n_ctx, paths
        self.sizes: dict[str, int] = {}

    def led(self, budget: int) -> list[Logits]:
        """Its logits along each path, (n, n_vocab)."""
        options = {
            **_options(self._args, self._n_ctx),
            "kv_policy": self._args.policy,
            "kv_budget": budget,
            "kv_staging": self._args.kv_staging,
        }
        result = []
        with closing(Decoder("laq_gguf", str(self._args.model), options)) as decoder:
            for piece, path in zip(self._pieces, self._paths, strict=True):
                decoder.prefill(piece.tokens)
                result.append(led(decoder, decoder.logits().copy(), path))
            self.sizes = _sizes(decoder, budget)
        return result


def _options(args: argparse.Namespace, n_ctx: int) -> dict[str, Any]:
    return {**llama_options(args, n_ctx), **eviction_options(args), "lookahead": "pseudo"}


def _sizes(decoder: Decoder, budget: int) -> dict[str, int]:
    """Bytes of K and V of the budget's cells, and of all that were allocated."""
    stats = decoder.stats()
    assert stats is not None
    per_cell = stats["kv_bytes"] // stats["n_cells"]
    return {"kv_bytes": per_cell * budget, "kv_bytes_allocated": stats["kv_bytes"],
            "n_resident": stats["n_resident"]}  # fmt: skip


def compare(full: list[Logits], own: list[Logits], budget: int) -> dict[str, Any]:
    """How near an evicted cache stays to the full one, over the tokens of all pieces.

    The first token of a piece is left out: it is chosen before anything is evicted.
    """
    pairs = [(f[1:], o[1:]) if len(f) > 1 else (f, o) for f, o in zip(full, own, strict=True)]
    every_full, every_own = (np.concatenate(rows) for rows in zip(*pairs, strict=True))
    kl = kl_divergence(every_full, every_own)
    return {
        "budget": budget,
        "top1_agreement": top1_agreement(every_full, every_own),
        "kl": float(kl.mean()),
        "n_compared": len(kl),
    }
