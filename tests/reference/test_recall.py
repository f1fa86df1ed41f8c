"""The reference's archive: what is archived, how a prompt attends, how tokens come back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from laq_gguf.reference import KVCache, PolicyParams, Tokens, attention_weights, evict
from laq_gguf.reference.attention import causal_mask
from laq_gguf.reference.cells import ALL, CELLS, NONE
from laq_gguf.reference.plan import REREAD
from laq_gguf.reference.seq import ATTENDING, IDLE, WHOLE, Phase
from laq_gguf.reference.values import attention_outputs
from reference.made import SHAPE, check_cells, tokens
from reference.saved import restore, snapshot


def opened(
    *,
    n_cells: int | None = None,
    recall: str | None = "turn",
    ahead_from_cells: bool = False,
    n_batch: int = 32,
    **params,
) -> KVCache:
    rules = {"budget": 32, "probe_size": 12, "lookahead": "pseudo", "lookahead_size": 8}
    rules["value_fit"] = 0
    made = PolicyParams(**{**rules, **params})
    own = {"recall": recall, "ahead_from_cells": ahead_from_cells, "n_batch": n_batch}
    return KVCache(made, **own, **SHAPE, n_cells=n_cells)


def read_on(cache: KVCache, n_left: int, source: Tokens | None = None) -> list[int]:
    """A prompt but its end, of the tokens of a source; the sizes of its chunks."""
    sizes = []

    def next_tokens(n: int) -> Tokens:
        first = cache.n_tokens
        return tokens(n, first=first) if source is None else source[first : first + n]

    while n_left:
        if n := cache.prompt_next():
            cache.take_back(n)
            cache.append(next_tokens(n))
        chunk = cache.plan(n_left)
        assert chunk.n_probe == 0
        cache.make_room(chunk.n_evict)
        cache.append(next_tokens(chunk.n_tokens))
        n_left -= chunk.n_tokens
        sizes.append(chunk.n_tokens)
    return sizes


def say(cache: KVCache, n: int, seed: int = 2) -> None:
    """A message of n tokens and the end of the prompt."""
    read_on(cache, n)
    cache.choose_for_lookahead()
    deferred = cache.params.lookahead == "deferred"
    cache.prompt_end(None if deferred else tokens(8, seed=seed, first=cache.n_tokens))


def test_what_there_cannot_be() -> None:
    with pytest.raises(ValueError, match="unknown recall"):
        opened(recall="never")
    with pytest.raises(ValueError, match="no scores to recall by"):
        opened(policy="streaming")
    with pytest.raises(ValueError, match="no archive"):
        opened(recall=None).recall()


@pytest.mark.parametrize("value_fit", [0, 0.01])
def test_a_prompt_attends_to_cells_and_archive(value_fit: float) -> None:
    cache = opened(n_cells=100, value_fit=value_fit)
    everything = tokens(500)
    sizes = read_on(cache, 500, everything)
    assert max(sizes) <= 32 and len(sizes) < 20
    assert cache.n_recalls == 0 and cache.phase == Phase(ATTENDING, begin=0)
    for il, layer in enumerate(cache.visible()):
        assert (layer.positions == np.arange(500)).all()
        np.testing.assert_array_equal(layer.k, everything.k[il].swapaxes(0, 1))
        np.testing.assert_array_equal(layer.v, everything.v[il].swapaxes(0, 1))
    assert cache.n_resident + 8 <= 100
    with pytest.raises(ValueError, match="129 tokens"):
        cache.append(tokens(129, first=500))
    cache.prompt_end(tokens(8, seed=2, first=500))
    assert (cache.n_tokens, cache.n_resident, cache.n_recalls) == (500, 32, 1)
    assert cache.phase == IDLE, "the answer is decoded from the cells alone"
    assert cache.visible()[0].positions.shape[1] == 32


def test_a_recall_selects_what_the_whole_cache_selects() -> None:
    for value_fit in (0, 0.01):
        whole, cache = opened(recall=None, value_fit=value_fit), opened(n_cells=100)
        cache.configure(replace(cache.params, value_fit=value_fit))
        whole.append(tokens(500))
        read_on(cache, 500, tokens(500))
        for one in (whole, cache):
            one.prompt_end(tokens(8, seed=2, first=500))
        np.testing.assert_array_equal(cache.positions, whole.positions)
        for a, b in zip(cache.cells.layers, whole.cells.layers, strict=True):
            np.testing.assert_array_equal(a.v, b.v)


def test_a_prompt_with_an_archive_ends_in_two_halves() -> None:
    cache = opened(n_cells=600, n_batch=512)
    sizes = read_on(cache, 1100)
    assert sum(sizes) == 1100 and min(sizes) >= 64
    assert sizes[-2:] == [69, 68], "not 128 and 9"
    device = opened(n_cells=600, n_batch=512)
    device.n_attend = 256
    assert 256 in read_on(device, 1100)


def test_the_first_eviction_of_a_prompt_makes_it_attend() -> None:
    cache = opened(n_cells=100)
    read_on(cache, 60)
    assert cache.phase.is_reading and not cache.attends
    read_on(cache, 60)
    assert cache.n_intact > 0 and cache.attends
    for call in (lambda: cache.evict(40), cache.recall):
        call()
        assert cache.phase == Phase(ATTENDING, begin=0) and cache.attends, "it leaves READING"


def test_the_lookahead_that_is_waited_for_attends() -> None:
    cache = opened(n_cells=100, lookahead="deferred")
    say(cache, 300)
    assert cache.phase == Phase(ATTENDING, n_prompt=300)
    for i in range(8):
        cache.append(tokens(1, first=300 + i))
    assert (cache.queries.outputs == ALL).all() and cache.n_exact is None
    cache.append(tokens(1, first=308))
    assert (cache.n_recalls, cache.n_resident, cache.phase) == (1, 33, IDLE)
    assert cache.n_exact == 308
    # a message in between gives it up
    cache = opened(n_cells=100, lookahead="deferred")
    say(cache, 300)
    cache.append(tokens(3, first=300))
    read_on(cache, 10)
    assert cache.phase == Phase(ATTENDING, begin=303)


@pytest.mark.parametrize("value_fit", [0, 0.01])
@pytest.mark.parametrize("lookahead", ["pseudo", "deferred"])
def test_a_prompt_is_looked_ahead_from_what_it_recalls(value_fit: float, lookahead: str) -> None:
    cache = opened(n_cells=100, ahead_from_cells=True, value_fit=value_fit, lookahead=lookahead)
    read_on(cache, 500)
    cache.choose_for_lookahead()
    assert (cache.n_tokens, cache.n_resident, cache.n_recalls) == (500, 100 - 8, 1)
    assert not cache.attends
    cache.choose_for_lookahead()
    assert cache.n_recalls == 1
    if lookahead == "pseudo":
        cache.prompt_end(tokens(8, seed=2, first=500))
    else:
        cache.prompt_end()
        assert cache.phase == Phase(WHOLE, n_prompt=500)
        cache.append(tokens(8, seed=2, first=500))
        cache.flush()
    assert (cache.n_resident, cache.n_recalls) == (32, 2)
    for n, others in [(500, {}), (90, {"ahead_from_cells": True})]:
        other = opened(n_cells=100, value_fit=value_fit, **others)
        read_on(other, n)
        other.choose_for_lookahead()
        assert other.n_recalls == 0, "it attends, or nothing is archived"


def test_an_answer_is_read_again_before_the_next_prompt() -> None:
    cache = opened(n_cells=100)
    say(cache, 200)
    cache.append(tokens(20, first=200))
    assert cache.n_exact == 200
    other = opened(n_cells=100)
    restore(other, snapshot(cache))
    assert (cache.prompt_next(), other.prompt_next()) == (20, 20)
    cache.take_back(20)
    assert (cache.n_tokens, cache.n_exact) == (200, None)
    assert cache.phase == Phase(ATTENDING, begin=220)
    cache.append(tokens(20, first=200))
    assert cache.n_exact is None and cache.prompt_next() == 0
    assert opened(recall=None).prompt_next() == 0
    # no more than so many, and none that some head may miss
    roomy = opened(n_cells=600)
    say(roomy, 700)
    for i in range(REREAD + 40):
        roomy.append(tokens(1, first=700 + i))
    assert roomy.prompt_next() == REREAD
    short = opened(n_cells=100)
    say(short, 200)
    for i in range(90):
        short.append(tokens(1, first=200 + i))
    assert short.n_intact > 200
    assert short.prompt_next() == short.n_tokens - short.n_intact


def test_a_recall_by_call() -> None:
    cache = opened(n_cells=100)
    cache.append(tokens(50))
    cache.recall()
    assert cache.n_recalls == 0, "nothing is archived"
    say(cache, 150)
    cache.append(tokens(20, seed=7, first=200))
    cache.recall()
    assert (cache.n_recalls, cache.n_resident, cache.n_tokens) == (2, 32, 220)
    check_values = cache.cells.layers[0].positions[0, -16:]
    assert (check_values == np.arange(204, 220)).all(), "the last ones stay whole"


def test_an_overflow_recalls_where_that_is_asked_for() -> None:
    for when, n_recalls in (("turn", 1), ("always", 2)):
        cache = opened(n_cells=100, recall=when)
        say(cache, 200)
        cache.append(tokens(68, first=200))
        cache.append(tokens(1, first=268))
        assert (cache.n_recalls, cache.n_resident) == (n_recalls, 33)
        check_cells(cache)


def test_without_a_query_the_newest_stay() -> None:
    cache = opened(n_cells=100, recall="always")
    say(cache, 200)
    cache.append(tokens(40, first=200))
    cache.queries.keep(cache.queries.positions < 0)
    cache.recall()
    assert cache.n_recalls == 1, "an eviction without an archive"
    assert (cache.positions[..., 4:] == np.arange(240 - 28, 240)).all()
    cache.queries.keep(cache.queries.positions < 0)
    before = cache.n_evictions
    cache.recall()
    assert cache.n_evictions == before, "no more is resident than is to stay"


def test_tokens_that_are_not_whole_go() -> None:
    cache = opened(n_cells=100)
    say(cache, 200)
    restore(cache, snapshot(cache, archive=False))
    assert cache.n_lost == (192 - 24) * 4 and not cache.recalls("turn")
    cache.prompt_next()
    shared = set.intersection(*(set(row) for row in cache.positions.reshape(4, -1)))
    assert shared >= {*range(4), *range(192, 200)}
    assert set(cache.visible()[0].positions[0]) == shared
    say(cache, 80)
    columns = set(cache.whole()[0].positions[0])
    assert set(range(192, 280)) <= columns <= shared | set(range(192, 280))
    for row in cache.positions.reshape(4, -1):
        assert set(row) <= columns
    check_cells(cache)


def test_values_that_were_fitted_come_back_as_they_were() -> None:
    cache = opened(n_cells=200, value_fit=0.01)
    say(cache, 300)
    for layer in cache.cells.layers:
        for head, positions in enumerate(layer.positions):
            assert (layer.v[head, :, 0] != positions).any()
    cache.configure(replace(cache.params, value_fit=0))
    say(cache, 6, seed=5)
    check_cells(cache)


def outputs_of(cache: KVCache, il: int, used: np.ndarray, layer) -> np.ndarray:
    mask = causal_mask(cache.queries.positions[used], layer.positions)
    seen = {**evict.attention(cache, il, used, layer), "mask": mask}
    return attention_outputs(attention_weights(**seen), layer.v)


def test_the_observed_queries_get_what_all_tokens_give() -> None:
    missing = {}
    for value_fit in (0, 1e-4):
        cache = opened(n_cells=100, budget=64, value_fit=value_fit, lookahead="deferred")
        read_on(cache, 300)
        cache.prompt_end()
        cache.append(tokens(8, seed=3, first=300))
        used = cache.queries.positions >= 292
        wanted = outputs_of(cache, 0, used, cache.whole()[0])
        cache.flush()
        used = cache.queries.positions >= 292
        got = outputs_of(cache, 0, used, cache.cells.layers[0])
        missing[value_fit] = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    assert missing[1e-4] < 0.5 * missing[0], missing


def test_what_is_known_of_outputs() -> None:
    cache, bare = opened(n_cells=100), opened(n_cells=100, recall=None, policy="snapkv")
    for one in (cache, bare):
        one.append(tokens(90))
        assert (one.queries.outputs == ALL).all()
        one.evict(40)
        one.append(tokens(10, first=90))
    assert (cache.queries.outputs[-11:] == [ALL, *[CELLS] * 10]).all()
    assert (bare.queries.outputs[-11:] == [NONE, *[CELLS] * 10]).all()
    cache.evict(36)
    assert (cache.queries.outputs[-11:] == [ALL, *[NONE] * 10]).all()


def test_an_eviction_to_more_than_the_budget_does_not_fit() -> None:
    for n_keep, is_fitted in ((40, False), (32, True), (30, True)):
        cache = opened(recall=None, value_fit=0.01)
        cache.append(tokens(90))
        cache.evict(n_keep)
        layer = cache.cells.layers[0]
        assert (layer.v[..., 0] != layer.positions).any() == is_fitted
