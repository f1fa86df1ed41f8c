"""Memory over context length: ours in cells of a fixed number, stock with cells for every token.

Each point is a process of its own, which reads a prompt, decodes, and tells the most memory it has
had, or what the device has given.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from typing import Any

from laq_gguf.bench.curve_tables import curve_table
from laq_gguf.bench.memory import TYPES, logged_bytes
from laq_gguf.bench.needles import essay
from laq_gguf.bench.options import eviction_options, llama_options, settings
from laq_gguf.bench.provenance import provenance, write_json
from laq_gguf.bench.worker import Worker, WorkerError
from laq_gguf.config import round_cells

NOTES = [
    "KV: ours read back from the buffers, stock what llama.cpp logs, in hundredths of a MiB; peak: "
    "of the process (VmHWM), with the pages of the model that were touched and Python itself; on a "
    "device: what it had free before the model was loaded less what it has free at the end",
]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out` after each process, print the table; return the document.

    Raises:
        ValueError: options or files that cannot be used.
        WorkerError: a configuration that does not run.
    """
    if min(args.contexts) <= args.n_decode:
        raise ValueError(f"--contexts are above --n-decode ({args.n_decode})")
    kept = {k: v for k, v in settings(args).items() if k not in ("plain_lib", "n_ctx")}
    document = provenance("memory_curve", args.model, kept)
    document.update(notes=NOTES, results=[])
    for name in args.types:
        for context in args.contexts:
            for library in ("laq_gguf", "llama_cpp"):
                row = _measure(args, library, name, context)
                document["results"].append(row)
                if args.out:
                    write_json(args.out, document)
                peak = row["peak_bytes"] / 2**20
                print(f"{library} {name} {context} tokens: {peak:.1f} MiB", file=sys.stderr)
    print(curve_table(document))
    return document


def _measure(
    args: argparse.Namespace, library: str, type_name: str, context: int
) -> dict[str, Any]:
    """One process: what it holds after `context` tokens, and the most it has had."""
    is_ours, n_ctx = library == "laq_gguf", round_cells(context)
    options = llama_options(args, n_ctx)
    options["type_k"] = options["type_v"] = TYPES[type_name]
    options["n_gpu_layers"] = 0 if args.device == "CPU" else -1
    if is_ours:
        options |= {"kv_budget": args.budget, "kv_staging": args.kv_staging}
        options |= eviction_options(args)
    n_prompt = context - args.n_decode
    with closing(Worker(None if is_ours else args.plain_lib.resolve())) as worker:
        free = _device_free(args)
        model = str(args.model.resolve())
        system = worker("open", library=library, model=model, options=options, log=True)
        if system["patched"] != is_ours:
            raise ValueError(f"{library}: loaded the wrong library; check --plain-lib")
        tokens = worker("tokenize", text=essay(max(10, n_prompt // 4)), n=n_prompt)
        done = worker("prefill", tokens=tokens, n_settle=args.n_decode)
        peak = worker("peak") if free is None else free - _device_free(args)
    row = {"library": library, "type": type_name, "context": context, "n_prompt": n_prompt}
    row["peak_bytes"] = peak
    if not is_ours:
        return {**row, "n_cells": n_ctx, **logged_bytes(system["log"])}
    stats = done["stats"]
    if free is not None and args.device not in stats["devices"]:
        raise WorkerError(f"K and V are on {', '.join(stats['devices'])}, not on {args.device}")
    held = ("n_cells", "kv_bytes", "kv_bytes_full", "ring_bytes", "compute_bytes", "n_evictions")
    return {**row, **{name: stats[name] for name in held}}


def _device_free(args: argparse.Namespace) -> int | None:
    """Bytes that the device has free, asked by a process that loads nothing; None: the CPU."""
    if args.device == "CPU":
        return None
    with closing(Worker(None)) as worker:
        return worker("device_free", name=args.device)
