"""The reference's cache: append, evict, remove, positions."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laq_gguf.reference import KVCache, PolicyParams, Tokens
from reference.made import SHAPE, check_cells, tokens
from reference.paper import prompt_end_of_paper

LN2 = float(np.log(2))


def filled(n_prompt: int, **params) -> KVCache:
    cache = KVCache(
        PolicyParams(**{"budget": 32, "lookahead_size": 8, "value_fit": 0, **params}), **SHAPE
    )
    cache.append(tokens(n_prompt))
    return cache


def test_six_tokens_by_hand() -> None:
    # one layer, one head, d = 1, scale 1, k = 0 but ln2 at position 2 and ln4 at position 4 (the
    # lookahead token, q = 1, which sees all): weights 1 1 2 1 4, of which 4 / 9 falls on itself.
    # budget 4 of 5: sink 0, window 1 (position 3) and everything after it: 0 3 4 stay, and 2
    # (weight 2 / 9) beats 1 (weight 1 / 9)
    params = PolicyParams(
        4, policy="laq", lookahead_size=1, window_size=1, n_sink=1, pooling="none"
    )
    cache = KVCache(params, n_layer=1, n_head=1, n_head_kv=1, n_embd_head=1, scale=1.0)
    k = np.array([0, 0, LN2, 0, 2 * LN2, 0], np.float32).reshape(1, 6, 1, 1)
    six = Tokens(k, np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1), np.ones_like(k))
    # a prompt of 4 fits the budget: nothing would happen, so the budget is lowered for it
    cache.params = replace(params, budget=3)
    cache.append(six[:4])
    cache.prompt_end()
    cache.params = params
    assert cache.pending
    cache.append(six[4:5])
    assert cache.pending and cache.n_resident == 5
    cache.append(six[5:6])
    np.testing.assert_allclose(cache.scores[0], np.array([[1, 1, 2, 1, 4]]) / 9, rtol=1e-6)
    assert cache.positions.tolist() == [[[0, 2, 3, 4, 5]]]
    assert cache.cells.layers[0].v.ravel().tolist() == [0, 2, 3, 4, 5]
    assert (cache.n_tokens, cache.n_intact, cache.n_evictions) == (6, 3, 1)


@pytest.mark.parametrize("policy", ["snapkv", "streaming", "random"])
def test_without_lookahead_the_prompt_end_evicts(policy) -> None:
    cache = filled(100, policy=policy, snapkv_window=16)
    cache.prompt_end()
    assert cache.n_resident == 32
    assert cache.n_tokens == 100
    assert cache.n_intact == 100 - (16 if policy == "snapkv" else 8)
    check_cells(cache)


def test_streaming_keeps_sinks_and_the_latest() -> None:
    cache = filled(100, policy="streaming")
    cache.prompt_end()
    want = [*range(4), *range(72, 100)]
    assert (cache.positions == want).all()


def test_heads_choose_for_themselves() -> None:
    cache = filled(100, policy="laq++")
    cache.prompt_end()
    cache.append(tokens(8, first=100))
    cache.flush()
    rows = {tuple(row) for layer in cache.positions for row in layer}
    assert len(rows) == 4
    check_cells(cache)


def test_deferred_waits_for_its_lookahead() -> None:
    cache = filled(100, policy="laq", lookahead_size=8)
    cache.prompt_end()
    for i in range(8):
        cache.append(tokens(1, first=100 + i))
        assert cache.n_resident == 101 + i
    cache.append(tokens(1, first=108))
    assert cache.n_resident == 33
    # the lookahead tokens were really generated: they stay
    assert (cache.positions[..., -9:] == np.arange(100, 109)).all()
    assert (cache.positions[..., -17:-9] == np.arange(92, 100)).all()
    check_cells(cache)


def test_a_flush_uses_the_lookahead_there_is() -> None:
    early, late = filled(100, policy="laq"), filled(100, policy="laq++")
    for cache in (early, late):
        cache.prompt_end()
        cache.append(tokens(3, first=100))
        cache.flush()
        assert (cache.n_resident, cache.n_intact, cache.pending) == (32, 92, False)
    # three queries and eight plus three: other scores
    assert early.scores[0].sum() == pytest.approx(2 * 3, rel=1e-5)
    assert late.scores[0].sum() == pytest.approx(2 * 11, rel=1e-5)
    # none yet: the last queries of the prompt
    none = filled(100, policy="laq")
    none.prompt_end()
    none.flush()
    assert none.scores[0].sum() == pytest.approx(2 * 8, rel=1e-5)


def test_a_long_batch_moves_the_lookahead_to_its_end() -> None:
    # 20 tokens at once after 3: only the last 8 of the 23 are ahead, the window lies before them
    cache = filled(100, policy="laq")
    cache.prompt_end()
    cache.append(tokens(3, first=100))
    cache.append(tokens(20, first=103))
    assert cache.n_evictions == 0
    cache.append(tokens(1, first=123))
    assert (cache.n_evictions, cache.n_resident, cache.n_intact) == (1, 33, 107)
    check_cells(cache)


def test_pseudo_tokens_score_and_vanish() -> None:
    ahead = tokens(8, first=100)
    deferred, pseudo = (filled(100, policy="laq", lookahead=x) for x in ("deferred", "pseudo"))
    deferred.prompt_end()
    deferred.append(ahead)
    deferred.flush()
    pseudo.prompt_end(ahead)
    # the pseudo tokens took part in the softmax, so the scores of the prompt are the same
    for a, b in zip(pseudo.scores, deferred.scores, strict=True):
        assert a.shape == (2, 100)
        np.testing.assert_array_equal(a, b[:, :100])
    assert (pseudo.n_tokens, pseudo.n_resident) == (100, 32)
    assert pseudo.positions.max() == 99
    assert pseudo.queries.positions.max() == 99
    check_cells(pseudo)


def test_the_papers_two_stages() -> None:
    snapkv = filled(100, policy="snapkv", budget=40)
    snapkv.prompt_end()
    drafted, ahead = [], tokens(8, first=100)

    def generate(cache: KVCache) -> Tokens:
        drafted.append(cache)
        return ahead

    cache = filled(100, policy="laq", lookahead="pseudo", budget=40)
    prompt_end_of_paper(cache, generate)
    np.testing.assert_array_equal(drafted[0].positions, snapkv.positions)
    # the keys of the pseudo tokens are gone: all attention falls on the 100 keys of the prompt
    assert cache.scores[0].shape == (2, 100)
    assert cache.scores[0].sum() == pytest.approx(2 * 8, rel=1e-5)
    assert (cache.n_tokens, cache.n_resident) == (100, 40)
    assert cache.queries.positions.max() == 99
    check_cells(cache)


@pytest.mark.parametrize("policy", ["laq", "laq++", "snapkv", "streaming", "random", "full"])
def test_nothing_happens_within_the_budget(policy) -> None:
    cache = filled(32, policy=policy)
    cache.prompt_end()
    cache.append(tokens(20, first=32))
    cache.flush()
    assert (cache.positions == np.arange(52)).all()
    assert cache.n_evictions == 0
    assert cache.remove(3)


def test_full_never_evicts() -> None:
    cache = filled(100, policy="full")
    cache.prompt_end()
    assert cache.n_resident == 100


def test_a_second_prompt_is_evicted_again() -> None:
    cache = filled(100, policy="laq++")
    cache.prompt_end()
    cache.append(tokens(8, first=100))
    cache.append(tokens(60, first=108))
    before = cache.positions
    cache.prompt_end()
    cache.append(tokens(8, first=168))
    cache.flush()
    assert cache.n_resident == 32
    assert cache.n_intact == 160
    for il, head in np.ndindex(2, 2):
        kept = cache.positions[il, head]
        assert set(kept) <= set(before[il, head]) | set(range(168, 176))
        assert set(range(4)) | set(range(160, 176)) <= set(kept)
    check_cells(cache)


def evicted() -> KVCache:
    cache = filled(100, policy="laq++")
    cache.prompt_end()
    cache.append(tokens(8, first=100))
    cache.append(tokens(4, first=108))
    assert (cache.n_intact, cache.n_tokens, cache.n_resident) == (92, 112, 36)
    return cache


def test_removal_below_the_intact_suffix_is_refused() -> None:
    cache = evicted()
    before = cache.positions
    for p0, p1 in [(91, -1), (1, -1), (0, 111), (0, 1), (50, 60), (91, 92)]:
        assert not cache.remove(p0, p1)
        np.testing.assert_array_equal(cache.positions, before)
    assert cache.n_tokens == 112


def test_removal_inside_the_intact_suffix() -> None:
    cache = evicted()
    assert cache.remove(105)
    assert (cache.n_tokens, cache.n_resident) == (105, 29)
    assert cache.positions.max() == 104
    assert cache.queries.positions.max() == 104
    check_cells(cache)
    cache.append(tokens(2, first=105))
    assert cache.n_tokens == 107
    assert cache.remove(92)
    assert (cache.n_tokens, cache.n_resident, cache.n_intact) == (92, 16, 92)
    assert cache.remove(200) and cache.remove(95, 93)
    assert cache.n_resident == 16


def test_a_full_clear_always_works() -> None:
    for p0, p1 in [(0, -1), (-1, -1), (0, 112), (0, 1000)]:
        cache = evicted()
        assert cache.remove(p0, p1)
        assert (cache.n_tokens, cache.n_resident, cache.n_intact) == (0, 0, 0)
        cache.append(tokens(5))
        assert cache.remove(2)


def test_removing_the_prompts_end_cancels_the_eviction() -> None:
    cache = filled(100, policy="laq")
    cache.prompt_end()
    cache.append(tokens(2, first=100))
    assert cache.remove(101) and cache.pending
    assert cache.remove(99) and not cache.pending
    cache.append(tokens(30, first=99))
    assert cache.n_evictions == 0


def test_refusals_leave_the_cache() -> None:
    cache = filled(100, policy="laq", budget=16, n_sink=4)
    with pytest.raises(ValueError, match="20 cells are pinned"):
        cache.prompt_end()
    assert not cache.pending and cache.n_resident == 100
    cache = filled(100, policy="laq", lookahead="pseudo")
    with pytest.raises(ValueError, match="pseudo"):
        cache.prompt_end()
    assert cache.n_resident == 100
    with pytest.raises(ValueError, match="pseudo"):
        filled(100, policy="snapkv").prompt_end(tokens(8, first=100))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["laq", "laq++", "snapkv", "streaming", "random"]),
    st.integers(20, 120),
    st.integers(24, 80),
    st.integers(1, 6),
    st.integers(0, 4),
    st.integers(1, 8),
    st.sampled_from([(), ((30, 33),), ((6, 8), (7, 10))]),
)
def test_cache_properties(policy, n_prompt, budget, n_ahead, n_sink, window, pinned) -> None:
    params = {"window_size": window, "snapkv_window": window, "lookahead_size": n_ahead}
    cache = filled(n_prompt, policy=policy, budget=budget, n_sink=n_sink, pinned=pinned, **params)
    cache.prompt_end()
    cache.append(tokens(n_ahead, first=n_prompt))
    cache.flush()
    lookahead = policy in ("laq", "laq++")
    if n_prompt <= budget:
        assert (cache.positions == np.arange(n_prompt + n_ahead)).all()
        return
    assert cache.n_resident == budget + (0 if lookahead else n_ahead)
    always = set(range(n_sink)) | set(range(n_prompt - window, n_prompt + n_ahead))
    always |= {p for p0, p1 in pinned for p in range(p0, min(p1, n_prompt))}
    for row in cache.positions.reshape(4, -1):
        assert always <= set(row)
    check_cells(cache)
