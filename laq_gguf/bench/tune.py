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
    check_model,
    eviction_options,
    llama_options,
    settings,
)
from laq_gguf.bench.prompts import chat_renderer
from laq_gguf.bench.provenance import provenance, write_json
from laq_gguf.config import LaqConfig

NOTES = [
    "lookahead pseudo: evicted before the first compared token, which deferred puts off by "
    "lookahead_size tokens",
    "agreement need not rise with every step of the budget: bisection finds a budget that keeps "
    "the target and a smaller one, --step tokens below, that does not",
]


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
    parser.add_argument("--policy", default="laq++", help="kv_policy")
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
    text = read_text(args.text)
    document = provenance("tune", args.model, {**settings(args), "text": args.text.name})
    document.update(notes=NOTES, results=[])
    rows = document["results"]

    pieces, full, n_ctx = _full(args, text)
    n_prompt = max(len(piece.tokens) for piece in pieces)
    document["n_prompts"] = [len(piece.tokens) for piece in pieces]

    def measure(budget: int) -> bool:
        with closing(_open(args, n_ctx, budget)) as decoder:
            row = _compare(decoder, pieces, full, budget)
        rows.append(row)
        if args.out:
            write_json(args.out, document)
        print(f"kv_budget {budget}: top-1 {row['top1_agreement']:.3f}, KL {row['kl']:.4f}",
              file=sys.stderr)  # fmt: skip
        return row["top1_agreement"] >= args.target

    config = LaqConfig(kv_policy=args.policy, lookahead="pseudo", **eviction_options(args))
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


def read_text(path: Path) -> str:
    """A text in UTF-8.

    Raises:
        ValueError: there is none.
    """
    if not path.is_file():
        raise ValueError(f"no text at {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not a text in UTF-8: {error.reason}") from error


def _full(
    args: argparse.Namespace, text: str
) -> tuple[list[Piece], list[tuple[list[int], npt.NDArray[np.float32]]], int]:
    """The pieces, the full cache's path and logits on each, and the context they need."""
    # the chat template and the question take tokens beside the text
    extra = 512 + 4 * len(args.prompt or "")
    n_ctx = -(-(args.length + args.n_compare + args.lookahead_size + extra) // 256) * 256
    with closing(Decoder("laq_gguf", str(args.model), llama_options(args, n_ctx))) as decoder:
        pieces = make_pieces(decoder, text, args)
        full = []
        for piece in pieces:
            decoder.prefill(piece.tokens)
            first = decoder.logits().copy()
            if piece.path is None:
                path, rows = freely(decoder, first, args.n_compare)
                full.append((path, np.stack(rows)))
            else:
                full.append((piece.path, led(decoder, first, piece.path)))
    return pieces, full, n_ctx


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


def _open(args: argparse.Namespace, n_ctx: int, budget: int) -> Decoder:
    options = {
        **llama_options(args, n_ctx),
        **eviction_options(args),
        "kv_budget": budget,
        "kv_staging": args.kv_staging or n_ctx,
        "kv_policy": args.policy,
        "lookahead": "pseudo",
    }
    return Decoder("laq_gguf", str(args.model), options)


def _compare(decoder: Decoder, pieces: list[Piece], full: list[Any], budget: int) -> dict[str, Any]:
    """How near an evicted cache stays to the full one, over all pieces."""
    agreement, kl = [], []
    for piece, (path, logits) in zip(pieces, full, strict=True):
        decoder.prefill(piece.tokens)
        own = led(decoder, decoder.logits().copy(), path)
        # the first token is chosen before anything is evicted
        skip = 1 if len(path) > 1 else 0
        agreement += [top1_agreement(logits[i : i + 1], own[i : i + 1])
                      for i in range(skip, len(path))]  # fmt: skip
        kl += kl_divergence(logits[skip:], own[skip:]).tolist()
    stats = decoder.stats()
    assert stats is not None
    held = ("n_cells", "kv_bytes", "kv_bytes_full", "n_evictions")
    return {
        "budget": budget,
        "top1_agreement": float(np.mean(agreement)),
        "kl": float(np.mean(kl)),
        "n_compared": len(kl),
        **{name: stats[name] for name in held},
    }
