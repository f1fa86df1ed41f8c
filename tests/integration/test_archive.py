"""The archive of a chat: what it cannot keep or read back is counted; sessions carry the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.decoding import open_llama
from integration.test_recall import SETTINGS, turn
from laq_gguf import recall
from laq_gguf.errors import LaqArgumentError, LaqInvalidError, LaqStateError

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self/fd")


def file_of_archive() -> str:
    """The path by which this process reaches its archive's file."""
    for name in os.listdir("/proc/self/fd"):
        path = f"/proc/self/fd/{name}"
        if os.path.islink(path) and "/recall-" in os.readlink(path):
            return path
    raise AssertionError("there is no file")


@linux
@pytest.mark.parametrize("damage", ["none", "truncated", "altered"])
def test_damaged_blocks_are_lost_and_the_chat_goes_on(
    tiny_gguf: Callable[..., Path], damage: str
) -> None:
    llm = open_llama(tiny_gguf("llama"), **{**SETTINGS, "kv_recall": "disk"})
    prompt = turn(llm, [], 1, 400)
    assert llm.kv_stats().archive_bytes == 0 < llm.kv_stats().archive_file_bytes
    path = file_of_archive()
    assert os.readlink(path).endswith("(deleted)"), "it goes with the process"
    size = os.stat(path).st_size
    if damage == "truncated":
        os.truncate(path, size // 2)
    elif damage == "altered":
        with open(path, "r+b") as file:
            file.seek(size // 3)
            byte = file.read(1)
            file.seek(size // 3)
            file.write(bytes([byte[0] ^ 1]))
    prompt = turn(llm, prompt, 2)
    stats = llm.kv_stats()
    assert (stats.n_lost > 0) == (damage != "none")
    assert stats.n_recalled > 0
    assert len(turn(llm, prompt, 3)) == len(prompt) + 72


@linux
def test_a_full_disk(tiny_gguf: Callable[..., Path]) -> None:
    import resource

    llm = open_llama(tiny_gguf("llama"), **{**SETTINGS, "kv_recall": "disk"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        prompt = turn(llm, turn(llm, [], 1, 400), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    stats = llm.kv_stats()
    assert stats.n_lost > 0
    assert stats.n_archived + stats.n_lost == stats.n_intact * stats.n_layer * stats.n_head_kv
    assert len(turn(llm, prompt, 3)) == len(prompt) + 72


def test_no_room_at_all(tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "file_folder", lambda: None)
    path = tiny_gguf("llama")
    with pytest.raises(LaqArgumentError, match="XDG_CACHE_HOME"):
        open_llama(path, **{**SETTINGS, "kv_recall": "disk"})
    # without a folder the archive holds a block at least
    for limit in (0, 1024):
        with pytest.raises(LaqInvalidError, match="kv_recall_limit"):
            open_llama(path, kv_recall_limit=limit, **SETTINGS)
    llm = open_llama(path, kv_recall_limit="256KiB", **SETTINGS)
    prompt = turn(llm, [], 1, 400)
    stats = llm.kv_stats()
    assert stats.n_lost > 0 and stats.archive_file_bytes == 0 < stats.archive_bytes
    assert stats.n_archived + stats.n_lost == stats.n_intact * stats.n_layer * stats.n_head_kv
    assert len(turn(llm, prompt, 2)) == len(prompt) + 72


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_a_limit_moves_the_oldest_to_the_file(tiny_gguf: Callable[..., Path], store: str) -> None:
    limit = 3 * 2**16
    settings = {**SETTINGS, "kv_recall": store, "kv_recall_limit": limit}
    llm, other = (open_llama(tiny_gguf("llama"), **s) for s in (settings, SETTINGS))
    prompt = turn(llm, [], 1, 400)
    assert turn(other, [], 1, 400) == prompt
    stats = llm.kv_stats()
    assert 0 < stats.archive_bytes <= limit and stats.archive_file_bytes > 0
    assert turn(llm, prompt, 2) == turn(other, prompt, 2)
    assert (llm.kept_positions() == other.kept_positions()).all()
    llm.reset()
    stats = llm.kv_stats()
    assert stats.archive_bytes == stats.archive_file_bytes == stats.n_archived == 0


def test_a_session_says_whether_it_carries_the_archive(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_gguf("llama")
    llm = open_llama(path, **SETTINGS)
    prompt = turn(llm, [], 1, 400)
    for name, archive in (("with", True), ("without", False)):
        llm.save_session(tmp_path / name, archive=archive)
    assert (tmp_path / "with").stat().st_size > (tmp_path / "without").stat().st_size
    with pytest.raises(LaqStateError, match="kv_recall"):
        open_llama(path, kv_budget=64, kv_staging=192).load_session(tmp_path / "with")
    with pytest.raises(LaqStateError, match="kv_recall_type"):
        open_llama(path, kv_recall_type="q8_0", **SETTINGS).load_session(tmp_path / "with")

    same, less = open_llama(path, **SETTINGS), open_llama(path, **SETTINGS)
    same.load_session(tmp_path / "with")
    less.load_session(tmp_path / "without")
    n_rows = llm.kv_stats().n_layer * llm.kv_stats().n_head_kv
    assert same.kv_stats().n_lost == 0 < less.kv_stats().n_lost
    kept = (llm.kept_positions()[0, 0] < llm.kv_stats().n_intact).sum()
    assert less.kv_stats().n_lost == (llm.kv_stats().n_intact - kept) * n_rows
    assert turn(same, prompt, 2) == turn(llm, prompt, 2)
    assert len(turn(less, prompt, 2)) == len(prompt) + 72
    # there values are fitted to outputs, which the state has not
    plain = open_llama(path, kv_budget=64, kv_staging=192)
    plain.load_session(tmp_path / "without")
    assert len(turn(plain, prompt, 2)) == len(prompt) + 72
    assert plain.kv_stats().ms_fit > 0
