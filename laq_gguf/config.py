"""Settings of the eviction: names, ranges, and their place in `struct laq_params`."""

from __future__ import annotations

import bisect
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any

from .errors import LaqArgumentError, LaqModelError

POLICIES = {"full": 0, "laq": 1, "laq++": 2, "snapkv": 3, "streaming": 4, "random": 5}
LOOKAHEADS = {"deferred": 0, "pseudo": 1}
POOLINGS = {"none": 0, "max": 1, "avg": 2}

#: policies whose scores come from lookahead queries
LOOKAHEAD_POLICIES = frozenset({"laq", "laq++"})
#: policies that rank tokens by attention
SCORED_POLICIES = LOOKAHEAD_POLICIES | {"snapkv"}

_CHOICES: dict[str, dict[str, int]] = {
    "kv_policy": POLICIES,
    "lookahead": LOOKAHEADS,
    "pooling": POOLINGS,
}
_MINIMA = {
    "lookahead_size": 1,
    "window_size": 1,
    "snapkv_window": 1,
    "n_sink": 0,
    "kernel_size": 1,
    "follow_size": 0,
    "probe_size": 1,
    "chunk_size": 0,
}
_INT32_MAX = 2**31 - 1
_MAXIMA = {"n_sink": 2**30}

#: llama.cpp rounds the cells of a context up to a multiple of this
CELL_STEP = 256
#: prompt tokens that must fit beside the probe, or a long prompt is read in crumbs
MIN_CHUNK = 32
#: tokens that a probe looks ahead, at most (LAQ_PROBE_AHEAD of native/src/laq-policy.h)
PROBE_AHEAD = 8

_BYTE_UNITS = {
    "": 1,
    "b": 1,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
}


def check_integer(name: str, value: Any, low: int, high: int = _INT32_MAX) -> int:
    """Return the value of a setting as an int.

    Raises:
        LaqArgumentError: it is no int, or not from low to high.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise LaqArgumentError(f"{name} must be an int of at least {low}, got {value!r}")
    if not low <= number <= high:
        raise LaqArgumentError(f"{name} must be from {low} to {high}, got {number}")
    return number


def check_real(name: str, value: Any, low: float) -> float:
    """Return the value of a setting as a float.

    Raises:
        LaqArgumentError: it is no finite number of at least low.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
        if math.isfinite(number) and number >= low:
            return number
    raise LaqArgumentError(f"{name} must be a finite number of at least {low:g}, got {value!r}")


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
        first, end = check_integer("pinned", span[0], 0), check_integer("pinned", span[1], 0)
        if first >= end:
            raise LaqArgumentError(f"{form}, got the entry ({first}, {end})")
        spans.append((first, end))
    return tuple(spans)


def round_cells(n_cells: int) -> int:
    """Cells that llama.cpp allocates where n_cells are asked for."""
    return -(-n_cells // CELL_STEP) * CELL_STEP


def default_staging(budget: int) -> int:
    """Cells beyond the budget where kv_staging is not given. Must not fall as the budget rises."""
    return max(512, budget)


def check_staging(kv_staging: Any) -> int | None:
    """Return kv_staging as an int, or None where it is None.

    Raises:
        LaqArgumentError: wrong type, or below 1.
    """
    return None if kv_staging is None else check_integer("kv_staging", kv_staging, 1)


def parse_bytes(text: str, name: str = "kv_budget") -> int:
    """Bytes of a size such as "512MiB", "1.5 GiB", "800MB" or "200000000"; name: of the setting.

    KiB, MiB and GiB are powers of 1024; kB, MB and GB powers of 1000.

    Raises:
        LaqArgumentError: it is no such text, or below one byte.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    scale = _BYTE_UNITS.get(match[2].lower()) if match else None
    if match is None or scale is None or (scale == 1 and "." in match[1]):
        others = "; for tokens an int, for a share of n_ctx a float" if name == "kv_budget" else ""
        raise LaqArgumentError(
            f"{name}={text!r} is not a size in bytes: give a number and KiB, MiB, GiB, kB, MB "
            f'or GB, as in "512MiB"{others}'
        )
    n_bytes = int(Fraction(match[1]) * scale)
    if n_bytes < 1:
        raise LaqArgumentError(f"{name}={text!r} must be at least one byte")
    return n_bytes


@dataclass(frozen=True)
class CacheSize:
    """How large a cache is.

    Attributes:
        budget: tokens per layer and KV head that stay once a prompt has been read.
        n_cells: cells that the context is made with: budget and staging, a multiple of 256.
    """

    budget: int
    n_cells: int


@dataclass(frozen=True)
class LaqConfig:
    """How a KV cache evicts. Checked when made; see `Llama` for what each setting does.

    Raises:
        LaqArgumentError: a value is unknown or out of range, or two values exclude each other.
    """

    kv_policy: str = "laq++"
    lookahead: str = "deferred"
    lookahead_size: int = 32
    window_size: int = 8
    n_sink: int = 4
    pinned: tuple[tuple[int, int], ...] = field(default=())
    snapkv_window: int = 32
    kernel_size: int = 7
    pooling: str = "max"
    follow_size: int = 32
    value_fit: float = 0.01
    probe_size: int = 48
    chunk_size: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise LaqArgumentError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        for name, low in _MINIMA.items():
            high = _MAXIMA.get(name, _INT32_MAX)
            object.__setattr__(self, name, check_integer(name, getattr(self, name), low, high))
        object.__setattr__(self, "value_fit", check_real("value_fit", self.value_fit, 0))
        object.__setattr__(self, "pinned", _spans(self.pinned))
        if self.kernel_size % 2 == 0:
            raise LaqArgumentError(
                f"kernel_size must be odd (a key and as many neighbours on each side), "
                f"got {self.kernel_size}"
            )

    @property
    def protected_size(self) -> int:
        """Last prompt tokens that every head keeps."""
        return self.snapkv_window if self.kv_policy == "snapkv" else self.window_size

    def n_pinned(self) -> int:
        """Cells that no eviction may free: sinks, pinned spans, last prompt tokens, lookahead."""
        n_lookahead = self.lookahead_size if self.kv_policy in LOOKAHEAD_POLICIES else 0
        n_fixed, end = 0, 0
        for first, last in sorted([(0, self.n_sink), *self.pinned]):
            n_fixed += max(0, last - max(first, end))
            end = max(end, last)
        return n_fixed + self.protected_size + n_lookahead

    @property
    def min_staging(self) -> int:
        """Cells beyond the budget that a prompt needs that is read in chunks."""
        room = 0
        if self.kv_policy in LOOKAHEAD_POLICIES:
            room = max(self.probe_size + self._probe_ahead, self.lookahead_size)
        return room + MIN_CHUNK

    @property
    def _probe_ahead(self) -> int:
        return min(self.lookahead_size, PROBE_AHEAD)

    def cache_size(
        self, kv_budget: Any, kv_staging: Any, n_ctx: int, bytes_per_cell: Callable[[], int]
    ) -> CacheSize:
        """Return the budget in tokens and the cells of the context.

        Args:
            kv_budget: tokens (int), a share of n_ctx (float between 0 and 1), or the bytes that
                all cells may take (str, see `parse_bytes`): then the budget is the largest whose
                cells fit into them.
            kv_staging: cells beyond the budget (int); None: `default_staging`, and no less than
                `min_staging`.
            n_ctx: tokens that a sequence may have, at least 1.
            bytes_per_cell: gives the bytes of one cell over all layers; called for bytes alone.

        Raises:
            LaqArgumentError: wrong type, below what is always kept, above n_ctx, too few bytes,
                or too little staging for a prompt to be read in chunks.
            LaqModelError: bytes for a model without a KV cache.
        """
        staging = check_staging(kv_staging)
        if isinstance(kv_budget, str):
            return self._size_of_bytes(kv_budget, staging, n_ctx, bytes_per_cell)
        budget = self.resolve_budget(kv_budget, n_ctx)
        self._check_staging(budget, staging, n_ctx)
        return CacheSize(budget, self._cells(budget, staging, n_ctx))

    def _staging(self, budget: int, kv_staging: int | None) -> int:
        if kv_staging is not None:
            return kv_staging
        return max(default_staging(budget), self.min_staging)

    def _cells(self, budget: int, kv_staging: int | None, n_ctx: int) -> int:
        if self.kv_policy == "full":
            return round_cells(n_ctx)
        return round_cells(min(budget + self._staging(budget, kv_staging), n_ctx))

    def _check_staging(self, budget: int, kv_staging: int | None, n_ctx: int) -> None:
        if self.kv_policy == "full" or kv_staging is None or budget + kv_staging >= n_ctx:
            return
        if kv_staging < self.min_staging:
            lower, parts = "", f"{MIN_CHUNK} tokens of the prompt"
            if self.kv_policy in LOOKAHEAD_POLICIES:
                lower = ", or lower probe_size or lookahead_size"
                if self.lookahead_size > self.probe_size + self._probe_ahead:
                    parts += f", lookahead_size={self.lookahead_size}"
                else:
                    parts += f", probe_size={self.probe_size} and {self._probe_ahead} after them"
            raise LaqArgumentError(
                f"kv_staging={kv_staging} is too small: a prompt that does not fit is read in "
                f"chunks, and those need {self.min_staging} cells beyond the budget ({parts}); "
                f"raise kv_staging{lower}"
            )

    def _size_of_bytes(
        self, text: str, kv_staging: int | None, n_ctx: int, bytes_per_cell: Callable[[], int]
    ) -> CacheSize:
        n_bytes, per_cell, n_all = parse_bytes(text), bytes_per_cell(), round_cells(n_ctx)
        if per_cell < 1:
            raise LaqModelError(f"kv_budget={text!r}: the model has no KV cache to be limited")
        n_cells = min(n_bytes // per_cell // CELL_STEP * CELL_STEP, n_all)
        least = max(1, min(self.n_pinned(), n_ctx))
        n_least = self._cells(least, kv_staging, n_ctx)
        if n_cells < n_least:
            why = f"{least} tokens that are always kept and {self._staging(least, kv_staging)} more"
            if self.kv_policy == "full":
                why = f'kv_policy="full" holds all of n_ctx={n_ctx}'
            raise LaqArgumentError(
                f"kv_budget={text!r} is {n_bytes} bytes, room for {n_cells} cells of {per_cell} "
                f"bytes (they come in steps of {CELL_STEP}), but {n_least} cells are the least "
                f"({why}): give at least {n_least * per_cell} bytes; for tokens give an int"
            )
        budget = n_ctx  # all cells there can be: nothing is ever evicted
        if n_cells < n_all:
            budget = bisect.bisect_right(
                range(n_cells), n_cells, key=lambda b: b + self._staging(b, kv_staging)
            )
            budget -= 1
        self._check_budget(budget, f"{text} is ", n_ctx)
        self._check_staging(budget, kv_staging, n_ctx)
        return CacheSize(budget, n_cells)

    def resolve_budget(self, kv_budget: Any, n_ctx: int) -> int:
        """Return the budget in tokens per layer and KV head; bytes are for `cache_size`.

        Args:
            kv_budget: tokens (int), or a share of n_ctx (float between 0 and 1).
            n_ctx: tokens that the context may hold.

        Raises:
            LaqArgumentError: wrong type, below the pinned cells, or above n_ctx.
        """
        if isinstance(kv_budget, float):
            if not (math.isfinite(kv_budget) and 0.0 < kv_budget < 1.0):
                raise LaqArgumentError(
                    f"kv_budget={kv_budget!r}: a float is a share of n_ctx and must lie between "
                    "0 and 1; give an int for tokens"
                )
            budget, asked = int(kv_budget * n_ctx), f"{kv_budget!r} of n_ctx={n_ctx} is "
        else:
            budget, asked = check_integer("kv_budget", kv_budget, 1), ""
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
            if self.kv_policy in LOOKAHEAD_POLICIES:
                lookahead = f", lookahead_size={self.lookahead_size}"
            raise LaqArgumentError(
                f"kv_budget: {asked}{budget} tokens, but {n_pinned} are always kept "
                f"(n_sink={self.n_sink}, {window}={self.protected_size}{lookahead}, "
                f"{len(self.pinned)} pinned spans); raise kv_budget or lower one of these"
            )

    def to_native(self, native: Any, budget: int, n_ctx: int, seed: int) -> tuple[Any, Any]:
        """Return (`struct laq_params *`, the span array that it points to, to be kept alive).

        Args:
            native: `_lib.Native`.
            budget: tokens per layer and KV head.
            n_ctx: positions that a sequence may have, whatever the cells.
            seed: of kv_policy="random".
        """
        params = native.ffi.new("struct laq_params *", native.lib.laq_default_params())
        spans = native.ffi.new("struct laq_span[]", [list(span) for span in self.pinned])
        params.size = native.ffi.sizeof("struct laq_params")
        params.policy = POLICIES[self.kv_policy]
        params.lookahead = LOOKAHEADS[self.lookahead]
        params.pooling = POOLINGS[self.pooling]
        params.n_ctx = n_ctx
        params.n_kv_budget = budget
        params.n_lookahead = self.lookahead_size
        params.n_probe = self.probe_size
        params.n_chunk = self.chunk_size
        params.n_window = self.window_size
        params.n_window_snapkv = self.snapkv_window
        params.n_sink = self.n_sink
        params.n_kernel = self.kernel_size
        params.n_follow = self.follow_size
        params.value_fit = self.value_fit
        params.seed = seed & 0xFFFFFFFF
        params.n_pinned = len(self.pinned)
        params.pinned = spans if self.pinned else native.ffi.NULL
        return params, spans


CONFIG_NAMES = tuple(f.name for f in fields(LaqConfig))
