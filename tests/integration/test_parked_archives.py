"""Archives of parked chats: their files and bytes go where the chat goes, and nothing is copied."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.decoding import open_llama
from integration.test_parking import SETTINGS, other_chat
from integration.test_recall import turn

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self")


def files_of_archives() -> dict[str, int]:
    """Archives' files that this process has open: inode and bytes, by a path that reaches them."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.islink(path) and "/recall-" in os.readlink(path):
            found[os.readlink(path)] = os.stat(path).st_size
    return found


@linux
def test_a_file_is_moved_and_goes_with_its_chat(tiny_gguf: Callable[..., Path]) -> None:
    before = set(files_of_archives())

    def files() -> dict[str, int]:
        return {name: n for name, n in files_of_archives().items() if name not in before}

    llm = open_llama(tiny_gguf("llama"), **{**SETTINGS, "kv_recall": "disk"})
    turn(llm, [], 1, 400)
    (first,) = files().items()
    llm.park("first")
    assert files() == dict([first])
    chat = llm.parked()["first"]
    assert chat.file_bytes == first[1]
    n_state = open_llama(tiny_gguf("llama"), kv_budget=64, kv_staging=192)
    turn(n_state, [], 1, 400)
    n_state.park("first")
    assert chat.memory_bytes == n_state.parked()["first"].memory_bytes, "nothing of it is in memory"

    other_chat(llm)
    assert len(files()) == 2
    llm.park("second")
    llm.resume("first")
    assert llm.kv_stats().archive_file_bytes == first[1]
    llm.forget("second")
    assert files() == dict([first])
    llm.park("first")
    other_chat(llm)
    llm.close()
    assert files() == {}


def peak_of_memory() -> int:
    """Most bytes that the process has had resident since `forget_peak`."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition("VmHWM:")[2].split()[0]) * 1024


def bytes_read() -> int:
    """Bytes that the process has read from files, cached or not."""
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(text.partition("rchar:")[2].split()[0])


def forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        pytest.skip(f"the peak cannot be set back: {error}")


@linux
@pytest.mark.parametrize("store", ["ram", "disk"])
def test_an_archive_is_not_copied(tiny_gguf: Callable[..., Path], store: str) -> None:
    """Not when it is parked, and not when it comes back: the process would grow by it."""
    shape = {"n_layer": 4, "n_head": 4, "n_head_kv": 4, "n_embd_head": 128, "n_embd": 32}
    path = tiny_gguf("llama", **shape)
    llm = open_llama(path, **{**SETTINGS, "kv_recall": store, "n_ctx": 2048})
    turn(llm, [], 1, 1900)
    stats = llm.kv_stats()
    n_archive = stats.archive_bytes + stats.archive_file_bytes
    llm.park("long")
    n_cells = llm.parked()["long"].memory_bytes - stats.archive_bytes
    assert n_archive > 8 * n_cells
    llm.resume("long")
    forget_peak()
    before, n_read = peak_of_memory(), bytes_read()
    for _ in range(3):
        llm.park("long")
        llm.resume("long")
    assert peak_of_memory() - before < n_archive / 3
    assert bytes_read() - n_read < n_archive / 3
    after = llm.kv_stats()
    for name in ("archive_bytes", "archive_file_bytes", "n_archived", "bytes_down", "bytes_up"):
        assert getattr(after, name) == getattr(stats, name), name


@linux
def test_damage_while_parked_is_counted_when_it_is_noticed(tiny_gguf: Callable[..., Path]) -> None:
    before = set(files_of_archives())
    llm = open_llama(tiny_gguf("llama"), **{**SETTINGS, "kv_recall": "disk"})
    prompt = turn(llm, [], 1, 400)
    llm.park("work")
    (name,) = set(files_of_archives()) - before
    for number in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{number}"
        if os.path.islink(path) and os.readlink(path) == name:
            os.truncate(path, 1000)
    other_chat(llm)
    llm.reset()
    assert llm.kv_stats().n_lost == 0
    llm.resume("work")
    assert llm.kv_stats().n_lost == 0, "nothing is read of the file"
    turn(llm, prompt, 2)
    assert llm.kv_stats().n_lost > 0
