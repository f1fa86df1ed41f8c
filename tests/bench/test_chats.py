"""Parts of the chat, multi-turn and memory benchmarks that need no model."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from laq_gguf.bench import chat, memory
from laq_gguf.bench.answers import freely, led, read, without_end
from laq_gguf.bench.multiturn import make_chat
from laq_gguf.bench.needles import essay
from laq_gguf.bench.worker import WorkerError

END = 9


class Words:
    """A tokenizer that knows words and the marks of a template."""

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        return [sum(word.encode()) for word in text.split(" ") if word]


def render(messages: Any) -> str:
    turns = "".join(f"<{m['role']}> {m['content']} </> " for m in messages)
    return f"{turns}<assistant> "


RECORD = {
    "title": "T",
    "context": "one two three",
    "turns": [
        {"question": "who", "answers": ["x", "y"]},
        {"question": " where ", "answers": ["z"]},
        {"question": "when", "answers": ["w"]},
    ],
}


def test_a_chat_in_parts_is_the_rendered_chat() -> None:
    made = make_chat(Words(), render, 4, RECORD, None)
    assert (made.index, made.title, made.n_context) == (4, "T", 3)
    assert made.outputs == (("x", "y"), ("z",), ("w",))
    tokens = Words().tokenize
    messages = [{"role": "user", "content": "one two three\n\nwho"}]
    conversation: list[int] = []
    for part, answer, question in zip(
        made.parts, ("a b", "c", ""), ("where", "when", ""), strict=True
    ):
        conversation += part
        assert conversation == tokens(render(messages))
        conversation += tokens(answer)
        messages += [
            {"role": "assistant", "content": answer}, {"role": "user", "content": question}
        ]  # fmt: skip
    short = make_chat(Words(), render, 4, RECORD, 2)
    assert short.parts == made.parts[:2] and short.digest != made.digest


def test_a_template_that_rewrites_turns_is_refused() -> None:
    def rewrites(messages: Any) -> str:
        return render(messages[-1:])

    with pytest.raises(ValueError, match="rewrites earlier turns"):
        make_chat(Words(), rewrites, 0, RECORD, None)


class Counting:
    """A cache whose next token is one more than the last; 9 ends a reply."""

    def __init__(self) -> None:
        self.history: list[int] = []
        self.reads: list[int] = []

    @property
    def n_tokens(self) -> int:
        return len(self.history)

    def prefill(self, tokens: list[int]) -> None:
        self.history = []
        self.extend(tokens)

    def extend(self, tokens: list[int]) -> None:
        self.history += tokens
        self.reads.append(len(tokens))

    def step(self, token: int) -> None:
        self.history.append(token)

    def is_end(self, token: int) -> bool:
        return token == END

    def logits(self) -> np.ndarray:
        return np.eye(10, dtype=np.float32)[(self.history[-1] + 1) % 10]


def test_a_reply_ends_or_is_cut_and_its_last_token_is_not_decoded() -> None:
    decoder = Counting()
    conversation = [1, 6]
    assert read(decoder, conversation, is_first=True) == 2
    tokens, rows = freely(decoder, decoder.logits(), 5)
    assert (tokens, len(rows), decoder.history) == ([7, 8, 9], 3, [1, 6, 7, 8])
    conversation += [*without_end(decoder, tokens), 9, 2]
    # all of the reply had been decoded: only what the template adds is new
    assert read(decoder, conversation, is_first=False) == 2
    tokens, _ = freely(decoder, decoder.logits(), 3)
    assert tokens == [3, 4, 5] == without_end(decoder, tokens)
    conversation += [*tokens, 9, 0]
    assert read(decoder, conversation, is_first=False) == 3, "5 was sampled, not decoded"
    assert decoder.history == conversation and decoder.reads == [2, 2, 3]


def test_led_decodes_a_given_reply() -> None:
    decoder = Counting()
    decoder.prefill([1])
    logits = led(decoder, decoder.logits(), [4, 7, 9])
    assert logits.argmax(axis=-1).tolist() == [2, 5, 8]
    assert decoder.history == [1, 4, 7]


class Llm:
    """Stands in for a Llama: `fills` says how many cells are in use after each eval."""

    def __init__(self, *fills: int) -> None:
        self.fills, self.stats_now = list(fills), {"n_resident": 0, "n_cells": 512}

    def eval(self, tokens: list[int]) -> None:
        self.stats_now = {"n_resident": self.fills.pop(0), "n_cells": 512}


class Watched:
    def __init__(self, *fills: int) -> None:
        self.llm = Llm(*fills)

    def stats(self) -> dict[str, int]:
        return self.llm.stats_now


def test_the_watch_sees_every_evaluation() -> None:
    decoder = Watched(100, 512, 300)
    watch = chat.Watch(decoder)
    watch.begin()
    for _ in range(3):
        decoder.llm.eval([1])
    assert (watch.n_resident_max, watch.n_looks, len(watch.times)) == (512, 3, 3)
    watch.begin()
    assert (watch.n_resident_max, watch.times) == (0, [])


def test_a_cap_that_does_not_hold_stops_the_run() -> None:
    decoder = Watched(513)
    chat.Watch(decoder)
    with pytest.raises(chat.CapError, match="513 cells in use, 512 allocated"):
        decoder.llm.eval([1])


def test_the_system_turn_ends_with_its_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "chat_renderer", lambda decoder: render)
    messages = [{"role": "system", "content": "be nice"}]
    assert chat.system_tokens(Words(), messages) == 3
    # the last word is in one token with what follows
    monkeypatch.setattr(
        chat, "chat_renderer", lambda d: lambda m: render(m).replace("nice ", "nice")
    )
    assert chat.system_tokens(Words(), messages) == 2
    monkeypatch.setattr(chat, "chat_renderer", lambda decoder: None)
    with pytest.raises(ValueError, match="no chat template with a system turn"):
        chat.system_tokens(Words(), messages)


def test_what_the_user_says_varies_and_comes_again_with_the_seed() -> None:
    def said(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [chat.question(rng) for _ in range(60)]

    assert said(1) == said(1) != said(2)
    assert len(set(said(1))) > 50
    assert all(text.endswith("?") and 4 <= len(text.split()) <= 16 for text in said(1))


def test_an_essay_is_long_enough() -> None:
    assert essay(100) == essay(100) != essay(100, seed=2)
    assert essay(100).count(".") == 100


def test_bytes_of_a_stock_context_come_from_its_log() -> None:
    lines = [
        "llama_kv_cache:        CPU KV buffer size =    22.50 MiB",
        "llama_kv_cache: size =   22.50 MiB (  1024 cells,  30 layers,  1/1 seqs)",
        "sched_reserve:        CPU compute buffer size =    98.25 MiB",
        "sched_reserve:      CUDA0 compute buffer size =     1.00 MiB",
    ]
    assert memory.logged_bytes(lines) == {
        "kv_bytes": 22.5 * 2**20,
        "compute_bytes": 99.25 * 2**20,
        "ring_bytes": 0,
    }
    with pytest.raises(WorkerError, match="compute_bytes"):
        memory.logged_bytes(lines[:2])
