"""Selection of the reference: worked by hand, and properties."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from laq_gguf.reference import POLICIES, PolicyParams, query_range, random_scores, select_head
from laq_gguf.reference.select import copies, follow_scores, pinned_mask, rank_scores, select


def test_six_tokens_by_hand() -> None:
    # scores      .1 .9 .3 .3 .2 .0   budget 4, token 0 and 5 pinned
    # pinned first: 0, 5; two left for 1 (.9) and, of the two .3, the lower one: 2
    scores = [0.1, 0.9, 0.3, 0.3, 0.2, 0.0]
    pinned = [1, 0, 0, 0, 0, 1]
    assert select(scores, 4, pinned).tolist() == [0, 1, 2, 5]
    # nothing pinned: .9, .3, .3, .2
    assert select(scores, 4).tolist() == [1, 2, 3, 4]
    # more pinned than fit: the lowest of them
    assert select(scores, 1, pinned).tolist() == [0]
    assert select(scores, 0, pinned).tolist() == []
    assert select(scores, 6, pinned).tolist() == [0, 1, 2, 3, 4, 5]


def test_six_tokens_under_a_policy_by_hand() -> None:
    # positions 0 2 3 7 8 9 (an earlier eviction left gaps), 1 sink, kept whole from 9 on:
    # pinned 0 and 9. raw scores 0 4 1 2 0 0, max pooling over 3 cells: 4 4 4 2 2 0
    # budget 4: 0, 9, then cell 1 and cell 2 (both 4) -> positions 0 2 3 9
    positions = np.array([0, 2, 3, 7, 8, 9])
    params = PolicyParams(4, policy="laq", n_sink=1, kernel_size=3, follow_size=0)
    kept = select_head(params, positions, n_intact=9, scores=[0, 4, 1, 2, 0, 0])
    assert positions[kept].tolist() == [0, 2, 3, 9]
    # without pooling the 2 at position 7 beats the 1 at position 3
    params = PolicyParams(4, policy="laq", n_sink=1, pooling="none", follow_size=0)
    kept = select_head(params, positions, n_intact=9, scores=[0, 4, 1, 2, 0, 0])
    assert positions[kept].tolist() == [0, 2, 7, 9]
    # streaming: the sink, 9, then the latest two
    params = PolicyParams(4, policy="streaming", n_sink=1)
    assert positions[select_head(params, positions, n_intact=9)].tolist() == [0, 7, 8, 9]
    # a span of the user takes the place of a better score
    params = PolicyParams(4, policy="laq", n_sink=1, kernel_size=3, pinned=((7, 9),))
    kept = select_head(params, positions, n_intact=9, scores=[0, 4, 1, 2, 0, 0])
    assert positions[kept].tolist() == [0, 7, 8, 9]
    assert len(select_head(PolicyParams(4, policy="full"), positions, n_intact=0)) == 6


def test_keys_after_the_best_follow_it_by_hand() -> None:
    # position 3 follows 2; 7 is out of reach of one position, and in reach of five
    positions, scores = np.array([0, 2, 3, 7, 8, 9]), np.array([0, 4, 1, 2, 0, 0], np.float32)
    assert follow_scores(scores, positions, 0).tolist() == [0, 4, 1, 2, 0, 0]
    assert follow_scores(scores, positions, 1).tolist() == [0, 4, 4, 2, 2, 0]
    assert follow_scores(scores, positions, 4).tolist() == [0, 4, 4, 2, 2, 2]
    assert follow_scores(scores, positions, 5).tolist() == [0, 4, 4, 4, 2, 2]
    # three cells are free: two for the best, at 2 and 7; one of 3 * 3 // 8 for what follows
    scores = [0, 4, 1, 3, 2, 0]
    params = PolicyParams(5, policy="laq", n_sink=1, pooling="none", follow_size=1)
    kept = select_head(params, positions, 9, scores)
    assert positions[kept].tolist() == [0, 2, 3, 7, 9]
    # what stays anyway lifts nobody
    kept = select_head(params, positions, 9, [99, 4, 1, 3, 2, 0])
    assert positions[kept].tolist() == [0, 2, 3, 7, 9]
    # snapkv looks at the prompt alone and does not follow
    params = PolicyParams(5, policy="snapkv", n_sink=1, pooling="none", follow_size=1)
    kept = select_head(params, positions, 9, scores)
    assert positions[kept].tolist() == [0, 2, 7, 8, 9]


def test_only_heads_that_copy_follow_by_hand() -> None:
    nothing = np.zeros(101, bool)
    # 100 keys of 1 and one of 7 or 8: 7 of 107 is less than 7 %, 8 of 108 is more
    even = np.ones(101, np.float32)
    even[40] = 7
    assert not copies(even, nothing)
    even[40] = 8
    assert copies(even, nothing)
    # what is pinned is neither the best key nor part of the sum
    assert not copies(even, np.arange(101) == 40)
    even[40], even[41] = 7, 50
    assert copies(even, np.arange(101) >= 41)
    # no attention, nothing free, no order
    assert not copies(np.zeros(3), np.zeros(3, bool))
    assert not copies([1, 2], [True, True])
    assert not copies([np.inf, -np.inf, 5], np.zeros(3, bool))
    params = PolicyParams(10, policy="laq++", n_sink=0, pooling="none", follow_size=8)
    even = np.ones(101, np.float32)
    even[40] = 7
    kept = select_head(params, np.arange(101), 100, even)
    assert kept.tolist() == [*range(8), 40, 100]
    even[40] = 8
    kept = select_head(params, np.arange(101), 100, even)
    assert kept.tolist() == [*range(5), 40, 41, 42, 43, 100]


def test_pinned_by_hand() -> None:
    got = pinned_mask(np.arange(10), n_sink=2, n_intact=8, spans=[(3, 5), (4, 6)])
    assert np.flatnonzero(got).tolist() == [0, 1, 3, 4, 5, 8, 9]


def test_queries_by_hand() -> None:
    # a prompt of 100 and 5 tokens after it
    def queries(policy, n_tokens=105, n_prompt=100, **settings):
        return query_range(PolicyParams(64, policy=policy, **settings), n_prompt, n_tokens)

    assert queries("laq") == (100, 105)
    assert queries("laq", n_tokens=150) == (100, 132)
    assert queries("laq", n_tokens=100) == (92, 100)
    assert queries("laq++") == (92, 105)
    assert queries("laq++", window_size=3, lookahead_size=2) == (97, 102)
    assert queries("snapkv") == (68, 100)
    assert queries("snapkv", n_prompt=10, n_tokens=10) == (0, 10)
    assert queries("laq++", n_prompt=5, n_tokens=6) == (0, 6)
    for policy in ("streaming", "random", "full"):
        first, last = queries(policy)
        assert first == last


def test_random_scores_follow_splitmix64() -> None:
    # with seed, layer and head 0 the state is the position itself. Position 0: all shifts and
    # products of 0 are 0. Otherwise splitmix64's finalizer, here with Python's big integers.
    def finalize(x: int) -> int:
        word = 2**64 - 1
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    assert random_scores(0, 0, 0, [0])[0] == 0
    # the first output of splitmix64 seeded with 0, published as 0xE220A8397B1DCDAF, finalizes the
    # golden gamma, which is what seed 1 adds
    assert finalize(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    assert random_scores(1, 0, 0, [0])[0] == 0xE220A8 / 2**24
    state = 3 * 0x9E3779B97F4A7C15 + 5 * 0xBF58476D1CE4E5B9 + 2 * 0x94D049BB133111EB + 1234
    assert random_scores(3, 5, 2, [1234])[0] == (finalize(state % 2**64) >> 40) / 2**24
    many = random_scores(2**32 - 1, 40, 7, np.arange(4096))
    assert many.dtype == np.float32
    assert (many >= 0).all() and (many < 1).all()
    assert abs(many.mean() - 0.5) < 0.03
    assert not np.array_equal(many, random_scores(2**32 - 1, 40, 6, np.arange(4096)))


def test_pooling_is_for_attention_only() -> None:
    positions = np.arange(50)
    ranked = rank_scores(PolicyParams(8, policy="random", seed=3), positions, ikv=1, head=2)
    np.testing.assert_array_equal(ranked, random_scores(3, 1, 2, positions))
    ranked = rank_scores(PolicyParams(8, policy="streaming"), positions)
    np.testing.assert_array_equal(ranked, positions)
    with pytest.raises(ValueError, match="scores"):
        rank_scores(PolicyParams(8, policy="snapkv"), positions)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="policy"):
        PolicyParams(8, policy="h2o")
    with pytest.raises(ValueError, match="budget"):
        PolicyParams(0)
    with pytest.raises(ValueError, match="follow_size"):
        PolicyParams(8, follow_size=-1)
    with pytest.raises(ValueError, match="NaN"):
        select([0.0, float("nan"), 1.0], 2)


# few different values, so that ties are the rule
tied = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=60)


@st.composite
def selections(draw):
    scores = np.array(draw(tied), np.float32)
    pinned = np.array(draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    return scores, pinned, draw(st.integers(0, len(scores) + 3))


@given(selections())
def test_selection_properties(selection) -> None:
    scores, pinned, budget = selection
    kept = select(scores, budget, pinned)
    assert len(kept) == min(budget, len(scores))
    assert (np.diff(kept) > 0).all()
    lost = np.setdiff1d(np.arange(len(scores)), kept)
    if pinned.sum() <= budget:
        assert not pinned[lost].any()
        free = kept[~pinned[kept]]
        for i in lost:  # whoever stayed was better, or equal and earlier
            better = (scores[free] > scores[i]) | ((scores[free] == scores[i]) & (free < i))
            assert better.all()


@given(selections())
def test_monotone_in_budget(selection) -> None:
    scores, pinned, budget = selection
    assert set(select(scores, budget, pinned)) <= set(select(scores, budget + 1, pinned))


@st.composite
def heads(draw):
    n_kv = draw(st.integers(1, 80))
    last = draw(st.integers(n_kv, n_kv + 40))
    positions = draw(st.permutations(range(last)))[: n_kv - 1]
    window = draw(st.integers(1, 12))
    policy = draw(st.sampled_from([p for p in POLICIES if p != "full"]))
    params = PolicyParams(
        draw(st.integers(20, 90)),
        policy=policy,
        n_sink=draw(st.integers(0, 6)),
        pooling=draw(st.sampled_from(["none", "max", "avg"])),
        kernel_size=draw(st.sampled_from([1, 3, 7])),
        follow_size=draw(st.sampled_from([0, 1, 5, 32])),
    )
    scores = np.array(draw(st.lists(st.floats(0, 9, width=16), min_size=n_kv, max_size=n_kv)))
    return params, np.sort([*positions, last]), last + 1 - window, scores


@given(heads())
def test_sinks_and_window_always_stay(head) -> None:
    params, positions, n_intact, scores = head
    pinned = pinned_mask(positions, n_sink=params.n_sink, n_intact=n_intact)
    assume(pinned.sum() <= params.budget)
    kept = positions[select_head(params, positions, n_intact, scores)]
    assert len(kept) == min(params.budget, len(positions))
    assert set(positions[positions < params.n_sink]) <= set(kept)
    assert set(positions[positions >= n_intact]) <= set(kept)
    assert (np.diff(kept) > 0).all()
