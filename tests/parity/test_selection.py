"""The native selection equals numpy's exactly, given the same scores."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laq_gguf.config import POLICIES
from laq_gguf.reference import POOLINGS, PolicyParams, random_scores, select_keys
from tolerances import assert_equal

CANARY = 0xDEADBEEF

# the library is one for the whole session
exact = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Problem:
    """A selection; pooling by name, or by a number that no name has."""

    scores: np.ndarray
    positions: np.ndarray
    pinned: np.ndarray
    budget: int
    kernel_size: int
    pooling: str | int
    follow_size: int
    policy: str = "laq"

    def expected(self) -> np.ndarray:
        params = PolicyParams(
            self.budget,
            policy=self.policy,
            kernel_size=self.kernel_size,
            pooling=self.pooling,
            follow_size=self.follow_size,
        )
        return select_keys(params, self.positions, self.pinned, self.scores)

    def __str__(self) -> str:
        return (
            f"{self.policy}, budget {self.budget}, {self.pooling} over {self.kernel_size}, "
            f"follow {self.follow_size}"
        )


def native_select(native, p: Problem):
    """(status, indices) of laq_select."""
    ffi, lib = native.ffi, native.lib
    n_kv = len(p.scores)
    n_max = min(n_kv, p.budget)
    dst = np.full(n_max + 8, CANARY, np.uint32)
    n_kept = ffi.new("uint32_t *", CANARY)
    params = ffi.new("struct laq_params *", lib.laq_default_params())
    params.policy = POLICIES[p.policy]
    params.n_kv_budget = p.budget
    params.n_kernel = p.kernel_size
    params.n_follow = p.follow_size
    params.pooling = p.pooling if isinstance(p.pooling, int) else POOLINGS.index(p.pooling)
    status = lib.laq_select(
        params,
        ffi.from_buffer("int32_t[]", np.ascontiguousarray(p.positions, np.int32)),
        ffi.from_buffer("float[]", np.ascontiguousarray(p.scores, np.float32)),
        ffi.from_buffer("uint8_t[]", np.ascontiguousarray(p.pinned, np.uint8)),
        n_kv,
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
    gaps = draw(st.lists(st.integers(1, 9), min_size=n_kv, max_size=n_kv))
    pooling = draw(st.sampled_from(POOLINGS))
    if pooling == "avg":
        scores = np.where(np.isneginf(scores), np.float32(0), scores)  # -inf + inf has no order
    return Problem(
        scores=scores,
        positions=np.cumsum(gaps) if draw(st.booleans()) else np.arange(n_kv),
        pinned=pinned,
        budget=draw(st.integers(1, n_kv + 3)),
        kernel_size=2 * draw(st.integers(0, 8)) + 1,
        pooling=pooling,
        follow_size=draw(st.integers(0, 40)),
        policy=draw(st.sampled_from(["laq", "laq++", "snapkv"])),
    )


@exact
@given(problem=problems())
def test_selection(native, problem) -> None:
    status, actual = native_select(native, problem)
    assert status == native.lib.LAQ_STATUS_OK
    assert_equal(actual, problem.expected(), str(problem))


@pytest.mark.parametrize("n_kv", [1, 255, 256, 257, 5000])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_selection_of_long_rows(native, n_kv, pooling) -> None:
    rng = np.random.default_rng(n_kv)
    # three decimals: thousands of ties
    scores = rng.random(n_kv).round(3).astype(np.float32)
    pinned = rng.random(n_kv) < 0.02
    positions = np.cumsum(rng.integers(1, 4, n_kv))
    for budget in {1, max(1, n_kv // 10), max(1, n_kv - 1), n_kv, n_kv + 1}:
        for kernel_size, follow_size in ((1, 32), (5, 0), (7, 32)):
            problem = Problem(scores, positions, pinned, budget, kernel_size, pooling, follow_size)
            status, actual = native_select(native, problem)
            assert status == native.lib.LAQ_STATUS_OK
            assert_equal(actual, problem.expected(), str(problem))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kernel_size": 4},
        {"kernel_size": 0},
        {"pooling": 3},
        {"pooling": -1},
        {"policy": "streaming"},
        {"positions": np.arange(9)[::-1]},
        {"scores": np.full(9, np.nan)},
    ],
)
def test_wrong_arguments_are_refused(native, wrong) -> None:
    good = Problem(np.ones(9), np.arange(9), np.zeros(9), 4, 7, "max", 0)
    assert native_select(native, good)[0] == native.lib.LAQ_STATUS_OK
    status, _ = native_select(native, replace(good, **wrong))
    assert status == native.lib.LAQ_STATUS_INVALID_ARGUMENT
    assert native.ffi.string(native.lib.laq_last_error())


uint32 = st.integers(0, 2**32 - 1)


@exact
@given(seed=uint32, ikv=uint32, head=uint32, position=st.integers(0, 2**31 - 1))
def test_random_score(native, seed, ikv, head, position) -> None:
    actual = native.lib.laq_random_score(seed, ikv, head, position)
    assert actual == float(random_scores(seed, ikv, head, [position])[0])
