"""What cannot be done is refused by name, before anything has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration.decoding import tokens_of
from integration.test_failures import (
    ARCHIVE,
    DEVICE,
    LAQ,
    N_AHEAD,
    ROW_BYTES,
    WAITS,
    Cells,
    Opener,
    answered,
    chunks,
    following,
)
from integration.test_sequences import BUDGET, N_CELLS
from laq_gguf import _lib
from laq_gguf.errors import LaqInvalidError, LaqUnsupportedError

FOREIGN = 5  # a sequence that llama_memory_seq_cp() takes although n_seq_max is 1
BLOCK_BYTES = 2 * 4 * ROW_BYTES * 64  # of an archive: K and V of all heads


@pytest.fixture
def cells(native: _lib.Native, tiny_gguf: Callable[..., Path]) -> Iterator[Opener]:
    """cells(**settings): Cells of a tiny model."""
    opener = Opener(native, tiny_gguf("llama"))
    yield opener
    opener.close()


def decode_some(context: Cells, seq: int, n: int, first: int = 0) -> np.ndarray:
    return context.decode(*[(t, first + i, seq) for i, t in enumerate(tokens_of(n, seed=seq))])


# at laq_attach()


def test_tensor_parallelism_is_refused_by_name(cells, tiny_gguf: Callable[..., Path]) -> None:
    context = cells(attach=False)
    api = context.api
    params = api.llama_model_default_params()
    params.split_mode = api.LLAMA_SPLIT_MODE_TENSOR
    model = api.llama_model_load_from_file(str(tiny_gguf("llama")).encode(), params)
    if not model:
        assert any("SPLIT_MODE_TENSOR needs >= 1 devices" in line for line in cells.log)
        pytest.skip("llama.cpp itself refuses split_mode = tensor where there is only a CPU")
    api.llama_free(context.ctx)
    api.llama_model_free(context.model)
    context.model = model
    context.ctx = api.llama_init_from_model(model, api.llama_context_default_params())
    with pytest.raises(LaqUnsupportedError, match="split_mode = tensor"):
        context.attach(**LAQ)


@pytest.mark.parametrize("n_sink", [2**30 + 1, 2**31, 2**31 + 4, 2**32 - 1])
def test_more_sinks_than_positions(cells, n_sink: int) -> None:
    context = cells(attach=False)
    for settings in ({**LAQ, "n_sink": n_sink}, {"policy": 0, "n_sink": n_sink}):
        with pytest.raises(LaqInvalidError, match="n_sink"):
            context.attach(**settings)
    context.laq = context.attach(**LAQ)
    params = context.native.ffi.new("struct laq_params *", context.native.lib.laq_default_params())
    params.n_kv_budget, params.n_sink = BUDGET, n_sink
    with pytest.raises(LaqInvalidError, match="n_sink"):
        context.call("laq_set_params", params)
    answered(300, 12)(context)
    assert (context.kept(0)[:, :, :4] == np.arange(4)).all()


def test_a_shift_of_positions_that_waits(cells) -> None:
    context = cells(attach=False)
    decode_some(context, 0, 50)
    context.api.llama_memory_seq_add(context.memory, 0, 0, -1, 5)
    with pytest.raises(LaqInvalidError, match="llama_memory_seq_add"):
        context.attach(**LAQ)
    context.decode((300, 55, 0))  # as it says
    context.laq = context.attach(**LAQ)
    assert context.stats(0).n_tokens == 56 and context.stats(0).n_resident == 51


@pytest.mark.parametrize("limit", [0, 1, BLOCK_BYTES - 1])
def test_an_archive_that_holds_nothing(cells, tmp_path: Path, limit: int) -> None:
    context = cells(attach=False)
    with pytest.raises(LaqInvalidError, match=rf"kv_recall_limit.*at least {BLOCK_BYTES} bytes"):
        context.attach(**ARCHIVE, archive_limit=limit)
    context.laq = context.attach(**ARCHIVE, archive_limit=limit, archive_folder=str(tmp_path))
    answered(300, 12)(context)
    stats = context.stats(0)
    assert stats.n_lost == 0 < stats.n_archived and stats.archive_file_bytes > 0


def test_an_archive_of_one_block(cells) -> None:
    context = cells(**ARCHIVE, archive_limit=BLOCK_BYTES)
    answered(300, 12)(context)
    stats = context.stats(0)
    assert stats.archive_bytes == BLOCK_BYTES and stats.n_archived > 0 < stats.n_lost


# sequences that are not ours


def put_foreign(context: Cells, n: int) -> None:
    """n tokens of a sequence that is not ours."""
    decode_some(context, 0, n)
    context.api.llama_memory_seq_cp(context.memory, 0, FOREIGN, 0, -1)
    assert context.api.llama_memory_seq_rm(context.memory, 0, -1, -1)


def test_foreign_sequences_are_not_counted(cells) -> None:
    context, alone = cells(**LAQ), cells(attach=False)
    put_foreign(context, 100)
    decode_some(alone, 0, 100)
    stats = context.stats(0)
    assert (stats.n_tokens, stats.n_resident, stats.n_used) == (0, 0, 100)
    decode_some(context, 0, BUDGET - 14)
    context.call("laq_prompt_end", 0)
    stats = context.stats(0)
    assert (stats.n_tokens, stats.n_resident, stats.n_used) == (50, 50, 150)
    assert stats.n_evictions == stats.pending == 0, "the sequence fits the budget"
    assert (context.kept(0) == np.arange(50)).all()
    # a prompt that needs evictions: the cells of the other are not to be had
    context.read(0, tokens_of(900, seed=1), first=50)
    stats = context.stats(0)
    assert (stats.n_tokens, stats.n_resident, stats.n_used) == (950, BUDGET, BUDGET + 100)
    assert (np.diff(context.kept(0), axis=-1) > 0).all() and context.kept(0).max() == 949
    context.call("laq_evict", 0, 40)
    assert context.stats(0).n_resident == 40 == context.kept(0).shape[-1]
    with pytest.raises(LaqInvalidError, match="seq_id"):
        context.call("laq_evict", FOREIGN, 40)
    # and its tokens are untouched
    assert context.api.llama_memory_seq_rm(context.memory, 0, -1, -1)
    context.api.llama_memory_seq_cp(context.memory, FOREIGN, 0, 0, -1)
    row = (300, 100, 0)
    np.testing.assert_allclose(context.decode(row), alone.decode(row), rtol=1e-2, atol=2e-2)


def test_foreign_cells_are_in_use_for_a_plan(cells) -> None:
    context = cells(**LAQ, n_probe=32)
    put_foreign(context, 120)
    n_chunk, left, first = context.native.ffi.new("uint32_t *"), tokens_of(900), 0
    params = context.native.ffi.new("struct laq_params *", context.native.lib.laq_default_params())
    params.n_kv_budget, params.n_probe, params.n_lookahead = BUDGET, 32, N_AHEAD
    params.n_chunk = 157  # a third of the cells that no probe needs
    n_evicted = 0
    while left:
        n = context.stats(0).n_resident
        plan = context.native.lib.laq_plan_chunk(params, N_CELLS, 120 + n, n, len(left), 256)
        context.call("laq_prompt_next", 0, left, len(left), n_chunk)
        assert n_chunk[0] == plan.n_tokens
        assert context.stats(0).n_resident == n - plan.n_evict
        n_evicted += plan.n_evict
        chunk, left = left[: n_chunk[0]], left[n_chunk[0] :]
        context.decode(*[(t, first + i, 0) for i, t in enumerate(chunk)])
        first += len(chunk)
    assert n_evicted > 300


# what a server asks


@pytest.mark.parametrize("archive", [0, 1])
def test_the_least_position_of_an_evicted_sequence(cells, archive: int) -> None:
    context = cells(n_seq=2, **LAQ, archive=archive)
    least = context.api.llama_memory_seq_pos_min
    decode_some(context, 1, 30)
    decode_some(context, 0, 30)
    assert (least(context.memory, 0), least(context.memory, 1)) == (0, 0)
    context.read(0, tokens_of(300), first=30)
    n_intact = context.stats(0).n_intact
    assert n_intact == 330 - 8
    assert (least(context.memory, 0), least(context.memory, 1)) == (n_intact - 1, 0)
    # so far back, and no further
    assert not context.api.llama_memory_seq_rm(context.memory, 0, n_intact - 1, -1)
    assert context.api.llama_memory_seq_rm(context.memory, 0, n_intact, -1)
    assert least(context.memory, 0) == n_intact - 1
    assert context.api.llama_memory_seq_rm(context.memory, 0, -1, -1)
    assert least(context.memory, 0) == -1


# backend samplers


@pytest.fixture
def sampler(cells) -> Any:
    """sampler(context, on): set a greedy sampler on the backend, or none."""
    api = cells(attach=False).api
    if not hasattr(api, "llama_set_sampler"):
        pytest.skip("this llama_cpp has no llama_set_sampler")
    chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
    api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
    return lambda context, on: api.llama_set_sampler(context.ctx, 0, chain if on else None)


def test_backend_samplers_and_a_lookahead(cells, sampler) -> None:
    context, twin = cells(**LAQ), cells(**LAQ)
    for each in (context, twin):
        chunks(300, 0)(each)
    assert sampler(context, True)
    before, n_decoded = context.snapshot(), context.stats(0).n_decoded
    for _ in range(2):
        with pytest.raises(LaqInvalidError, match="llama_set_sampler"):
            context.call("laq_prompt_end", 0)
        assert context.snapshot() == before and context.stats(0).n_decoded == n_decoded
    assert sampler(context, False)
    for each in (context, twin):
        each.call("laq_prompt_end", 0)
    assert context.snapshot() == twin.snapshot()


def test_backend_samplers_and_a_probe(cells, sampler) -> None:
    context, twin = cells(**LAQ), cells(**LAQ)
    for each in (context, twin):
        chunks(1200, 420)(each)
    assert sampler(context, True)
    before, n_decoded = context.snapshot(), context.stats(0).n_decoded
    n_chunk = context.native.ffi.new("uint32_t *")
    with pytest.raises(LaqInvalidError, match="llama_set_sampler"):
        context.call("laq_prompt_next", 0, context.left, len(context.left), n_chunk)
    assert context.snapshot() == before and context.stats(0).n_decoded == n_decoded
    assert sampler(context, False)
    for each in (context, twin):
        each.call("laq_prompt_next", 0, each.left, len(each.left), n_chunk)
    assert context.snapshot() == twin.snapshot()


def test_backend_samplers_without_a_lookahead(cells, sampler) -> None:
    context, twin = cells(**WAITS), cells(**WAITS)
    assert sampler(context, True)
    for each in (context, twin):
        chunks(300, 0)(each)
        each.call("laq_prompt_end", 0)
        for i in range(9):
            assert each.try_decode((300 + i, 300 + i, 0)) == 0
    assert context.stats(0).n_evictions == 1 and (context.kept(0) == twin.kept(0)).all()


# batches that attend


def attending(context: Cells) -> list[tuple[int, int, int]]:
    """A prompt is being read in view of its archive: rows of its next tokens."""
    chunks(1200, 380)(context)
    n_chunk = context.native.ffi.new("uint32_t *")
    context.call("laq_prompt_next", 0, context.left, len(context.left), n_chunk)
    n = context.stats(0).n_tokens
    assert n_chunk[0] == 128
    return [(t, n + i, 0) for i, t in enumerate(context.left)]


def test_more_tokens_attend_than_may(cells) -> None:
    context, twin = cells(**ARCHIVE), cells(**ARCHIVE)
    rows = attending(context)
    assert attending(twin) == rows
    before = context.snapshot()
    for n in (129, 200):
        assert context.try_decode(*rows[:n]) == 1
        error = context.native.last_error()
        assert all(word in error for word in ("sequence 0", "archive", "at most 128"))
        assert context.snapshot() == before
    assert context.decode(*rows[:128]).tobytes() == twin.decode(*rows[:128]).tobytes()
    for each in (context, twin):
        each.call("laq_prompt_end", 0)
    assert context.snapshot() == twin.snapshot() and following(context) == following(twin)


def test_as_many_attend_on_a_device_as_a_ubatch_has(cells, monkeypatch) -> None:
    monkeypatch.setenv("LAQ_CELLS", DEVICE["cells"])
    context = cells(**ARCHIVE)
    chunks(1200, 380)(context)
    n_chunk = context.native.ffi.new("uint32_t *")
    context.call("laq_prompt_next", 0, context.left, len(context.left), n_chunk)
    n = context.stats(0).n_tokens
    rows = [(t, n + i, 0) for i, t in enumerate(context.left[:200])]
    assert context.try_decode(*rows) == 0 and context.stats(0).n_tokens == n + 200


def test_another_sequence_in_a_batch_that_attends(cells) -> None:
    context, twin = (cells(n_seq=2, **ARCHIVE) for _ in range(2))
    rows = attending(context)
    assert attending(twin) == rows
    for each in (context, twin):
        decode_some(each, 1, 20)
    before, other = context.snapshot(), context.snapshot(1)
    mixed = [*rows[:40], (300, 20, 1)]
    for batch in (mixed, [mixed[-1], *mixed[:-1]]):
        assert context.try_decode(*batch) == 1
        error = context.native.last_error()
        assert all(word in error for word in ("sequence 0", "archive", "batch of their own"))
        assert context.snapshot() == before and context.snapshot(1) == other
    for each in (context, twin):
        each.decode(*rows[:128])
        each.decode((300, 20, 1))
    assert context.snapshot() == twin.snapshot() and context.snapshot(1) == twin.snapshot(1)
