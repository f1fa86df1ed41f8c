"""The state of a reference's cache, saved and restored."""

from __future__ import annotations

import copy
from typing import Any

from laq_gguf.reference import KVCache

#: What changes as tokens come and go, beside the rows of the cells. Settings are no part of it.
STATE = ("queries", "archive", "phase", "n_tokens", "n_intact", "n_exact", "scores")


def snapshot(cache: KVCache, archive: bool = True) -> dict[str, Any]:
    """A copy of the state, which `restore` takes; without the archive what it holds is lost where
    the copy is restored."""
    state = {name: getattr(cache, name) for name in STATE} | {"layers": cache.cells.layers}
    return copy.deepcopy(state if archive else state | {"archive": None})


def restore(cache: KVCache, saved: dict[str, Any]) -> None:
    """Go on from a snapshot, of this cache or of another one of the same model.

    Raises:
        ValueError: the snapshot is of another model, or of more tokens than find cells. The cache
            is as it was.
    """
    state = copy.deepcopy(saved)
    layers, archive = state.pop("layers"), state.pop("archive")
    ours, theirs = ([x.k.shape[::2] for x in rows] for rows in (cache.cells.layers, layers))
    if ours != theirs or cache.queries.values.shape[2:] != state["queries"].values.shape[2:]:
        raise ValueError("the snapshot is of another model: layers, heads or head sizes differ")
    if not cache.cells.fits(len(layers[0]), cache.n_resident):
        raise ValueError(f"the snapshot has {len(layers[0])} cells, more than there are")
    cache.clear()
    cache.cells.layers = layers
    for name, value in state.items():
        setattr(cache, name, value)
    if cache.archive is not None and archive is not None:
        cache.archive = archive
    elif cache.archive is not None:
        n_missing = cache.n_intact - layers[0].n_before(cache.n_intact)
        cache.n_lost += n_missing * cache.n_layer * cache.n_head_kv
