"""Chats that outgrow the cells: the system turn stays, earlier turns are not read again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration.decoding import Reads, greedy, open_llama, tokens_of
from laq_gguf.errors import LaqInvalidError

SYSTEM = "You are the keeper of a small library by the sea. Answer in one or two short sentences."
QUESTIONS = (
    "Which book should I read first?", "Who wrote it?", "Is it long?", "What is it about?",
    "Do you have it here?", "When do you close?", "May I bring tea?", "Where is the reading room?",
)  # fmt: skip


def chat(llm: Any, n_turns: int, system: str | None = SYSTEM) -> list[dict[str, str]]:
    """Turns as an application makes them: the whole history is rendered anew each time."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in range(n_turns):
        messages.append({"role": "user", "content": QUESTIONS[turn % len(QUESTIONS)]})
        done = llm.create_chat_completion(messages, max_tokens=40, temperature=0.0)
        messages.append(done["choices"][0]["message"])
        stats = llm.kv_stats()
        assert stats.n_resident <= stats.n_cells
    return messages


@pytest.mark.model
def test_long_chat(smollm2: Path) -> None:
    llm = open_llama(smollm2, n_ctx=8192, n_batch=512, kv_budget=96, kv_staging=160)
    llm.progress = reads = Reads()
    messages = chat(llm, 16)
    stats, kept = llm.kv_stats(), llm.kept_positions()
    assert stats.n_cells == 256 < stats.n_tokens and stats.n_evictions >= 2
    n_system = len(llm._pinned_prefix)
    rendered = llm.detokenize(list(llm._pinned_prefix), special=True).decode()
    assert SYSTEM in rendered and QUESTIONS[0] not in rendered
    for head in kept.reshape(-1, kept.shape[-1]):
        assert np.isin(np.arange(n_system), head).all()
    # a turn reads its own message and template, not the history
    assert reads.totals[0] > 0 and max(reads.totals[1:]) < 60
    assert stats.n_decoded - stats.n_probe - stats.n_pseudo <= stats.n_tokens + 3 * len(messages)


@pytest.mark.model
def test_system_turn_is_pinned_only_in_its_own_chat(smollm2: Path) -> None:
    llm = open_llama(smollm2, n_ctx=4096, n_batch=512, kv_budget=64, lookahead="pseudo")
    chat(llm, 1)
    n_system = len(llm._pinned_prefix)
    assert n_system > 20
    llm.reset()
    prompt = tokens_of(300)
    greedy(llm, prompt, 2)
    assert not np.isin(np.arange(n_system), llm.kept_positions()[0, 0]).all()
    unpinned = open_llama(smollm2, n_ctx=4096, kv_budget=64, pin_system=False)
    chat(unpinned, 1)
    assert len(unpinned._pinned_prefix) == 0


@pytest.mark.model
def test_system_turn_above_the_budget_names_the_settings(smollm2: Path) -> None:
    llm = open_llama(smollm2, n_ctx=4096, n_batch=512, kv_budget=64)
    with pytest.raises(LaqInvalidError, match=r"kv_budget = 64 is below.*raise kv_budget"):
        chat(llm, 1, system=SYSTEM * 4)
    assert len(chat(llm, 1)) == 3
    assert len(chat(llm, 1, system=None)) == 2 and len(llm._pinned_prefix) == 0


def test_reply_that_is_rendered_otherwise(tiny_gguf: Callable[..., Path]) -> None:
    """A history that differs in the reply alone, which is still whole, is not read again."""
    llm = open_llama(tiny_gguf("llama"), n_ctx=2048, kv_budget=64, kv_staging=448)
    llm.progress = reads = Reads()
    prompt = tokens_of(300)
    reply = greedy(llm, prompt, 60)
    changed = [*reply[:10], *tokens_of(45, seed=1)]
    greedy(llm, [*prompt, *changed, *tokens_of(20, seed=2)], 10)
    assert reads.totals == [300, 45 + 20]
    assert llm.kv_stats().n_tokens == 300 + 55 + 20 + 9
