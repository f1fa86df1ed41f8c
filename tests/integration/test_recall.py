"""Recall: what left the cells comes back; what cannot is counted, and nothing wrong comes back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration.decoding import greedy, open_llama, tokens_of
from laq_gguf import recall
from laq_gguf.errors import LaqArgumentError, LaqNativeError, LaqStateError
from tolerances import assert_nmse

SETTINGS = {"kv_budget": 64, "kv_staging": 192, "kv_recall": "ram"}
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self/fd")


def turn(llm: Any, prompt: list[int], seed: int, n_tokens: int = 60) -> list[int]:
    """A message and an answer; the conversation after them."""
    prompt = [*prompt, *tokens_of(n_tokens, seed=seed)]
    return prompt + greedy(llm, prompt, 12)


@pytest.mark.parametrize("lookahead", ["deferred", "pseudo"])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_evicted_tokens_come_back(
    tiny_gguf: Callable[..., Path], lookahead: str, flash_attn: bool
) -> None:
    llm = open_llama(tiny_gguf("llama"), lookahead=lookahead, flash_attn=flash_attn, **SETTINGS)
    before = llm.kv_stats()
    prompt = turn(llm, [], 1, 400)
    kept = llm.kept_positions()
    turn(llm, prompt, 2)
    stats = llm.kv_stats()
    gone = [
        np.setdiff1d(new, old) for new, old in zip(llm.kept_positions()[0], kept[0], strict=True)
    ]
    assert any((positions < kept.max() - 20).any() for positions in gone), "older ones are back"
    assert stats.n_recalls > 0 and stats.n_recalled > 0 and stats.bytes_up > 0
    assert stats.n_lost == 0
    assert stats.n_archived == stats.n_intact * stats.n_layer * stats.n_head_kv
    for name in ("kv_bytes", "ring_bytes", "compute_bytes", "n_cells"):
        assert getattr(stats, name) == getattr(before, name), f"{name}: nothing is allocated"


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_rounds_read_the_end_of_the_message_again(
    tiny_gguf: Callable[..., Path], rounds: int
) -> None:
    llm = open_llama(tiny_gguf("llama"), lookahead="pseudo", recall_rounds=rounds, **SETTINGS)
    prompt = turn(llm, [], 1, 230)
    first = llm.kv_stats()
    turn(llm, prompt, 2)
    stats = llm.kv_stats()
    assert stats.n_recalls - first.n_recalls == rounds + 1
    # a quarter of the budget in each round, then what window_size says
    assert stats.n_reread - first.n_reread == rounds * 64 // 4 + 8


def test_without_recall_nothing_is_archived(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64)
    turn(llm, turn(llm, [], 1, 300), 2)
    stats = llm.kv_stats()
    assert stats.n_archived == stats.archive_bytes == stats.n_recalls == stats.bytes_down == 0
    with pytest.raises(LaqNativeError, match="kv_recall"):
        llm.recall()


@pytest.mark.parametrize("when", ["never", "always"])
def test_when_tokens_are_chosen_again(tiny_gguf: Callable[..., Path], when: str) -> None:
    llm = open_llama(tiny_gguf("llama"), recall=when, **SETTINGS)
    prompt = turn(llm, [], 1, 300)
    prompt += greedy(llm, prompt, 250)  # more than the cells
    n = llm.kv_stats().n_recalls + llm.kv_stats().n_recalls_skipped
    assert (n > 1) == (when == "always")
    if when == "never":
        assert n == 0
        llm.recall()
        assert llm.kv_stats().n_recalls + llm.kv_stats().n_recalls_skipped == 1


def test_a_smaller_type_comes_back_close(tiny_gguf: Callable[..., Path]) -> None:
    from laq_gguf import _lib
    from parity.test_evict import Inspector

    keys = {}
    for kind in (None, "q8_0"):
        llm = open_llama(tiny_gguf("llama"), recall="never", kv_recall_type=kind, **SETTINGS)
        turn(llm, [], 1, 240)
        llm.eval(tokens_of(20, seed=4))
        llm.recall()
        assert llm.kv_stats().n_recalled > 0
        keys[kind] = Inspector(llm, _lib.load()).keys(0), llm.kept_positions(), llm.kv_stats()
    assert keys["q8_0"][2].archive_bytes < 0.6 * keys[None][2].archive_bytes
    same = (keys["q8_0"][1][0] == keys[None][1][0]).all(axis=0)
    assert same.mean() > 0.5
    exact, close = keys[None][0][same], keys["q8_0"][0][same]
    assert (exact != close).any()
    assert_nmse(close, exact, 1e-4, "keys that were archived as q8_0")


# the file


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
    llm = open_llama(path, kv_recall_limit=0, **SETTINGS)
    plain = open_llama(path, kv_budget=64, kv_staging=192)
    prompt = turn(llm, [], 1, 400)
    stats = llm.kv_stats()
    assert stats.n_archived == stats.archive_bytes == stats.archive_file_bytes == 0
    assert stats.n_lost == stats.n_intact * stats.n_layer * stats.n_head_kv
    assert prompt == turn(plain, [], 1, 400), "as without an archive"
    assert turn(llm, prompt, 2) == turn(plain, prompt, 2)


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


# sessions


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
