"""Eight sequences of one context, driven at random: nothing is lost, and nothing is mixed.

A failure shows the setup, the seed and the last operations. A crash shows nothing: set
LAQ_PROPERTY_TRACE=1 and add -s, and each operation is printed before it is made. Operations are
the same each time, unless there is

env: LAQ_PROPERTY_OPERATIONS  operations over all setups; default: as many as take seconds
env: LAQ_PROPERTY_SEED        other operations
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from property.sequences import Sequences
from property.several import (
    FIRST_TOKEN,
    N_TOKENS,
    SETUPS,
    SHAPE,
    Seen,
    Setup,
    Several,
    Twin,
    load_model,
)

N_OPERATIONS = int(os.environ.get("LAQ_PROPERTY_OPERATIONS", "1100"))
SEED = os.environ.get("LAQ_PROPERTY_SEED", "0")
N_EACH = 100  # operations on one context


@pytest.fixture(scope="module")
def model(native: Any, tiny_gguf: Callable[..., Path]) -> Iterator[Any]:
    import llama_cpp

    model = load_model(tiny_gguf("llama", **SHAPE))
    yield model
    llama_cpp.llama_model_free(model)


@pytest.fixture(scope="module")
def twin_of(
    native: Any, model: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Setup], Twin]:
    """twin_of(setup): made once for each type of cells."""
    folder, made = tmp_path_factory.mktemp("twin"), {}

    def make(setup: Setup) -> Twin:
        if setup.cache_type not in made:
            made[setup.cache_type] = Twin(native, model, setup, folder)
        return made[setup.cache_type]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_nothing_is_lost_and_nothing_is_mixed(
    native: Any,
    model: Any,
    twin_of: Callable[[Setup], Twin],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setup: Setup,
) -> None:
    monkeypatch.setenv("LAQ_COMPACT", setup.compaction)
    counts: Counter[str] = Counter()
    n_left, i = -(-N_OPERATIONS // len(SETUPS)), 0
    while n_left > 0:
        seed = f"{setup}/{SEED}/{i}"
        sequences = Sequences(native, model, setup, twin_of(setup), tmp_path, seed)
        with closing(sequences):
            try:
                sequences.run(min(n_left, N_EACH))
            except AssertionError as error:
                log = "\n".join(sequences.log[-60:])
                raise AssertionError(
                    f"{error}\nseed {seed!r}, the last operations:\n{log}"
                ) from error
        counts += sequences.counts
        n_left, i = n_left - N_EACH, i + 1
    print(f"\n{setup}: {dict(sorted(counts.items()))}")


# what went wrong once


@pytest.fixture
def opened(
    native: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Several]]:
    """opened(setup, **fields of laq_params)."""
    monkeypatch.setenv("LAQ_COMPACT", "host")
    contexts: list[Several] = []

    def make(setup: Setup, **changes: Any) -> Several:
        contexts.append(Several(native, model, setup, tmp_path, **changes))
        return contexts[-1]

    yield make
    for context in contexts:
        context.close()


def fill(context: Several, seq: int, n: int) -> Seen:
    """Decode n tokens behind what a sequence has."""
    first = context.stats(seq).n_tokens
    tokens = (FIRST_TOKEN + (seq + i) % N_TOKENS for i in range(n))
    assert context.decode([(t, first + i, seq) for i, t in enumerate(tokens)]) == 0
    return context.look(seq)


def read(context: Several, seq: int, n: int) -> None:
    """A prompt of n tokens into an empty sequence, but for its end."""
    n_chunk, done = context.ffi.new("uint32_t *"), 0
    while done < n:
        left = [FIRST_TOKEN] * (n - done)
        status = context.lib.laq_prompt_next(context.laq, seq, left, len(left), n_chunk)
        context.native.check("laq_prompt_next", status)
        fill(context, seq, n_chunk[0])
        done += n_chunk[0]


def copy(context: Several, src: int, dst: int) -> None:
    context.api.llama_memory_seq_cp(context.memory, src, dst, 0, -1)


def test_cells_that_are_shared_cannot_be_evicted(opened: Callable[..., Several]) -> None:
    context = opened(Setup("shared"))
    before = fill(context, 0, 60)
    copy(context, 0, 1)
    status = context.lib.laq_evict(context.laq, 1, 40)
    assert status == context.lib.LAQ_STATUS_INVALID_ARGUMENT
    assert "shared" in context.error()
    assert context.look(1).same(before) and context.look(0).same(before)


SHARED = """
import faulthandler, sys
from pathlib import Path
from laq_gguf import _lib
from property.several import FIRST_TOKEN, Setup, Several, load_model
faulthandler.dump_traceback_later(60, exit=True)
context = Several(_lib.load(), load_model(Path(sys.argv[1])), Setup("shared"), Path("."))
for first in range(0, 480, 96):
    assert context.decode([(FIRST_TOKEN, first + i, 0) for i in range(96)]) == 0
context.api.llama_memory_seq_cp(context.memory, 0, 1, 0, -1)
status = context.decode([(FIRST_TOKEN, i, 2) for i in range(60)])
assert status == 1, status
assert context.stats(0).n_resident == context.stats(1).n_resident == 480
context.close()
"""


def test_cells_that_are_all_shared_are_full(
    tiny_gguf: Callable[..., Path], run_python: Callable[..., Any]
) -> None:
    """In a process of its own: it does not come back where it looks for cells for ever."""
    tests = str(Path(__file__).parents[1])
    done = run_python("-c", SHARED, str(tiny_gguf("llama", **SHAPE)), PYTHONPATH=tests)
    assert done.returncode == 0, done.stderr


def test_cells_that_are_shared_are_no_room(opened: Callable[..., Several]) -> None:
    """Other sequences are evicted."""
    context = opened(Setup("shared"))
    before = [fill(context, 0, 100), fill(context, 0, 100)][1]
    copy(context, 0, 1)
    for seq in (2, 3):
        fill(context, seq, 110)
    fill(context, 4, 120)
    assert context.look(0).same(before) and context.look(1).same(before)


STREAMED = Setup("streams", unified=False, archive="ram", lookahead="deferred")


def evict_source(context: Several) -> int:
    context.native.check("laq_evict", context.lib.laq_evict(context.laq, 0, 24))
    return 1


def evict_copy(context: Several) -> int:
    context.native.check("laq_evict", context.lib.laq_evict(context.laq, 1, 24))
    return 1


def park_copy(context: Several) -> int:
    """And resume it elsewhere."""
    out = context.ffi.new("struct laq_parked **")
    context.native.check("laq_park", context.lib.laq_park(context.laq, 1, out))
    context.native.check("laq_resume", context.lib.laq_resume(context.laq, 3, out[0]))
    return 3


def load_over_source(context: Several) -> int:
    assert context.load(0, context.save(5))
    return 1


@pytest.mark.parametrize("call", [evict_source, evict_copy, park_copy, load_over_source])
def test_a_stream_is_copied_before_anything_else(
    opened: Callable[..., Several], call: Callable[[Several], int]
) -> None:
    context = opened(STREAMED)
    fill(context, 5, 40)
    before = fill(context, 0, 60)
    copy(context, 0, 1)
    seq = call(context)
    fill(context, 6, 1)  # llama.cpp copies the rows when it decodes
    after = context.look(seq)
    own = np.take_along_axis(before.rows, after.kept[None, ..., None], axis=3)
    assert (own == after.rows).all(), "rows of other tokens"
    for p in range(after.n_intact):
        rows = context.archived(seq, p)
        assert rows is not None and (rows == before.rows[:, :, :, p]).all()


def test_a_copy_takes_the_place_of_what_was_there(opened: Callable[..., Several]) -> None:
    context = opened(STREAMED)
    read(context, 1, 100)
    context.native.check("laq_prompt_end", context.lib.laq_prompt_end(context.laq, 1))
    assert context.look(1).waits
    fill(context, 0, 40)
    copy(context, 0, 1)
    fill(context, 6, 1)
    assert not context.look(1).waits and context.look(1).n_tokens == 40
    context.native.check("laq_flush", context.lib.laq_flush(context.laq, 1))
    assert context.look(1).n_tokens == 40


def test_nothing_is_allocated_when_a_stream_is_copied(opened: Callable[..., Several]) -> None:
    context = opened(STREAMED)
    before = context.stats(0).compute_bytes
    read(context, 0, 300)  # its tokens attend to all others
    fill(context, 1, 20)
    copy(context, 1, 2)
    fill(context, 2, 1)
    assert context.stats(0).compute_bytes == before


@pytest.mark.parametrize("position", [-5, -1, 8, 2**31 - 1])
def test_a_state_with_a_position_that_cannot_be(
    opened: Callable[..., Several], position: int
) -> None:
    """It is refused, and no cell is lost to it. 8: two cells have it."""
    context = opened(Setup("one sequence"))
    before = fill(context, 0, 20)
    data = context.save(0)
    at = data.index(struct.pack("<3i", 7, 1, 0))  # position, sequences, sequence of a cell
    damaged = data[:at] + struct.pack("<i", position) + data[at + 4 :]
    assert context.load(3, damaged) == 0
    assert context.look(0).same(before)
    assert context.look(3).n_tokens == 0 and context.stats(0).n_used == 20


def test_a_state_that_ends_early_leaves_nothing(opened: Callable[..., Several]) -> None:
    """Of a context with streams, where the others follow the sequence's own."""
    context = opened(STREAMED)
    read(context, 0, 300)
    data = context.save(0)
    for n in range(4, 33, 4):
        assert context.load(3, data[:-n]) == 0
        assert context.look(3).n_tokens == context.stats(3).n_resident == 0
