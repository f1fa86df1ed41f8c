"""What is known of one sequence: its tokens, their rows of K and V, and what must still be held."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import numpy as np

from property.several import N_CTX, N_HEAD_KV, N_LAYER, N_SINK, Ints, Seen, Several, Twin

POSITIONS = np.arange(N_CTX)


class Conversation:
    """A sequence as it should be.

    Attributes:
        tokens: (N_CTX,) the token at each position; -1 = none.
        rows: K and V of each position when it was decoded, (2, n_layer, n_head_kv, N_CTX, bytes).
        known: (N_CTX,) whether `rows` holds those of a position.
        spans: pinned positions.
        pinned: (N_CTX,) pinned positions that every head holds.
        alone: tokens from here on were decoded from the cells alone and may be read again.
        lossy: a state without its archive was loaded.
    """

    def __init__(self, row_bytes: int) -> None:
        self.tokens = np.full(N_CTX, -1, np.int32)
        self.rows = np.zeros((2, N_LAYER, N_HEAD_KV, N_CTX, row_bytes), np.uint8)
        self.known = np.zeros(N_CTX, np.bool_)
        self.spans: tuple[tuple[int, int], ...] = ()
        self.pinned = np.zeros(N_CTX, np.bool_)
        self.n_intact = 0
        self.alone = N_CTX
        self.lossy = False

    @property
    def exists(self) -> np.ndarray:
        return self.tokens >= 0

    @property
    def n_tokens(self) -> int:
        """The logical length."""
        held = np.flatnonzero(self.exists)
        return max(int(held[-1]) + 1 if held.size else 0, self.n_intact)

    def copy(self) -> Conversation:
        return copy.deepcopy(self)

    def append(self, tokens: Iterable[int], alone: bool) -> None:
        """Tokens are decoded behind what is there; alone: perhaps from the cells alone."""
        for token in tokens:
            p = self.n_tokens
            self.tokens[p], self.known[p] = token, False
            self.pinned[p] = any(p0 <= p < p1 for p0, p1 in self.spans)
            if alone and self.n_intact > 0:
                self.alone = min(self.alone, p)

    def remove(self, p0: int, p1: int = N_CTX) -> None:
        """The positions [p0, p1) are gone."""
        for array, value in ((self.tokens, -1), (self.known, False), (self.pinned, False)):
            array[p0:p1] = value
        self.alone = N_CTX if p0 <= self.alone else self.alone

    def clear(self) -> None:
        """All tokens are gone; what is pinned stays so."""
        self.remove(0)
        self.n_intact, self.alone, self.lossy = 0, N_CTX, False

    def pin(self, spans: tuple[tuple[int, int], ...], seen: Seen) -> None:
        """From now on; what some head does not hold any more may be missing."""
        self.spans = spans
        wanted = np.zeros(N_CTX, np.bool_)
        for p0, p1 in spans:
            wanted[p0:p1] = True
        self.pinned = wanted & held_by_all(seen.kept)

    def read_again(self) -> None:
        """The tokens decoded from the cells alone are read again: their rows change."""
        self.known[max(self.alone, self.n_intact) :] = False

    def check(self, seen: Seen, twin: Twin, may_fit: bool) -> None:
        """What a sequence holds is what it should hold. Rows of new tokens are remembered."""
        self.n_intact = seen.n_intact
        assert seen.n_tokens == self.n_tokens, f"{seen.n_tokens} tokens, not {self.n_tokens}"
        kept, n = seen.kept, seen.kept.shape[-1]
        assert (np.diff(kept, axis=-1) > 0).all(), "positions do not ascend"
        if n:
            assert kept.min() >= 0 and kept.max() < N_CTX, "a position that cannot be"
        assert self.exists[kept].all(), "a position without a token"
        required = self.exists & ((self.n_intact <= POSITIONS) | (POSITIONS < N_SINK) | self.pinned)
        missing = np.flatnonzero(required & ~held_by_all(kept))
        assert missing.size == 0, f"positions {missing} are not held by every head"

        own = np.take_along_axis(self.rows, kept[None, ..., None], axis=3)
        equal = (own == seen.rows).all(-1)
        known = self.known[kept]
        assert equal[0][known].all(), "K of other tokens"
        unfitted = (kept >= self.n_intact) if may_fit else np.ones_like(known)
        assert equal[1][known & unfitted].all(), "V of other tokens"
        agree = twin.agrees(self.tokens[kept[0]], kept[0], seen.rows[0, 0])
        assert agree.all(), "K in the first layer is not that of the token at its position"
        self._remember(seen)

    def _remember(self, seen: Seen) -> None:
        """Rows from n_intact on: every head holds the same tokens there, the last ones."""
        new = seen.kept[0, 0]
        new = new[(new >= self.n_intact) & ~self.known[new]]
        if new.size:
            at = np.searchsorted(seen.kept[0, 0], new)
            back = at - seen.kept.shape[-1]  # counted from the end
            self.rows[:, :, :, new] = seen.rows[:, :, :, back]
            self.known[new] = True

    def check_archive(self, seq: int, context: Several, twin: Twin, some: Ints) -> None:
        """Every token below n_intact is archived; the positions `some` with the same bytes."""
        gone = () if self.lossy else np.flatnonzero(self.exists[: self.n_intact])
        for p in map(int, gone):
            assert context.is_archived(seq, p), f"position {p} is not archived"
        for p in some:
            rows = context.archived(seq, int(p))
            if rows is None:
                continue
            assert self.exists[p], f"position {p} is archived and has no token"
            if self.known[p]:
                assert (rows == self.rows[:, :, :, p]).all(), f"position {p} is archived otherwise"
            elif p < self.n_intact:
                self.rows[:, :, :, p], self.known[p] = rows, True
            at = np.full((N_HEAD_KV, 1), p)
            assert twin.agrees(self.tokens[at], at, rows[0, 0][:, None]).all(), f"K archived at {p}"


def held_by_all(kept: Ints) -> np.ndarray:
    """(N_CTX,) whether every head of every layer holds a position; kept: `Seen.kept`."""
    heads = kept.reshape(N_LAYER * N_HEAD_KV, -1)
    held = np.zeros((len(heads), N_CTX), np.bool_)
    held[np.arange(len(heads))[:, None], heads] = True
    res: np.ndarray = held.all(0)
    return res
