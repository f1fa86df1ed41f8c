"""A cache of so many cells and no more, worked by hand: chunks, probes, overflows."""

from dataclasses import replace

import numpy as np
import pytest

from laq_gguf.reference import ChunkPlan, KVCache, PolicyParams, Tokens
from laq_gguf.reference.seq import ATTENDING, IDLE, PROBED, WHOLE, Phase
from reference.made import SHAPE, check_cells, read, tokens, wide
from reference.saved import restore, snapshot

LN2, LN3, LN4 = float(np.log(2)), float(np.log(3)), float(np.log(4))


def row(k: list[float], q: list[float]) -> Tokens:
    """Tokens of one layer and one head with d = 1; v counts them."""
    keys = np.array(k, np.float32).reshape(1, -1, 1, 1)
    values = np.arange(len(k), dtype=np.float32).reshape(keys.shape)
    return Tokens(keys, values, np.array(q, np.float32).reshape(keys.shape))


def narrow(n_cells: int, budget: int, **params) -> KVCache:
    """One layer, one head, d = 1, scale 1; one sink, a window, a probe and a lookahead of one."""
    small = {"lookahead_size": 1, "window_size": 1, "snapkv_window": 1, "n_sink": 1}
    small["value_fit"] = 0
    made = PolicyParams(**{"budget": budget, "pooling": "none", "probe_size": 1, **small, **params})
    one = {"n_layer": 1, "n_head": 1, "n_head_kv": 1, "n_embd_head": 1, "scale": 1.0}
    return KVCache(made, **one, n_cells=n_cells, n_batch=2)


FIVE = row([0, 0, LN2, LN3, 0], [1] * 5)


def test_a_probe_over_five_tokens_by_hand() -> None:
    # 8 cells, 5 in use, 4 tokens left. They and one ahead are more than the 3 free cells: a chunk
    # of 2 and the room of 1 + 1 lack one cell.
    # probe at 5: k = 0, q = -1; pseudo at 6: k = ln4, q = 1
    #   weights of the pseudo token: 1 1 2 3 1 1 4, sum 13
    #   weights of the probe:        1 1 1/2 1/3 1 1, sum 29/6: 6 6 3 2 6 6, sum 29
    # both, times 377 = 13 * 29: 29 + 78 = 107, 107, 58 + 39 = 97, 87 + 26 = 113, 107
    probe = row([0, LN4], [-1, 1])
    for policy, scores, kept in (
        ("laq", np.array([1, 1, 2, 3, 1]) / 13, [0, 2, 3, 4]),
        ("laq++", np.array([107, 107, 97, 113, 107]) / 377, [0, 1, 3, 4]),
    ):
        cache = narrow(8, 3, policy=policy)
        cache.append(FIVE)
        assert cache.plan(4) == ChunkPlan(n_tokens=2, n_evict=1, n_probe=1)
        cache.make_room(1, probe, 1)
        np.testing.assert_allclose(cache.scores[0], [scores], rtol=1e-6)
        assert cache.positions.tolist() == [[kept]]
        assert cache.cells.layers[0].v.ravel().tolist() == kept
        assert cache.queries.positions.tolist() == [0, 1, 2, 3, 4]
        assert (cache.n_tokens, cache.n_intact, cache.n_evictions) == (5, 4, 1)
        # the chunk, and two cells of room beside it
        cache.append(row([0, 0], [1, 1]))
        assert cache.positions.tolist() == [[[*kept, 5, 6]]]
        # of 2 left, one ahead: 3 of 2 free cells; 2 + 2 - 2 = 2 have to go, 3 may
        assert cache.plan(2) == ChunkPlan(n_tokens=2, n_evict=2, n_probe=1)


def test_a_short_probe_scores_alone_by_hand() -> None:
    # the window is two, the probe one: the token before the probe does not score
    cache = narrow(8, 4, policy="laq++", window_size=2)
    cache.append(FIVE)
    cache.make_room(1, row([0, LN4], [-1, 1]), 1)
    want = np.array([[107, 107, 97, 113, 107]]) / 377
    np.testing.assert_allclose(cache.scores[0], want, rtol=1e-6)
    # 0, 3 and 4 are pinned; 1 beats 2
    assert cache.positions.tolist() == [[[0, 1, 3, 4]]]


@pytest.mark.parametrize("removed", (False, True))
def test_what_a_probe_saw_counts_at_the_next_one_by_hand(removed: bool) -> None:
    cache = narrow(9, 3, policy="laq")
    cache.append(FIVE)
    cache.make_room(1, row([0, LN4], [-1, 1]), 1)
    # of the kept ones 0 2 3 4, each over 13: 1 2 3 1. 4 is of the intact suffix: not known
    np.testing.assert_allclose(cache.cells.layers[0].memory * 13, [[1, 2, 3, 1]], rtol=1e-6)
    cache.append(row([0, 0], [1, 1]))
    if removed:  # the prompt is gone, and another one goes on from here
        assert cache.remove(5) and not cache.phase.is_reading
        cache.append(row([0, 0], [1, 1]))
    # pseudo token at 8: q = -1, weights 1 1/2 1/3 1 1 1 1 1, sum 41/6
    cache.make_room(1, row([0, 0], [-1, -1]), 1)
    np.testing.assert_allclose(cache.scores[0] * 41, [[6, 3, 2, 6, 6, 6]], rtol=1e-6)
    # 0 and 6 are pinned, 4 and 5 have 6/41. 2: (3/41 + 2/13) / 2 < 3: (2/41 + 3/13) / 2
    kept = 2 if removed else 3
    assert cache.positions.tolist() == [[[0, kept, 4, 5, 6]]]
    want = 3 / 41 if removed else (2 / 41 + 3 / 13) / 2
    np.testing.assert_allclose(cache.cells.layers[0].memory[0, 1], want, rtol=1e-6)
    cache.prompt_end()
    assert cache.pending and cache.phase.how == PROBED
    cache.append(row([0], [1]))
    cache.flush()
    assert (cache.n_resident, cache.phase) == (3, IDLE)


def test_room_without_a_probe_by_hand() -> None:
    # snapkv: the last query of what is cached, q = 1 at 4: weights 1 1 2 3 1, sum 8
    cache = narrow(8, 3, policy="snapkv")
    cache.append(FIVE)
    cache.make_room(1)
    np.testing.assert_allclose(cache.scores[0], np.array([[1, 1, 2, 3, 1]]) / 8, rtol=1e-6)
    assert cache.positions.tolist() == [[[0, 2, 3, 4]]]
    # streaming: the sink and the latest
    cache = narrow(8, 3, policy="streaming")
    cache.append(FIVE)
    cache.make_room(2)
    assert cache.positions.tolist() == [[[0, 3, 4]]]
    assert (cache.n_intact, cache.scores) == (4, [])
    cache.make_room(0)
    assert cache.n_evictions == 1


SIX = row([0, 0, LN2, LN3, 0, 0], [1] * 6)


def test_six_cells_overflow_by_hand() -> None:
    # the query of the last token scores: weights 1 1 2 3 1 1, sum 9. Kept whole from 6 - 1 - 1 = 4
    # on, the sink 0, and one more: 3
    cache = narrow(6, 4, policy="laq")
    cache.append(SIX)
    cache.append(row([0], [1]))
    np.testing.assert_allclose(cache.scores[0], np.array([[1, 1, 2, 3, 1, 1]]) / 9, rtol=1e-6)
    assert cache.positions.tolist() == [[[0, 3, 4, 5, 6]]]
    assert (cache.n_tokens, cache.n_intact, cache.n_evictions) == (7, 4, 1)
    # one cell is free: nothing happens
    cache.append(row([0], [1]))
    assert (cache.n_resident, cache.n_evictions) == (6, 1)


def test_an_overflow_does_a_waiting_eviction_by_hand() -> None:
    # the prompt of 5 waits for two tokens; the second finds no cell. The last two tokens score,
    # one of the prompt among them: (1 1 2 3 1 0) / 8 + (1 1 2 3 1 1) / 9, times 72:
    # 17 17 34 51 17 8. Kept whole from 6 - 2 - 1 = 3 on, and the sink
    cache = narrow(6, 4, policy="laq", lookahead_size=2)
    cache.append(SIX[:5])
    cache.prompt_end()
    cache.append(SIX[5:])
    assert cache.pending and cache.n_evictions == 0
    cache.append(row([0], [1]))
    want = np.array([[17, 17, 34, 51, 17, 8]]) / 72
    np.testing.assert_allclose(cache.scores[0], want, rtol=1e-6)
    assert cache.positions.tolist() == [[[0, 3, 4, 5, 6]]]
    assert (cache.n_intact, cache.n_evictions, cache.pending) == (3, 1, False)


def test_down_to_any_number_by_hand() -> None:
    # as the overflow by hand: 3 is the best and 2 the next
    cache = narrow(6, 4, policy="laq")
    cache.append(SIX)
    cache.evict(6)
    assert cache.n_evictions == 0
    cache.evict(5)
    assert cache.positions.tolist() == [[[0, 2, 3, 4, 5]]]
    cache.evict(3)
    assert cache.positions.tolist() == [[[0, 4, 5]]]
    cache.overflow()
    assert (cache.n_resident, cache.n_evictions) == (3, 2)
    with pytest.raises(ValueError, match="3 cells are pinned"):
        cache.evict(2)
    with pytest.raises(ValueError, match="n_keep"):
        cache.evict(0)


@pytest.mark.parametrize("policy", ["snapkv", "streaming", "random"])
def test_an_overflow_without_lookahead(policy) -> None:
    cache = wide(64, policy=policy)
    cache.append(tokens(64))
    cache.append(tokens(1, first=64))
    assert (cache.n_resident, cache.n_intact) == (33, 56)
    if policy == "snapkv":
        assert cache.scores[0].sum() == pytest.approx(2 * 8, rel=1e-5)
    if policy == "streaming":
        assert (cache.positions == [*range(4), *range(36, 65)]).all()
    check_cells(cache)


def test_a_long_prompt_in_chunks() -> None:
    # room 12 + 8 = 20. Three chunks of 16 bring 48, and 80 - 48 - 20 = 12 are too few for a fourth:
    # 4 have to go, then 16 each time. At the end 16 and 8 ahead are more than the 20 free cells.
    cache = wide(80, chunk_size=16)
    plans = read(cache, 160)
    assert [chunk.n_evict for chunk in plans] == [0, 0, 0, 4, *[16] * 6]
    assert {chunk.n_tokens for chunk in plans} == {16}
    assert [chunk.n_probe for chunk in plans] == [0, 0, 0, *[12] * 7]
    assert (cache.n_tokens, cache.n_resident, cache.n_evictions) == (160, 60, 7)
    check_cells(cache)
    cache.prompt_end()
    assert cache.pending
    cache.append(tokens(8, first=160))
    cache.append(tokens(1, first=168))
    assert (cache.n_resident, cache.n_evictions, cache.n_intact) == (33, 8, 152)
    check_cells(cache)


def test_a_prompt_over_full_cells_overflows_first() -> None:
    cache = wide(80)
    cache.append(tokens(80))
    assert cache.plan(100) == ChunkPlan(0, 0, 0)
    cache.overflow()
    # 48 cells are free, 20 of them room
    assert cache.plan(100) == ChunkPlan(28, 0, 12)


def test_other_sequences_take_cells() -> None:
    cache = wide(80)
    cache.cells.n_foreign = 30
    cache.append(tokens(50))
    assert (cache.cells.n_used, cache.n_over) == (80, 18)
    cache.append(tokens(1, first=50))
    assert (cache.n_resident, cache.cells.n_used) == (33, 63)
    # 17 cells are free, 9 hold a token of the prompt and 8 ahead; 1 above the budget may go, and
    # with 18 - 20 no token finds room
    assert cache.plan(9) == ChunkPlan(9)
    assert cache.plan(10) == ChunkPlan(0)


def test_unbounded_plans() -> None:
    cache = KVCache(PolicyParams(32), **SHAPE, n_batch=32)
    assert cache.plan(1000) == ChunkPlan(32)
    cache.append(tokens(100))
    assert cache.plan(5) == ChunkPlan(5)


def unchanged(cache: KVCache, before: dict) -> None:
    after = snapshot(cache)
    for name in ("n_tokens", "n_intact", "phase"):
        assert after[name] == before[name]
    np.testing.assert_array_equal(after["queries"].positions, before["queries"].positions)
    for a, b in zip(after["layers"], before["layers"], strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
        np.testing.assert_array_equal(a.k, b.k)


def test_what_finds_no_cells_is_refused() -> None:
    cache = wide(64)
    cache.append(tokens(60))
    before = snapshot(cache)
    # 60 - 32 = 28 may go: 4 + 28 = 32 find room, 33 do not
    with pytest.raises(ValueError, match="33 tokens find no room"):
        cache.append(tokens(33, first=60))
    unchanged(cache, before)
    cache.append(tokens(32, first=60))
    assert (cache.n_resident, cache.n_evictions) == (64, 1)
    full = wide(64, policy="full")
    full.append(tokens(64))
    with pytest.raises(ValueError, match="1 tokens find no room"):
        full.append(tokens(1, first=64))
    with pytest.raises(ValueError, match="never evicts"):
        full.evict(32)
    full.overflow()
    assert full.n_resident == 64


def test_a_waiting_eviction_whose_lookahead_is_there_makes_the_room() -> None:
    cache = wide(64, policy="laq")
    cache.append(tokens(56))
    cache.prompt_end()
    cache.append(tokens(8, first=56))
    cache.append(tokens(1, first=64))
    # one eviction, not two: the lookahead of 8 and the window of 8 before it stay whole
    assert (cache.n_resident, cache.n_intact, cache.n_evictions) == (33, 48, 1)
    # 31 cells are free and one is above the budget
    with pytest.raises(ValueError, match="33 tokens find no room"):
        cache.append(tokens(33, first=65))


def test_refused_rooms_leave_the_cache() -> None:
    cache = wide(80)
    cache.append(tokens(60))
    before = snapshot(cache)
    probe = tokens(20, seed=1, first=60)
    for arguments, match in (
        ((29, probe, 12), "n_evict must be from 0 to 28"),
        ((-1, probe, 12), "n_evict"),
        ((4, None, 0), "needs a probe"),
        ((4, probe, 0), "needs a probe"),
        ((4, probe[:12], 12), "needs a probe"),  # no pseudo token
        ((4, tokens(22, seed=1, first=60), 14), "22 tokens finds 20 free cells"),
    ):
        with pytest.raises(ValueError, match=match):
            cache.make_room(*arguments)
        unchanged(cache, before)
    cache.params = replace(cache.params, pinned=((10, 50),))
    with pytest.raises(ValueError, match="52 cells are pinned"):
        cache.make_room(20, probe, 12)
    unchanged(cache, before)
    cache = wide(80, policy="snapkv")
    cache.append(tokens(60))
    with pytest.raises(ValueError, match="takes no probe"):
        cache.make_room(4, probe, 12)
    for name in ("n_cells", "n_batch"):
        with pytest.raises(ValueError, match=name):
            KVCache(PolicyParams(32), **SHAPE, **{name: 0})


@pytest.mark.parametrize("n_prompt", [56, 60, 63])
def test_as_many_pseudo_tokens_as_find_cells(n_prompt) -> None:
    ahead = tokens(8, first=n_prompt)
    cache, roomy = (wide(n, policy="laq", lookahead="pseudo") for n in (64, 80))
    cache.append(tokens(n_prompt))
    roomy.append(tokens(n_prompt))
    cache.prompt_end(ahead)
    roomy.prompt_end(ahead[: 64 - n_prompt])
    np.testing.assert_array_equal(cache.scores[0], roomy.scores[0])
    assert (cache.n_resident, cache.n_tokens) == (32, n_prompt)


def test_without_a_cell_for_pseudo_tokens_the_prompt_scores() -> None:
    cache = wide(64, policy="laq", lookahead="pseudo")
    cache.append(tokens(64))
    cache.prompt_end(tokens(8, first=64))
    assert cache.scores[0].sum() == pytest.approx(2 * 8, rel=1e-5)
    assert (cache.n_resident, cache.n_tokens) == (32, 64)
    check_cells(cache)


def test_a_new_prompt_gives_up_the_eviction_that_waits() -> None:
    # the lookahead is complete, so that a token alone would bring the eviction
    cache = wide(80)
    read(cache, 40)
    cache.prompt_end()
    cache.append(tokens(8, first=40))
    assert cache.pending
    read(cache, 20)
    assert (cache.n_resident, cache.n_evictions, cache.pending) == (68, 0, False)
    cache.prompt_end()
    assert cache.phase.n_prompt == 68


def test_the_phases_of_a_prompt() -> None:
    phase = IDLE.reading(40, archived=False)
    assert phase == Phase(WHOLE, begin=40) == phase.reading(60, archived=False)
    assert IDLE.reading(40, archived=True) == Phase(ATTENDING, begin=40)
    probed = phase.evicted(by_probe=True)
    assert probed == Phase(PROBED, begin=40) == probed.reading(60, archived=False)
    # a removal after its beginning leaves it, one before ends it
    assert (probed.removed(41), probed.removed(40)) == (probed, IDLE)
    waiting = probed.waiting(90)
    assert waiting == Phase(PROBED, n_prompt=90)
    assert (waiting.removed(90), waiting.removed(89)) == (waiting, IDLE)
    assert waiting.reading(95, archived=False) == Phase(WHOLE, begin=95), "it is given up"
    assert (waiting.evicted(), probed.evicted(), IDLE.evicted()) == (IDLE, phase, IDLE)
    assert (probed.forgotten(), phase.forgotten()) == (phase, phase)


def test_a_removal_within_the_prompt_keeps_what_probes_saw() -> None:
    cache = wide(80, chunk_size=16)
    read(cache, 100)
    assert cache.phase == Phase(PROBED, begin=0)
    assert cache.remove(98) and cache.phase == Phase(PROBED, begin=0)
    cache.configure(replace(cache.params, budget=40))
    assert cache.phase == Phase(WHOLE, begin=0)
    cache.overflow()
    assert cache.phase.is_reading
    assert cache.remove(0) and cache.phase == IDLE


def test_restored_state_goes_on_as_if_never_saved() -> None:
    cache = wide(80, chunk_size=16)
    read(cache, 100)
    cache.prompt_end()
    cache.append(tokens(3, first=100))
    saved = snapshot(cache)
    other = wide(80, chunk_size=16)
    restore(other, saved)
    for one in (cache, other):
        for i in range(40):
            one.append(tokens(1, first=103 + i))
        read(one, 70)
    np.testing.assert_array_equal(cache.positions, other.positions)
    for a, b in zip(cache.scores, other.scores, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (other.n_tokens, other.phase) == (cache.n_tokens, cache.phase)
    # the snapshot is as it was
    third = wide(80)
    restore(third, saved)
    assert (third.n_tokens, third.phase.n_prompt) == (103, 100)
    check_cells(third)
    with pytest.raises(ValueError, match="more than there are"):
        restore(wide(32), saved)
    with pytest.raises(ValueError, match="another model"):
        restore(narrow(80, 32), saved)
