"""The fit of values: worked by hand, and properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laq_gguf.reference import (
    KVCache,
    PolicyParams,
    attention_outputs,
    attention_weights,
    causal_mask,
    fit_values,
)
from laq_gguf.reference.cells import Tokens
from laq_gguf.reference.values import FIT_QUERIES
from reference.made import SHAPE, keep, tokens


def test_two_values_by_hand() -> None:
    # one query pays 1/4 and 3/4 to two values 0, gets 0 and wants 1. x x^T = 1/16 + 9/16 = 10/16:
    # with a ridge of 6/16 each value gets its weight times 1, so that the query gets 10/16
    weights = np.array([0.25, 0.75]).reshape(1, 1, 1, 2)
    free = np.ones((1, 2), bool)
    fitted = fit_values(weights, np.zeros((1, 2, 1)), np.ones((1, 1, 1, 1)), free, 6 / 16)
    np.testing.assert_allclose(fitted.ravel(), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(attention_outputs(weights, fitted).ravel(), [10 / 16], rtol=1e-6)


def test_a_value_that_may_not_change_by_hand() -> None:
    # the same with the second value held at 2: it gives 3/2 already, and 1 is wanted. x x^T is
    # 1/16; with a ridge of 1/16 the first value gets 1/4 * -1/2 / (2/16) = -1
    weights = np.array([0.25, 0.75]).reshape(1, 1, 1, 2)
    values, free = np.array([0.0, 2.0]).reshape(1, 2, 1), np.array([[True, False]])
    fitted = fit_values(weights, values, np.ones((1, 1, 1, 1)), free, 1 / 16)
    np.testing.assert_allclose(fitted.ravel(), [-1, 2], rtol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, -0.1])
def test_a_ridge_is_positive(ridge) -> None:
    weights = np.full((1, 1, 1, 2), 0.5)
    with pytest.raises(ValueError, match="ridge"):
        fit_values(weights, np.zeros((1, 2, 1)), np.ones((1, 1, 1, 1)), np.ones((1, 2)), ridge)
    with pytest.raises(ValueError, match="value_fit"):
        PolicyParams(8, value_fit=-1)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 4), st.integers(1, 12))
def test_properties(seed, n_group, n_queries, n_kv) -> None:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2 * n_group, n_queries, 4))
    k, v = rng.standard_normal((n_kv, 2, 4)), rng.standard_normal((2, n_kv, 3)).astype(np.float32)
    weights = attention_weights(q, k, scale=1.0)
    outputs = attention_outputs(weights, v)
    free = rng.random((2, n_kv)) < 0.7
    # nothing is missing: nothing changes
    np.testing.assert_allclose(fit_values(weights, v, outputs, free, 0.01), v, atol=1e-6)
    wanted = outputs + rng.standard_normal(outputs.shape)
    fitted = {ridge: fit_values(weights, v, wanted, free, ridge) for ridge in (1e-3, 1e-1, 1e9)}
    for values in fitted.values():
        np.testing.assert_array_equal(values[~free], v[~free])

    def miss(values):
        return float(np.square(attention_outputs(weights, values) - wanted).sum())

    # the smaller the ridge, the closer; with a huge one all is as before
    before = miss(v)
    assert miss(fitted[1e-3]) <= miss(fitted[1e-1]) + 1e-4 <= before + 2e-4
    np.testing.assert_allclose(fitted[1e9], v, atol=1e-5)


def outputs_of(cache: KVCache, q: np.ndarray, first: int) -> np.ndarray:
    """What queries (n_head, n_queries, d) from position `first` on get in layer 0."""
    layer = cache.cells.layers[0]
    mask = causal_mask(first + np.arange(q.shape[1]), layer.positions)
    weights = attention_weights(q, layer.k.swapaxes(0, 1), scale=cache.scale, mask=mask)
    return attention_outputs(weights, layer.v)


@pytest.mark.parametrize("lookahead", ["deferred", "pseudo"])
def test_the_lookahead_gets_what_it_got(lookahead) -> None:
    caches = {
        name: KVCache(
            PolicyParams(80, lookahead_size=8, lookahead=lookahead, value_fit=value_fit, **rules),
            **SHAPE,
        )
        for name, value_fit, rules in (
            ("whole", 0, {"policy": "full"}),
            ("cut", 0, {}),
            ("fitted", 1e-4, {}),
        )
    }
    ahead = tokens(8, first=100)
    got = {}
    for name, cache in caches.items():
        cache.append(tokens(100))
        if lookahead == "pseudo" and name != "whole":
            cache.prompt_end(ahead)
        else:
            cache.prompt_end()
        cache.append(ahead)
        cache.flush()
        got[name] = outputs_of(cache, ahead.q[0].swapaxes(0, 1), 100)
    cut, fitted = (np.square(got[name] - got["whole"]).sum() for name in ("cut", "fitted"))
    assert fitted < 0.1 * cut


@pytest.mark.parametrize(
    "rules",
    [
        {"policy": "laq"},
        {"policy": "snapkv"},
        {"value_fit": 0},
    ],
    ids=str,
)
def test_what_is_compared_with_keeps_its_values(rules) -> None:
    assert not PolicyParams(32, **rules).fits_values
    assert PolicyParams(32).fits_values


def test_of_many_queries_values_are_fitted_to_the_last() -> None:
    ahead, params = tokens(50, first=100), PolicyParams(96, lookahead_size=50)
    kept = np.broadcast_to(np.arange(54, 150, dtype=np.int32), (2, 2, 96))

    def fitted_with(first: int, last: int) -> np.ndarray:
        """V where the queries of ahead[first:last] are others."""
        q = ahead.q.copy()
        q[:, first:last] *= -2
        cache = KVCache(PolicyParams(150, policy="full"), **SHAPE)
        cache.append(tokens(100))
        cache.append(Tokens(ahead.k, ahead.v, q))
        keep(cache, kept, 142, (params, (100, 150)))
        return np.stack([layer.v for layer in cache.cells.layers])

    as_they_are = fitted_with(0, 0)
    np.testing.assert_array_equal(fitted_with(0, 50 - FIT_QUERIES), as_they_are)
    assert (fitted_with(0, 51 - FIT_QUERIES) != as_they_are).any()


def test_pinned_values_stay() -> None:
    cache = KVCache(PolicyParams(32, lookahead_size=8, pinned=((20, 25),)), **SHAPE)
    cache.append(tokens(100))
    cache.prompt_end()
    cache.append(tokens(8, first=100))
    cache.flush()
    layer = cache.cells.layers[0]
    for positions, values in zip(layer.positions, layer.v, strict=True):
        pinned = (positions < 4) | (positions >= 92) | ((positions >= 20) & (positions < 25))
        np.testing.assert_array_equal(values[pinned, 0], positions[pinned])
        assert not np.array_equal(values[~pinned, 0], positions[~pinned])
