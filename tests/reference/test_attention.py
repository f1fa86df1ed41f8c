"""Scores and pooling of the reference: worked by hand, and properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from laq_gguf.reference import attention_scores, causal_mask, pool_scores

LN2, LN3 = float(np.log(2)), float(np.log(3))


def test_six_keys_by_hand() -> None:
    # d = 1, k = (0, ln2, 0, ln3, 0, ln2), one KV head, two query heads, two queries at positions
    # 3 and 5, scale 1. exp(q * k) for q = 1: (1, 2, 1, 3, 1, 2), for q = 0: all 1.
    #   head 0: q = (1, 1)
    #     query at 3 sees keys 0..3, sum 7:  (1, 2, 1, 3, 0, 0) / 7
    #     query at 5 sees all,       sum 10: (1, 2, 1, 3, 1, 2) / 10
    #   head 1: q = (0, 0)
    #     query at 3: (1, 1, 1, 1, 0, 0) / 4
    #     query at 5: (1, 1, 1, 1, 1, 1) / 6
    # sum over queries, mean over the two heads, times 840 to clear the denominators:
    #   key 0: (1/7 + 1/10 + 1/4 + 1/6) / 2 = (120 + 84 + 210 + 140) / 1680 = 554 / 1680
    #   key 1: (240 + 168 + 210 + 140) / 1680 = 758 / 1680
    #   key 2: as key 0
    #   key 3: (360 + 252 + 210 + 140) / 1680 = 962 / 1680
    #   key 4: (0 + 84 + 0 + 140) / 1680 = 224 / 1680
    #   key 5: (0 + 168 + 0 + 140) / 1680 = 308 / 1680
    q = np.array([[[1.0], [1.0]], [[0.0], [0.0]]])
    k = np.array([0, LN2, 0, LN3, 0, LN2]).reshape(6, 1, 1)
    got = attention_scores(q, k, scale=1.0, mask=causal_mask([3, 5], np.arange(6)))
    want = np.array([[554, 758, 554, 962, 224, 308]]) / 1680
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_each_group_reads_its_own_keys() -> None:
    # two KV heads, four query heads, one query, scale 2, k = ln2 / 2 where it is not 0:
    # heads 0, 1 read KV head 0, k = (h, 0): weights (2, 1) / 3
    # heads 2, 3 read KV head 1, k = (0, 0): weights (1, 1) / 2
    k = np.array([[[LN2 / 2], [0]], [[0], [0]]])
    got = attention_scores(np.ones((4, 1, 1)), k, scale=2.0)
    np.testing.assert_allclose(got, [[2 / 3, 1 / 3], [1 / 2, 1 / 2]], rtol=1e-6)


def test_sink_takes_part_in_the_denominator_only() -> None:
    # two keys with logit 0 and a sink of ln2: 1 / (1 + 1 + 2) each; the other head has a sink of
    # -inf: 1 / 2 each; the mean is 3 / 8
    q, k = np.ones((2, 1, 1)), np.zeros((2, 1, 1))
    got = attention_scores(q, k, scale=1.0, sinks=[LN2, -np.inf])
    np.testing.assert_allclose(got, [[3 / 8, 3 / 8]], rtol=1e-6)


def test_softcap_bounds_the_logits_before_the_mask() -> None:
    # a logit of 1000 becomes 1 * tanh(1000) = 1, one of 0 stays 0: e / (e + 1); -inf still hides
    q, k = np.ones((1, 1, 1)), np.array([1000.0, 0.0, 1000.0]).reshape(3, 1, 1)
    mask = np.array([[0, 0, -np.inf]])
    got = attention_scores(q, k, scale=1.0, softcap=1.0, mask=mask)
    np.testing.assert_allclose(got, [[np.e / (np.e + 1), 1 / (np.e + 1), 0]], rtol=1e-6)


def test_a_query_that_sees_nothing_pays_nothing() -> None:
    got = attention_scores(
        np.ones((1, 2, 1)), np.zeros((2, 1, 1)), scale=1.0, mask=[[-np.inf] * 2, [0, 0]]
    )
    np.testing.assert_allclose(got, [[0.5, 0.5]])


def test_mask_by_head() -> None:
    # the heads hold different tokens: positions (0, 5) and (0, 2), a query at 3
    mask = causal_mask([3], [[0, 5], [0, 2]])
    assert mask.shape == (2, 1, 2)
    got = attention_scores(np.ones((2, 1, 1)), np.zeros((2, 2, 1)), scale=1.0, mask=mask)
    np.testing.assert_allclose(got, [[1, 0], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("q", "k", "mask", "softcap"),
    [
        ((3, 1, 4), (5, 2, 4), None, 0.0),  # 3 heads do not fill 2 groups
        ((2, 1, 4), (5, 2, 8), None, 0.0),  # head sizes
        ((2, 4), (5, 2, 4), None, 0.0),  # rank
        ((2, 1, 4), (5, 2, 4), (5, 1), 0.0),  # mask
        ((2, 1, 4), (5, 2, 4), None, -1.0),
    ],
)
def test_wrong_shapes_are_refused(q, k, mask, softcap) -> None:
    bias = None if mask is None else np.zeros(mask)
    with pytest.raises(ValueError):
        attention_scores(np.ones(q), np.ones(k), scale=1.0, mask=bias, softcap=softcap)


shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 12), st.integers(1, 8)
)


@given(shapes, st.integers(0, 2**32 - 1))
def test_every_query_spends_one(shape, seed) -> None:
    n_head_kv, n_group, n_queries, n_kv, d = shape
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n_head_kv * n_group, n_queries, d))
    k = rng.standard_normal((n_kv, n_head_kv, d))
    scores = attention_scores(q, k, scale=d**-0.5)
    assert (scores >= 0).all()
    np.testing.assert_allclose(scores.sum(axis=1), n_queries, rtol=1e-5)


@given(shapes, st.integers(0, 2**32 - 1))
def test_permuted_heads_give_permuted_scores(shape, seed) -> None:
    n_head_kv, n_group, n_queries, n_kv, d = shape
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n_head_kv, n_group, n_queries, d))
    k = rng.standard_normal((n_kv, n_head_kv, d))
    heads, members, keys = (rng.permutation(n) for n in (n_head_kv, n_group, n_kv))

    def score(q, k):
        return attention_scores(q.reshape(-1, n_queries, d), k, scale=d**-0.5)

    plain = score(q, k)
    np.testing.assert_allclose(score(q[heads], k[:, heads]), plain[heads], rtol=1e-5)
    np.testing.assert_allclose(score(q[:, members], k), plain, rtol=1e-5)
    np.testing.assert_allclose(score(q, k[keys]), plain[:, keys], rtol=1e-5)


def test_pooling_by_hand() -> None:
    scores = np.array([1, 5, 2, 0, 3, 4], np.float32)
    # width 3: each with its two neighbours, the ends with one
    assert pool_scores(scores, 3, "max").tolist() == [5, 5, 5, 3, 4, 4]
    # sums 6, 8, 7, 5, 7, 7 (zeros beyond the ends), always divided by 3
    want = (np.array([6, 8, 7, 5, 7, 7], np.float32) / np.float32(3)).tolist()
    assert pool_scores(scores, 3, "avg").tolist() == want
    assert pool_scores(scores, 3, "none").tolist() == scores.tolist()
    assert pool_scores(scores, 1, "max").tolist() == scores.tolist()
    # wider than the row
    assert pool_scores(scores, 31, "max").tolist() == [5] * 6


def test_average_adds_in_float32_from_left_to_right() -> None:
    # 1e8 + 1 = 1e8 in float32, so (1e8 + 1) - 1e8 = 0 and not 1
    scores = np.array([1e8, 1, -1e8], np.float32)
    assert pool_scores(scores, 3, "avg")[1] == 0


@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-4, 4, width=32)),
    st.integers(0, 6).map(lambda r: 2 * r + 1),
)
def test_max_pooling_never_lowers_and_mirrors(scores, kernel_size) -> None:
    pooled = pool_scores(scores, kernel_size, "max")
    assert pooled.shape == scores.shape
    assert (pooled >= scores).all()
    assert pooled.max() == scores.max()
    np.testing.assert_array_equal(pool_scores(scores[::-1], kernel_size, "max"), pooled[::-1])


@pytest.mark.parametrize(("kernel_size", "pooling"), [(4, "max"), (0, "avg"), (3, "median")])
def test_pooling_refuses(kernel_size, pooling) -> None:
    with pytest.raises(ValueError):
        pool_scores(np.zeros(5), kernel_size, pooling)
