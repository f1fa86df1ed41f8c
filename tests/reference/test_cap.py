"""A cache of so many cells and no more, whatever is read and decoded: properties."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from laq_gguf.reference import KVCache, PolicyParams
from reference.made import SHAPE, check_cells, make_room, read, tokens

POLICIES = ("laq", "laq++", "snapkv", "streaming", "random")
N_SINK = 3


@st.composite
def caches(draw):
    """An empty cache whose staging holds a probe and at least one token."""
    window, n_ahead = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    params = PolicyParams(
        draw(st.integers(20, 48)),
        policy=draw(st.sampled_from(POLICIES)),
        lookahead=draw(st.sampled_from(["deferred", "pseudo"])),
        lookahead_size=n_ahead,
        window_size=window,
        snapkv_window=window,
        n_sink=N_SINK,
        value_fit=0,
        pinned=draw(st.sampled_from([(), ((8, 11),), ((2, 5), (7, 9))])),
        probe_size=draw(st.integers(1, 10)),
        chunk_size=draw(st.sampled_from([0, 1, 7])),
    )
    room = params.probe_size + n_ahead if params.needs_lookahead else 0
    n_cells = params.budget + room + draw(st.integers(1, 40))
    n_batch = draw(st.sampled_from([5, 16, 64]))
    return KVCache(params, **SHAPE, n_cells=n_cells, n_batch=n_batch)


def check_cache(cache: KVCache) -> None:
    assert cache.cells.n_used <= cache.cells.n_cells
    check_cells(cache)
    params, n = cache.params, cache.n_tokens
    always = {p for p0, p1 in ((0, params.n_sink), *params.pinned) for p in range(p0, min(p1, n))}
    always |= set(range(max(n - params.window, 0), n)) | set(range(cache.n_intact, n))
    for positions in cache.positions.reshape(4, -1):
        assert always <= set(positions)
    if cache.n_evictions == 0:
        assert cache.n_resident == n


def read_checked(cache: KVCache, n_left: int) -> None:
    """Read a prompt and look at every step."""
    params = cache.params
    ahead = params.lookahead_size if params.needs_lookahead else 0
    room = params.probe_size + ahead if params.needs_lookahead else 0
    while n_left:
        chunk = cache.plan(n_left)
        if chunk.n_tokens == 0:
            cache.overflow()
            chunk = cache.plan(n_left)
        assert 1 <= chunk.n_tokens <= min(cache.n_batch, n_left)
        n_resident = cache.n_resident
        small = cache.n_resident <= params.budget
        all_fits = n_left + (0 if small else ahead) <= cache.cells.n_free
        make_room(cache, chunk)
        check_cache(cache)
        assert cache.n_resident == n_resident - chunk.n_evict
        if chunk.n_evict:
            assert cache.n_resident >= params.budget
            assert not all_fits
        n_evictions = cache.n_evictions
        cache.append(tokens(chunk.n_tokens, first=cache.n_tokens))
        assert cache.n_evictions == n_evictions
        check_cache(cache)
        n_left -= chunk.n_tokens
        if not all_fits:
            assert cache.cells.n_used + room <= cache.cells.n_cells


@settings(max_examples=100, deadline=None)
@given(caches(), st.lists(st.tuples(st.integers(1, 150), st.integers(0, 40)), max_size=3))
def test_the_cap_holds(cache, turns) -> None:
    params = cache.params
    pseudo = params.needs_lookahead and params.lookahead == "pseudo"
    for n_prompt, n_answer in turns:
        read_checked(cache, n_prompt)
        ahead = tokens(params.lookahead_size, seed=1, first=cache.n_tokens) if pseudo else None
        cache.prompt_end(ahead)
        check_cache(cache)
        if not cache.pending:
            assert cache.n_resident <= params.budget
        for _ in range(n_answer):
            cache.append(tokens(1, first=cache.n_tokens))
            check_cache(cache)


@settings(max_examples=30, deadline=None)
@given(caches(), st.integers(1, 200))
def test_a_prompt_that_fits_is_evicted_once(cache, n_prompt) -> None:
    params = cache.params
    ahead = params.lookahead_size if params.needs_lookahead else 0
    n_prompt = min(n_prompt, cache.cells.n_cells - ahead)
    plans = read(cache, n_prompt)
    assert {chunk.n_evict for chunk in plans} == {0}
    assert len(plans) == -(-n_prompt // cache.n_batch)
    assert (cache.positions == np.arange(n_prompt)).all()
