"""A state that is refused has not changed what is running; a damaged one may have emptied it.

What is running is a conversation whose eviction waits: the queries that choose are the last thing
that a load may touch. Each test compares with a twin that never loaded.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from integration.decoding import tokens_of
from integration.test_archive import file_of_archive
from integration.test_failures import WAITS, Cells, Opener, answered, following
from laq_gguf import _lib

ARCHIVED = {**WAITS, "archive": 1}
MAGIC, VERSION = b"LAQ1", 9
N_HEADER = 12  # of a file without tokens
INT_MAX = 2**31 - 1


@pytest.fixture
def cells(native: _lib.Native, tiny_gguf: Callable[..., Path]) -> Iterator[Opener]:
    """cells(**settings): Cells of a tiny model."""
    opener = Opener(native, tiny_gguf("llama"))
    yield opener
    opener.close()


def save(context: Cells, path: Path) -> bytes:
    """Sequence 0 as a file; what is in it."""
    none = (context.api.llama_token * 1)()
    size = context.api.llama_state_seq_save_file(context.ctx, str(path).encode(), 0, none, 0)
    data = path.read_bytes()
    assert size == len(data)
    return data


def load_file(context: Cells, data: bytes, path: Path, seq: int) -> bool:
    path.write_bytes(data)
    tokens, n = (context.api.llama_token * 8)(), context.api.ctypes.c_size_t()
    n_read = context.api.llama_state_seq_load_file(
        context.ctx, str(path).encode(), seq, tokens, 8, context.api.ctypes.byref(n)
    )
    return n_read == len(data)


def load_memory(context: Cells, data: bytes, _: Path, seq: int) -> bool:
    """The same state; in memory other words stand in front."""
    return context.load(seq, context.state(0)[:8] + data[N_HEADER:])


LOADS = {"file": load_file, "memory": load_memory}


@pytest.fixture(params=LOADS)
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., bool]:
    """load(context, data, seq): whether a state was loaded, from a file or from memory."""
    return lambda context, data, seq=0: LOADS[request.param](context, data, tmp_path / "l", seq)


def assert_intact(context: Cells, twin: Cells, before: Any) -> None:
    """What is running is as before, and its eviction keeps what that of the twin keeps."""
    assert context.snapshot() == before
    assert following(context) == following(twin)
    assert context.snapshot() == twin.snapshot()
    assert context.stats(0).n_archived == twin.stats(0).n_archived
    assert context.stats(0).pending == 0


def assert_empty_and_usable(context: Cells, fresh: Cells) -> None:
    """The sequence holds nothing, and a conversation goes on in it."""
    stats = context.stats(0)
    assert stats.n_tokens == stats.n_resident == stats.n_used == stats.n_intact == 0
    assert stats.pending == stats.n_archived == 0
    for each in (context, fresh):
        answered(300, 12)(each)
    assert context.kept(0).tobytes() == fresh.kept(0).tobytes()
    assert context.stats(0).n_archived == fresh.stats(0).n_archived


# states of other settings

OTHERS = {
    "another window": {"n_window": 40},
    "a longer lookahead": {"n_lookahead": 12},
    "a longer window of snapkv": {"n_window_snapkv": 48},
    "an archive": {"archive": 1},
    "not attached": {"attach": False},
}
OTHER_ARCHIVES = {"another type": {"archive_type": 8}, "another window": {"n_window": 40}}


@pytest.mark.parametrize("name", [*OTHERS, *(f"archived, {name}" for name in OTHER_ARCHIVES)])
def test_a_refused_state_changes_nothing(cells, load, tmp_path: Path, name: str) -> None:
    if name.startswith("archived"):
        settings, n_prompt, other = ARCHIVED, 900, OTHER_ARCHIVES[name.split(", ")[1]]
    else:
        settings, n_prompt, other = WAITS, 250, OTHERS[name]
    source = cells(**{**settings, **other})
    if other.get("attach", True):
        answered(n_prompt, 14)(source)
    else:
        source.decode(*[(t, i, 0) for i, t in enumerate(tokens_of(100))])
    data = save(source, tmp_path / "s")
    context, twin = cells(**settings), cells(**settings)
    for each in (context, twin):
        answered(n_prompt - 9)(each)
    before = context.snapshot()
    done = load(context, data)
    assert not done
    assert_intact(context, twin, before)


@pytest.mark.parametrize("fits", [(0.01, 0.0), (0.0, 0.01)], ids=["saved with", "loaded with"])
def test_a_state_of_another_value_fit_goes_on(cells, load, tmp_path: Path, fits: Any) -> None:
    """It is not refused: the outputs that only one of the two captures are left out."""
    source, other = (cells(**WAITS, value_fit=fit) for fit in fits)
    answered(250)(source)
    data, before = save(source, tmp_path / "s"), source.snapshot()
    answered(200)(other)
    assert load(other, data) and other.snapshot() == before
    for each in (source, other):
        each.call("laq_flush", 0)
        assert each.stats(0).n_evictions == 1
    a, b = source.snapshot(), other.snapshot()
    assert a[:6] == b[:6], "all but V, which one of them may fit"
    assert (a.values != b.values) == (fits[0] > 0), "no outputs were loaded"


# damaged states


class Tables:
    """Where the tables of a saved sequence lie."""

    def __init__(self, data: bytes) -> None:
        self.data, self.next, self.at = data, data.index(MAGIC), {}
        assert self.word("magic") == struct.unpack("<I", MAGIC)[0]
        assert self.word("version") == VERSION, "the format is another one: write this anew"
        for name in (
            "n_seqs", "n_streams", "n_resident", "n_intact", "n_exact", "fitted", "kind", "how",
            "begin", "n_prompt", "n_mixed", "has_memory", "n_heads",
        ):  # fmt: skip
            setattr(self, name, self.word(name))
        assert not self.has_memory
        self.skip("origins", 4 * self.n_mixed * self.n_heads)
        self.n_ring = self.word("n_ring")
        ring = struct.unpack_from(f"<{self.n_ring}i", data, self.next)
        self.skip("ring", 4 * self.n_ring)
        self.skip("outputs", self.n_ring)
        for name in ("row 0", "row 1"):
            self.skip(name + " rows", self.word(name) * sum(p >= 0 for p in ring))
        if self.word("archive"):
            self.skip("types", 8)
            self.n_block = struct.unpack_from("<Q", data, self.next)[0]
            self.skip("n_block", 8)
            n_blocks = self.word("n_blocks")
            self.skip("blocks", n_blocks * (12 + self.n_block))
        assert self.word("end") == struct.unpack("<I", MAGIC)[0]
        self.word("n_stream")
        self.word("n_cells")
        self.skip("cells", 12 * (self.n_resident - 1))
        self.skip("last cell", 12)
        self.at["rows of cells"] = self.next

    def skip(self, name: str, n: int) -> None:
        self.at[name] = self.next
        self.next += n

    def word(self, name: str) -> int:
        self.skip(name, 4)
        return struct.unpack_from("<I", self.data, self.at[name])[0]


def damaged(data: bytes, name: str, *values: int) -> bytes:
    """Other values at the beginning of a table."""
    res = bytearray(data)
    struct.pack_into(f"<{len(values)}i", res, Tables(data).at[name], *values)
    return bytes(res)


#: what is damaged -> its table and what stands there then
DAMAGED_TABLES: dict[str, tuple[Any, ...]] = {
    "version": ("version", VERSION - 1),
    "sequences": ("n_seqs", 2),
    "more cells than there are": ("n_resident", 513),
    "n_intact is huge": ("n_intact", INT_MAX),
    "n_intact is beyond n_ctx": ("n_intact", 4097),
    "n_intact is negative": ("n_intact", -1),
    "n_exact is negative": ("n_exact", -1),
    "no phase": ("kind", 7),
    "no way to read": ("how", 7),
    "a prompt that begins nowhere": ("begin", -5),
    "a prompt that ends nowhere": ("n_prompt", INT_MAX),
    "more mixed cells than cells": ("n_mixed", 500),
    "heads": ("n_heads", 5),
    "an origin is huge": ("origins", INT_MAX),
    "an origin is not below n_intact": ("origins", 901),
    "an origin is negative": ("origins", -7),
    "an origin stands twice": ("origins", 0, 1, 2, 3, 3),
    "size of the ring": ("n_ring", 41),
    "a query in another slot": ("ring", 41),
    "a query before the first": ("ring", -2),
    "rows of queries": ("row 0", 100),
}
#: in a state of a sequence whose archive holds something
DAMAGED_ARCHIVES: dict[str, tuple[Any, ...]] = {
    "types": ("types", 1, 8),
    "bytes of a block": ("n_block", 64),
    "more blocks than follow": ("n_blocks", 1000),
    "a block that cannot be": ("blocks", INT_MAX),
}


@pytest.mark.parametrize("name", [*DAMAGED_TABLES, *DAMAGED_ARCHIVES])
def test_damaged_tables_change_nothing(cells, load, tmp_path: Path, name: str) -> None:
    settings = ARCHIVED if name in DAMAGED_ARCHIVES else WAITS
    context, twin, source = (cells(**settings) for _ in range(3))
    for each in (context, twin):
        answered(400)(each)
    answered(900, 12)(source)
    table, *values = {**DAMAGED_TABLES, **DAMAGED_ARCHIVES}[name]
    data = damaged(save(source, tmp_path / "s"), table, *values)
    before = context.snapshot()
    done = load(context, data)
    assert not done
    assert_intact(context, twin, before)


#: tables that do not fit the cells, which are read after them
DAMAGED_CELLS: dict[str, tuple[Any, ...]] = {
    "n_intact is too small": ("n_intact", 890),
    "n_intact is too large": ("n_intact", 905),
    "another number of cells": ("n_resident", 65),
    "a prompt that waits and is not there": ("kind", 2, 0, 0, 4000),
    "streams": ("n_stream", 3),
    "no cells": ("n_cells", 0),
    "fewer cells": ("n_cells", 40),
    "more cells than there are": ("n_cells", 600),
    "a cell of several sequences": ("cells", 0, 2),
    "a token beyond n_ctx": ("last cell", 5000),
    "the largest position": ("last cell", INT_MAX),
}


@pytest.mark.parametrize("name", DAMAGED_CELLS)
def test_damaged_cells_leave_what_is_running_or_nothing(
    cells, load, tmp_path: Path, name: str
) -> None:
    context, twin, fresh, source = (cells(**WAITS) for _ in range(4))
    for each in (context, twin):
        answered(400)(each)
    answered(900, 12)(source)
    table, *values = DAMAGED_CELLS[name]
    before, data = context.snapshot(), damaged(save(source, tmp_path / "s"), table, *values)
    done = load(context, data)
    assert not done
    if context.stats(0).n_tokens:
        assert_intact(context, twin, before)
    else:
        assert_empty_and_usable(context, fresh)


@pytest.mark.parametrize("archive", [0, 1])
def test_truncated_tables_change_nothing(cells, load, tmp_path: Path, archive: int) -> None:
    settings = {**WAITS, "archive": archive}
    context, twin, source = (cells(**settings) for _ in range(3))
    for each in (context, twin):
        answered(400)(each)
    answered(900, 12)(source)
    before, data = context.snapshot(), save(source, tmp_path / "s")
    at = Tables(data).at
    for name in list(at)[1 : list(at).index("n_stream")]:
        for end in (at[name], at[name] + 2):
            assert not load(context, data[:end])
            assert context.snapshot() == before, f"cut in {name}"
    assert_intact(context, twin, before)


@pytest.mark.parametrize("archive", [0, 1])
@pytest.mark.parametrize("name", ["n_stream", "n_cells", "cells", "last cell", "rows of cells"])
def test_truncated_cells_leave_what_is_running_or_nothing(
    cells, tmp_path: Path, archive: int, name: str
) -> None:
    """From memory: llama.cpp reads a file past its end, and aborts where it finds out."""
    settings = {**WAITS, "archive": archive}
    context, twin, fresh, source = (cells(**settings) for _ in range(4))
    for each in (context, twin):
        answered(400)(each)
    answered(900, 12)(source)
    before, data = context.snapshot(), save(source, tmp_path / "s")
    assert not load_memory(context, data[: Tables(data).at[name] + 2], tmp_path, 0)
    if context.stats(0).n_tokens:
        assert_intact(context, twin, before)
    else:
        assert_empty_and_usable(context, fresh)


@pytest.mark.parametrize("name", ["n_intact is too small", "fewer cells"])
def test_a_damaged_state_leaves_other_sequences_alone(
    cells, load, tmp_path: Path, name: str
) -> None:
    context, twin = (cells(n_seq=2, **WAITS) for _ in range(2))
    source = cells(**WAITS)
    for each in (context, twin):
        answered(300)(each)
    answered(900, 12)(source)
    table, *values = DAMAGED_CELLS[name]
    before, data = context.snapshot(), damaged(save(source, tmp_path / "s"), table, *values)
    done = load(context, data, 1)
    assert not done
    assert context.stats(1).n_tokens == context.stats(1).n_intact == 0
    assert_intact(context, twin, before)


# memory


def test_a_load_that_finds_no_memory_changes_nothing(cells, load, tmp_path: Path) -> None:
    context, source = cells(**ARCHIVED), cells(**ARCHIVED)
    answered(400)(context)
    answered(900)(source)
    data, before = save(source, tmp_path / "s"), context.snapshot()
    n_archived = context.stats(0).n_archived
    for n in count(1):
        context.native.lib.laq_test_fail(n)
        done = load(context, data)
        context.native.lib.laq_test_fail(0)
        if done:
            break
        assert context.snapshot() == before and context.stats(0).n_archived == n_archived
    assert n > 10, "each block of the archive is allocated"
    assert context.snapshot() == source.snapshot()
    assert context.stats(0).n_archived == source.stats(0).n_archived
    assert following(context) == following(source)
    assert context.snapshot() == source.snapshot()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self/fd")
def test_the_size_of_a_state_is_known_without_the_file(cells, tmp_path: Path) -> None:
    context = cells(**ARCHIVED, archive_limit=1, archive_folder=str(tmp_path))
    answered(900, 12)(context)
    stats = context.stats(0)
    assert stats.archive_bytes == 0 < stats.archive_file_bytes
    n_lost, size = stats.n_lost, len(context.state(0))
    assert size > stats.archive_file_bytes
    os.truncate(file_of_archive(), 0)
    get_size = context.api.llama_state_seq_get_size
    assert get_size(context.ctx, 0) == size
    assert context.stats(0).n_lost == n_lost, "nothing was read"
    # whoever reads it sees that it is gone
    buffer = (context.api.ctypes.c_uint8 * size)()
    assert context.api.llama_state_seq_get_data(context.ctx, buffer, size, 0) != size
    assert context.stats(0).n_lost > n_lost
