"""A call that finds no memory fails and nothing has changed, or it is done.

`laq_test_fail(n)` lets the n-th allocation of a call fail. Each test compares with a twin that
never failed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import laq_gguf
from integration.decoding import tokens_of
from integration.test_sequences import BUDGET, N_CELLS, Context
from laq_gguf import _lib

TESTS = Path(__file__).resolve().parents[1]
DEFERRED, PSEUDO = 0, 1
N_AHEAD = 8
LAQ = {"n_lookahead": N_AHEAD, "lookahead": PSEUDO}
WAITS = {**LAQ, "lookahead": DEFERRED}
ARCHIVE = {**LAQ, "archive": 1}
DEVICE = {"cells": "device"}
ROW_BYTES = 2 * 64  # of one head, F16


class Snapshot(NamedTuple):
    """What a failed call leaves as it was."""

    n_tokens: int
    n_resident: int
    n_intact: int
    pending: int
    kept: bytes
    keys: bytes
    values: bytes


class Cells(Context):
    """A context of N_CELLS cells with one sequence, unless told otherwise."""

    def __init__(self, native: _lib.Native, path: Path, **settings: Any) -> None:
        import llama_cpp

        self.api, self.native = llama_cpp, native
        model = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = N_CELLS, 256, 256
        params.n_threads = params.n_threads_batch = 1
        params.n_seq_max, params.kv_unified = settings.pop("n_seq", 1), True
        flash = settings.pop("flash_attn", True)
        params.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash
            else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.laq, self._kept_alive = native.ffi.NULL, []
        if settings.pop("attach", True):
            self.laq = self.attach(**settings)

    def attach(self, **settings: Any) -> Any:
        """laq_attach(), or the error that it gives."""
        if isinstance(settings.get("archive_folder"), str):
            folder = self.native.ffi.new("char[]", settings["archive_folder"].encode())
            self._kept_alive.append(folder)
            settings["archive_folder"] = folder
        return self._attach(settings)

    def fails(self, n: int, name: str, *args: Any) -> int:
        """The status of a call whose n-th allocation fails."""
        self.native.lib.laq_test_fail(n)
        status = getattr(self.native.lib, name)(self.laq, *args)
        self.native.lib.laq_test_fail(0)
        return status

    def try_decode(self, *rows: tuple[int, int, int]) -> int:
        """What llama_decode() returns for rows (token, position, sequence)."""
        try:
            self.decode(*rows)
        except RuntimeError as error:
            return int(str(error).rsplit(" ", 1)[1])
        return 0

    def rows(self, seq: int, is_v: bool) -> bytes:
        """K or V of all layers and heads."""
        stats = self.stats(seq)
        raw = np.zeros((stats.n_layer, stats.n_head_kv, stats.n_resident * ROW_BYTES), np.uint8)
        for il in range(stats.n_layer):
            for head in range(stats.n_head_kv):
                dst = self.native.ffi.from_buffer("uint8_t[]", raw[il, head], require_writable=True)
                self.call("laq_get_rows", seq, il, head, is_v, dst, raw.shape[-1])
        return raw.tobytes()

    def snapshot(self, seq: int = 0) -> Snapshot:
        s = self.stats(seq)
        kept = self.kept(seq).tobytes()
        state = (s.n_tokens, s.n_resident, s.n_intact, s.pending)
        return Snapshot(*state, kept, self.rows(seq, False), self.rows(seq, True))


class Opener:
    """Makes contexts of a model, closes them, and collects what is logged."""

    def __init__(self, native: _lib.Native, path: Path) -> None:
        import llama_cpp

        self.native, self.path, self.log = native, path, []
        self._made: list[Cells] = []
        self._api, self._previous = llama_cpp, llama_cpp.llama_log_callback()
        self._data = llama_cpp.ctypes.c_void_p()
        byref = llama_cpp.ctypes.byref
        llama_cpp.llama_log_get(byref(self._previous), byref(self._data))
        self._collect = llama_cpp.llama_log_callback(
            lambda level, text, _: self.log.append(text.decode("utf-8", "replace"))
        )
        llama_cpp.llama_log_set(self._collect, llama_cpp.ctypes.c_void_p())

    def __call__(self, **settings: Any) -> Cells:
        """settings: of laq_params, and those of Cells."""
        self._made.append(Cells(self.native, self.path, **settings))
        return self._made[-1]

    def close(self) -> None:
        self.native.lib.laq_test_fail(0)
        for context in self._made:
            context.close()
        self._api.llama_log_set(self._previous, self._data)


@pytest.fixture
def cells(native: _lib.Native, tiny_gguf: Callable[..., Path]) -> Iterator[Opener]:
    """cells(**settings): Cells of a tiny model."""
    opener = Opener(native, tiny_gguf("llama"))
    yield opener
    opener.close()


def following(context: Cells, n: int = 3) -> list[bytes]:
    """Logits of n more tokens."""
    first = context.stats(0).n_tokens
    return [context.decode((300 + i, first + i, 0)).tobytes() for i in range(n)]


class Case(NamedTuple):
    """A call that may run out of memory.

    Attributes:
        settings: of the context.
        prepare: what happens before the call.
        call: its name and what follows the context and the sequence.
    """

    settings: dict[str, Any]
    prepare: Callable[[Cells], Any]
    call: tuple[Any, ...]


def read(n: int) -> Callable[[Cells], Any]:
    """A prompt of n tokens."""
    return lambda c: c.read(0, tokens_of(n))


def chunks(n: int, n_left: int) -> Callable[[Cells], Any]:
    """The beginning of a prompt of n tokens, until n_left or fewer are left."""

    def go(c: Cells) -> None:
        n_chunk, left, first = c.native.ffi.new("uint32_t *"), tokens_of(n), 0
        while len(left) > n_left:
            c.call("laq_prompt_next", 0, left, len(left), n_chunk)
            chunk, left = left[: n_chunk[0]], left[n_chunk[0] :]
            c.decode(*[(t, first + i, 0) for i, t in enumerate(chunk)])
            first += len(chunk)
        c.left = left

    return go


def answered(n: int, n_answer: int = N_AHEAD) -> Callable[[Cells], Any]:
    """A prompt of n tokens, then n_answer of an answer."""

    def go(c: Cells) -> None:
        c.read(0, tokens_of(n))
        for i, token in enumerate(tokens_of(n_answer, seed=9)):
            c.decode((token, n + i, 0))

    return go


CASES = {
    "evict": Case(LAQ, read(200), ("laq_evict", 40)),
    "evict, V is transposed": Case({**LAQ, "flash_attn": False}, read(200), ("laq_evict", 40)),
    "evict, archived": Case(ARCHIVE, read(200), ("laq_evict", 40)),
    "evict, for the first time": Case(LAQ, answered(60, 40), ("laq_evict", 40)),
    "evict, streaming": Case({"policy": 4}, answered(200, 20), ("laq_evict", 40)),
    "flush": Case(WAITS, answered(200), ("laq_flush",)),
    "flush, no lookahead yet": Case(WAITS, answered(200, 0), ("laq_flush",)),
    "flush, archived": Case({**WAITS, "archive": 1}, answered(200), ("laq_flush",)),
    "flush, recalled": Case({**WAITS, "archive": 1}, answered(900), ("laq_flush",)),
    "recall": Case(ARCHIVE, read(900), ("laq_recall",)),
    "recall, q8_0": Case({**ARCHIVE, "archive_type": 8}, answered(900, 20), ("laq_recall",)),
    "recall, from a file": Case({**ARCHIVE, "archive_limit": 1}, read(900), ("laq_recall",)),
    "prompt_next, probe": Case({**LAQ, "n_probe": 32}, chunks(1200, 420), ("laq_prompt_next",)),
    "prompt_next, attends": Case(ARCHIVE, chunks(1200, 380), ("laq_prompt_next",)),
    "prompt_end": Case(LAQ, chunks(300, 0), ("laq_prompt_end",)),
    "prompt_end, archived": Case(ARCHIVE, chunks(300, 0), ("laq_prompt_end",)),
    "prompt_end, recalled": Case(ARCHIVE, chunks(900, 0), ("laq_prompt_end",)),
    "prompt_end, snapkv": Case({"policy": 3}, chunks(300, 0), ("laq_prompt_end",)),
    "prompt_end, on a device": Case({**ARCHIVE, **DEVICE}, chunks(900, 0), ("laq_prompt_end",)),
    "prompt_end, on a device, no fit": Case(
        {**ARCHIVE, **DEVICE, "value_fit": 0.0}, chunks(900, 0), ("laq_prompt_end",)
    ),
    "prompt_end, on a device, deferred": Case(
        {**WAITS, **DEVICE, "archive": 1}, chunks(900, 0), ("laq_prompt_end",)
    ),
}
#: a recall for the lookahead, then the recall by it: where the second one fails, no token is lost
IN_TWO_STEPS = ("prompt_end, on a device", "prompt_end, on a device, no fit")
Made = tuple[Cells, tuple[Any, ...]]


@pytest.fixture
def made(cells: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Made]:
    """made(case): a context before the call, and the call."""

    def make(case: Case, **other: Any) -> Made:
        settings = {**case.settings, **other}
        monkeypatch.setenv("LAQ_CELLS", settings.pop("cells", "host"))
        if "archive_limit" in settings:
            settings["archive_folder"] = str(tmp_path)
        context = cells(**settings)
        case.prepare(context)
        name, *args = case.call
        if name == "laq_prompt_next":
            args = [context.left, len(context.left), context.native.ffi.new("uint32_t *")]
        return context, (name, 0, *args)

    return make


@pytest.mark.parametrize("moved_by", ["host", "graph"])
@pytest.mark.parametrize("name", CASES)
def test_a_call_that_finds_no_memory_changes_nothing(
    made, cells, monkeypatch: pytest.MonkeyPatch, name: str, moved_by: str
) -> None:
    monkeypatch.setenv("LAQ_COMPACT", moved_by)
    (context, call), (twin, call_of_twin) = made(CASES[name]), made(CASES[name])
    before = context.snapshot()
    assert twin.snapshot() == before
    twin.call(*call_of_twin)
    assert twin.snapshot() != before or "deferred" in name, "the call does something"

    n_failed = 0
    for n in count(1):
        cells.log.clear()
        if context.fails(n, *call) != context.native.lib.LAQ_STATUS_OK:
            n_failed += 1
            assert context.native.last_error()
            if name not in IN_TWO_STEPS:
                assert context.snapshot() == before, f"allocation {n} failed"
        elif any("laq_fit" in line for line in cells.log):
            # values are fitted if there is memory for it; the next one fails in a new context
            assert context.snapshot()[:4] == twin.snapshot()[:4]
            context, call = made(CASES[name])
        else:
            break
    assert n_failed > 0, "something was to fail"
    assert context.snapshot() == twin.snapshot()
    assert following(context) == following(twin)


def test_values_stay_where_a_fit_finds_no_memory(made, cells) -> None:
    (context, call), (fitted, _) = made(CASES["flush"]), made(CASES["flush"])
    unfitted, _ = made(CASES["flush"], value_fit=0.0)
    for each in (fitted, unfitted):
        each.call(*call)
    for n in count(1):
        cells.log.clear()
        if context.fails(n, *call) == context.native.lib.LAQ_STATUS_OK:
            break
    assert any("laq_fit" in line for line in cells.log), "the last allocation is that of the fit"
    assert context.snapshot() == unfitted.snapshot() != fitted.snapshot()


@pytest.mark.parametrize("name", ["flush", "flush, recalled"])
def test_an_eviction_that_waits_goes_on_waiting(made, name: str) -> None:
    (context, call), (twin, _) = made(CASES[name]), made(CASES[name])
    for n in (1, 2, 3):
        assert context.fails(n, *call) == context.native.lib.LAQ_STATUS_NO_MEMORY
        assert context.stats(0).pending == 1
    # the next token does it
    assert following(context) == following(twin)
    assert context.stats(0).pending == 0 and context.snapshot() == twin.snapshot()


DECODING = {
    "an eviction that waits": (WAITS, answered(300)),
    "a recall that waits": ({**WAITS, "archive": 1}, answered(900)),
    "no cells": (LAQ, answered(200, N_CELLS - BUDGET)),
    "no cells, archived": ({**ARCHIVE, "recall": 1}, answered(900, N_CELLS - BUDGET)),
}


@pytest.mark.parametrize("name", DECODING)
def test_a_failure_inside_llama_decode_is_said(cells, name: str) -> None:
    settings, prepare = DECODING[name]
    context, twin = cells(**settings), cells(**settings)
    for each in (context, twin):
        prepare(each)
    before, n_evictions = context.snapshot(), context.stats(0).n_evictions
    for n in (1, 2, 3):
        context.native.lib.laq_test_fail(n)
        assert context.try_decode((300, before.n_tokens, 0)) == 1
        context.native.lib.laq_test_fail(0)
        assert "memory" in context.native.last_error()
        assert context.snapshot() == before
    assert following(context) == following(twin)
    assert context.snapshot() == twin.snapshot()
    assert context.stats(0).n_evictions == n_evictions + 1
    assert context.native.last_error() == ""


@pytest.mark.parametrize("n_shared", [150, -1], ids=["most", "all"])
def test_what_is_shared_keeps_an_eviction_waiting(cells, n_shared: int) -> None:
    context, twin = (cells(n_seq=2, **WAITS) for _ in range(2))
    for each in (context, twin):
        answered(200)(each)
    context.api.llama_memory_seq_cp(context.memory, 0, 1, 0, n_shared)
    before = context.snapshot()
    for _ in range(2):
        assert context.try_decode((300, before.n_tokens, 0)) == 1
        assert "shared with another" in context.native.last_error()
        assert context.snapshot() == before
    assert context.api.llama_memory_seq_rm(context.memory, 1, -1, -1)
    assert following(context) == following(twin)
    assert context.snapshot() == twin.snapshot()


RECALL_OF_UNSHARED = """
import signal
from pathlib import Path
from integration.test_failures import WAITS, Opener, answered
from laq_gguf import _lib
signal.alarm(20)
native = _lib.load()
opener = Opener(native, Path({path!r}))
context = opener(n_seq=2, archive=1, archive_limit=2**16, **WAITS)
pinned = native.ffi.new("struct laq_span[]", [[10, 20]])
context.call("laq_set_pinned", 0, pinned, 1)
answered(200)(context)
context.api.llama_memory_seq_cp(context.memory, 0, 1, 30, 55)
context.decode((300, 208, 0))
assert context.api.llama_memory_seq_rm(context.memory, 1, -1, -1)
for i in range(40):
    context.decode((300 + i, 209 + i, 0))
assert context.stats(0).n_lost > 0, "the archived copies of the pinned tokens are gone"
context.call("laq_recall", 0)
assert context.stats(0).n_recalls == 1
kept = context.kept(0)
assert all(p in kept[il, h] for il in range(2) for h in range(2) for p in range(10, 20))
opener.close()
print("done")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a call that hangs is ended by a signal")
def test_a_recall_of_what_was_shared_ends(run_python, tiny_gguf: Callable[..., Path]) -> None:
    paths = [Path(laq_gguf.__file__).parents[1], TESTS, TESTS.parent / "scripts"]
    code = RECALL_OF_UNSHARED.format(path=str(tiny_gguf("llama")))
    done = run_python("-c", code, PYTHONPATH=os.pathsep.join(map(str, paths)))
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr[-2000:]


@pytest.mark.parametrize("archive", [0, 1])
@pytest.mark.parametrize("n_answer", [3, 20])
def test_parking_that_finds_no_memory(cells, archive: int, n_answer: int) -> None:
    context, twin = (cells(**WAITS, archive=archive) for _ in range(2))
    for each in (context, twin):
        answered(900, n_answer)(each)
    before, out = context.snapshot(), context.native.ffi.new("struct laq_parked **")
    n_archived = context.stats(0).n_archived
    for n in count(1):
        if context.fails(n, "laq_park", 0, out) == context.native.lib.LAQ_STATUS_OK:
            break
        assert context.snapshot() == before and context.stats(0).n_archived == n_archived
    assert n > 1 and context.stats(0).n_used == 0
    for n in count(1):
        if context.fails(n, "laq_resume", 0, out[0]) == context.native.lib.LAQ_STATUS_OK:
            break
        assert context.stats(0).n_used == context.stats(0).n_tokens == 0
    assert context.snapshot() == before and context.stats(0).n_archived == n_archived
    assert following(context, 12) == following(twin, 12)
    assert context.snapshot() == twin.snapshot()
