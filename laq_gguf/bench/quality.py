"""Quality: do the answers survive in a small cache, and how near does it stay to the full one.

Methods are compared at equal bytes: shares of what the full f16 cache of the same prompt takes.
Each prompt is read once for each K/V type; from there every method evicts in its own way, answers
greedily, and is led along the full cache's own answer so that its next-token distributions can be
compared with the full cache's, position by position.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from laq_gguf.bench.methods import METHODS, allocation, method_names, parse_method, shares
from laq_gguf.bench.options import (
    add_common,
    add_overwrite,
    check_model,
    integers,
)
from laq_gguf.bench.presets import PRESETS, apply_preset
from laq_gguf.bench.prompts import (
    Prompt,
    chat_renderer,
    open_tokenizer,
    rounds_of,
    task_prompts,
    text_prompts,
)
from laq_gguf.bench.quality_rows import KEY, Case, Measurement, new_tokens
from laq_gguf.bench.quality_tables import quality_table
from laq_gguf.bench.reading import Readers
from laq_gguf.bench.results import ResultFile
from laq_gguf.bench.tasks import (
    TASKS,
    long_text,
    parse_tasks,
    task_lengths,
)
from laq_gguf.config import round_cells

NOTES = (
    "shares are of the bytes that the prompt takes in the full f16 cache; bytes per cell are read "
    "back from the allocated cache of each K/V type",
    "all methods but bounded read the whole prompt before they evict: their bytes are those of the "
    "cells they keep; bounded counts all cells it has, which come in steps of 256 and may be up to "
    "3 % more than the share",
    "the cache is evicted before the first token of the reply (deferred: after its first "
    "lookahead_size tokens, which are the full cache's own); the reply's beginning (answer_prefix) "
    "is part of the prompt",
)
STOPPED = "stopped by --minutes "
TIMED_OUT = STOPPED + "after {} of {} rounds (a round: one example of each task)"
CUT_SHORT = STOPPED + "within a round: the tasks have not the same number of examples"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench quality`; those that are not given come from the preset."""
    add_common(parser)
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), help="default: 30 minutes on 2 cores; all: everything")
    add("--data", type=Path, help="folder with ruler/LENGTH/TASK.jsonl, longbench/, text/")
    add("--text", type=Path, help="a text to hide the needles in, and for the perplexity")
    add("--tasks", type=_tasks, help=f"with commas, each TASK or TASK:LENGTH; {', '.join(TASKS)}")
    add("--lengths", type=integers, help="prompt lengths in tokens: 2048,4096")
    add("--limit", type=int, help="the first N examples of each task only")
    add("--n-needles", type=int, help="depths of the task needles")
    add("--methods", type=method_names, help=f"NAME[@TYPE][:SETTING=VALUE]: {', '.join(METHODS)}")
    add("--shares", type=shares, help="of the full f16 cache's bytes: 1/4,1/8,1/16")
    add("--budgets", type=integers, help="tokens in place of shares: 128,256")
    add("--bounded-cells", type=int, help="bounded has no row with fewer cells than these")
    add("--bounded-staging", type=int, help="bounded: the same --budgets, and N cells more")
    add("--n-compare", type=int, help="tokens of the full cache's answer that are compared")
    add("--max-new-tokens", type=int, help="of an answer, where the task allows more")
    add("--minutes", type=float, help="begin no example that would not be done by then")
    add_overwrite(parser)


def _tasks(text: str) -> list[str]:
    try:
        return parse_tasks(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out` after every row, print the table; return the document.

    Raises:
        ValueError: options, data or an earlier result that cannot be used.
    """
    check_model(args)
    if args.shares and args.budgets:
        raise ValueError("--shares and --budgets say the same: give one of them")
    if args.bounded_staging is not None and not args.budgets:
        raise ValueError("--bounded-staging goes with --budgets: shares are of all cells")
    apply_preset(args)
    least = {"n_compare": 1, "max_new_tokens": 1, "limit": 1, "n_needles": 1, "threads": 1}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} is at least {low}, got {value}")
    rounds, n_ctx = _prepare(args)
    file = ResultFile("quality", args, KEY, NOTES)
    file.document["notes"] = [n for n in file.document["notes"] if not n.startswith(STOPPED)]
    with closing(Readers(args, n_ctx)) as readers:
        measurement = Measurement(args, readers, file)
        _measure(args, rounds, measurement)
    file.write()
    print(quality_table(file.document))
    return file.document


class _Clock:
    """Says whether there is time for a prompt, by the slowest one so far."""

    MARGIN = 1.25  # a longer prompt takes more for each of its tokens

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._per_token = 0.0

    def has_time(self, n_tokens: int) -> bool:
        """Whether a prompt of so many tokens, with all methods, would be done in time."""
        needed = self.MARGIN * self._per_token * n_tokens
        return self._end is None or time.monotonic() + needed <= self._end

    def measured(self, n_tokens: int, seconds: float) -> None:
        """A prompt took so long, with all methods."""
        self._per_token = max(self._per_token, seconds / n_tokens)


def _measure(
    args: argparse.Namespace, rounds: list[list[Prompt]], measurement: Measurement
) -> None:
    """All rounds for which there is time: one example of each task and length after the other."""
    clock = _Clock(args.minutes)
    cases = {id(p): measurement.cases(p) for prompts in rounds for p in prompts}

    def missing(prompt: Prompt) -> int:
        return sum(measurement.is_missing(prompt, case) for case in cases[id(prompt)])

    total = sum(len(c) for c in cases.values())
    with tqdm(total=total, unit="row", file=sys.stderr, dynamic_ncols=True) as bar:
        for i, prompts in enumerate(rounds):
            is_new = all(missing(p) == len(cases[id(p)]) for p in prompts)
            if is_new and not clock.has_time(sum(len(p.tokens) for p in prompts)):
                measurement.file.note(TIMED_OUT.format(i, len(rounds)))
                return
            for prompt in prompts:
                n_missing, begun = missing(prompt), time.monotonic()
                if n_missing and not clock.has_time(len(prompt.tokens)):
                    measurement.file.note(CUT_SHORT)
                    return
                bar.set_postfix_str(_label(prompt))
                for case in measurement.example(prompt, cases[id(prompt)]):
                    bar.set_postfix_str(_label(prompt, case))
                    bar.update()
                    if not clock.has_time(0):
                        measurement.file.note(CUT_SHORT)
                        return
                if n_missing == len(cases[id(prompt)]):
                    clock.measured(len(prompt.tokens), time.monotonic() - begun)


def _label(prompt: Prompt, case: Case | None = None) -> str:
    task = f"{prompt.example.task}/{prompt.example.id}"
    return f"{task} {case.method.name} {case.size or ''}".strip() if case else task


def _prepare(args: argparse.Namespace) -> tuple[list[list[Prompt]], int]:
    """The rounds of prompts, and the tokens that the longest of them and its answer take."""
    with closing(open_tokenizer(str(args.model))) as decoder:
        render = chat_renderer(decoder)

        def prompts_of(name: str, length: int) -> list[Prompt]:
            if TASKS[name].source == "text":
                text = long_text(args.data, args.text)
                return text_prompts(decoder, text, length, args.n_compare, args.limit or 8)
            return task_prompts(decoder, render, name, length, args, args.text)

        series = []
        for name, length in _entries(args):
            try:
                series.append(prompts_of(name, length))
            except ValueError as error:
                # everything that --data has
                if args.preset != "all" or args.data is None:
                    raise
                print(f"left out: {name}: {error}", file=sys.stderr)
    rounds = rounds_of(series)
    after = max(
        max(args.n_compare, new_tokens(args, p), len(p.path)) + len(p.tokens)
        for prompts in rounds
        for p in prompts
    )
    # pseudo tokens take cells until they are dropped
    n_pseudo = allocation(map(parse_method, args.methods))["lookahead_size"]
    return rounds, round_cells(after + n_pseudo)


def _entries(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    for task in args.tasks:
        name, lengths = task_lengths(task, args.lengths)
        for length in lengths:
            yield name, length
