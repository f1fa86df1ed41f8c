"""What the cells of one sequence hold, whatever the policy: tokens come, some stay, some go.

Each layer and KV head holds its own tokens, sorted by position; all hold the same number. The
positions are the origin table: they say which token a cell holds. Positions from `n_intact` on are
held by every head (the intact suffix), below it every head may miss different tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .attention import FloatArray

#: What changes as tokens come and go: all that `Cells.snapshot` copies.
_STATE = (
    "layers",
    "query_positions",
    "queries",
    "scores",
    "n_tokens",
    "n_prompt",
    "n_intact",
    "n_settled",
    "n_evictions",
    "pending",
    "remembers",
)


@dataclass(frozen=True)
class Tokens:
    """Keys, values and queries (after RoPE) of consecutive tokens in every layer.

    k, v: (n_layer, n_tokens, n_head_kv, d); q: (n_layer, n_tokens, n_head, d).
    """

    k: FloatArray
    v: FloatArray
    q: FloatArray

    def __len__(self) -> int:
        return self.k.shape[1]

    def __getitem__(self, tokens: slice) -> Tokens:
        return Tokens(self.k[:, tokens], self.v[:, tokens], self.q[:, tokens])


@dataclass
class Layer:
    """One layer: positions (n_head_kv, n_resident), k and v (n_head_kv, n_resident, d).

    memory (n_head_kv, n_resident): what a token scored when a probe last looked, mean over its
    queries; 0 where none has.
    """

    positions: npt.NDArray[np.int32]
    k: FloatArray
    v: FloatArray
    memory: FloatArray

    def heads(self) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
        yield from enumerate(self.positions)

    def keep(self, index: npt.NDArray[np.int64]) -> None:
        """index (n_head_kv, n_kept): cells of each head that stay, ascending."""
        self.positions = np.take_along_axis(self.positions, index, axis=1)
        self.k = np.take_along_axis(self.k, index[:, :, None], axis=1)
        self.v = np.take_along_axis(self.v, index[:, :, None], axis=1)
        self.memory = np.take_along_axis(self.memory, index, axis=1)

    def append(self, positions: npt.NDArray[np.int32], k: FloatArray, v: FloatArray) -> None:
        """k, v: (n_tokens, n_head_kv, d)."""
        rows = np.broadcast_to(positions, (len(self.positions), len(positions)))
        self.positions = np.concatenate([self.positions, rows], axis=1)
        self.k = np.concatenate([self.k, k.swapaxes(0, 1)], axis=1)
        self.v = np.concatenate([self.v, v.swapaxes(0, 1)], axis=1)
        self.memory = np.concatenate([self.memory, np.zeros(rows.shape, np.float32)], axis=1)


class Cells:
    """The cells of one sequence.

    Args:
        n_layer, n_head, n_head_kv, n_embd_head: shape of the model.
        n_cells: cells that there are and never more; None = as many as it takes.
    Attributes:
        n_foreign: cells that other sequences use, of the same n_cells. 0; the caller's to set.
    Raises:
        ValueError: n_cells below 1.
    """

    def __init__(
        self, n_layer: int, n_head: int, n_head_kv: int, n_embd_head: int, n_cells: int | None
    ) -> None:
        if n_cells is not None and n_cells < 1:
            raise ValueError(f"n_cells must be at least 1, got {n_cells}")
        self.n_layer, self.n_head, self.n_head_kv = n_layer, n_head, n_head_kv
        self.n_embd_head = n_embd_head
        self.n_cells, self.n_foreign = n_cells, 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        empty = np.zeros((self.n_head_kv, 0, self.n_embd_head), np.float32)
        self.layers = [
            Layer(np.zeros((self.n_head_kv, 0), np.int32), empty, empty, empty[:, :, 0])
            for _ in range(self.n_layer)
        ]
        self.query_positions = np.zeros(0, np.int32)
        self.queries = np.zeros((self.n_layer, 0, self.n_head, self.n_embd_head), np.float32)
        self.scores: list[FloatArray] = []  # raw, of the last eviction, (n_head_kv, n_kv) a layer
        self.n_tokens = 0  # last position + 1
        self.n_prompt = 0
        self.n_intact = 0  # 0 = nothing evicted
        self.n_settled = 0  # tokens before it were read from other cells than there are now
        self.n_evictions = 0
        self.pending = False  # an eviction waits for its lookahead queries
        self.remembers = False  # the last eviction was by a probe of the prompt that is being read

    @property
    def n_resident(self) -> int:
        return self.layers[0].positions.shape[1]

    @property
    def n_used(self) -> int:
        """Cells in use: those of this sequence and those of others."""
        return self.n_resident + self.n_foreign

    @property
    def n_free(self) -> int | None:
        """Cells that nothing uses; None = as many as it takes."""
        return None if self.n_cells is None else self.n_cells - self.n_used

    @property
    def positions(self) -> npt.NDArray[np.int32]:
        """The origin table: (n_layer, n_head_kv, n_resident), sorted along the last axis."""
        return np.stack([layer.positions for layer in self.layers])

    def visible(
        self, il: int, n_tokens: int
    ) -> tuple[npt.NDArray[np.int32], FloatArray, FloatArray]:
        """What n_tokens more attend to of what there is: positions (n_head_kv, n), k and v
        (n_head_kv, n, d)."""
        layer = self.layers[il]
        return layer.positions, layer.k, layer.v

    def fits(self, n_tokens: int, n_freed: int = 0) -> bool:
        """Whether n_tokens more find cells once n_freed are free."""
        return self.n_cells is None or self.n_used - n_freed + n_tokens <= self.n_cells

    def keep(self, positions: npt.NDArray[np.int32], n_intact: int) -> None:
        """Evict down to given positions, as another implementation selected them.

        Args:
            positions: (n_layer, n_head_kv, n_kept), ascending, all resident.
            n_intact: position from which every head holds every token.
        Raises:
            ValueError: a position that is not resident.
        """
        self._keep(self.cells_of(positions), n_intact)
        self.n_settled = self.n_tokens

    def cells_of(self, positions: npt.NDArray[np.int32]) -> list[npt.NDArray[np.int64]]:
        """Where positions (n_layer, n_head_kv, n) are, for each layer (n_head_kv, n).

        Raises:
            ValueError: a position that is not resident.
        """
        index = np.zeros(positions.shape, np.int64)
        for il, layer in enumerate(self.layers):
            for head, resident in layer.heads():
                if not np.isin(positions[il, head], resident).all():
                    raise ValueError(f"layer {il}, head {head}: a position is not resident")
                index[il, head] = np.searchsorted(resident, positions[il, head])
        return list(index)

    def remove(self, p0: int, p1: int = -1) -> bool:
        """Remove the positions [p0, p1); p1 < 0 means to the end. False: refused, nothing was
        changed.

        Below the intact suffix every head misses other tokens, so that a removal there cannot leave
        a prefix that may be continued: it is refused. Removing everything always works.
        """
        p0 = max(p0, 0)
        p1 = self.n_tokens if p1 < 0 else min(p1, self.n_tokens)
        if p0 == 0 and p1 == self.n_tokens:
            self.clear()
            return True
        if p0 >= p1:
            return True
        if p0 < self.n_intact:
            return False
        for layer in self.layers:
            # the same cells count in every head: they lie in the intact suffix
            rows = (layer.positions < p0) | (layer.positions >= p1)
            layer.keep(np.stack([np.flatnonzero(row) for row in rows]))
        self._keep_queries((self.query_positions < p0) | (self.query_positions >= p1))
        # when nothing of the intact suffix is left, its beginning is where tokens go on
        last = int(self.layers[0].positions[0].max(initial=-1))
        self.n_tokens = max(last + 1, self.n_intact)
        self.n_settled = min(self.n_settled, p0)
        self.remembers = False
        if p0 < self.n_prompt:
            self.pending = False  # the prompt that it belonged to is gone
        return True

    def snapshot(self) -> dict[str, Any]:
        """A copy of the state: what `restore` takes. Settings are no part of it."""
        return copy.deepcopy({name: getattr(self, name) for name in _STATE})

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go on from a snapshot, of this cache or of another one of the same model.

        Raises:
            ValueError: another shape, or more cells than there are. The cache is as before.
        """
        ours, theirs = (
            [(layer.k.shape[0], layer.k.shape[2]) for layer in layers]
            for layers in (self.layers, snapshot["layers"])
        )
        if ours != theirs or self.queries.shape[2:] != snapshot["queries"].shape[2:]:
            raise ValueError("the snapshot is of another model: layers, heads or head sizes differ")
        n_resident = snapshot["layers"][0].positions.shape[1]
        if not self.fits(n_resident, self.n_resident):
            raise ValueError(
                f"the snapshot has {n_resident} cells, more than there are: n_cells is "
                f"{self.n_cells}, others use {self.n_foreign}"
            )
        for name, value in copy.deepcopy(snapshot).items():
            setattr(self, name, value)

    def _append(self, tokens: Tokens) -> None:
        positions = np.arange(self.n_tokens, self.n_tokens + len(tokens), dtype=np.int32)
        for il, layer in enumerate(self.layers):
            layer.append(positions, tokens.k[il], tokens.v[il])
        self._append_queries(tokens)

    def _append_queries(self, tokens: Tokens) -> None:
        positions = np.arange(self.n_tokens, self.n_tokens + len(tokens), dtype=np.int32)
        self.query_positions = np.concatenate([self.query_positions, positions])
        self.queries = np.concatenate([self.queries, tokens.q], axis=1)
        self.n_tokens += len(tokens)

    def _keep(self, index: list[npt.NDArray[np.int64]], n_intact: int) -> None:
        """index: for each layer (n_head_kv, n_kept), cells that stay, ascending."""
        for layer, rows in zip(self.layers, index, strict=True):
            layer.keep(rows)
        self.n_intact = n_intact
        self.n_evictions += 1
        self.pending = False

    def _keep_queries(self, stays: npt.NDArray[np.bool_]) -> None:
        self.query_positions = self.query_positions[stays]
        self.queries = self.queries[:, stays]
