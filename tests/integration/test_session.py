"""Session files: what was read and evicted, saved and gone on with; anything else is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from integration.decoding import Reads, greedy, open_llama, tokens_of
from laq_gguf.errors import LaqStateError

POINTS = {
    "nothing read": (0, 0, {}),
    "below the budget": (40, 6, {}),
    "eviction waits": (300, 5, {}),
    "evicted": (300, 14, {}),
    "pseudo": (300, 3, {"lookahead": "pseudo"}),
    "longer than the cells": (1000, 14, {"kv_staging": 192}),
    "cells filled while decoding": (50, 400, {"kv_staging": 192}),
    "no FlashAttention, q8_0 keys": (300, 14, {"flash_attn": False, "type_k": 8}),
}


@pytest.mark.parametrize("point", POINTS)
def test_going_on_in_another_process_equals_never_having_stopped(
    tiny_gguf: Callable[..., Path], tmp_path: Path, point: str
) -> None:
    n_prompt, n_taken, settings = POINTS[point]
    settings = {"n_ctx": 2048, "kv_budget": 64, **settings}
    llm = open_llama(tiny_gguf("llama"), **settings)
    prompt = tokens_of(n_prompt)
    if n_prompt:
        prompt += greedy(llm, prompt, n_taken)
    llm.save_session(tmp_path / "chat.laq")
    # an eviction that waits is carried out when generate() ends: save, then look
    stats, kept = llm.kv_stats(), llm.kept_positions()

    other = open_llama(tiny_gguf("llama"), **settings)
    greedy(other, tokens_of(500, seed=5), 12)
    other.load_session(tmp_path / "chat.laq")
    after = other.kv_stats()
    for field in ("n_tokens", "n_resident", "n_intact", "pending", "n_cells", "kv_bytes"):
        assert getattr(after, field) == getattr(stats, field), field
    assert (other.kept_positions() == kept).all()
    assert other.n_tokens == llm.n_tokens
    other.progress = reads = Reads()
    longer = [*prompt, *tokens_of(30, seed=3)]
    assert greedy(other, longer, 30) == greedy(llm, longer, 30)
    assert (other.kept_positions() == llm.kept_positions()).all()
    assert reads.totals in ([31], [30]), "nothing before the message is read again"


@pytest.fixture
def saved(tiny_gguf: Callable[..., Path], tmp_path: Path) -> Path:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64)
    greedy(llm, tokens_of(300), 12)
    llm.save_session(tmp_path / "chat.laq")
    return tmp_path / "chat.laq"


def refused(llm: object, path: Path, message: str) -> None:
    """Loading fails, and the conversation that was going on goes on."""
    prompt = tokens_of(200, seed=8)
    answer = greedy(llm, prompt, 12)
    kept, stats = llm.kept_positions(), llm.kv_stats()
    with pytest.raises(LaqStateError, match=message):
        llm.load_session(path)
    assert (llm.kept_positions() == kept).all() and llm.kv_stats() == stats
    fresh = open_llama(llm.model_path, **llm.asked)
    greedy(fresh, prompt, 12)
    longer = [*prompt, *answer, 300]
    assert greedy(llm, longer, 12) == greedy(fresh, longer, 12)


def opened(path: Path, **settings: object) -> object:
    llm = open_llama(path, **settings)
    llm.asked = settings
    return llm


def test_damaged_files(tiny_gguf: Callable[..., Path], saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    wrong = tmp_path / "wrong.laq"
    llm = opened(tiny_gguf("llama"), kv_budget=64)
    for n_bytes in (0, 5, 40, 1000, len(whole) - 1):
        wrong.write_bytes(whole[:n_bytes])
        refused(llm, wrong, r"(?i)session|truncated|bytes")
    for at in (20, 200, len(whole) // 2, len(whole) - 5):
        wrong.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(LaqStateError):
            llm.load_session(wrong)
    refused(llm, tmp_path / "none.laq", "cannot be read|No such file")
    wrong.write_bytes(tiny_gguf("llama").read_bytes())
    refused(llm, wrong, "not a session file|no session file")


def test_foreign_files(tiny_gguf: Callable[..., Path], saved: Path) -> None:
    cases = {
        "model_path": (tiny_gguf("llama", seed=7), {}),
        "type_k": (tiny_gguf("llama"), {"type_k": 8}),
        "flash_attn": (tiny_gguf("llama"), {"flash_attn": False}),
        "lookahead_size": (tiny_gguf("llama"), {"lookahead_size": 5}),
    }
    for message, (path, settings) in cases.items():
        refused(opened(path, kv_budget=64, **settings), saved, message)


def test_more_cells_than_there_are(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    large = open_llama(tiny_gguf("llama"), kv_budget=400)
    large.eval(tokens_of(390))
    large.save_session(tmp_path / "large.laq")
    small = opened(tiny_gguf("llama"), kv_budget=64, kv_staging=192)
    refused(small, tmp_path / "large.laq", "390 cells, but there are 256: raise kv_budget")


def test_other_budget_and_policy_are_taken(tiny_gguf: Callable[..., Path], saved: Path) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=128, kv_policy="streaming", n_ctx=4096)
    llm.load_session(saved)
    assert llm.kv_stats().n_tokens == 311 and llm.kv_stats().n_resident == 67


def test_needs_a_budget(tiny_gguf: Callable[..., Path], saved: Path) -> None:
    llm = open_llama(tiny_gguf("llama"))
    for call in (llm.load_session, llm.save_session):
        with pytest.raises(LaqStateError, match="kv_budget"):
            call(saved)


@pytest.mark.model
@pytest.mark.slow
def test_file_is_ten_times_smaller_than_the_full_state(smollm2: Path, tmp_path: Path) -> None:
    import llama_cpp

    # what the file holds does not depend on the length: 1,500 tokens stand for 7,500
    prompt = [1 + i % 900 for i in range(1500)]
    llm = open_llama(smollm2, n_ctx=8192, kv_budget=512, kv_staging=512, n_batch=512)
    greedy(llm, prompt, 12)
    llm.save_session(tmp_path / "chat.laq")
    n_bytes = (tmp_path / "chat.laq").stat().st_size
    # the bytes of a full state follow from its cells
    stock = llama_cpp.Llama(str(smollm2), n_ctx=8192, n_batch=512, flash_attn=True, verbose=False)
    sizes = []
    for n_tokens in (16, 32):
        stock.reset()
        stock.eval(prompt[:n_tokens])
        sizes.append(llama_cpp.llama_state_seq_get_size(stock.ctx, 0))
    full = sizes[0] + (sizes[1] - sizes[0]) // 16 * (7500 - 16)
    assert n_bytes * 10 <= full, (n_bytes, full)
