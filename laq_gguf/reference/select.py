"""Selection: which keys of a KV head stay.

    keep = pinned cells + the best (budget - pinned) by rank; equal ranks: the lower index
    rank = the pooled scores
The policies that look ahead see the beginning of an answer. In the heads that copy it word for word
(`copies`), 3/8 of the cells that are not pinned go to the keys that follow the best ones within
follow_size positions: the copy goes on there, after the last key that the lookahead attended to.

Indices count the cells of one KV head, sorted by position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .attention import POOLINGS, FloatArray, pool_scores

POLICIES = ("full", "laq", "laq++", "snapkv", "streaming", "random")
LOOKAHEADS = ("deferred", "pseudo", "position")
DRAFTS = ("full", "snapkv")
_ATTENTION_POLICIES = ("laq", "laq++", "snapkv")
_LOOKAHEAD_POLICIES = ("laq", "laq++")

#: Tokens that a probe looks ahead, at most.
PROBE_AHEAD = 8

#: A head copies when its best key has this share of the attention to keys that are not pinned.
COPY_SHARE = 0.07

Span = tuple[int, int]


@dataclass(frozen=True)
class PolicyParams:
    """What decides a selection. The names and defaults are those of laq_gguf.Llama."""

    budget: int
    policy: str = "laq++"
    lookahead: str = "deferred"
    draft: str = "full"
    lookahead_size: int = 32
    window_size: int = 8
    snapkv_window: int = 32
    n_sink: int = 4
    kernel_size: int = 7
    pooling: str = "max"
    follow_size: int = 32
    value_fit: float = 0.01
    seed: int = 0
    pinned: tuple[Span, ...] = ()
    probe_size: int = 48
    chunk_size: int = 0  # 0: see plan.default_chunk

    def __post_init__(self) -> None:
        choices = (
            ("policy", POLICIES),
            ("lookahead", LOOKAHEADS),
            ("draft", DRAFTS),
            ("pooling", POOLINGS),
        )
        for name, possible in choices:
            if getattr(self, name) not in possible:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}, possible: {', '.join(possible)}"
                )
        if self.draft == "snapkv" and self.lookahead == "position":
            raise ValueError("lookahead 'position' generates nothing that draft could say where")
        if self.budget < 1:
            raise ValueError(f"budget must be at least 1, got {self.budget}")
        if self.follow_size < 0:
            raise ValueError(f"follow_size must not be negative, got {self.follow_size}")
        if self.value_fit < 0:
            raise ValueError(f"value_fit must not be negative, got {self.value_fit}")
        if self.probe_size < 1:
            raise ValueError(f"probe_size must be at least 1, got {self.probe_size}")
        if self.chunk_size < 0:
            raise ValueError(f"chunk_size must not be negative, got {self.chunk_size}")

    @property
    def window(self) -> int:
        """Last prompt tokens that are kept whole."""
        return self.snapkv_window if self.policy == "snapkv" else self.window_size

    @property
    def needs_queries(self) -> bool:
        return self.policy in _ATTENTION_POLICIES

    @property
    def needs_lookahead(self) -> bool:
        return self.policy in _LOOKAHEAD_POLICIES

    @property
    def ahead(self) -> int:
        """Tokens of the lookahead."""
        return self.lookahead_size if self.needs_lookahead else 0

    @property
    def n_queries(self) -> int:
        """Last queries that are kept."""
        return max(self.window_size, self.snapkv_window) + self.lookahead_size

    @property
    def probe_ahead(self) -> int:
        """Tokens that a probe looks ahead: it is made for every chunk, and what it misses is looked
        for again."""
        return min(self.ahead, PROBE_AHEAD)

    @property
    def room(self) -> int:
        """Cells that stay free while a prompt is read: for the probe, and for the lookahead from
        its end."""
        return max(self.probe_size + self.probe_ahead, self.ahead) if self.needs_lookahead else 0

    @property
    def fits_values(self) -> bool:
        """Whether V of what stays is fitted (see values.py). A draft's outputs are those of a small
        cache, and placeholders say nothing."""
        fits = self.policy == "laq++" and self.draft == "full" and self.lookahead != "position"
        return fits and self.value_fit > 0


def query_range(params: PolicyParams, n_prompt: int, n_tokens: int) -> Span:
    """Positions [first, last) whose queries score the keys; empty for policies that use none.

    When no lookahead token has been decoded yet, laq has the queries of laq++.

    Args:
        n_prompt: length of the prompt.
        n_tokens: last position + 1, lookahead tokens included.
    """
    ahead = min(n_tokens, n_prompt + params.lookahead_size)
    if params.policy == "laq" and ahead > n_prompt:
        return n_prompt, ahead
    if params.needs_lookahead:
        return max(0, n_prompt - params.window_size), ahead
    if params.policy == "snapkv":
        return max(0, n_prompt - params.snapkv_window), n_prompt
    return 0, 0


def pinned_mask(
    positions: npt.ArrayLike, *, n_sink: int, n_intact: int, spans: Sequence[Span] = ()
) -> npt.NDArray[np.bool_]:
    """Which cells no eviction may free: sinks, the suffix kept whole, and the spans of the user.

    Args:
        positions: (n_kv,) position of each cell.
        n_sink: positions below it are kept.
        n_intact: positions from it on are kept.
        spans: [p0, p1) pairs of positions.
    """
    pos = np.asarray(positions)
    pinned = (pos < n_sink) | (pos >= n_intact)
    for p0, p1 in spans:
        pinned |= (pos >= p0) & (pos < p1)
    return pinned


def random_scores(seed: int, ikv: int, head: int, positions: npt.ArrayLike) -> FloatArray:
    """Scores in [0, 1) of the random policy: a hash (the finalizer of splitmix64), the same on
    every machine.

    Args:
        seed, ikv, head: seed of the user, layer of the cache, KV head.
        positions: (n_kv,) position of each cell.
    """
    word = (1 << 64) - 1
    base = seed * 0x9E3779B97F4A7C15 + ikv * 0xBF58476D1CE4E5B9 + head * 0x94D049BB133111EB
    x = np.uint64(base & word) + np.asarray(positions).astype(np.int64).astype(np.uint64)
    z = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def follow_scores(scores: npt.ArrayLike, positions: npt.ArrayLike, follow_size: int) -> FloatArray:
    """The highest score among a key and the keys at most follow_size positions before it.

    Lookahead queries see the beginning of an answer. One that repeats the text word for word
    (a name, a key, a line of code) reads on from there: the next keys are worth as much.

    Args:
        scores: (n_kv,) float32.
        positions: (n_kv,) position of each cell, ascending; an evicted neighbour leaves a gap.
    """
    src = np.asarray(scores, dtype=np.float32)
    pos = np.asarray(positions)
    result = src.copy()
    for i in range(len(src)):
        first = np.searchsorted(pos, pos[i] - follow_size)
        result[i] = src[first : i + 1].max()
    return result


def copies(scores: npt.ArrayLike, pinned: npt.ArrayLike) -> bool:
    """Whether one KV head copies: its best key has at least COPY_SHARE of all scores.

    A head that reads a text word for word attends to one key per query; most heads attend to many,
    and lose more than they win when cells go to keys that merely follow.

    Args:
        scores: (n_kv,) raw attention scores, float32; summed in float64 from left to right.
        pinned: (n_kv,) bool: these keys do not count.
    """
    free = np.asarray(scores, dtype=np.float32)[~np.asarray(pinned, dtype=bool)]
    with np.errstate(invalid="ignore"):  # inf - inf: not a number, which no comparison passes
        total = np.cumsum(free, dtype=np.float64)
    best = float(free.max(initial=0))
    return best > 0 and bool(best >= COPY_SHARE * total[-1])


def rank_scores(
    params: PolicyParams,
    positions: npt.ArrayLike,
    scores: npt.ArrayLike | None = None,
    pinned: npt.ArrayLike | None = None,
    *,
    ikv: int = 0,
    head: int = 0,
) -> FloatArray:
    """What the cells of one KV head are ranked by: (n_kv,) float32.

    Args:
        positions: (n_kv,) position of each cell, ascending.
        scores: (n_kv,) raw attention scores; needed by laq, laq++ and snapkv, which alone are
            pooled.
        pinned: (n_kv,) bool, or None. A pinned cell stays whatever its score: it counts as 0, so
            that the attention to sinks and recent tokens does not lift their neighbours.
    Raises:
        ValueError: an attention policy without scores.
    """
    if params.policy == "random":
        return random_scores(params.seed, ikv, head, positions)
    if not params.needs_queries:
        return np.asarray(positions).astype(np.float32)
    if scores is None:
        raise ValueError(f"policy {params.policy!r} ranks by attention scores: give scores")
    raw = np.array(scores, dtype=np.float32)
    if pinned is not None:
        raw[np.asarray(pinned, dtype=bool)] = 0
    return pool_scores(raw, params.kernel_size, params.pooling)


def select(
    scores: npt.ArrayLike, budget: int, pinned: npt.ArrayLike | None = None
) -> npt.NDArray[np.int64]:
    """Indices of the kept cells, ascending: min(n_kv, budget) of them.

    Pinned cells come first, then the best by score. This is the one place of the tie rule: among
    equal scores, and among pinned cells if they alone exceed the budget, the lower index wins.

    Args:
        scores: (n_kv,) float32 as they are ranked, that is after pooling; no NaN.
        budget: cells that may stay.
        pinned: (n_kv,) bool, or None.
    Raises:
        ValueError: budget < 0, or NaN among the scores.
    """
    ranked = np.asarray(scores, dtype=np.float32)
    n_kv = len(ranked)
    if budget < 0:
        raise ValueError(f"budget must not be negative, got {budget}")
    if np.isnan(ranked).any():
        raise ValueError("a score is NaN: NaN has no rank")
    if n_kv <= budget:
        return np.arange(n_kv)
    first = np.zeros(n_kv, dtype=bool) if pinned is None else np.asarray(pinned, dtype=bool)
    # lexsort: the last key is the most significant; the index makes every entry different
    order = np.lexsort((np.arange(n_kv), np.where(first, np.float32(0), -ranked), ~first))
    return np.sort(order[:budget])


def select_keys(
    params: PolicyParams,
    positions: npt.ArrayLike,
    pinned: npt.ArrayLike,
    scores: npt.ArrayLike | None = None,
    *,
    ikv: int = 0,
    head: int = 0,
) -> npt.NDArray[np.int64]:
    """The selection of one KV head given what is pinned: indices of the kept cells, ascending.

    Args:
        positions: (n_kv,) position of each cell, ascending.
        pinned: (n_kv,) bool.
        scores: (n_kv,) raw attention scores, for the policies that need them.
    """
    first = np.array(pinned, dtype=bool)
    ranked = rank_scores(params, positions, scores, first, ikv=ikv, head=head)
    free = params.budget - int(first.sum())
    follows = params.needs_lookahead and params.follow_size > 0 and free > 0
    if scores is None or not follows or not copies(scores, first):
        return select(ranked, params.budget, first)
    first[select(ranked, params.budget - 3 * free // 8, first)] = True
    return select(follow_scores(ranked, positions, params.follow_size), params.budget, first)


def select_head(
    params: PolicyParams,
    positions: npt.ArrayLike,
    n_intact: int,
    scores: npt.ArrayLike | None = None,
    *,
    ikv: int = 0,
    head: int = 0,
) -> npt.NDArray[np.int64]:
    """The selection of one KV head under a policy: indices of the kept cells, ascending.

    Args:
        positions: (n_kv,) position of each cell, ascending.
        n_intact: positions from here on are kept whole.
        scores: (n_kv,) raw attention scores, for the policies that need them.
    """
    pos = np.asarray(positions)
    if params.policy == "full":
        return np.arange(len(pos))
    pinned = pinned_mask(pos, n_sink=params.n_sink, n_intact=n_intact, spans=params.pinned)
    return select_keys(params, pos, pinned, scores, ikv=ikv, head=head)
