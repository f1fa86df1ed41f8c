"""Speed over context length and budget, against the plain library in alternating runs.

For every length all configurations are loaded at once, each in a worker process; one works at a
time. A round goes through all of them, every other round in the opposite order, and a ratio is that
of one round, so that a drift of the machine favours none.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laq_gguf.bench.curve_tables import sweep_table
from laq_gguf.bench.options import llama_options, settings
from laq_gguf.bench.provenance import provenance, write_json
from laq_gguf.bench.speed import N_WARM_UP, check_plain_lib, ratios, read_text, system_load
from laq_gguf.bench.worker import Worker, WorkerError
from laq_gguf.config import round_cells

PARTS = ("probe", "lookahead", "score", "select", "compact")
NOTES = [
    "first token: from the call that reads the prompt to its logits; prefill: prompt tokens in "
    "that time; decode: after the eviction and a warm-up",
    "an eviction's parts are counted by the library; lookahead: pseudo tokens, which deferred has "
    "none of; those before the first token are part of the time to it",
]


@dataclass
class Runner:
    """A configuration, its worker, and what was measured of it in every round."""

    context: int
    budget: int | None
    worker: Worker
    system: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] | None = None
    ms_first_token: list[float] = field(default_factory=list)
    ms_step: list[float] = field(default_factory=list)
    evictions: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For progress and errors."""
        return "stock" if self.budget is None else f"kv_budget {self.budget}"

    def round(self, tokens: list[int], n_settle: int, n_decode: int) -> None:
        """Read the prompt, let its eviction pass, decode.

        Raises:
            WorkerError: nothing was evicted.
        """
        before = self.stats
        read = self.worker("prefill", tokens=tokens, n_settle=n_settle)
        steps = self.worker("generate", n=N_WARM_UP + n_decode)
        self.ms_first_token.append(read["ms_first_token"])
        self.ms_step.append(statistics.fmean(steps["ms_steps"][N_WARM_UP:]))
        self.stats = steps["stats"]
        if self.stats is None:
            return
        assert before is not None  # warmed up
        if self.stats["n_evictions"] == before["n_evictions"]:
            raise WorkerError(f"{self.name}: nothing was evicted of {len(tokens)} tokens")
        self.evictions.append(eviction_parts(before, self.stats))

    def to_json(self, stock: Runner) -> dict[str, Any]:
        """Everything measured, and its ratios to stock of the same rounds."""
        row = {
            "context": self.context,
            "budget": self.budget,
            "n_cells": self.stats["n_cells"] if self.stats else None,
            "kv_bytes": self.stats["kv_bytes"] if self.stats else None,
            "system": self.system,
            "first_token_s": [ms / 1e3 for ms in self.ms_first_token],
            "prefill_tokens_per_s": [1e3 * self.context / ms for ms in self.ms_first_token],
            "decode_tokens_per_s": [1e3 / ms for ms in self.ms_step],
        }
        if self.budget is not None:
            row["first_token_ratio"] = ratios(self.ms_first_token, stock.ms_first_token)
            row["decode_ratio"] = ratios(stock.ms_step, self.ms_step)
            row["evictions"] = self.evictions
        return row


def eviction_parts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """What a round's evictions took, ms by part, and how many they were."""
    parts = {part: after[f"ms_{part}"] - before[f"ms_{part}"] for part in PARTS}
    return {**parts, "n": after["n_evictions"] - before["n_evictions"]}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out` after each length, print the table; return the document.

    Raises:
        ValueError: options or files that cannot be used.
        WorkerError: a configuration that does not run.
    """
    budgets = args.budgets or [args.budget]
    if min(args.contexts) <= max(budgets):
        raise ValueError(
            f"--contexts are above every --budgets: {min(args.contexts)} tokens are not evicted to "
            f"{max(budgets)}"
        )
    check_plain_lib(args)
    text = read_text(args.text)
    unused = {"n_ctx_tokens", "n_short_tokens", "segments", "first_token_only", "budget"}
    unused |= {"plain_lib", "text"}
    kept = {k: v for k, v in settings(args).items() if k not in unused}
    document = provenance("sweep", args.model, {**kept, "budgets": budgets})
    document.update(notes=NOTES, load=[system_load()], results=[])
    document["text"] = args.text.name if args.text else "build/pristine **/*.md"
    for context in args.contexts:
        document["results"] += _measure(args, context, budgets, text)
        document["load"].append(system_load())
        if args.out:
            write_json(args.out, document)
    print(sweep_table(document))
    return document


def _measure(
    args: argparse.Namespace, context: int, budgets: list[int], text: str
) -> list[dict[str, Any]]:
    # beyond the lookahead, the step that evicts and a warm-up
    n_settle = args.lookahead_size + 1 + N_WARM_UP
    with _runners(args, context, budgets, n_settle) as runners:
        tokens = runners[0].worker("tokenize", text=text, n=context)
        for runner in runners:
            # the first prompt of a process also pays for pages that are touched first
            warm_up = runner.worker("prefill", tokens=tokens, n_settle=n_settle)
            runner.stats = warm_up["stats"]
        for i in range(args.repeat):
            for runner in runners if i % 2 == 0 else reversed(runners):
                print(f"{context} tokens, round {i + 1}/{args.repeat}: {runner.name}",
                      file=sys.stderr)  # fmt: skip
                runner.round(tokens, n_settle, args.n_decode)
        return [runner.to_json(runners[0]) for runner in runners]


@contextmanager
def _runners(
    args: argparse.Namespace, context: int, budgets: list[int], n_settle: int
) -> Iterator[list[Runner]]:
    """Stock and one for each budget, their models loaded."""
    n_ctx = context + n_settle + N_WARM_UP + args.n_decode + args.lookahead_size
    options = llama_options(args, round_cells(n_ctx))
    with ExitStack() as stack:
        runners = []
        for budget in (None, *budgets):
            lib = args.plain_lib.resolve() if budget is None else None
            worker = stack.enter_context(closing(Worker(lib)))
            runner = Runner(context, budget, worker)
            runner.system = _open(args, worker, budget, options)
            runners.append(runner)
        yield runners


def _open(
    args: argparse.Namespace, worker: Worker, budget: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    library, extra = "llama_cpp", {}
    if budget is not None:
        library = "laq_gguf"
        extra = {
            "kv_budget": budget,
            "kv_staging": args.kv_staging or options["n_ctx"],
            "kv_policy": args.policy,
            "lookahead": args.lookahead,
            "lookahead_size": args.lookahead_size,
        }
    model = str(Path(args.model).resolve())
    system = worker("open", library=library, model=model, options={**options, **extra})
    if system["patched"] != (budget is not None):
        raise ValueError(f"{library}: loaded the wrong library; check --plain-lib")
    return system
