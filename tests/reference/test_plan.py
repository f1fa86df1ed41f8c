"""The plan of a chunk: worked by hand, and properties."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laq_gguf.reference import POLICIES, ChunkPlan, PolicyParams, default_chunk, plan_chunk
from laq_gguf.reference.evict import check_pinned


def plan(n_used: int, n_left: int, *, n_resident: int | None = None, **params) -> tuple:
    """256 cells, batches of 64, budget 64, 8 tokens ahead, a probe of 48: 56 cells of room."""
    chunk = plan_chunk(
        PolicyParams(**{"budget": 64, "lookahead_size": 8, **params}),
        n_cells=256,
        n_used=n_used,
        n_resident=n_used if n_resident is None else n_resident,
        n_left=n_left,
        n_batch=64,
    )
    return chunk.n_tokens, chunk.n_evict, chunk.n_probe


@pytest.mark.parametrize("policy", ["laq", "laq++"])
def test_a_prompt_that_fits_by_hand(policy) -> None:
    # 248 tokens and 8 ahead are 256: the cells are full when the lookahead is complete
    assert plan(0, 248, policy=policy) == (64, 0, 0)
    assert plan(192, 56, policy=policy) == (56, 0, 0)
    assert plan(247, 1, policy=policy) == (1, 0, 0)
    # it is read in whole batches even where a prompt that does not fit is read in small ones
    assert plan(0, 248, policy=policy, chunk_size=16) == (64, 0, 0)
    # at the budget nothing could go: the cells may be full before the lookahead
    assert plan(200, 56, n_resident=64, policy=policy) == (56, 0, 0)
    assert plan(200, 57, n_resident=64, policy=policy) == (0, 0, 0)
    # one above it may: min(56 + 56 - 56, 65 - 64), then 56 + 1 - 56 tokens; 56 - 8 hold the probe
    assert plan(200, 56, n_resident=65, policy=policy) == (1, 1, 48)
    # nothing left, nothing to do
    assert plan(100, 0, policy=policy) == (0, 0, 0)


@pytest.mark.parametrize("policy", ["laq", "laq++"])
def test_a_prompt_that_does_not_fit_by_hand(policy) -> None:
    # 1000 > 256, but 256 - 56 = 200 cells are free for a batch, or for chunks of 16
    assert plan(0, 1000, policy=policy) == (64, 0, 0)
    assert plan(0, 1000, policy=policy, chunk_size=16) == (16, 0, 0)
    # 256 - 136 = 120 free, 120 - 56 = 64: just a batch
    assert plan(136, 1000, policy=policy) == (64, 0, 0)
    # one less: the batch of 64 and the room of 56 lack 1 of 119; 119 - 8 = 111 hold the probe
    assert plan(137, 1000, policy=policy) == (64, 1, 48)
    # free 64: the 57 that are left and 56 of room lack 49; the probe: min(48, 57, 64 - 8)
    assert plan(192, 57, policy=policy) == (57, 49, 48)
    # free 40: the 33 that are left and 56 lack 49; the probe: min(48, 33, 40 - 8)
    assert plan(216, 33, policy=policy) == (33, 49, 32)
    # chunks of 16: 16 + 56 - 64 = 8
    assert plan(192, 1000, policy=policy, chunk_size=16) == (16, 8, 48)
    # a chunk is never more than a batch
    assert plan(192, 1000, policy=policy, chunk_size=500) == (64, 56, 48)
    # a probe looks ahead 8 tokens at most
    assert plan(192, 1000, policy=policy, lookahead_size=32) == (64, 56, 48)
    # the lookahead from the end of the prompt wants more than a probe of 4 and 8: 64 + 32 - 64
    assert plan(192, 1000, policy=policy, lookahead_size=32, probe_size=4) == (64, 32, 4)
    # the room is that of the settings: 24 + 4 = 28, 64 + 28 - 64 = 28
    assert plan(192, 1000, policy=policy, probe_size=24, lookahead_size=4) == (64, 28, 24)


def test_near_the_budget_by_hand() -> None:
    # 36 cells are free, 100 - 64 = 36 may go, a batch would need 64 + 56 - 36 = 84: all 36 go, and
    # 36 + 36 - 56 = 16 tokens find room. The probe: min(48, 1000, 36 - 8)
    assert plan(220, 1000, n_resident=100) == (16, 36, 28)
    # at the budget nothing may go; 60 - 56 = 4 tokens, and the probe scores nothing
    assert plan(196, 1000, n_resident=64) == (4, 0, 48)
    assert plan(196, 1000, n_resident=10) == (4, 0, 48)


def test_a_plan_that_fails_by_hand() -> None:
    # at the budget, 56 cells free: all of it is room, no token
    assert plan(200, 1000, n_resident=64) == (0, 0, 0)
    # 192 cells may go, but with 8 free no probe can say which, with 9 one token can
    assert plan(256, 1000) == (0, 0, 0)
    assert plan(248, 1000) == (0, 0, 0)
    assert plan(247, 1000) == (64, 111, 1)
    # after the overflow 256 - 64 = 192 cells are free
    assert plan(64, 1000) == (64, 0, 0)
    # the room alone is more than there is
    assert plan(0, 1000, probe_size=250) == (0, 0, 0)


@pytest.mark.parametrize("policy", ["snapkv", "streaming", "random"])
def test_without_lookahead_no_room_is_kept_by_hand(policy) -> None:
    assert plan(0, 256, policy=policy) == (64, 0, 0)
    assert plan(192, 1000, policy=policy) == (64, 0, 0)
    assert plan(193, 1000, policy=policy) == (64, 1, 0)
    # the cells may be full: nothing has to be decoded to choose
    assert plan(256, 100, policy=policy) == (64, 64, 0)
    assert plan(256, 10, policy=policy) == (10, 10, 0)
    assert plan(256, 100, n_resident=70, policy=policy) == (6, 6, 0)
    assert plan(256, 100, n_resident=64, policy=policy) == (0, 0, 0)


def test_full_reads_until_the_cells_are_full_by_hand() -> None:
    assert plan(0, 1000, policy="full") == (64, 0, 0)
    assert plan(246, 1000, policy="full") == (10, 0, 0)
    assert plan(246, 3, policy="full") == (3, 0, 0)
    assert plan(256, 3, policy="full") == (0, 0, 0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="probe_size"):
        PolicyParams(8, probe_size=0)
    with pytest.raises(ValueError, match="chunk_size"):
        PolicyParams(8, chunk_size=-1)


def test_pinned_cells_by_hand() -> None:
    # 4 sinks, 92..99 kept whole, 40..43 of the user; 2..5 of the user overlap the sinks: 18
    params = PolicyParams(64, pinned=((40, 44), (2, 6)))
    check_pinned(params, 18, 92, 100)
    with pytest.raises(ValueError, match=r"18 cells are pinned .* the cells to keep are 17"):
        check_pinned(params, 17, 92, 100)
    # what lies beyond the end is not there yet: 0..4
    check_pinned(PolicyParams(5, pinned=((40, 44),)), 5, 0, 5)
    with pytest.raises(ValueError, match=r"5 cells are pinned .* the budget is 4"):
        check_pinned(PolicyParams(4), 4, 0, 5)


@st.composite
def situations(draw):
    """Settings, and numbers that a cache may have."""
    params = PolicyParams(
        draw(st.integers(1, 80)),
        policy=draw(st.sampled_from(POLICIES)),
        lookahead_size=draw(st.integers(1, 12)),
        probe_size=draw(st.integers(1, 60)),
        chunk_size=draw(st.sampled_from([0, 1, 16, 100])),
    )
    n_cells = draw(st.integers(1, 300))
    n_used = draw(st.integers(0, n_cells))
    counts = {
        "n_cells": n_cells,
        "n_used": n_used,
        "n_resident": draw(st.integers(0, n_used)),
        "n_left": draw(st.integers(1, 400)),
        "n_batch": draw(st.integers(1, 128)),
    }
    return params, counts


@given(situations())
def test_plan_properties(situation) -> None:
    params, counts = situation
    chunk = plan_chunk(params, **counts)
    free, n_left = counts["n_cells"] - counts["n_used"], counts["n_left"]
    ahead, probe_ahead, room = 0, 0, 0
    if params.needs_lookahead:
        ahead = params.lookahead_size
        probe_ahead = min(ahead, 8)
        room = max(params.probe_size + probe_ahead, ahead)
    if chunk.n_tokens == 0:
        assert chunk == ChunkPlan(0, 0, 0)
        # whatever may go, a chunk, the room of a probe and the budget do not fit together
        over = 0 if params.policy == "full" else max(counts["n_resident"] - params.budget, 0)
        no_probe = params.needs_lookahead and free <= probe_ahead
        assert free + over - room < 1 or no_probe
        return
    assert 1 <= chunk.n_tokens <= min(n_left, counts["n_batch"])
    assert chunk.n_tokens <= free + chunk.n_evict
    if params.policy == "full":
        assert (chunk.n_evict, chunk.n_probe) == (0, 0)
    elif n_left + ahead <= free or (n_left <= free and counts["n_resident"] <= params.budget):
        assert chunk == ChunkPlan(min(n_left, counts["n_batch"]), 0, 0)
    else:
        assert chunk.n_tokens <= (params.chunk_size or n_left)
        # afterwards the room of the next probe is free
        assert chunk.n_tokens + room <= free + chunk.n_evict
    if chunk.n_evict:
        assert counts["n_resident"] - chunk.n_evict >= params.budget
        assert chunk.n_tokens + room == free + chunk.n_evict
        assert (chunk.n_probe > 0) == params.needs_lookahead
    if chunk.n_probe:
        assert chunk.n_probe <= min(params.probe_size, n_left)
        assert chunk.n_probe + probe_ahead <= free


@given(situations())
def test_a_larger_budget_never_evicts_more(situation) -> None:
    params, counts = situation
    larger = replace(params, budget=params.budget + 7)
    before, after = (plan_chunk(p, **counts) for p in (params, larger))
    assert after.n_evict <= before.n_evict


@pytest.mark.parametrize(
    ("policy", "n_cells", "expected"),
    [("laq++", 768, (768 - 56) // 3), ("streaming", 300, 100), ("laq", 100, 32), ("laq", 10, 32)],
)
def test_default_chunk_is_a_third_of_the_cells(policy: str, n_cells: int, expected: int) -> None:
    assert default_chunk(PolicyParams(8, policy=policy), n_cells) == expected
