"""Options that the benchmarks share, and the keyword arguments of Llama that they stand for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from laq_gguf.bench.provenance import sha256, usable_cores
from laq_gguf.config import LOOKAHEADS, LaqConfig

# where things are, and how a run goes on: no part of what is measured
NO_SETTINGS = frozenset(
    {"model", "data", "references", "out", "overwrite", "command", "function", "minutes"}
)
EVICTION = ("lookahead_size", "window_size", "probe_size", "chunk_size", "follow_size")


def add_common(parser: argparse.ArgumentParser) -> None:
    """--model, --threads, --out."""
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, help="result file, JSON")


def add_resume(parser: argparse.ArgumentParser) -> None:
    """--overwrite, --references: for runs that are long enough to be stopped."""
    add_overwrite(parser)
    parser.add_argument(
        "--references", type=Path,
        help="folder for the full cache's replies: they are kept there for later runs",
    )  # fmt: skip


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """--overwrite."""
    parser.add_argument(
        "--overwrite", action="store_true",
        help="begin anew; without it a run goes on with what --out already holds",
    )  # fmt: skip


def add_policy(parser: argparse.ArgumentParser) -> None:
    """--policy."""
    parser.add_argument("--policy", default=LaqConfig().kv_policy, help="kv_policy")


def add_lookahead(parser: argparse.ArgumentParser) -> None:
    """--lookahead."""
    default = LaqConfig().lookahead
    parser.add_argument("--lookahead", choices=tuple(LOOKAHEADS), default=default)


def add_eviction(parser: argparse.ArgumentParser) -> None:
    """The settings of LaqConfig that a benchmark may change, with its defaults."""
    default = LaqConfig()
    for name in EVICTION:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))


def eviction_options(args: argparse.Namespace) -> dict[str, int]:
    """What `add_eviction` added, as keyword arguments of laq_gguf.Llama."""
    return {name: getattr(args, name) for name in EVICTION}


def llama_options(args: argparse.Namespace, n_ctx: int) -> dict[str, Any]:
    """Keyword arguments that every class named Llama takes."""
    return {
        "n_ctx": n_ctx,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "flash_attn": True,
    }


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that decide what is measured, for the head of a result file."""
    return {
        k: {"file": v.name, "sha256": sha256(v)} if isinstance(v, Path) and v.is_file() else v
        for k, v in vars(args).items()
        if k not in NO_SETTINGS
    }


def check_model(args: argparse.Namespace) -> None:
    """Refuse a --model that is no file.

    Raises:
        ValueError: there is none.
    """
    if not args.model.is_file():
        raise ValueError(f"no model at {args.model}")


def names(known: dict[str, Any]) -> Any:
    """An argparse type: names of `known` with commas between them."""

    def parse(text: str) -> list[str]:
        given = text.split(",")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}"
            )
        return list(dict.fromkeys(given))

    return parse


def integers(text: str) -> list[int]:
    """An argparse type: whole numbers with commas between them."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers with commas, got {text!r}") from None
