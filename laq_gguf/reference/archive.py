"""What a cache keeps of evicted tokens, and what its heads may choose from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .attention import FloatArray


@dataclass
class Archive:
    """Tokens that left the intact suffix: positions (n,), ascending; k and v
    (n_layer, n_head_kv, n, d)."""

    positions: npt.NDArray[np.int32]
    k: FloatArray
    v: FloatArray

    @classmethod
    def empty(cls, n_layer: int, n_head_kv: int, d: int) -> Archive:
        rows = np.zeros((n_layer, n_head_kv, 0, d), np.float32)
        return cls(np.zeros(0, np.int32), rows, rows)

    def add(self, positions: npt.NDArray[np.int32], k: FloatArray, v: FloatArray) -> None:
        """Tokens that are not there yet; shapes as those of the archive."""
        self.positions = np.concatenate([self.positions, positions])
        order = np.argsort(self.positions)
        self.positions = self.positions[order]
        self.k = np.concatenate([self.k, k], axis=2)[:, :, order]
        self.v = np.concatenate([self.v, v], axis=2)[:, :, order]


@dataclass
class Candidates:
    """What the heads of a layer may hold, in columns of one list of positions.

    held (n_head_kv, n) and resident say where a head has such a token; k and v (n_head_kv, n, d)
    are 0 elsewhere. memory (n_head_kv, n) is the layer's, 0 for what is archived alone.
    """

    positions: npt.NDArray[np.int32]
    held: npt.NDArray[np.bool_]
    resident: npt.NDArray[np.bool_]
    k: FloatArray
    v: FloatArray
    memory: FloatArray
