"""What applications do: streams that end late, several threads, calls after close()."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration.decoding import greedy, open_llama, tokens_of
from integration.test_recall import SETTINGS, last_logits
from laq_gguf.errors import LaqStateError
from tolerances import assert_equal

BUDGET = {"kv_budget": 64, "kv_staging": 192}


def test_an_old_stream_that_ends_late_changes_nothing(tiny_gguf: Callable[..., Path]) -> None:
    prompts = [tokens_of(150, seed=seed) for seed in (1, 2)]
    answers = []
    for late in (False, True):
        llm = open_llama(tiny_gguf("llama"), **BUDGET)
        old = llm.generate(prompts[0], temp=0.0)
        next(old)
        new = llm.generate(prompts[1], temp=0.0)
        answer = list(islice(new, 4))
        if late:
            old.close()
        answer += list(islice(new, 20))
        answers.append((answer, llm.kept_positions().tolist()))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("call", ["park", "reset", "eval", "load_state", "generate"])
def test_a_stream_does_not_go_on_in_another_chat(tiny_gguf: Callable[..., Path], call: str) -> None:
    llm = open_llama(tiny_gguf("llama"), **BUDGET)
    llm.eval(tokens_of(20, seed=3))
    state = llm.save_state()
    stream = llm.generate(tokens_of(150, seed=1), temp=0.0)
    next(stream)
    calls: dict[str, Callable[[], Any]] = {
        "park": lambda: llm.park("other"),
        "reset": llm.reset,
        "eval": lambda: llm.eval([300]),
        "load_state": lambda: llm.load_state(state),
        "generate": lambda: next(llm.generate(tokens_of(10, seed=2), temp=0.0)),
    }
    calls[call]()
    n_tokens = llm.n_tokens
    with pytest.raises(LaqStateError, match="while this answer was generated"):
        next(stream)
    assert llm.n_tokens == n_tokens
    assert len(greedy(llm, tokens_of(30, seed=4), 3)) == 3, "the model goes on"


def test_a_short_answer_s_eviction_is_made_by_the_next_prompt(
    tiny_gguf: Callable[..., Path],
) -> None:
    llm = open_llama(tiny_gguf("llama"), **BUDGET)
    prompt = tokens_of(150, seed=1)
    prompt += greedy(llm, prompt, 3)
    assert llm.kv_stats().pending
    llm.eval(tokens_of(9, seed=2))
    stats = llm.kv_stats()
    assert stats.n_evictions == 1 and stats.n_resident < 150


def test_an_answer_is_regenerated_from_all_of_the_prompt(tiny_gguf: Callable[..., Path]) -> None:
    prompt = tokens_of(700, seed=1)
    llm = open_llama(tiny_gguf("llama"), lookahead="pseudo", **SETTINGS)
    first = greedy(llm, prompt, 5)
    n_attended = llm.kv_stats().n_attended
    assert greedy(llm, prompt, 5) == first
    stats = llm.kv_stats()
    assert stats.n_attended > n_attended, "the last token is a prompt, though it is one"
    assert stats.n_decoded < 2 * len(prompt), "and no other one is read again"


def test_a_closed_model_raises(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    with open_llama(tiny_gguf("llama"), **BUDGET) as llm:
        llm.eval(tokens_of(5))
        state = llm.save_state()
        llm.save_session(tmp_path / "chat")
    llm.close()
    calls: list[Callable[[], Any]] = [
        lambda: llm.eval([300]), lambda: next(llm.generate([300, 301])), llm.reset, llm.kv_stats,
        llm.kept_positions, llm.recall, llm.save_state, lambda: llm.load_state(state),
        lambda: llm.save_session(tmp_path / "other"), lambda: llm.load_session(tmp_path / "chat"),
        lambda: llm.park("a"), lambda: llm.resume("a"), llm.parked, lambda: llm.forget("a"),
        lambda: llm.set_eviction(lookahead_size=4), lambda: llm.tokenize(b"a"),
        lambda: llm.create_completion("a"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(LaqStateError, match="the model is closed"):
            call()
    assert not (tmp_path / "other").exists()


def test_models_are_made_in_threads(tiny_gguf: Callable[..., Path]) -> None:
    path, answers = tiny_gguf("llama"), []

    def work() -> None:
        for _ in range(4):
            with open_llama(path, **BUDGET) as llm:
                answers.append(tuple(greedy(llm, tokens_of(80), 3)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 12 and len(set(answers)) == 1


def test_threads_take_turns(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), **BUDGET)
    logits: dict[int, Any] = {}
    ended = []

    def work(seed: int) -> None:
        for _ in range(3):
            try:
                list(islice(llm.generate(tokens_of(90, seed=seed), temp=0.0), 6))
            except LaqStateError:
                ended.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (1, 2):
        for fresh in (True, False):
            model = open_llama(tiny_gguf("llama"), **BUDGET) if fresh else llm
            model.reset()
            model.eval(tokens_of(90, seed=seed))
            logits[fresh] = last_logits(model)
        assert_equal(logits[False], logits[True], "logits")


def test_a_session_belongs_to_how_keys_are_made(
    tiny_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_gguf("llama")
    llm = open_llama(path, **BUDGET)
    llm.eval(tokens_of(20))
    monkeypatch.chdir(tmp_path)
    llm.save_session("chat")
    other = open_llama(path, rope_freq_scale=0.5, **BUDGET)
    with pytest.raises(LaqStateError, match="rope_freq_scale"):
        other.load_session("chat")
    again = open_llama(path, **BUDGET)
    again.load_session("chat")
    assert again.n_tokens == 20


def test_an_entry_of_a_cache_that_does_not_fit_is_a_miss(tiny_gguf: Callable[..., Path]) -> None:
    from llama_cpp import LlamaRAMCache

    cache, prompt = LlamaRAMCache(), tokens_of(60)
    texts = []
    for settings in (BUDGET, {}, {"kv_budget": 64, "window_size": 4}):
        llm = open_llama(tiny_gguf("llama"), **settings)
        llm.set_cache(cache)
        result = llm.create_completion(prompt, max_tokens=2, temperature=0.0)
        texts.append(result["choices"][0]["text"])
    assert len(set(texts)) == 1
    state = open_llama(tiny_gguf("llama"))
    with pytest.raises(LaqStateError):
        state.load_state(llm.save_state())


def test_the_length_is_what_kv_overrides_say(tiny_gguf: Callable[..., Path]) -> None:
    for length in (512, 4096):
        overrides = {"llama.context_length": length}
        llm = open_llama(tiny_gguf("llama"), n_ctx=0, kv_overrides=overrides, **BUDGET)
        assert llm.n_ctx() == length


def test_a_system_turn_above_the_budget_names_pin_system(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), **BUDGET)
    llm._pinned_prefix = tokens_of(120)
    with pytest.raises(ValueError, match="pin_system=False"):
        llm.eval([*llm._pinned_prefix, *tokens_of(10, seed=2)])
    llm._pinned_prefix = ()
    llm.eval(tokens_of(10, seed=2))
    assert np.isfinite(last_logits(llm)).all()
