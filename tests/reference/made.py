"""Tokens made up for the tests of the cache, and how a prompt of them is read."""

import numpy as np

from laq_gguf.reference import ChunkPlan, KVCache, PolicyParams, Span, Tokens, evict
from laq_gguf.reference.cells import NONE
from laq_gguf.reference.values import last_queries

SHAPE = {"n_layer": 2, "n_head": 4, "n_head_kv": 2, "n_embd_head": 4}


def tokens(n: int, seed: int = 0, first: int = 0) -> Tokens:
    """Random tokens; v says layer, head and position, so that a cell can be recognized."""
    rng = np.random.default_rng([seed, first])
    q = rng.standard_normal((2, n, 4, 4)).astype(np.float32) * 2
    k = rng.standard_normal((2, n, 2, 4)).astype(np.float32)
    v = np.zeros_like(k)
    v[..., 0] = np.arange(first, first + n)[None, :, None]
    v[..., 1] = np.arange(2)[:, None, None]
    v[..., 2] = np.arange(2)
    return Tokens(k, v, q)


def check_cells(cache: KVCache) -> None:
    """Every cell holds the token that the origin table says, in every layer and head."""
    for il, layer in enumerate(cache.cells.layers):
        for head, positions in enumerate(layer.positions):
            assert (np.diff(positions) > 0).all()
            np.testing.assert_array_equal(layer.v[head, :, 0], positions)
            np.testing.assert_array_equal(layer.v[head, :, 1], il)
            np.testing.assert_array_equal(layer.v[head, :, 2], head)


def wide(n_cells: int, *, n_batch: int = 32, **params) -> KVCache:
    # values stay what they were: a cell is recognized by them
    rules = {
        "budget": 32,
        "probe_size": 12,
        "lookahead_size": 8,
        "snapkv_window": 8,
        "value_fit": 0,
    }
    made = PolicyParams(**{**rules, **params})
    return KVCache(made, **SHAPE, n_cells=n_cells, n_batch=n_batch)


def read(cache: KVCache, n_left: int) -> list[ChunkPlan]:
    """Read a prompt as planned; a plan that fails is tried once more after the overflow."""
    plans = []
    while n_left:
        chunk = cache.plan(n_left)
        if chunk.n_tokens == 0:
            cache.overflow()
            chunk = cache.plan(n_left)
            assert chunk.n_tokens, "no room"
        make_room(cache, chunk)
        cache.append(tokens(chunk.n_tokens, first=cache.n_tokens))
        n_left -= chunk.n_tokens
        plans.append(chunk)
    return plans


def make_room(cache: KVCache, chunk: ChunkPlan) -> None:
    probe = None
    if cache.params.needs_lookahead:
        n_ahead = chunk.n_probe + cache.params.probe_ahead
        probe = tokens(n_ahead, seed=1, first=cache.n_tokens)
    cache.make_room(chunk.n_evict, probe, chunk.n_probe)


def keep(
    cache: KVCache, positions: np.ndarray, n_intact: int, fit: tuple[PolicyParams, Span]
) -> None:
    """Evict down to positions (n_layer, n_head_kv, n_kept) that another implementation selected; V
    is fitted as other settings say to what the queries [first, last) got."""
    index = np.zeros(positions.shape, np.int64)
    for il, head in np.ndindex(positions.shape[:2]):
        resident = cache.cells.layers[il].positions[head]
        assert np.isin(positions[il, head], resident).all(), f"layer {il}, head {head}"
        index[il, head] = np.searchsorted(resident, positions[il, head])
    own, (cache.params, queries) = cache.params, fit
    fitted = last_queries(cache.queries.within(*queries) & (cache.queries.outputs != NONE))
    if cache.params.fits_values and fitted.any():
        evict.fit_layers(cache, cache.cells.layers, list(index), fitted, n_intact)
    cache.cells.keep(list(index))
    cache.params, cache.n_intact = own, n_intact
    cache.queries.age(archived=False)
