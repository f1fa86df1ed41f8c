"""Selection: which keys of a KV head stay.

    keep = pinned cells + the best (budget - pinned) by rank; equal ranks: the lower index
    rank = the pooled scores

The policies that look ahead see the beginning of an answer. In the heads that copy it word for word
(`copies`), 3/8 of the cells that are not pinned go to the keys that follow the best ones within
follow_size positions: the copy goes on there, after the last key that the lookahead attended to.
Indices count the cells of one KV head, sorted by position. In native/src, laq-policy agrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .attention import POOLINGS, BoolArray, FloatArray, Index, IntArray, pool_scores

POLICIES = ("full", "laq", "laq++", "snapkv", "streaming", "random")
#: Tokens that a probe looks ahead, at most.
PROBE_AHEAD = 8
#: A head copies when its best key has this share of the attention to keys that are not pinned.
COPY_SHARE = 0.07

Span = tuple[int, int]
#: Raw scores (n_kv,) of one KV head; None where the policy needs none.
Scores = ArrayLike | None


@dataclass(frozen=True)
class PolicyParams:
    """What decides a selection. The names and defaults are those of laq_gguf.Llama."""

    budget: int
    policy: str = "laq++"
    lookahead: str = "deferred"
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
        choices = {"policy": POLICIES, "lookahead": ("deferred", "pseudo"), "pooling": POOLINGS}
        for name, possible in choices.items():
            if (value := getattr(self, name)) not in possible:
                raise ValueError(f"unknown {name} {value!r}, possible: {', '.join(possible)}")
        least = {"budget": 1, "probe_size": 1, "follow_size": 0, "value_fit": 0, "chunk_size": 0}
        for name, n in least.items():
            if (value := getattr(self, name)) < n:
                raise ValueError(f"{name} must be at least {n}, got {value}")

    @property
    def window(self) -> int:
        """Last prompt tokens that are kept whole."""
        return self.snapkv_window if self.policy == "snapkv" else self.window_size

    @property
    def needs_queries(self) -> bool:
        return self.needs_lookahead or self.policy == "snapkv"

    @property
    def needs_lookahead(self) -> bool:
        return self.policy in ("laq", "laq++")

    @property
    def ahead(self) -> int:
        """Tokens of the lookahead."""
        return self.lookahead_size if self.needs_lookahead else 0

    @property
    def probe_ahead(self) -> int:
        """Tokens that a probe looks ahead: the next probe looks for what it misses."""
        return min(self.ahead, PROBE_AHEAD)

    @property
    def room(self) -> int:
        """Cells that stay free while a prompt is read: for a probe, or a lookahead from its end."""
        return max(self.probe_size + self.probe_ahead, self.ahead) if self.needs_lookahead else 0

    @property
    def fits_values(self) -> bool:
        """Whether V of what stays is fitted: see values.py."""
        return self.policy == "laq++" and self.value_fit > 0


def query_range(params: PolicyParams, n_prompt: int, n_tokens: int) -> Span:
    """Positions [first, last) whose queries score the keys of n_tokens, of which those from
    n_prompt on are ahead; empty for policies that use none. With none ahead, laq is laq++."""
    if not params.needs_queries:
        return 0, 0
    last = min(n_tokens, n_prompt + params.ahead)
    if params.policy == "laq" and last > n_prompt:
        return n_prompt, last
    return max(0, n_prompt - params.window), last


def pinned_mask(
    positions: ArrayLike, *, n_sink: int, n_intact: int, spans: Sequence[Span] = ()
) -> BoolArray:
    """Which cells no eviction may free: positions below n_sink, those from n_intact on, and spans
    [p0, p1) of the user."""
    pos = np.asarray(positions)
    pinned = (pos < n_sink) | (pos >= n_intact)
    for p0, p1 in spans:
        pinned |= (pos >= p0) & (pos < p1)
    return pinned


def random_scores(seed: int, ikv: int, head: int, positions: ArrayLike) -> FloatArray:
    """Scores in [0, 1) of the random policy: a hash (the finalizer of splitmix64) of the user's
    seed, layer, KV head and position, the same on every machine."""
    word = (1 << 64) - 1
    base = seed * 0x9E3779B97F4A7C15 + ikv * 0xBF58476D1CE4E5B9 + head * 0x94D049BB133111EB
    x = np.uint64(base & word) + np.asarray(positions).astype(np.int64).astype(np.uint64)
    z = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def follow_scores(scores: ArrayLike, positions: ArrayLike, follow_size: int) -> FloatArray:
    """The highest score among a key and the keys at most follow_size positions before it. Positions
    ascend; an evicted neighbour leaves a gap."""
    src, pos = np.asarray(scores, np.float32), np.asarray(positions)
    first = np.searchsorted(pos, pos - follow_size)
    return np.array([src[first[i] : i + 1].max() for i in range(len(src))], np.float32)


def copies(scores: ArrayLike, pinned: ArrayLike) -> bool:
    """Whether one KV head copies: its best key has at least COPY_SHARE of all scores.

    A head that reads a text word for word attends to one key per query; most heads attend to many,
    and lose more than they win when cells go to keys that merely follow. Raw scores (n_kv,) are
    summed in float64 from left to right; pinned keys do not count.
    """
    free = np.asarray(scores, np.float32)[~np.asarray(pinned, bool)]
    with np.errstate(invalid="ignore"):  # inf - inf: not a number, which no comparison passes
        total = np.cumsum(free, dtype=np.float64)
    best = float(free.max(initial=0))
    return best > 0 and bool(best >= COPY_SHARE * total[-1])


def rank_scores(
    params: PolicyParams, positions: IntArray, scores: Scores = None, *, ikv: int = 0, head: int = 0
) -> FloatArray:
    """What the cells of one KV head of a layer are ranked by: (n_kv,) float32. The policies that
    need raw scores raise a ValueError without."""
    if params.policy == "random":
        return random_scores(params.seed, ikv, head, positions)
    if not params.needs_queries:
        return positions.astype(np.float32)
    if scores is None:
        raise ValueError(f"policy {params.policy!r} ranks by attention scores: give scores")
    return pool_scores(scores, params.kernel_size, params.pooling)


def select(scores: ArrayLike, budget: int, pinned: ArrayLike | None = None) -> Index:
    """Indices of the kept cells, ascending: min(n_kv, budget) of them.

    Pinned cells come first, then the best by score (n_kv,) as they are ranked. This is the one
    place of the tie rule: among equal scores, and among pinned cells if they alone exceed the
    budget, the lower index wins. A budget below 0 and NaN among the scores raise a ValueError.
    """
    ranked = np.asarray(scores, np.float32)
    if budget < 0:
        raise ValueError(f"budget must not be negative, got {budget}")
    if np.isnan(ranked).any():
        raise ValueError("a score is NaN: NaN has no rank")
    first = np.zeros(len(ranked), bool) if pinned is None else np.asarray(pinned, bool)
    # lexsort is stable, and its last key the most significant
    order = np.lexsort((np.where(first, np.float32(0), -ranked), ~first))
    return np.sort(order[:budget])


def select_keys(
    params: PolicyParams, positions: IntArray, pinned: ArrayLike, scores: Scores = None, **of: int
) -> Index:
    """The selection of one KV head, `of` which ikv and head, given what is pinned: indices of the
    kept cells, ascending."""
    first = np.array(pinned, bool)
    # what is pinned stays anyway: sinks and recent tokens shall not lift their neighbours
    raw = None if scores is None else np.where(first, np.float32(0), np.asarray(scores, np.float32))
    ranked = rank_scores(params, positions, raw, **of)
    free = params.budget - int(first.sum())
    follows = params.needs_lookahead and params.follow_size > 0 and free > 0
    if not follows or not copies(scores, first):
        return select(ranked, params.budget, first)
    first[select(ranked, params.budget - 3 * free // 8, first)] = True
    return select(follow_scores(ranked, positions, params.follow_size), params.budget, first)


def select_head(
    params: PolicyParams, positions: IntArray, n_intact: int, scores: Scores = None, **of: int
) -> Index:
    """`select_keys` under a policy; positions from n_intact on are kept whole."""
    if params.policy == "full":
        return np.arange(len(positions))
    pinned = pinned_mask(positions, n_sink=params.n_sink, n_intact=n_intact, spans=params.pinned)
    return select_keys(params, positions, pinned, scores, **of)
