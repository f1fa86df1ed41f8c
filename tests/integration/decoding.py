"""Short ways to make models and decode greedily, for the tests of this folder."""

from __future__ import annotations

import os
import random
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import device

TINY_BYTES = 2**22


def open_llama(path: Path, **kwargs: Any) -> Any:
    """`laq_gguf.Llama`, quiet, with room for 1,024 tokens, and 8 ahead unless told otherwise: the
    budgets of small tests would hold little beside the default."""
    from laq_gguf import Llama

    settings = {"n_ctx": 1024, "n_batch": 256, "verbose": False, **device.OPTIONS}
    if "kv_budget" in kwargs:
        settings["lookahead_size"] = 8
    if os.stat(path).st_size < TINY_BYTES:
        # many small graphs on a busy machine mostly wait at barriers
        settings |= {"n_threads": 1, "n_threads_batch": 1}
    return Llama(str(path), **{**settings, **kwargs})


def tokens_of(n_tokens: int, seed: int = 0) -> list[int]:
    """Random ordinary tokens that every tiny model has (and SmolLM2, too)."""
    rng = random.Random(seed)
    return [rng.randrange(260, 380) for _ in range(n_tokens)]


def greedy(llm: Any, prompt: list[int], n_tokens: int) -> list[int]:
    """The next `n_tokens` tokens; the last of them is sampled, not decoded."""
    with closing(llm.generate(prompt, temp=0.0)) as tokens:
        return list(islice(tokens, n_tokens))


class Reads:
    """A progress callback that notes how many tokens each prompt evaluation decoded."""

    def __init__(self) -> None:
        self.totals: list[int] = []

    def __call__(self, n_done: int, n_total: int) -> None:
        if n_done == n_total:
            self.totals.append(n_total)
