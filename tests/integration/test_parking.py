"""Parked chats: they come back as they were, at no decoding, and their archives are moved."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration.decoding import Reads, greedy, open_llama, tokens_of
from integration.test_recall import turn
from laq_gguf.errors import LaqArgumentError, LaqNativeError, LaqStateError
from tolerances import assert_equal

SETTINGS = {"kv_budget": 64, "kv_staging": 192, "kv_recall": "ram"}
LIMIT = 3 * 2**16

#: counters of the conversation in the cells
STATE = (
    "n_tokens", "n_resident", "n_intact", "pending", "n_archived", "archive_bytes",
    "archive_file_bytes", "n_cells", "kv_bytes",
)  # fmt: skip
CASES = {
    "ram": {},
    "disk": {"kv_recall": "disk"},
    "part on disk": {"kv_recall_limit": LIMIT},
    "q8_0 archive": {"kv_recall_type": "q8_0"},
    "q4_0 archive on disk": {"kv_recall": "disk", "kv_recall_type": "q4_0"},
    "q8_0 keys, no FlashAttention": {"flash_attn": False, "type_k": 8},
    "no FlashAttention, disk": {"flash_attn": False, "kv_recall": "disk"},
    "pseudo": {"lookahead": "pseudo"},
    "pseudo, no FlashAttention": {"lookahead": "pseudo", "flash_attn": False},
    "laq": {"kv_policy": "laq"},
    "always": {"recall": "always"},
    "no archive": {"kv_recall": None},
}


def logits_of(llm: Any) -> Any:
    """Those of the last token, (n_vocab,)."""
    return llm._last_logits().copy()


def same(llm: Any, other: Any) -> None:
    """Two models hold the same conversation."""
    stats, others = llm.kv_stats(), other.kv_stats()
    for name in STATE:
        assert getattr(stats, name) == getattr(others, name), name
    assert_equal(llm.kept_positions(), other.kept_positions(), "resident positions")
    assert llm._input_ids.tolist() == other._input_ids.tolist()


def other_chat(llm: Any, seed: int = 50) -> list[int]:
    return turn(llm, turn(llm, [], seed, 300), seed + 1)


@pytest.mark.parametrize("case", CASES)
def test_going_on_equals_never_having_parked(tiny_gguf: Callable[..., Path], case: str) -> None:
    settings = {**SETTINGS, **CASES[case]}
    llm, stays = (open_llama(tiny_gguf("llama"), **settings) for _ in range(2))
    prompt = turn(llm, [], 1, 400)
    assert turn(stays, [], 1, 400) == prompt
    for seed in (2, 3):
        llm.park("work")
        assert llm.n_tokens == llm.kv_stats().n_tokens == llm.kv_stats().n_archived == 0
        other_chat(llm)
        llm.reset()
        llm.resume("work")
        same(llm, stays)
        assert_equal(logits_of(llm), logits_of(stays), "logits of the last token")
        longer = turn(llm, prompt, seed)
        assert turn(stays, prompt, seed) == longer
        assert_equal(logits_of(llm), logits_of(stays), "logits of the answer")
        same(llm, stays)
        prompt = longer
    assert llm.kv_stats().n_lost == 0
    if settings["kv_recall"]:
        assert llm.kv_stats().n_recalled > 0


@pytest.mark.parametrize("store", ["ram", "disk"])
@pytest.mark.parametrize("flash_attn", [True, False])
def test_an_eviction_goes_on_waiting(
    tiny_gguf: Callable[..., Path], store: str, flash_attn: bool
) -> None:
    settings = {**SETTINGS, "kv_recall": store, "flash_attn": flash_attn}
    llm, stays = (open_llama(tiny_gguf("llama"), **settings) for _ in range(2))
    prompt, answer = tokens_of(400), tokens_of(20, seed=7)
    for model in (llm, stays):
        model.eval(prompt)
        for token in answer[:3]:
            model.eval([token])
    assert llm.kv_stats().pending
    llm.park("waits")
    assert not llm.kv_stats().pending
    with pytest.raises(LaqNativeError, match="parked sequence waits"):
        llm.set_eviction(48)
    other_chat(llm)
    llm.park("other")
    llm.resume("waits")
    same(llm, stays)
    for token in answer[3:]:
        for model in (llm, stays):
            model.eval([token])
        assert_equal(logits_of(llm), logits_of(stays), "logits")
        same(llm, stays)
    assert not llm.kv_stats().pending


@pytest.mark.parametrize("seed", range(6))
def test_parking_between_any_calls(tiny_gguf: Callable[..., Path], seed: int) -> None:
    rng = random.Random(seed)
    settings = {**SETTINGS, **CASES[list(CASES)[2 * seed]]}
    llm, stays = (open_llama(tiny_gguf("llama"), **settings) for _ in range(2))
    for model in (llm, stays):
        model.eval(tokens_of(9))
    for _ in range(12):
        call = rng.choice(("read", "decode", "go back", "generate", "recall"))
        some = tokens_of(rng.randrange(1, 160), seed=rng.randrange(1000))
        n_back = rng.randrange(20)

        def both(model: Any, call: str = call, some: list[int] = some, n: int = n_back) -> Any:
            if call == "read":
                return model.eval(some)
            if call == "decode":
                return [model.eval([token]) for token in some[:14]]
            if call == "generate":
                return greedy(model, model._input_ids.tolist() + some, 2 + n)
            if call == "recall" and settings["kv_recall"]:
                return model.recall()
            model.n_tokens = max(model.kv_stats().n_intact, model.n_tokens - n)
            return model.eval(some[:9])

        assert both(llm) == both(stays), call
        if rng.random() < 0.6:
            llm.park("one")
            greedy(llm, some, 1 + n_back)
            llm.park("two")
            llm.resume("one")
            llm.forget("two")
        same(llm, stays)
        assert_equal(logits_of(llm), logits_of(stays), f"logits after {call}")


def test_nothing_is_read_again(tiny_gguf: Callable[..., Path]) -> None:
    llm, stays = (open_llama(tiny_gguf("llama"), **SETTINGS) for _ in range(2))
    for model in (llm, stays):
        model.eval(tokens_of(400))
    llm.park("read")
    llm.eval(tokens_of(30, seed=3))
    llm.reset()
    n_decoded = llm.kv_stats().n_decoded
    llm.resume("read")
    assert llm.kv_stats().n_decoded == n_decoded
    llm.progress = reads = Reads()
    assert greedy(llm, tokens_of(400), 9) == greedy(stays, tokens_of(400), 9)
    assert reads.totals == []


def test_chats_take_turns(tiny_gguf: Callable[..., Path]) -> None:
    names = ("a", "b", "c")
    settings = {**SETTINGS, "kv_recall_limit": LIMIT}
    llm = open_llama(tiny_gguf("llama"), **settings)
    alone = {name: open_llama(tiny_gguf("llama"), **settings) for name in names}
    prompts: dict[str, list[int]] = {name: [] for name in names}
    for i in range(3):
        for j, name in enumerate(names):
            if i > 0:
                llm.resume(name)
            n_tokens = 250 if i == 0 else 60
            expected = turn(alone[name], prompts[name], 10 * i + j, n_tokens)
            prompts[name] = turn(llm, prompts[name], 10 * i + j, n_tokens)
            assert prompts[name] == expected
            same(llm, alone[name])
            llm.park(name)
            stats, chats = llm.kv_stats(), llm.parked()
            assert stats.n_parked == len(chats)
            assert stats.parked_bytes == sum(chat.memory_bytes for chat in chats.values())
            assert stats.parked_file_bytes == sum(chat.file_bytes for chat in chats.values())
            assert chats[name].n_tokens == alone[name].n_tokens
            assert chats[name].n_resident == alone[name].kv_stats().n_resident
            assert chats[name].file_bytes == alone[name].kv_stats().archive_file_bytes > 0
            assert chats[name].memory_bytes > alone[name].kv_stats().archive_bytes
    assert list(llm.parked()) == list(names)


# beside the other calls


def test_calls_on_the_cache_leave_parked_chats_alone(
    tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    llm, stays = (open_llama(tiny_gguf("llama"), **SETTINGS) for _ in range(2))
    prompt = turn(llm, [], 1, 400)
    turn(stays, [], 1, 400)
    state = llm.save_state()
    llm.park("work")
    other_chat(llm)
    llm.save_session(tmp_path / "other")
    llm.reset()
    llm.load_state(state)
    llm.recall()
    llm.reset()
    llm.load_session(tmp_path / "other")
    llm.set_eviction(48, window_size=4)
    other_chat(llm)
    llm.set_eviction(64, window_size=8)
    llm.reset()
    llm.resume("work")
    same(llm, stays)
    assert turn(llm, prompt, 2) == turn(stays, prompt, 2)
    same(llm, stays)
    assert llm.kv_stats().n_lost == 0


def test_what_was_pinned_stays_so(tiny_gguf: Callable[..., Path]) -> None:
    llm, stays = (open_llama(tiny_gguf("llama"), **SETTINGS) for _ in range(2))
    prompt = tokens_of(400)
    for model in (llm, stays):
        model._pinned_prefix = prompt[:30]
        greedy(model, prompt, 12)
    llm.park("pinned")
    greedy(llm, tokens_of(300, seed=4), 12)
    llm.reset()
    llm.resume("pinned")
    assert llm._pinned_prefix == prompt[:30]
    for model in (llm, stays):
        model.eval(tokens_of(100, seed=5))
        model.recall()
    assert (llm.kept_positions()[:, :, :30] == np.arange(30)).all()
    same(llm, stays)


def test_all_logits(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), logits_all=True, **SETTINGS)
    llm.eval(tokens_of(300))
    scores = llm.scores[: llm.n_tokens].copy()
    llm.park("scored")
    assert llm.parked()["scored"].memory_bytes > scores.nbytes
    llm.eval(tokens_of(310, seed=2))
    llm.reset()
    llm.resume("scored")
    assert_equal(llm.scores[: llm.n_tokens], scores, "logits of all tokens")


def test_tokens_that_were_set_back_are_not_parked(tiny_gguf: Callable[..., Path]) -> None:
    llm, stays = (open_llama(tiny_gguf("llama"), **SETTINGS) for _ in range(2))
    for model in (llm, stays):
        greedy(model, tokens_of(300), 12)
        model.n_tokens -= 4
    llm.park("shorter")
    assert llm.parked()["shorter"].n_tokens == 307
    llm.resume("shorter")
    for model in (llm, stays):
        model.eval(tokens_of(9, seed=4))
    same(llm, stays)
    assert_equal(logits_of(llm), logits_of(stays), "logits")
    llm.n_tokens = 100
    with pytest.raises(LaqStateError, match="set back to 100"):
        llm.park("gone")
    llm.n_tokens = llm.kv_stats().n_tokens
    same(llm, stays)


def test_refusals(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), **SETTINGS)
    with pytest.raises(LaqStateError, match="the cache is empty"):
        llm.park("work")
    turn(llm, [], 1, 400)
    for name in ("", None, 3):
        with pytest.raises(LaqArgumentError, match="not empty"):
            llm.park(name)
    with pytest.raises(LaqArgumentError, match="'work'; parked: none"):
        llm.resume("work")
    llm.park("work")
    other_chat(llm)
    kept = llm.kept_positions()
    with pytest.raises(LaqArgumentError, match="'work' already"):
        llm.park("work")
    with pytest.raises(LaqStateError, match=r"372 tokens is in the cache|park\(\) it"):
        llm.resume("work")
    assert_equal(llm.kept_positions(), kept, "resident positions")
    llm.park("more")
    for call in (llm.resume, llm.forget):
        with pytest.raises(LaqArgumentError, match="'play'; parked: 'work', 'more'"):
            call("play")
    llm.forget("work")
    assert list(llm.parked()) == ["more"]
    llm.close()
    for call in (lambda: llm.park("x"), lambda: llm.resume("more"), llm.parked):
        with pytest.raises(LaqStateError, match="closed"):
            call()
    plain = open_llama(tiny_gguf("llama"))
    with pytest.raises(LaqStateError, match="kv_budget"):
        plain.park("work")


def test_native_refusals(tiny_gguf: Callable[..., Path], native: Any) -> None:
    llm = open_llama(tiny_gguf("llama"), **SETTINGS)
    ffi, lib, laq = native.ffi, native.lib, llm._laq._laq
    out, info = ffi.new("struct laq_parked **"), ffi.new("struct laq_parked_info *")
    assert lib.laq_park(laq, 0, out) == lib.LAQ_STATUS_INVALID_ARGUMENT
    assert "no tokens" in native.last_error()
    greedy(llm, tokens_of(300), 12)
    for call in (
        lambda: lib.laq_park(laq, 1, out),
        lambda: lib.laq_park(laq, 0, ffi.NULL),
        lambda: lib.laq_resume(laq, 0, ffi.NULL),
    ):
        assert call() == lib.LAQ_STATUS_INVALID_ARGUMENT
    assert lib.laq_park(laq, 0, out) == lib.LAQ_STATUS_OK
    assert lib.laq_get_parked(laq, out[0], info) == lib.LAQ_STATUS_INVALID_ARGUMENT  # no size
    llm.reset()
    greedy(llm, tokens_of(20), 3)
    assert lib.laq_resume(laq, 0, out[0]) == lib.LAQ_STATUS_INVALID_ARGUMENT
    assert "holds tokens" in native.last_error()
    llm.reset()
    assert lib.laq_resume(laq, 0, out[0]) == lib.LAQ_STATUS_OK
    for call in (
        lambda: lib.laq_resume(laq, 0, out[0]),
        lambda: lib.laq_forget(laq, out[0]),
        lambda: lib.laq_get_parked(laq, out[0], info),
    ):
        assert call() == lib.LAQ_STATUS_INVALID_ARGUMENT
        assert "not parked here" in native.last_error()
