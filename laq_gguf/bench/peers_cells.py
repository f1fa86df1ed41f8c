"""Caches of several policies side by side: decoded as one batch, each over its own cells.

transformers attends over one mask for all layers and heads, while policies keep other numbers of
cells per layer, or other cells per head. Here every layer has its own mask, and what pads a row to
the longest of its batch is masked.

Needs the extra `peers` (torch, transformers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

ATTENTION = "laq_cells"  # the name of `attend` among transformers' attention functions


@dataclass(frozen=True)
class LayerCells:
    """What one layer of one cache holds after a prompt.

    Attributes:
        keys, values: (n_head_kv, n, d), RoPE applied, in any order.
        held: (n_head_kv, n), False where a head lacks that cell; None: every head holds all.
    """

    keys: torch.Tensor
    values: torch.Tensor
    held: torch.Tensor | None = None

    @property
    def n(self) -> int:
        """Cells of the head that has the most."""
        return self.keys.shape[1]

    @property
    def n_held(self) -> int:
        """Cells of all heads together."""
        return self.keys.shape[0] * self.n if self.held is None else int(self.held.sum())


Cells = list[LayerCells]


def held_bytes(cells: Cells, bytes_per_value: int = 2) -> int:
    """Bytes of K and V of the cells that heads hold, in f16 unless told."""
    return sum(
        layer.n_held * (layer.keys.shape[-1] + layer.values.shape[-1]) * bytes_per_value
        for layer in cells
    )


def cells_per_head(cells: Cells) -> float:
    """Cells that a head of a layer holds, mean."""
    return sum(layer.n_held for layer in cells) / sum(layer.keys.shape[0] for layer in cells)


def only_held(keys: torch.Tensor, values: torch.Tensor, held: torch.Tensor) -> LayerCells:
    """The cells that heads hold, moved to the front of each head.

    Args:
        keys, values: (n_head_kv, n, d).
        held: (n_head_kv, n).
    """
    n = int(held.sum(dim=-1).max())
    order = held.int().argsort(dim=-1, descending=True, stable=True)[:, :n, None]
    return LayerCells(
        keys.gather(1, order.expand(-1, -1, keys.shape[-1])),
        values.gather(1, order.expand(-1, -1, values.shape[-1])),
        held.gather(1, order[..., 0]),
    )


class Batch:
    """Rows of cells that grow together; stands in the place of transformers' cache.

    Attributes:
        n_past: positions before the first new token, the same for all rows.
        n_new: tokens decoded since.
    """

    def __init__(self, rows: Sequence[Cells], n_past: int, n_room: int) -> None:
        """Copy `rows`, with room for `n_room` new tokens."""
        self.n_past, self.n_new, self._n_room = n_past, 0, n_room
        self._layers = [self._layer([row[il] for row in rows]) for il in range(len(rows[0]))]

    def _layer(self, rows: list[LayerCells]) -> tuple[torch.Tensor, ...]:
        n, first = max(row.n for row in rows), rows[0]
        n_head_kv = first.keys.shape[0]

        def room(like: torch.Tensor) -> torch.Tensor:
            return like.new_zeros(len(rows), n_head_kv, n + self._n_room, like.shape[-1])

        keys, values = room(first.keys), room(first.values)
        held = torch.zeros(len(rows), n_head_kv, n + self._n_room, dtype=torch.bool)
        held[..., n:] = True
        for i, row in enumerate(rows):
            keys[i, :, : row.n], values[i, :, : row.n] = row.keys, row.values
            held[i, :, : row.n] = True if row.held is None else row.held
        return keys, values, held.to(keys.device)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, _: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a layer's new K and V (n_rows, n_head_kv, n, d); return all of them."""
        all_keys, all_values, _ = self._layers[layer]
        end = self._n_cells(layer) + keys.shape[2]
        all_keys[:, :, end - keys.shape[2] : end] = keys
        all_values[:, :, end - keys.shape[2] : end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(list(rows))
        self._layers = [tuple(part[index] for part in layer) for layer in self._layers]

    def get_seq_length(self, _: int = 0) -> int:
        """Positions decoded, whatever is kept of them."""
        return self.n_past + self.n_new

    def mask(self, layer: int, n: int) -> torch.Tensor:
        """What the last `n` tokens see: bool (n_rows, n_head_kv, n, n_cells)."""
        begin = self._n_cells(layer)
        held = self._layers[layer][2][:, :, None, : begin + n].repeat(1, 1, n, 1)
        held[..., begin:] &= torch.ones(n, n, dtype=torch.bool, device=held.device).tril()
        return held

    def _n_cells(self, layer: int) -> int:
        return self._layers[layer][0].shape[2] - self._n_room + self.n_new


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    laq_batch: Batch,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of new tokens over a `Batch`, with its own mask; K and V are not repeated.

    Args:
        query: (n_rows, n_head, n, d).
        key, value: (n_rows, n_head_kv, n_cells, d).

    Returns:
        (n_rows, n, n_head, d), and no weights.
    """
    n_rows, n_head, n, d = query.shape
    n_head_kv = key.shape[1]
    group = n_head // n_head_kv
    mask = laq_batch.mask(module.layer_idx, n)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.reshape(n_rows, n_head_kv, group * n, d),
        key,
        value,
        attn_mask=mask.repeat(1, 1, group, 1),
        scale=scaling,
    )
    return out.reshape(n_rows, n_head, n, d).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)
