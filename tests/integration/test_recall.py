"""Recall: archived tokens become resident again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import device
from integration.decoding import greedy, open_llama, tokens_of
from laq_gguf.errors import LaqNativeError
from tolerances import assert_nmse

SETTINGS = {"kv_budget": 64, "kv_staging": 192, "kv_recall": "ram"}


def last_logits(llm: Any) -> Any:
    """Those of the last token."""
    return np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)).astype(np.float64)


def turn(llm: Any, prompt: list[int], seed: int, n_tokens: int = 60) -> list[int]:
    """A message and an answer; the conversation after them."""
    prompt = [*prompt, *tokens_of(n_tokens, seed=seed)]
    return prompt + greedy(llm, prompt, 12)


@pytest.mark.parametrize("cells", ["host", "device"])
@pytest.mark.parametrize("lookahead", ["deferred", "pseudo"])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_evicted_tokens_come_back(
    tiny_gguf: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    lookahead: str,
    flash_attn: bool,
    cells: str,
) -> None:
    monkeypatch.setenv("LAQ_CELLS", cells)
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
    assert stats.n_lost == stats.n_probe == 0
    assert stats.n_archived == stats.n_intact * stats.n_layer * stats.n_head_kv
    for name in ("kv_bytes", "ring_bytes", "compute_bytes", "n_cells"):
        assert getattr(stats, name) == getattr(before, name), f"{name}: nothing is allocated"


def test_values_that_were_fitted_come_back_as_they_were(tiny_gguf: Callable[..., Path]) -> None:
    from laq_gguf import _lib
    from property.native_cache import Rows

    llm = open_llama(tiny_gguf("llama"), lookahead="pseudo", **SETTINGS)
    rows = Rows(llm, _lib.load())

    def n_moved() -> int:
        """Values of the first head that are not those of the archive."""
        n = 0
        for row, position in zip(
            rows.resident(0, 0, True), llm.kept_positions()[0, 0], strict=True
        ):
            if position < llm.kv_stats().n_intact:
                n += (row != rows.archived(0, 0, True, int(position))).any()
        return n

    prompt = turn(llm, [], 1, 230)
    assert n_moved() > 40 and llm.kv_stats().ms_fit > 0
    llm.set_eviction(value_fit=0)
    turn(llm, prompt, 2)
    assert llm.kv_stats().n_recalls > 0 and n_moved() == 0


def test_without_an_archive_nothing_is_archived(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64)
    turn(llm, turn(llm, [], 1, 300), 2)
    stats = llm.kv_stats()
    assert stats.n_archived == stats.archive_bytes == stats.n_recalls == stats.bytes_down == 0
    with pytest.raises(LaqNativeError, match="kv_recall"):
        llm.recall()


@pytest.mark.parametrize("when", ["turn", "always"])
def test_when_tokens_are_recalled(tiny_gguf: Callable[..., Path], when: str) -> None:
    llm = open_llama(tiny_gguf("llama"), recall=when, **SETTINGS)
    prompt = turn(llm, [], 1, 300)
    n_turn = llm.kv_stats().n_recalls
    # on a device once more, for what it is looked ahead from
    assert n_turn == (1 if device.ON_CPU else 2)
    n_evictions = llm.kv_stats().n_evictions
    for token in [prompt[-1], *tokens_of(250, seed=3)]:  # more than the cells
        llm.eval([token])
    stats = llm.kv_stats()
    assert stats.n_evictions > n_evictions
    assert (stats.n_recalls > n_turn) == (when == "always")
    llm.recall()
    assert llm.kv_stats().n_recalls == stats.n_recalls + 1, "at any time"


def test_nothing_is_skipped(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), **SETTINGS)
    turn(llm, [], 1, 300)
    kept, n = llm.kept_positions(), llm.kv_stats().n_recalls
    for i in (1, 2):
        llm.recall()
        assert llm.kv_stats().n_recalls == n + i
    assert llm.kept_positions().shape <= kept.shape


def test_a_smaller_type_comes_back_close(tiny_gguf: Callable[..., Path]) -> None:
    from laq_gguf import _lib
    from parity.test_evict import Inspector

    keys = {}
    for kind in (None, "q8_0"):
        llm = open_llama(tiny_gguf("llama"), kv_recall_type=kind, **SETTINGS)
        turn(llm, [], 1, 240)
        for token in tokens_of(20, seed=4):
            llm.eval([token])
        llm.recall()
        assert llm.kv_stats().n_recalled > 0
        keys[kind] = Inspector(llm, _lib.load()).keys(0), llm.kept_positions(), llm.kv_stats()
    assert keys["q8_0"][2].archive_bytes < 0.6 * keys[None][2].archive_bytes
    same = (keys["q8_0"][1][0] == keys[None][1][0]).all(axis=0)
    assert same.mean() > 0.5
    exact, close = keys[None][0][same], keys["q8_0"][0][same]
    assert (exact != close).any()
    assert_nmse(close, exact, 1e-4, "keys that were archived as q8_0")


def test_other_settings_leave_the_archive_as_it_is(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), **SETTINGS)
    before = llm.kv_stats()
    llm.set_eviction(48, kv_policy="snapkv")
    prompt = turn(llm, turn(llm, [], 1, 300), 2)
    stats = llm.kv_stats()
    assert len(prompt) > 300 and stats.n_recalls > 0
    assert stats.compute_bytes == before.compute_bytes


def test_the_papers_two_stages(tiny_gguf: Callable[..., Path]) -> None:
    """SnapKV evicts, pseudo tokens are decoded from what is left, their queries recall."""
    prompt, n_ahead = tokens_of(240, seed=1), 8
    llm = open_llama(tiny_gguf("llama"), kv_policy="laq", **SETTINGS)
    llm.set_eviction(64, kv_policy="snapkv")
    llm.eval(prompt)
    assert llm.kv_stats().n_resident == 64
    by_snapkv = llm.kept_positions()
    for token in tokens_of(n_ahead, seed=2):
        llm.eval([token])
    llm.set_eviction(64 + n_ahead, kv_policy="laq")
    llm.recall()
    assert llm._ctx.kv_cache_seq_rm(0, len(prompt), -1)
    stats = llm.kv_stats()
    assert (stats.n_resident, stats.n_tokens, stats.n_recalls) == (64, len(prompt), 1)
    assert (llm.kept_positions() != by_snapkv).any()
