"""A prompt that attends to cells and archive gives what a cache with room for all gives."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import device
from integration.decoding import greedy, open_llama, tokens_of
from integration.test_archive import file_of_archive
from integration.test_recall import SETTINGS, last_logits, turn
from laq_gguf.errors import LaqNativeError, LaqUnsupportedError
from parity.rows import ggml_type
from tolerances import assert_equal, assert_nmse, nmse

N_PROMPT = 700
#: of logits, where sums have another order: an answer that is read again is read in one batch
NMSE = 1e-8 if device.ON_CPU else 1e-6


def whole(tiny_gguf: Callable[..., Path], prompt: list[int], **settings: Any) -> Any:
    """Room for all of the prompt."""
    rules = {"n_ctx": 1536, "kv_budget": 1280, "kv_staging": 256, "kv_policy": "full"}
    llm = open_llama(tiny_gguf("llama"), **{**rules, **settings})
    llm.eval(prompt)
    return llm


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells in host memory are treated as if they were a device's."""
    monkeypatch.setenv("LAQ_CELLS", "device")


@pytest.mark.parametrize("cells", ["host", "device"])
@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize(
    "archive", [{}, {"kv_recall": "disk"}, {"kv_recall_limit": "64KiB"}], ids=str
)
def test_logits_are_those_of_the_whole_cache(
    tiny_gguf: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    flash_attn: bool,
    archive: dict[str, Any],
    cells: str,
) -> None:
    monkeypatch.setenv("LAQ_CELLS", cells)
    prompt = tokens_of(N_PROMPT, seed=1)
    wanted = last_logits(whole(tiny_gguf, prompt, flash_attn=flash_attn))
    llm = open_llama(tiny_gguf("llama"), flash_attn=flash_attn, **{**SETTINGS, **archive})
    before = llm.kv_stats()
    llm.eval(prompt)
    stats = llm.kv_stats()
    assert_equal(last_logits(llm), wanted, "logits")
    assert stats.n_attended > 400 and stats.n_decoded == N_PROMPT
    assert stats.n_probe == stats.n_lost == 0
    # what it is looked ahead from
    assert stats.n_recalls == (1 if cells == "device" or not device.ON_CPU else 0)
    for name in ("kv_bytes", "ring_bytes", "compute_bytes", "n_cells"):
        assert getattr(stats, name) == getattr(before, name), f"{name}: nothing is allocated"


@pytest.mark.parametrize("cache_type", ["q8_0", "f32"])
def test_cells_of_other_types(tiny_gguf: Callable[..., Path], cache_type: str) -> None:
    types = {"type_k": ggml_type(cache_type), "type_v": ggml_type(cache_type)}
    prompt = tokens_of(N_PROMPT, seed=1)
    wanted = last_logits(whole(tiny_gguf, prompt, **types))
    llm = open_llama(tiny_gguf("llama"), **SETTINGS, **types)
    llm.eval(prompt)
    assert_equal(last_logits(llm), wanted, "logits")


def test_an_archive_of_a_smaller_type_costs_what_it_rounds(tiny_gguf: Callable[..., Path]) -> None:
    prompt = tokens_of(N_PROMPT, seed=1)
    wanted = last_logits(whole(tiny_gguf, prompt))
    llm = open_llama(tiny_gguf("llama"), kv_recall_type="q8_0", **SETTINGS)
    llm.eval(prompt)
    probed = open_llama(tiny_gguf("llama"), kv_budget=64, kv_staging=192)
    probed.eval(prompt)
    error = [float(np.square(last_logits(x) - wanted).mean()) for x in (llm, probed)]
    assert 0 < error[0] < 0.05 * error[1]


@pytest.mark.skipif(not device.ON_CPU, reason="on a device it is looked ahead from the cells")
def test_the_first_tokens_of_an_answer_are_the_whole_cache_s(
    tiny_gguf: Callable[..., Path],
) -> None:
    prompt = tokens_of(N_PROMPT, seed=1)
    full = whole(tiny_gguf, prompt)
    llm = open_llama(tiny_gguf("llama"), lookahead="deferred", **SETTINGS)
    llm.eval(prompt)
    for token in tokens_of(8, seed=2):
        assert llm.kv_stats().pending
        for each in (llm, full):
            each.eval([token])
        assert_equal(last_logits(llm), last_logits(full), "logits")
    n_attended = llm.kv_stats().n_attended
    llm.eval([1])
    stats = llm.kv_stats()
    assert not stats.pending and stats.n_recalls == 1
    assert stats.n_attended == n_attended, "what follows comes from the cells alone"


@pytest.mark.skipif(not device.ON_CPU, reason="on a device it is looked ahead from the cells")
@pytest.mark.parametrize("value_fit", [0.0, 0.01])
def test_what_stays_is_what_stays_of_the_whole_cache(
    tiny_gguf: Callable[..., Path], value_fit: float
) -> None:
    prompt, kept, logits = tokens_of(N_PROMPT, seed=1), [], []
    for settings in (SETTINGS, {"kv_budget": 64, "kv_staging": 1200}):
        settings = {**settings, "lookahead": "pseudo", "n_ctx": 1536, "value_fit": value_fit}
        llm = open_llama(tiny_gguf("llama"), **settings)
        llm.eval(prompt)
        assert llm.kv_stats().n_pseudo == 8
        kept.append(llm.kept_positions())
        llm.eval([1])
        logits.append(last_logits(llm))
    assert_equal(kept[0], kept[1], "positions")
    assert_equal(logits[0], logits[1], "logits")


@pytest.mark.parametrize("lookahead", ["deferred", "pseudo"])
def test_on_a_device_a_prompt_is_looked_ahead_from_what_it_recalls(
    tiny_gguf: Callable[..., Path], as_on_a_device: None, lookahead: str
) -> None:
    prompt = tokens_of(N_PROMPT, seed=1)
    full = whole(tiny_gguf, prompt)
    llm = open_llama(tiny_gguf("llama"), lookahead=lookahead, **SETTINGS)
    n_free = llm.kv_stats().n_cells - 8
    llm.eval(prompt)
    assert_equal(last_logits(llm), last_logits(full), "logits")
    stats = llm.kv_stats()
    n_attended = stats.n_attended
    assert n_attended > 400 and stats.n_reread == stats.n_probe == 0
    if lookahead == "deferred":
        assert stats.n_resident == n_free, "all that there is room for, to be looked ahead from"
    assert stats.n_recalls == (1 if lookahead == "deferred" else 2)
    for token in tokens_of(9, seed=2):
        llm.eval([token])
    stats = llm.kv_stats()
    assert (stats.n_attended, stats.n_recalls) == (n_attended, 2), "looked ahead from the cells"


def test_what_the_prompt_recalls_is_fitted_to_all_of_it(
    tiny_gguf: Callable[..., Path], as_on_a_device: None
) -> None:
    prompt, token, errors = tokens_of(N_PROMPT, seed=1), tokens_of(1, seed=2), []
    full = whole(tiny_gguf, prompt)
    full.eval(token)
    for value_fit in (0.0, 0.01):
        llm = open_llama(tiny_gguf("llama"), value_fit=value_fit, **SETTINGS)
        llm.eval(prompt)
        llm.eval(token)
        errors.append(nmse(last_logits(llm), last_logits(full)))
    assert errors[1] < 0.9 * errors[0]


def test_an_answer_is_read_again_with_the_next_message(tiny_gguf: Callable[..., Path]) -> None:
    exact = {"type_k": ggml_type("f32"), "type_v": ggml_type("f32"), "flash_attn": False}
    llm = open_llama(tiny_gguf("llama"), lookahead="pseudo", **SETTINGS, **exact)
    prompt = turn(llm, [], 1, N_PROMPT)
    assert llm.kv_stats().n_reread == 0
    prompt += tokens_of(30, seed=3)
    llm.eval(prompt[llm.n_tokens :])
    stats = llm.kv_stats()
    # on a device each turn recalls what it is looked ahead from, too
    assert stats.n_reread == 11 and stats.n_recalls == (2 if device.ON_CPU else 4)
    wanted = last_logits(whole(tiny_gguf, prompt, **exact))
    assert_nmse(last_logits(llm), wanted, NMSE, "logits")


@pytest.mark.parametrize("lookahead", ["deferred", "pseudo"])
def test_a_prompt_that_is_parked_goes_on_to_attend(
    tiny_gguf: Callable[..., Path], lookahead: str
) -> None:
    prompt = tokens_of(N_PROMPT, seed=1)
    llm = open_llama(tiny_gguf("llama"), lookahead=lookahead, **SETTINGS)
    laq, prompt_next = llm._laq, llm._laq.prompt_next

    def set_aside(left: Any) -> int:
        if len(left) < N_PROMPT:
            laq.resume(laq.park())
        return prompt_next(left)

    laq.prompt_next = set_aside
    llm.eval(prompt)
    assert_equal(last_logits(llm), last_logits(whole(tiny_gguf, prompt)), "logits")


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc/self")
def test_what_is_lost_on_the_way_is_not_attended_to(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), lookahead="pseudo", **{**SETTINGS, "kv_recall": "disk"})
    prompt = turn(llm, [], 1, N_PROMPT)
    os.truncate(file_of_archive(), 0)
    prompt = turn(llm, prompt, 2)
    stats = llm.kv_stats()
    assert stats.n_lost > 0 and np.isfinite(last_logits(llm)).all()
    n_attended = stats.n_attended
    turn(llm, prompt, 3)
    assert llm.kv_stats().n_attended > n_attended, "it attends to what there is"
    assert np.isfinite(last_logits(llm)).all()


def test_a_long_lookahead_and_a_large_batch(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), lookahead="deferred", n_batch=512, **SETTINGS)
    prompt = turn(llm, [], 1, N_PROMPT)
    assert llm.kv_stats().n_attended > 400
    answer = greedy(llm, prompt, 30)
    assert len(answer) == 30


@pytest.mark.skipif(not device.ON_CPU, reason="on a device n_ubatch tokens attend at once")
def test_more_than_can_attend_at_once_are_refused(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), lookahead="deferred", kv_staging=448, **{
        name: value for name, value in SETTINGS.items() if name != "kv_staging"
    })  # fmt: skip
    llm.eval(tokens_of(N_PROMPT, seed=1))
    assert llm.kv_stats().pending
    with pytest.raises(LaqNativeError, match="128"):
        llm._decode(tokens_of(129, seed=2))
    stats = llm.kv_stats()
    assert stats.pending and stats.n_tokens == N_PROMPT
    llm._decode(tokens_of(128, seed=2))
    assert llm.kv_stats().n_tokens == N_PROMPT + 128


def test_what_cannot_be_is_refused(tiny_gguf: Callable[..., Path]) -> None:
    with pytest.raises(LaqUnsupportedError, match="sliding"):
        open_llama(tiny_gguf("gemma3"), **SETTINGS)
