"""Memory: a cache of fixed size, whatever n_ctx, beside a stock context of the same cells.

Each configuration is a process of its own, which reads a prompt (ours: one longer than the cells),
decodes, and tells the most memory it has had.
"""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from laq_gguf.bench.needles import essay
from laq_gguf.bench.options import (
    add_common,
    add_eviction,
    check_model,
    eviction_options,
    integers,
    llama_options,
    names,
    settings,
)
from laq_gguf.bench.provenance import provenance, write_json
from laq_gguf.bench.speed import check_plain_lib
from laq_gguf.bench.tables import memory_table
from laq_gguf.bench.worker import Worker, WorkerError
from laq_gguf.config import round_cells

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}  # enum ggml_type
CURVE_ONLY = ("plain_lib", "contexts", "device")
NOTES = [
    "ours: bytes read back from the buffers; stock: what llama.cpp logs, in hundredths of a MiB; "
    "graphs: compute buffers; peak RSS (VmHWM) holds the pages of the model that were touched and "
    "Python itself, in both",
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench memory`."""
    add_common(parser)
    parser.add_argument(
        "--plain-lib", type=Path, default=Path("build/plain/bin"),
        help="folder of the unpatched libraries",
    )  # fmt: skip
    parser.add_argument(
        "--n-ctx", type=integers, default=[2048, 8192, 32768, 131072], help="positions, with commas"
    )
    parser.add_argument("--budget", type=int, default=512, help="kv_budget")
    parser.add_argument("--kv-staging", type=int, default=512, help="cells beyond the budget")
    parser.add_argument("--types", type=names(TYPES), default=["f16", "q8_0"], help="of K and V")
    parser.add_argument("--n-decode", type=int, default=64, help="tokens decoded after the prompt")
    parser.add_argument(
        "--contexts", type=integers,
        help="a curve instead: both sides read so many tokens, with commas; stock has cells for "
        "all of them",
    )  # fmt: skip
    parser.add_argument("--device", default="CPU", help="of the curve, as laq-gguf doctor names it")
    add_eviction(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out` after each process, print the table; return the document.

    With --contexts: see memory_curve.py.

    Raises:
        ValueError: options or files that cannot be used.
        WorkerError: a configuration that does not run.
    """
    check_model(args)
    check_plain_lib(args)
    if args.contexts:
        from laq_gguf.bench import memory_curve  # it is built of this module

        return memory_curve.run(args)
    n_cells = round_cells(args.budget + args.kv_staging)
    n_prompt = n_cells + n_cells // 2
    if min(args.n_ctx) < n_prompt + args.n_decode:
        raise ValueError(
            f"--n-ctx is at least {n_prompt + args.n_decode}: the prompt has to be longer than the "
            f"{n_cells} cells"
        )
    if args.n_decode >= n_cells:
        raise ValueError(f"--n-decode is below the {n_cells} cells")
    kept = {k: v for k, v in settings(args).items() if k not in CURVE_ONLY}
    document = provenance("memory", args.model, kept)
    document.update(notes=NOTES, results=[])
    for name in args.types:
        for n_ctx in args.n_ctx:
            options = {
                "kv_budget": args.budget,
                "kv_staging": args.kv_staging,
                **eviction_options(args),
            }
            row = _measure(args, "laq_gguf", name, n_ctx, n_prompt, options)
            _add(args, document, row)
        row = _measure(args, "llama_cpp", name, n_cells, n_cells - args.n_decode, {})
        _add(args, document, row)
    print(memory_table(document))
    return document


def _add(args: argparse.Namespace, document: dict[str, Any], row: dict[str, Any]) -> None:
    document["results"].append(row)
    if args.out:
        write_json(args.out, document)
    peak = row["peak_bytes"] / 2**20
    print(f"{row['library']} {row['type']} n_ctx {row['n_ctx']}: {peak:.1f} MiB", file=sys.stderr)


def _measure(
    args: argparse.Namespace,
    library: str,
    type_name: str,
    n_ctx: int,
    n_prompt: int,
    extra: dict[str, Any],
) -> dict[str, Any]:
    """One process: what it holds, and the most it has had."""
    options = {**llama_options(args, n_ctx), **extra}
    options["type_k"] = options["type_v"] = TYPES[type_name]
    lib = args.plain_lib.resolve() if library == "llama_cpp" else None
    with closing(Worker(lib)) as worker:
        model = str(args.model.resolve())
        system = worker("open", library=library, model=model, options=options, log=True)
        if system["patched"] != (library == "laq_gguf"):
            raise ValueError(f"{library}: loaded the wrong library; check --plain-lib")
        loaded = worker("peak")
        tokens = worker("tokenize", text=essay(n_prompt // 4), n=n_prompt)
        done = worker("prefill", tokens=tokens, n_settle=args.n_decode)
        row = {
            "library": library,
            "type": type_name,
            "n_ctx": n_ctx,
            "n_prompt": n_prompt,
            "n_decode": args.n_decode,
            "peak_loaded_bytes": loaded,
            "peak_bytes": worker("peak"),
        }
    stats = done["stats"]
    if stats is None:
        return {**row, "n_cells": n_ctx, **logged_bytes(system["log"])}
    if stats["n_evictions"] < 2:
        raise WorkerError("nothing was evicted while the prompt was read: lower --kv-staging")
    held = ("n_cells", "kv_bytes", "kv_bytes_full", "ring_bytes", "compute_bytes", "n_evictions")
    return {**row, **{name: stats[name] for name in held}}


def logged_bytes(lines: list[str]) -> dict[str, int]:
    """Bytes of a stock context's KV cache and graphs, from what llama.cpp logs.

    Raises:
        WorkerError: it logs something else than it did.
    """
    sizes = {}
    for name, pattern in (
        ("kv_bytes", r"\bKV buffer size *= *([0-9.]+) MiB"),
        ("compute_bytes", r"\bcompute buffer size *= *([0-9.]+) MiB"),
    ):
        found = [match[1] for line in lines if (match := re.search(pattern, line))]
        if not found:
            raise WorkerError(f"no line of llama.cpp's log tells {name}")
        sizes[name] = round(sum(float(size) for size in found) * 2**20)
    return {**sizes, "ring_bytes": 0}
