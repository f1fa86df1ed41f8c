"""Settings of the eviction: names, ranges, and their place in `struct laq_params`."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import LaqArgumentError

POLICIES = {"full": 0, "laq": 1, "laq++": 2, "snapkv": 3, "streaming": 4, "random": 5}
LOOKAHEADS = {"deferred": 0, "pseudo": 1}
DRAFTS = {"full": 0, "snapkv": 1}
POOLINGS = {"none": 0, "max": 1, "avg": 2}
SCORE_KERNELS = {"auto": 0, "fused": 1, "composed": 2}

#: policies whose scores come from lookahead queries
LOOKAHEAD_POLICIES = frozenset({"laq", "laq++"})
#: policies that rank tokens by attention
SCORED_POLICIES = LOOKAHEAD_POLICIES | {"snapkv"}

_CHOICES: dict[str, dict[str, int]] = {
    "kv_policy": POLICIES,
    "lookahead": LOOKAHEADS,
    "draft": DRAFTS,
    "pooling": POOLINGS,
    "score_kernel": SCORE_KERNELS,
}
_MINIMA = {
    "lookahead_size": 1,
    "window_size": 1,
    "snapkv_window": 1,
    "n_sink": 0,
    "kernel_size": 1,
    "follow_size": 0,
}
_INT32_MAX = 2**31 - 1


def _integer(name: str, value: Any, low: int, high: int = _INT32_MAX) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise LaqArgumentError(f"{name} must be an int of at least {low}, got {value!r}")
    if not low <= number <= high:
        raise LaqArgumentError(f"{name} must be from {low} to {high}, got {number}")
    return number


def _spans(pinned: Any) -> tuple[tuple[int, int], ...]:
    spans = []
    form = "pinned must be a sequence of (first, end) positions, first < end"
    if pinned is None:
        return ()
    if isinstance(pinned, str) or not isinstance(pinned, Sequence):
        raise LaqArgumentError(f"{form}, got {pinned!r}")
    for span in pinned:
        if isinstance(span, str) or not isinstance(span, Sequence) or len(span) != 2:
            raise LaqArgumentError(f"{form}, got the entry {span!r}")
        first, end = _integer("pinned", span[0], 0), _integer("pinned", span[1], 0)
        if first >= end:
            raise LaqArgumentError(f"{form}, got the entry ({first}, {end})")
        spans.append((first, end))
    return tuple(spans)


@dataclass(frozen=True)
class LaqConfig:
    """How a KV cache evicts. Checked when made; see `Llama` for what each setting does.

    Raises:
        LaqArgumentError: a value is unknown or out of range, or two values exclude each other.
    """

    kv_policy: str = "laq++"
    lookahead: str = "deferred"
    lookahead_size: int = 8
    window_size: int = 8
    n_sink: int = 4
    pinned: tuple[tuple[int, int], ...] = field(default=())
    snapkv_window: int = 32
    kernel_size: int = 7
    pooling: str = "max"
    follow_size: int = 32
    draft: str = "full"
    score_kernel: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise LaqArgumentError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        for name, low in _MINIMA.items():
            object.__setattr__(self, name, _integer(name, getattr(self, name), low))
        object.__setattr__(self, "pinned", _spans(self.pinned))
        if self.kernel_size % 2 == 0:
            raise LaqArgumentError(
                f"kernel_size must be odd (a key and as many neighbours on each side), "
                f"got {self.kernel_size}"
            )
        if self.draft == "snapkv" and self.lookahead != "pseudo":
            raise LaqArgumentError(
                'draft="snapkv" says which cache pseudo tokens are drafted from: it needs '
                f'lookahead="pseudo", got lookahead={self.lookahead!r}'
            )

    @property
    def protected_size(self) -> int:
        """Last prompt tokens that every head keeps."""
        return self.snapkv_window if self.kv_policy == "snapkv" else self.window_size

    def n_pinned(self) -> int:
        """Cells that no eviction may free: sinks, pinned spans, last prompt tokens, lookahead."""
        n_lookahead = 0
        if self.kv_policy in LOOKAHEAD_POLICIES and self.lookahead == "deferred":
            n_lookahead = self.lookahead_size
        n_fixed, end = 0, 0
        for first, last in sorted([(0, self.n_sink), *self.pinned]):
            n_fixed += max(0, last - max(first, end))
            end = max(end, last)
        return n_fixed + self.protected_size + n_lookahead

    def resolve_budget(self, kv_budget: Any, n_ctx: int) -> int:
        """Return the budget in tokens per layer and KV head.

        Args:
            kv_budget: tokens (int), or a share of n_ctx (float between 0 and 1).
            n_ctx: tokens that the context may hold.

        Raises:
            LaqArgumentError: wrong type, below the pinned cells, or above n_ctx.
        """
        if isinstance(kv_budget, str):
            raise LaqArgumentError(
                f"kv_budget={kv_budget!r}: a budget in bytes is not supported; give tokens per "
                "layer and KV head (int) or a share of n_ctx (float between 0 and 1)"
            )
        if isinstance(kv_budget, float):
            if not (math.isfinite(kv_budget) and 0.0 < kv_budget < 1.0):
                raise LaqArgumentError(
                    f"kv_budget={kv_budget!r}: a float is a share of n_ctx and must lie between "
                    "0 and 1; give an int for tokens"
                )
            budget, asked = int(kv_budget * n_ctx), f"{kv_budget!r} of n_ctx={n_ctx} is "
        else:
            budget, asked = _integer("kv_budget", kv_budget, 1), ""
        self._check_budget(budget, asked, n_ctx)
        return budget

    def _check_budget(self, budget: int, asked: str, n_ctx: int) -> None:
        if budget > n_ctx:
            raise LaqArgumentError(
                f"kv_budget={budget} is above n_ctx={n_ctx}: nothing would ever be evicted; "
                "lower kv_budget or raise n_ctx"
            )
        if any(end > n_ctx for _, end in self.pinned):
            raise LaqArgumentError(f"pinned={list(self.pinned)} reaches beyond n_ctx={n_ctx}")
        n_pinned = self.n_pinned()
        if self.kv_policy != "full" and budget < n_pinned:
            window = "snapkv_window" if self.kv_policy == "snapkv" else "window_size"
            lookahead = ""
            if self.kv_policy in LOOKAHEAD_POLICIES and self.lookahead == "deferred":
                lookahead = f", lookahead_size={self.lookahead_size}"
            raise LaqArgumentError(
                f"kv_budget: {asked}{budget} tokens, but {n_pinned} are always kept "
                f"(n_sink={self.n_sink}, {window}={self.protected_size}{lookahead}, "
                f"{len(self.pinned)} pinned spans); raise kv_budget or lower one of these"
            )

    def to_native(self, native: Any, budget: int, seed: int) -> tuple[Any, Any]:
        """Return (`struct laq_params *`, the span array that it points to, to be kept alive).

        Args:
            native: `_lib.Native`.
            budget: tokens per layer and KV head.
            seed: of kv_policy="random".
        """
        params = native.ffi.new("struct laq_params *", native.lib.laq_default_params())
        spans = native.ffi.new("struct laq_span[]", [list(span) for span in self.pinned])
        params.size = native.ffi.sizeof("struct laq_params")
        params.policy = POLICIES[self.kv_policy]
        params.lookahead = LOOKAHEADS[self.lookahead]
        params.draft = DRAFTS[self.draft]
        params.pooling = POOLINGS[self.pooling]
        params.score_kernel = SCORE_KERNELS[self.score_kernel]
        params.n_kv_budget = budget
        params.n_lookahead = self.lookahead_size
        params.n_window = self.window_size
        params.n_window_snapkv = self.snapkv_window
        params.n_sink = self.n_sink
        params.n_kernel = self.kernel_size
        params.n_follow = self.follow_size
        params.seed = seed & 0xFFFFFFFF
        params.n_pinned = len(self.pinned)
        params.pinned = spans if self.pinned else native.ffi.NULL
        return params, spans


CONFIG_NAMES = tuple(f.name for f in fields(LaqConfig))
