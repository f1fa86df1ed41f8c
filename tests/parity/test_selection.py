"""The native selection equals numpy's exactly, given the same scores."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laq_gguf.reference import POOLINGS, pool_scores, random_scores, select
from tolerances import assert_equal

CANARY = 0xDEADBEEF

# the library is one for the whole session
exact = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def native_select(native, scores, pinned, budget, kernel_size, pooling):
    """(status, indices) of laq_select; pooling by name or number."""
    ffi, lib = native.ffi, native.lib
    n_kv = len(scores)
    n_max = min(n_kv, budget)
    dst = np.full(n_max + 8, CANARY, np.uint32)
    n_kept = ffi.new("uint32_t *", CANARY)
    number = pooling if isinstance(pooling, int) else POOLINGS.index(pooling)
    status = lib.laq_select(
        ffi.from_buffer("float[]", np.ascontiguousarray(scores, np.float32)),
        ffi.from_buffer("uint8_t[]", np.ascontiguousarray(pinned, np.uint8)),
        n_kv,
        budget,
        kernel_size,
        number,
        ffi.from_buffer("uint32_t[]", dst, require_writable=True),
        n_kept,
    )
    assert (dst[n_max:] == CANARY).all(), "laq_select wrote past dst"
    return status, dst[: n_kept[0]] if status == lib.LAQ_STATUS_OK else None


values = st.one_of(
    # few different values, so that ties are the rule; both zeros are equal
    st.sampled_from([0.0, -0.0, 0.25, 0.5, 1.0, -1.0]),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.just(float("-inf")),
)


@st.composite
def problems(draw):
    element = draw(st.sampled_from([values, st.sampled_from([0.0, 0.5, 1.0]), st.just(1.0)]))
    scores = np.array(draw(st.lists(element, min_size=1, max_size=120)), np.float32)
    n_kv = len(scores)
    pinned = np.array(draw(st.lists(st.booleans(), min_size=n_kv, max_size=n_kv)))
    if draw(st.booleans()):
        pinned &= np.arange(n_kv) % 7 == 0
    budget = draw(st.integers(1, n_kv + 3))
    kernel_size = 2 * draw(st.integers(0, 8)) + 1
    return scores, pinned, budget, kernel_size, draw(st.sampled_from(POOLINGS))


@exact
@given(problem=problems())
def test_selection(native, problem) -> None:
    scores, pinned, budget, kernel_size, pooling = problem
    if pooling == "avg":
        scores = np.where(np.isneginf(scores), np.float32(0), scores)  # -inf + inf has no order
    status, actual = native_select(native, scores, pinned, budget, kernel_size, pooling)
    assert status == native.lib.LAQ_STATUS_OK
    expected = select(pool_scores(scores, kernel_size, pooling), budget, pinned)
    assert_equal(actual, expected, f"budget {budget}, {pooling} over {kernel_size}")


@pytest.mark.parametrize("n_kv", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_selection_of_long_rows(native, n_kv, pooling) -> None:
    rng = np.random.default_rng(n_kv)
    # three decimals: thousands of ties
    scores = rng.random(n_kv).round(3).astype(np.float32)
    pinned = rng.random(n_kv) < 0.02
    for budget in {1, max(1, n_kv // 10), max(1, n_kv - 1), n_kv, n_kv + 1}:
        for kernel_size in (1, 5, 7):
            status, actual = native_select(native, scores, pinned, budget, kernel_size, pooling)
            assert status == native.lib.LAQ_STATUS_OK
            expected = select(pool_scores(scores, kernel_size, pooling), budget, pinned)
            assert_equal(actual, expected, f"budget {budget}, {pooling} over {kernel_size}")


@pytest.mark.parametrize(("kernel_size", "pooling"), [(4, 1), (0, 1), (7, 3), (7, -1)])
def test_wrong_arguments_are_refused(native, kernel_size, pooling) -> None:
    status, _ = native_select(native, np.ones(9), np.zeros(9), 4, kernel_size, pooling)
    assert status == native.lib.LAQ_STATUS_INVALID_ARGUMENT
    assert native.ffi.string(native.lib.laq_last_error())


uint32 = st.integers(0, 2**32 - 1)


@exact
@given(seed=uint32, ikv=uint32, head=uint32, position=st.integers(0, 2**31 - 1))
def test_random_score(native, seed, ikv, head, position) -> None:
    actual = native.lib.laq_random_score(seed, ikv, head, position)
    assert actual == float(random_scores(seed, ikv, head, [position])[0])
