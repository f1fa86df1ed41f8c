"""The reference's archive: what a message brings together, and how tokens come back."""

from __future__ import annotations

import numpy as np
import pytest

from laq_gguf.reference import PolicyParams, RecallCache, reselect
from laq_gguf.reference.attention import causal_mask
from laq_gguf.reference.recall import Again
from laq_gguf.reference.values import attention_outputs
from reference.made import SHAPE, check_cells, make_room, tokens


def opened(
    *,
    n_cells: int | None = None,
    recall: str | None = "turn",
    recall_rounds: int = 1,
    reads_archive: bool = False,
    ahead_from_cells: bool = False,
    **params,
) -> RecallCache:
    rules = {
        "budget": 32,
        "probe_size": 12,
        "lookahead": "pseudo",
        "lookahead_size": 8,
        "value_fit": 0,
    }
    made = PolicyParams(**{**rules, **params})
    own = {
        "recall": recall,
        "recall_rounds": recall_rounds,
        "reads_archive": reads_archive,
        "ahead_from_cells": ahead_from_cells,
    }
    return RecallCache(made, **own, **SHAPE, n_cells=n_cells, n_batch=32)


def say(cache: RecallCache, n: int, seed: int = 0) -> None:
    """A message of n tokens that fits, and the end of the prompt."""
    cache.append(tokens(n, seed=seed, first=cache.n_tokens))
    cache.prompt_end(tokens(8, seed=seed + 1, first=cache.n_tokens))


@pytest.mark.parametrize(
    ("n_cells", "n_draft"), [(None, 156), (200, 156), (100, 92), (40, 32)], ids=str
)
def test_a_message_brings_together_more_than_the_budget(n_cells: int | None, n_draft: int) -> None:
    cache = opened()
    say(cache, 150)
    cache.n_cells = n_cells
    message = tokens(6, seed=5, first=cache.n_tokens)
    cache.append(message)
    assert cache.choose_for_message(6)
    assert cache.n_resident == n_draft
    held = cache.layers[0].positions
    assert (held[:, -6:] == np.arange(150, 156)).all(), "the message stays whole"
    check_cells(cache)


def test_the_last_of_what_is_read_again_chooses() -> None:
    chosen = []
    for n_reread, window in [(6, 2), (2, 32), (6, 32)]:
        cache = opened(snapkv_window=window)
        say(cache, 150)
        cache.n_cells = 60
        cache.append(tokens(6, seed=5, first=cache.n_tokens))
        assert cache.choose_for_message(n_reread)
        chosen.append(cache.scores[0])
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert (chosen[0] != chosen[2]).any()


def test_nothing_is_brought_for_what_is_there() -> None:
    cache = opened()
    say(cache, 60)
    cache.archive.positions = cache.archive.positions[:0]
    cache.archive.k, cache.archive.v = cache.archive.k[:, :, :0], cache.archive.v[:, :, :0]
    cache.append(tokens(4, seed=3, first=cache.n_tokens))
    before = cache.positions
    assert not cache.choose_for_message(4)
    np.testing.assert_array_equal(cache.positions, before)
    assert cache.n_recalls_skipped == 1


def test_values_that_were_fitted_come_back_as_they_were() -> None:
    cache = opened(value_fit=0.01)
    say(cache, 150)
    fitted = [
        (layer.v[head, :, 0] != positions).any()
        for layer in cache.layers
        for head, positions in layer.heads()
    ]
    assert all(fitted)
    cache.fits_to_archive = False
    cache.append(tokens(6, seed=5, first=cache.n_tokens))
    assert cache.choose_for_message(6)
    check_cells(cache)


def test_an_eviction_that_fits_to_the_archive_is_not_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reselect, "RECALL_NEW", 2.0)  # nothing is new enough
    for value_fit, counts in ((0.01, (1, 0)), (0, (0, 1))):
        cache = opened(value_fit=value_fit)
        say(cache, 150)
        first = cache.n_recalls, cache.n_recalls_skipped
        say(cache, 6, seed=5)
        assert (cache.n_recalls - first[0], cache.n_recalls_skipped - first[1]) == counts


def read_by_probes(value_fit: float) -> RecallCache:
    cache = opened(n_cells=100, value_fit=value_fit, recall_rounds=0)
    for _ in range(5):
        make_room(cache, chunk := cache.plan(90))
        cache.append(tokens(chunk.n_tokens, first=cache.n_tokens))
    assert cache.remembers and len(cache.archive.positions)
    return cache


def test_what_was_read_last_gets_what_all_tokens_give() -> None:
    missing = {}
    for value_fit in (0, 0.01):
        cache = read_by_probes(value_fit)
        archived = np.searchsorted(cache.archive.positions, np.arange(40))
        original = tokens(40, first=0).v.swapaxes(1, 2)
        np.testing.assert_array_equal(cache.archive.v[:, :, archived], original)
        n_read = cache.n_intact + 8  # when the last probe looked
        used = (cache.query_positions >= cache.n_intact) & (cache.query_positions < n_read)
        assert used.sum() == 8
        layer = cache.layers[0]
        mask = causal_mask(cache.query_positions[used], layer.positions)
        got = attention_outputs(cache._weights(0, used, mask), layer.v)
        wanted = cache._outputs_of_all(0, used, cache._candidates(0, cache._all_positions()))
        missing[value_fit] = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    assert missing[0.01] < 0.7 * missing[0], missing


def test_a_message_that_probes_have_looked_for_chooses_where_values_are_fitted() -> None:
    cache = read_by_probes(0.01)
    assert cache.message_again() == Again(0, 8, True)
    cache.recall_rounds = 1
    assert cache.message_again() == Again(2, 8, True)
    assert cache.choose_for_message(8, probed=True)
    assert cache.n_recalls == 1 and not cache.remembers
    cache = read_by_probes(0)
    cache.recall_rounds = 1
    assert cache.message_again() == Again(0, 8, True), "they have looked for it already"


def test_what_probes_kept_counts_at_the_end_of_the_prompt() -> None:
    cache = opened(n_cells=100)
    for _ in range(5):
        make_room(cache, chunk := cache.plan(90))
        cache.append(tokens(chunk.n_tokens, first=cache.n_tokens))
    assert cache.remembers and len(cache.archive.positions)
    before = cache.positions

    # a token that all probes saw beats one that only this lookahead looks at as much
    remembered, forgotten = (cache.snapshot() for _ in range(2))
    for layer in remembered["layers"]:
        layer.memory[:] = 1
    n_back = []
    for state in (remembered, forgotten):
        cache.restore(state)
        cache.remembers = state is remembered
        cache.prompt_end(tokens(8, seed=9, first=cache.n_tokens))
        below = cache.layers[0].positions < cache.n_intact
        n_back.append(int((~np.isin(cache.layers[0].positions, before) & below).sum()))
    assert n_back[0] == 0 < n_back[1]


def again(cache: RecallCache, n: int) -> None:
    """The last n tokens are removed and read again: a second reading brings the same ones."""
    assert cache.remove(cache.n_tokens - n)
    cache.append(tokens(n, first=cache.n_tokens))


def read_on(cache: RecallCache, n_left: int) -> list[int]:
    """A prompt but its end; the sizes of its chunks."""
    sizes = []
    while n_left:
        if n := cache.attend():
            again(cache, n)
        cache.answer_read()
        if not cache.attending and (n := cache.part_again()):
            assert cache.choose_for_part(n)
            again(cache, n)
        chunk = cache.plan(n_left)
        assert chunk.n_probe == 0
        cache.make_room(chunk.n_evict, goes_on=chunk.n_tokens < n_left)
        cache.append(tokens(chunk.n_tokens, first=cache.n_tokens))
        n_left -= chunk.n_tokens
        sizes.append(chunk.n_tokens)
    return sizes


def test_a_prompt_that_does_not_fit_is_read_in_parts() -> None:
    cache = opened(n_cells=300, value_fit=0.01)
    cache.n_batch = 64
    assert cache.part_size == 40, "as many as queries are kept"
    assert opened(n_cells=100, value_fit=0.01).part_size == (100 - 8 - 32) // 4
    assert opened(n_cells=300).part_size == 0, "no values are fitted"
    assert opened(n_cells=300, value_fit=0.01, recall_rounds=0).part_size == 0
    sizes = read_on(cache, 500)
    n_whole = sizes.index(40)
    assert sizes[:n_whole] == [64] * 4, "in view of all, until a part finds no room: 292 - 256 < 40"
    assert set(sizes[n_whole:-1]) == {40} and cache.in_parts
    assert cache.n_recalls == len(sizes) - n_whole - 1, "all parts but the last one, so far"
    assert cache.n_resident + 8 <= 300
    assert cache.message_again() == Again(2, 8, True)

    other = opened(n_cells=300, value_fit=0.01)
    other.restore(cache.snapshot())
    assert other.in_parts
    cache.prompt_end(tokens(8, first=cache.n_tokens))
    assert not cache.in_parts


def test_all_queries_of_a_part_get_what_all_tokens_give() -> None:
    missing = {}
    for n_fit in (40, 20):
        cache = opened(n_cells=300, value_fit=1e-6)
        read_on(cache, 480)
        first = cache.n_tokens - 40
        cache._archive_leaving(first)
        used = cache.query_positions >= first
        wanted = cache._outputs_of_all(0, used, cache._candidates(0, cache._all_positions()))
        eviction = 150, first, (first, cache.n_tokens), cache.n_tokens
        assert cache._reselect(*eviction, always=True, n_fit=n_fit)
        layer = cache.layers[0]
        mask = causal_mask(cache.query_positions[used], layer.positions)
        got = attention_outputs(cache._weights(0, used, mask), layer.v)
        missing[n_fit] = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    assert missing[40] < 0.1 * missing[20], missing


def test_the_first_of_two_lookaheads_keeps_what_the_second_is_generated_from() -> None:
    cache = opened(n_cells=300, value_fit=0.01)
    read_on(cache, 500)
    n_prompt, n_evictions = cache.n_tokens, cache.n_evictions
    cache.choose_ahead(tokens(8, seed=3, first=n_prompt))
    assert (cache.n_tokens, cache.n_resident) == (n_prompt, 300 - 8)
    assert cache.n_evictions == n_evictions + 1
    assert (cache.layers[0].positions[:, -1] == n_prompt - 1).all(), "what was ahead is dropped"
    cache.prompt_end(tokens(8, seed=4, first=n_prompt))
    assert (cache.n_tokens, cache.n_resident) == (n_prompt, cache.params.budget)


@pytest.mark.parametrize("value_fit", [0, 0.01])
def test_a_prompt_is_read_in_view_of_its_archive(value_fit: float) -> None:
    cache = opened(n_cells=100, reads_archive=True, value_fit=value_fit)
    sizes = read_on(cache, 500)
    assert max(sizes) <= 32 and len(sizes) < 20
    assert cache.n_recalls == 0 and cache.attends(8) and not cache.attends(129)
    everything = tokens(500, first=0)
    for il in range(cache.n_layer):
        positions, k, v = cache.visible(il, 8)
        assert (positions == np.arange(500)).all() and k.shape == v.shape
        np.testing.assert_array_equal(v, everything.v[il].swapaxes(0, 1))
    assert cache.message_again().n_rounds == 0, "it was read in view of all there is"
    assert cache.n_resident + 8 <= 100
    cache.prompt_end(tokens(8, seed=2, first=500))
    assert (cache.n_tokens, cache.n_resident, cache.n_recalls) == (500, 32, 1)
    assert not cache.attends(8), "the answer comes from the cells alone"
    assert cache.visible(0, 8)[0].shape[1] == 32


def test_a_prompt_read_in_view_of_its_archive_ends_in_two_halves() -> None:
    cache = opened(n_cells=600, reads_archive=True)
    cache.n_batch = 512
    sizes = read_on(cache, 1100)
    assert sum(sizes) == 1100 and min(sizes) >= 64
    assert sizes[-2:] == [69, 68], "not 128 and 9"


@pytest.mark.parametrize("value_fit", [0, 0.01])
def test_a_prompt_chooses_what_it_is_looked_ahead_from(value_fit: float) -> None:
    cache = opened(n_cells=100, reads_archive=True, ahead_from_cells=True, value_fit=value_fit)
    read_on(cache, 500)
    assert cache.choose_for_lookahead()
    assert (cache.n_tokens, cache.n_resident, cache.n_recalls) == (500, 100 - 8, 1)
    assert not cache.attends(1) and not cache.choose_for_lookahead()
    cache.prompt_end(tokens(8, seed=2, first=500))
    assert (cache.n_tokens, cache.n_resident, cache.n_recalls) == (500, 32, 2)
    for n, others in [(500, {}), (90, {"ahead_from_cells": True})]:
        other = opened(n_cells=100, reads_archive=True, value_fit=value_fit, **others)
        read_on(other, n)
        assert not other.choose_for_lookahead(), "with the archive, or nothing has left"


def test_an_answer_is_read_again_before_the_next_prompt() -> None:
    cache = opened(n_cells=100, reads_archive=True)
    read_on(cache, 200)
    cache.prompt_end(tokens(8, seed=2, first=200))
    cache.append(tokens(20, first=200))
    assert cache.n_exact == 200
    assert opened(n_cells=100).n_exact is None
    other = opened(n_cells=100, reads_archive=True)
    other.restore(cache.snapshot())
    other.n_reread = 7
    assert (cache.attend(), other.attend()) == (20, 7)
    assert cache.remove(200) and cache.n_exact is None
    cache.append(tokens(20, first=200))
    assert cache.n_exact is None, "in view of all"


def test_without_a_whole_archive_the_cells_are_all_there_is() -> None:
    cache = opened(n_cells=100, reads_archive=True)
    read_on(cache, 200)
    bare = cache.snapshot(archive=False)
    cache.restore(bare)
    assert not cache.may_attend and not cache.attends(1)
    assert cache.attend() == 0
