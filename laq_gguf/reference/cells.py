"""What a sequence holds: rows of K and V in its cells and its archive, and captured queries.

Each layer and KV head holds its own tokens, all the same number. The positions are the origin
table: they say which token a cell holds. From `n_intact` on every head holds every token (the
intact suffix); below it every head may miss other tokens. In native/src, laq-store and laq-archive
agree, and laq-seq for the queries (laq_ring).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .attention import BoolArray, FloatArray, Index, IntArray

#: What is known of the output that a query got: nothing; that it came from the cells as they are
#: now; that it came from all tokens.
NONE, CELLS, ALL = range(3)


@dataclass(frozen=True)
class Tokens:
    """Keys, values and queries (after RoPE) of consecutive tokens in every layer."""

    k: FloatArray  # (n_layer, n_tokens, n_head_kv, d)
    v: FloatArray
    q: FloatArray  # (n_layer, n_tokens, n_head, d)

    def __len__(self) -> int:
        return self.k.shape[1]

    def __getitem__(self, tokens: slice) -> Tokens:
        return Tokens(self.k[:, tokens], self.v[:, tokens], self.q[:, tokens])


@dataclass
class Layer:
    """Rows of one layer, in each head by position."""

    positions: IntArray  # (n_head_kv, n)
    k: FloatArray  # (n_head_kv, n, d)
    v: FloatArray
    memory: FloatArray  # (n_head_kv, n): scores at the last probe, mean over its queries; else 0

    def __len__(self) -> int:
        """Rows of each head."""
        return self.positions.shape[1]

    @classmethod
    def of(cls, first: int, k: FloatArray, v: FloatArray) -> Layer:
        """Tokens from position `first` on: k, v (n_tokens, n_head_kv, d)."""
        rows = np.tile(np.arange(first, first + len(k), dtype=np.int32), (k.shape[1], 1))
        return cls(rows, k.swapaxes(0, 1), v.swapaxes(0, 1), np.zeros_like(rows, np.float32))

    def n_before(self, position: int) -> int:
        """Tokens of each head before a position, which is in the intact suffix or its beginning."""
        return int((self.positions[0] < position).sum())

    def take(self, index: Index) -> Layer:
        """index (n_head_kv, n_kept): rows of each head."""
        return Layer(
            np.take_along_axis(self.positions, index, axis=1),
            np.take_along_axis(self.k, index[:, :, None], axis=1),
            np.take_along_axis(self.v, index[:, :, None], axis=1),
            np.take_along_axis(self.memory, index, axis=1),
        )

    def at(self, positions: IntArray) -> Layer:
        """The rows of positions (n,) that every head holds."""
        return self.take(np.stack([np.searchsorted(row, positions) for row in self.positions]))

    def joined(self, other: Layer) -> Layer:
        """The rows of both."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        rows = Layer(*(np.concatenate(pair, axis=1) for pair in pairs))
        return rows.take(np.argsort(rows.positions, axis=1))


def empty_layers(n_layer: int, n_head_kv: int, d: int) -> list[Layer]:
    rows = np.zeros((0, n_head_kv, d), np.float32)
    return [Layer.of(0, rows, rows) for _ in range(n_layer)]


class Cells:
    """The cells of one sequence, and what they hold in each layer."""

    def __init__(self, layers: list[Layer], n_cells: int | None) -> None:
        if n_cells is not None and n_cells < 1:
            raise ValueError(f"n_cells must be at least 1, got {n_cells}")
        self.layers = layers
        self.n_cells = n_cells  # that there are and never more; None = as many as it takes
        self.n_foreign = 0  # of these, cells that other sequences use; the caller's to set

    @property
    def positions(self) -> IntArray:
        """The origin table: (n_layer, n_head_kv, n_resident), sorted along the last axis."""
        return np.stack([layer.positions for layer in self.layers])

    @property
    def n_used(self) -> int:
        """Cells in use: those of this sequence and those of others."""
        return len(self.layers[0]) + self.n_foreign

    @property
    def n_free(self) -> int | None:
        """Cells that nothing uses; None = as many as it takes."""
        return None if self.n_cells is None else self.n_cells - self.n_used

    def fits(self, n_tokens: int, n_freed: int = 0) -> bool:
        """Whether n_tokens more find cells once n_freed are free."""
        return self.n_free is None or n_tokens <= self.n_free + n_freed

    def append(self, first: int, tokens: Tokens) -> None:
        rows = zip(self.layers, tokens.k, tokens.v, strict=True)
        self.layers = [layer.joined(Layer.of(first, k, v)) for layer, k, v in rows]

    def keep(self, index: list[Index]) -> None:
        """index: for each layer (n_head_kv, n_kept), cells that stay, ascending."""
        self.layers = [layer.take(kept) for layer, kept in zip(self.layers, index, strict=True)]

    def remove(self, p0: int, p1: int) -> None:
        """The positions [p0, p1) of the intact suffix: the same cells in every head."""
        stays = (self.positions < p0) | (self.positions >= p1)
        self.keep([np.stack([np.flatnonzero(row) for row in rows]) for rows in stays])


class Archive:
    """Archived tokens, the same in every head of each layer, with V as it was before any fit."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers

    @property
    def positions(self) -> IntArray:
        return self.layers[0].positions[0]

    def add(self, cells: Cells, first: int, end: int) -> None:
        """Archive the tokens [first, end), which every head still holds."""
        resident = cells.layers[0].positions[0]
        self.layers = self._with(cells, resident[(resident >= first) & (resident < end)])

    def whole(self, cells: Cells) -> list[Layer]:
        """The tokens that are whole, the same in every head of every layer: archived, or held by
        all of these heads. K and V are as archived, and as the cells hold the others."""
        table = cells.positions
        held, n_heads = np.unique(table, return_counts=True)
        return self._with(cells, held[n_heads == table.shape[0] * table.shape[1]])

    def _with(self, cells: Cells, positions: IntArray) -> list[Layer]:
        """What is archived, and what cells hold of the positions that are not."""
        others = np.setdiff1d(positions, self.positions)
        rows = zip(self.layers, cells.layers, strict=True)
        return [archived.joined(own.at(others)) for archived, own in rows]


class Queries:
    """Captured queries of the last tokens."""

    def __init__(self, n_layer: int, n_head: int, d: int) -> None:
        self.positions = np.zeros(0, np.int32)
        self.values = np.zeros((n_layer, 0, n_head, d), np.float32)
        self.outputs = np.zeros(0, np.int8)  # what is known of each: NONE, CELLS or ALL

    def append(self, first: int, tokens: Tokens, output: int) -> None:
        positions = np.arange(first, first + len(tokens), dtype=np.int32)
        self.positions = np.concatenate([self.positions, positions])
        self.values = np.concatenate([self.values, tokens.q], axis=1)
        self.outputs = np.append(self.outputs, np.full(len(tokens), output, np.int8))

    def keep(self, stays: BoolArray) -> None:
        self.positions, self.outputs = self.positions[stays], self.outputs[stays]
        self.values = self.values[:, stays]

    def age(self, archived: bool) -> None:
        """The cells are no longer what they were. What came from all tokens stays true where all
        of them are archived or resident."""
        self.outputs[(self.outputs != ALL) | (not archived)] = NONE

    def within(self, first: int, last: int) -> BoolArray:
        """Which have positions [first, last)."""
        return (self.positions >= first) & (self.positions < last)
