"""PRESETS: what `bench quality` measures where its options do not say."""

from __future__ import annotations

import argparse
from typing import Any

from laq_gguf.bench.tasks import TASKS
from laq_gguf.config import CELL_STEP

SHARES = [1 / 4, 1 / 8, 1 / 16]
NIAH = [name for name in TASKS if name.startswith("niah_")]
WHOLE_READERS = ["streaming", "random", "snapkv", "laq", "laq++"]
QUANTIZED = ["q8_0", "q4_0"]
FULL = ["full", *(f"full@{kind}" for kind in QUANTIZED)]

# where neither an option nor a preset says anything
BASE: dict[str, Any] = {
    "tasks": ["needles"],
    "lengths": [2048],
    "limit": None,
    "n_needles": 4,
    "methods": [*FULL, *WHOLE_READERS, "bounded"],
    "bounded_cells": CELL_STEP,
    "n_compare": 64,
    "max_new_tokens": None,
    "minutes": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        # the most expensive last: on a slow machine the time may end before it
        "tasks": [*NIAH, "needles", "needles:4096", "kv_retrieval_75"],
        "limit": 1,
        "methods": [
            *FULL,
            *WHOLE_READERS,
            "laq++:value_fit=0",
            "bounded",
            *(f"{name}@{kind}" for kind in QUANTIZED for name in ("snapkv", "laq++")),
        ],
        # with fewer, the probes before each chunk take longer than the prompt
        "bounded_cells": 512,
        "max_new_tokens": 64,
        "minutes": 30.0,
    },
    "all": {
        "tasks": list(TASKS),
        "lengths": [2048, 4096],
        "methods": [
            *FULL,
            *WHOLE_READERS,
            "deferred",
            "bounded",
            *(f"{name}@{kind}" for kind in QUANTIZED for name in (*WHOLE_READERS, "bounded")),
        ],
    },
}


def apply_preset(args: argparse.Namespace) -> None:
    """Fill in the options that were not given: from --preset, and from BASE."""
    for name, value in {**BASE, **PRESETS.get(args.preset, {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.budgets is None and args.shares is None:
        args.shares = SHARES
