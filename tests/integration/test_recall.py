"""Recall: what left the cells comes back, when it is chosen again and where it is scored."""

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
#: as where the cells are on a device
CELLS = {**SETTINGS, "recall_read": "cells"}


def last_logits(llm: Any) -> Any:
    """Those of the last token."""
    return np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),)).astype(np.float64)


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
    llm = open_llama(tiny_gguf("llama"), lookahead="pseudo", recall_rounds=rounds, **CELLS)
    prompt = turn(llm, [], 1, 230)
    first = llm.kv_stats()
    turn(llm, prompt, 2)
    stats = llm.kv_stats()
    n_skipped = stats.n_recalls_skipped - first.n_recalls_skipped
    assert stats.n_recalls - first.n_recalls + n_skipped == rounds + 1
    assert n_skipped == 0 or rounds > 1, "what one round brought is enough for the next"
    # a quarter of the budget in each round; what window_size says only where there was none
    assert stats.n_reread - first.n_reread == (64 // 4 * (rounds - n_skipped) or 8)


@pytest.mark.parametrize(("size", "n_reread"), [(256, 8 + 12 + 20), (25, 25)])
def test_the_answer_before_the_message_is_read_again(
    tiny_gguf: Callable[..., Path], size: int, n_reread: int
) -> None:
    settings = {**CELLS, "kv_budget": 168, "kv_staging": 344, "reread_size": size}
    llm = open_llama(tiny_gguf("llama"), lookahead="pseudo", **settings)
    prompt = turn(llm, [], 1, 400)
    assert llm.kv_stats().n_reread == 0
    turn(llm, prompt, 2, 20)
    stats = llm.kv_stats()
    assert stats.n_recalls > 0 and stats.n_reread == n_reread


@pytest.mark.parametrize(("budget", "staging", "n_draft"), [(64, 192, 248), (168, 88, 248)])
def test_a_message_brings_together_what_is_looked_ahead_from(
    tiny_gguf: Callable[..., Path], budget: int, staging: int, n_draft: int
) -> None:
    size = {"kv_budget": budget, "kv_staging": staging}
    llm = open_llama(tiny_gguf("llama"), lookahead="deferred", **{**CELLS, **size})
    assert llm.kv_stats().n_cells == 256
    turn(llm, [], 1, 230)
    llm.eval(tokens_of(40, seed=2))
    stats = llm.kv_stats()
    assert stats.n_recalls == 1
    assert stats.n_resident == n_draft, "all cells but the lookahead's"
    for token in tokens_of(9, seed=3):
        llm.eval([token])
    assert llm.kv_stats().n_resident == budget + 1


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


# Where values are fitted to the archive, of 400 tokens in 256 cells, 8 of them for a lookahead, 248
# are read in view of all, then three parts of 40, each of which chooses and is read again, and 32
IN_PARTS = {"n_parts": 3, "part": 40}


@pytest.mark.parametrize(
    "settings", [{}, {"recall_rounds": 0}, {"value_fit": 0}, {"recall_device": "device"}]
)
def test_a_prompt_that_does_not_fit_is_read_twice_where_values_are_fitted(
    tiny_gguf: Callable[..., Path], settings: dict[str, Any]
) -> None:
    llm = open_llama(tiny_gguf("llama"), lookahead="deferred", **CELLS, **settings)
    before = llm.kv_stats()
    llm.eval(tokens_of(400, seed=1))
    stats = llm.kv_stats()
    assert stats.n_tokens == 400 and stats.n_archived > 0 and stats.n_recalls_skipped == 0
    if settings:
        assert stats.n_probe > 0 and stats.n_recalls == stats.n_reread == 0
    else:
        assert stats.n_probe == 0
        assert stats.n_recalls == IN_PARTS["n_parts"] + 2, "the end is read again twice"
        n_parts = IN_PARTS["n_parts"] * IN_PARTS["part"]
        assert stats.n_reread == n_parts + 2 * CELLS["kv_budget"] // 4
    for name in ("kv_bytes", "ring_bytes", "compute_bytes", "n_cells"):
        assert getattr(stats, name) == getattr(before, name), f"{name}: nothing is allocated"


def test_a_prompt_that_was_set_aside_goes_on_in_parts(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), lookahead="deferred", **CELLS)
    llm.eval(tokens_of(400, seed=1))
    n_reread, wanted = llm.kv_stats().n_reread, last_logits(llm)

    llm = open_llama(tiny_gguf("llama"), lookahead="deferred", **CELLS)
    laq, prompt_next = llm._laq, llm._laq.prompt_next

    def set_aside(left: Any) -> int:
        if len(left) < 400:
            laq.resume(laq.park())
        return prompt_next(left)

    laq.prompt_next = set_aside
    llm.eval(tokens_of(400, seed=1))
    assert llm.kv_stats().n_reread == n_reread > 0
    assert (last_logits(llm) == wanted).all()


@pytest.mark.parametrize(
    ("settings", "n_recalls"),
    [({}, IN_PARTS["n_parts"] + 2 + 2), ({"recall_rounds": 0}, 1), ({"value_fit": 0}, 1)],
)
def test_a_message_that_was_read_twice_is_looked_ahead_from_twice(
    tiny_gguf: Callable[..., Path], settings: dict[str, Any], n_recalls: int
) -> None:
    llm = open_llama(tiny_gguf("llama"), lookahead="pseudo", **CELLS, **settings)
    llm.eval(tokens_of(400, seed=1))
    stats = llm.kv_stats()
    assert stats.n_recalls + stats.n_recalls_skipped == n_recalls
    assert stats.n_tokens == 400 and stats.n_resident == CELLS["kv_budget"]
    n_recalled = stats.n_recalls
    turn(llm, tokens_of(400, seed=1), 2, 20)
    assert llm.kv_stats().n_recalls <= n_recalled + 2, "a short message is not"


def test_what_is_read_twice_is_nearly_what_it_is_in_view_of_all(
    tiny_gguf: Callable[..., Path],
) -> None:
    prompt = tokens_of(400, seed=1)
    whole = open_llama(tiny_gguf("llama"), n_ctx=1024, kv_budget=512, kv_policy="full")
    whole.eval(prompt)
    wanted = last_logits(whole)
    error = {}
    for rounds in (0, 1):
        llm = open_llama(tiny_gguf("llama"), lookahead="deferred", recall_rounds=rounds, **CELLS)
        llm.eval(prompt)
        error[rounds] = float(np.square(last_logits(llm) - wanted).mean())
    assert error[1] < 0.25 * error[0]


def test_values_are_fitted_while_a_prompt_is_read(tiny_gguf: Callable[..., Path]) -> None:
    from laq_gguf import _lib
    from property.native_cache import Rows

    values, n_moved = {}, {}
    for fit in (0.01, 0):
        llm = open_llama(tiny_gguf("llama"), recall="never", value_fit=fit, **SETTINGS)
        llm.eval(tokens_of(400, seed=1))
        rows, kept = Rows(llm, _lib.load()), llm.kept_positions()[0, 0]
        archived = {p: rows.archived(0, 0, True, p) for p in kept[kept < 200].tolist()}
        pairs = zip(rows.resident(0, 0, True), kept.tolist(), strict=True)
        n_moved[fit] = sum((row != archived[p]).any() for row, p in pairs if p in archived)
        values[fit] = [rows.archived(0, 0, True, p) for p in range(100)]
        assert (llm.kv_stats().ms_fit > 0) == (fit > 0)
    assert n_moved[0.01] > 20 and n_moved[0] == 0
    # of the first chunk, which was read in view of all that there was
    np.testing.assert_array_equal(*values.values())


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


# where the archive is scored

#: of cases.KERNELS, the one that a device scores the archive with
has_kernel = pytest.mark.skipif("fused" not in device.KERNELS, reason="the CPU scores")


@has_kernel
@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q8_0 in the archive"])
def test_both_places_choose_the_same(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Until n_ctx is full, so that the device's buffer is as well."""
    from laq_gguf import _lib
    from parity.rows import ggml_type
    from parity.test_evict import Inspector

    monkeypatch.setenv("LAQ_DEBUG", "1")
    name, _, archived = kind.partition(" ")
    # where a device scores, values are not fitted to the archive
    settings = {**SETTINGS, "n_ctx": 512, "lookahead": "pseudo", "recall": "always", "value_fit": 0}
    if archived:
        settings["kv_recall_type"], name = name, "f16"
    settings.update(type_k=ggml_type(name), type_v=ggml_type(name))
    chats, chosen, scores = [], [], []
    for place in ("cpu", "device"):
        llm = open_llama(tiny_gguf("llama"), recall_device=place, **settings)
        before = llm.kv_stats()
        prompt = turn(llm, turn(llm, [], 1, 300), 2)
        chats.append(prompt)
        scores.append([Inspector(llm, _lib.load()).scores(il) for il in range(before.n_layer)])
        chosen.append([llm.kept_positions()])
        llm.eval(tokens_of(llm.n_ctx() - len(prompt) + 1, seed=5))
        assert llm.n_tokens == llm.n_ctx()
        llm.recall()
        chosen[-1].append(llm.kept_positions())
        stats = llm.kv_stats()
        assert stats.n_recalls > 2 and stats.n_recalled > 0
        assert stats.recall_bytes == before.recall_bytes
        assert (stats.recall_bytes > 0) == (place == "device")
        assert stats.recall_scored_on == (device.NAME if place == "device" else "CPU",)
        assert stats.recall_reason == f"recall_device = {place} was asked for"
        for field in ("kv_bytes", "ring_bytes", "compute_bytes"):
            assert getattr(stats, field) == getattr(before, field), f"{field}: nothing is allocated"
    if device.ON_CPU:
        assert chats[0] == chats[1]
        assert all((a == b).all() for a, b in zip(*scores, strict=True))
        assert all((a == b).all() for a, b in zip(*chosen, strict=True))
    elif chats[0] == chats[1]:
        assert all((a != b).mean() < 0.02 for a, b in zip(*chosen, strict=True))


@has_kernel
def test_the_buffer_holds_all_that_may_come(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), recall_device="device", **SETTINGS)
    n_keys, n_queries = 1024 + 8, 32  # n_ctx and a lookahead; the window of snapkv
    d, n_group = 64, 2
    info = llm._laq.layer_info(0)
    assert (info.n_embd_head_k, info.n_head // info.n_head_kv) == (d, n_group)
    n_values = n_queries * (n_group * d + n_keys) + n_keys + n_group
    n_bytes = 4 * n_values + 2 * n_keys * d
    assert n_bytes <= llm.kv_stats().recall_bytes <= n_bytes + 5 * 256, "but for alignment"


def test_the_faster_place_is_chosen(tiny_gguf: Callable[..., Path]) -> None:
    stats = open_llama(tiny_gguf("llama"), **SETTINGS).kv_stats()
    if device.ON_CPU:
        assert stats.recall_reason == "the layers are on the CPU"
    elif "fused" not in device.KERNELS:
        assert stats.recall_reason.startswith(f"{device.NAME} has no score kernel")
    else:
        assert min(stats.ms_recall_cpu, stats.ms_recall_device) > 0
        is_there = stats.ms_recall_device < stats.ms_recall_cpu
        assert stats.recall_scored_on == (device.NAME if is_there else "CPU",)
        assert (stats.recall_bytes > 0) == is_there
        assert f"ms on {device.NAME}" in stats.recall_reason
        return
    assert stats.recall_scored_on == ("CPU",)
    assert stats.recall_bytes == stats.ms_recall_cpu == stats.ms_recall_device == 0
    stats = open_llama(tiny_gguf("llama"), kv_budget=64).kv_stats()
    assert stats.recall_scored_on == () and stats.recall_reason == "" and stats.recall_bytes == 0


@pytest.mark.skipif("fused" in device.KERNELS, reason="it has one")
def test_a_device_without_a_kernel_is_refused(tiny_gguf: Callable[..., Path]) -> None:
    with pytest.raises(LaqNativeError, match=r"has no score kernel.*recall_device = auto"):
        open_llama(tiny_gguf("llama"), recall_device="device", **SETTINGS)


def test_other_settings_leave_the_place_as_it_is(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), recall_device="cpu", **SETTINGS)
    before = llm.kv_stats()
    llm.set_eviction(48, kv_policy="snapkv")
    prompt = turn(llm, turn(llm, [], 1, 300), 2)
    stats = llm.kv_stats()
    assert len(prompt) > 300 and stats.n_recalls > 0
    for field in ("recall_scored_on", "recall_reason", "recall_bytes"):
        assert getattr(stats, field) == getattr(before, field)


def test_scoring_is_timed(native: Any) -> None:
    assert 0 < native.time_score("CPU", 1, 64, 512) < 10_000
    with pytest.raises(LaqNativeError, match="not the name of one"):
        native.time_score("GPU of tomorrow", 1, 64, 512)
    with pytest.raises(LaqNativeError, match="block"):
        native.time_score("CPU", 8, 40, 512)
