"""Which tokens a later prompt reuses, and that what cannot be reused is evaluated afresh."""

from collections.abc import Callable
from pathlib import Path

import pytest

from integration.decoding import Reads, greedy, open_llama, tokens_of
from laq_gguf.errors import LaqContextFullError, LaqStateError

N_PROMPT = 300
MODES = pytest.mark.parametrize("lookahead", ["deferred", "pseudo"])


@MODES
def test_prompt_that_extends_the_last_one_reuses_the_cache(
    tiny_gguf: Callable[..., Path], lookahead: str
) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=96, lookahead=lookahead)
    llm.progress = reads = Reads()
    prompt = tokens_of(N_PROMPT)
    answer = greedy(llm, prompt, 20)
    follow_up = [*prompt, *answer, *tokens_of(50, seed=1)]
    greedy(llm, follow_up, 20)
    assert reads.totals == [N_PROMPT, 51], "the last sampled token was not decoded yet"
    stats = llm.kv_stats()
    assert stats.n_evictions == 2 and stats.n_tokens == len(follow_up) + 19
    assert stats.n_resident <= 96 + 19
    assert (llm.kept_positions() >= N_PROMPT).any()


@MODES
@pytest.mark.parametrize("n_shared", [0, 1, 150])
def test_diverging_prompt_equals_a_new_context(
    tiny_gguf: Callable[..., Path], lookahead: str, n_shared: int
) -> None:
    first = tokens_of(N_PROMPT)
    second = [*first[:n_shared], *tokens_of(N_PROMPT - n_shared + 7, seed=2)]
    used = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead=lookahead)
    greedy(used, first, 12)
    used.progress = reads = Reads()
    fresh = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead=lookahead)
    assert greedy(used, second, 30) == greedy(fresh, second, 30)
    assert reads.totals == [len(second)]
    assert (used.kept_positions() == fresh.kept_positions()).all()
    assert used.kv_stats().n_resident == fresh.kv_stats().n_resident
    assert used.kv_stats().n_intact == fresh.kv_stats().n_intact


@MODES
def test_same_prompt_again_reuses_the_cache(tiny_gguf: Callable[..., Path], lookahead: str) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead=lookahead)
    prompt = tokens_of(N_PROMPT)
    greedy(llm, prompt, 20)
    llm.progress = reads = Reads()
    second = greedy(llm, prompt, 20)
    assert reads.totals == [1], "the last token is decoded again"
    assert greedy(llm, prompt, 20) == second


def test_reset_gives_a_new_context(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead="pseudo")
    llm.eval(tokens_of(N_PROMPT))
    llm.reset()
    stats = llm.kv_stats()
    assert (stats.n_resident, stats.n_tokens, stats.n_intact, stats.pending) == (0, 0, 0, False)
    assert llm.kept_positions().shape == (stats.n_layer, stats.n_head_kv, 0)
    short = tokens_of(40)
    assert greedy(llm, short, 10) == greedy(open_llama(tiny_gguf("llama")), short, 10)


def test_setting_n_tokens_back_to_evicted_tokens_is_refused(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead="pseudo")
    prompt = tokens_of(N_PROMPT)
    llm.eval(prompt)
    llm.n_tokens = 10
    with pytest.raises(LaqStateError, match=r"n_tokens was set back to 10.*reset"):
        llm.eval([300])
    llm.n_tokens = N_PROMPT - 3  # inside the window that every head keeps
    llm.eval([300])
    assert llm.kv_stats().n_tokens == N_PROMPT - 2
    assert llm.kept_positions().max() == N_PROMPT - 3
    llm.reset()
    llm.eval(prompt)
    assert llm.kv_stats().n_resident == 64


@pytest.mark.parametrize("budget", [None, 64])
def test_prompt_above_n_ctx_leaves_the_object_usable(
    tiny_gguf: Callable[..., Path], budget: int | None
) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=budget, n_ctx=512)
    prompt = tokens_of(N_PROMPT)
    expected = greedy(llm, prompt, 5)
    for call in (
        lambda: llm.eval(tokens_of(513)),
        lambda: next(llm.generate(tokens_of(513))),
        lambda: llm.create_completion(tokens_of(513)),
        lambda: llm.create_completion(tokens_of(512)),
    ):
        with pytest.raises(LaqContextFullError, match="n_ctx") as error:
            call()
        assert isinstance(error.value, ValueError) and isinstance(error.value, RuntimeError)
    llm.reset()
    assert greedy(llm, prompt, 5) == expected


def test_generating_to_the_end_of_the_context(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64, n_ctx=256)
    with pytest.raises(
        LaqContextFullError, match=r"Requested tokens .257. exceed context window of 256"
    ):
        for _ in llm.generate(tokens_of(240), temp=0.0):
            pass
    assert llm.n_tokens == 256
    llm.reset()
    assert len(greedy(llm, tokens_of(100), 3)) == 3


def test_n_ctx_is_rounded_up_once_for_all(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=0.5, n_ctx=300)
    assert llm.n_ctx() == 512 and llm.kv_budget == 256
    greedy(llm, tokens_of(500), 5)


def test_no_budget_means_nothing_is_attached(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"))
    for call in (llm.kv_stats, llm.kept_positions):
        with pytest.raises(LaqStateError, match="kv_budget"):
            call()


def test_interrupted_prompt_is_not_taken_for_a_read_one(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64, n_batch=64)

    def stop(n_done: int, n_total: int) -> None:
        if n_done == 128:
            raise KeyboardInterrupt

    prompt = tokens_of(N_PROMPT)
    llm.progress = stop
    with pytest.raises(KeyboardInterrupt):
        next(llm.generate(prompt, temp=0.0))
    llm.progress = reads = Reads()
    tokens = greedy(llm, prompt, 12)
    assert reads.totals == [N_PROMPT - 128], "what was read is reused"
    assert tokens == greedy(open_llama(tiny_gguf("llama"), kv_budget=64, n_batch=64), prompt, 12)


def test_memory_functions_that_cannot_work_change_nothing(tiny_gguf: Callable[..., Path]) -> None:
    import llama_cpp

    llm = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead="pseudo")
    llm.eval(tokens_of(N_PROMPT))
    kept, stats = llm.kept_positions(), llm.kv_stats()
    memory = llama_cpp.llama_get_memory(llm._ctx.ctx)
    assert not llama_cpp.llama_memory_can_shift(memory)
    llama_cpp.llama_memory_seq_add(memory, 0, 10, 20, 5)
    llama_cpp.llama_memory_seq_div(memory, 0, 10, 20, 2)
    llama_cpp.llama_memory_seq_keep(memory, 0)
    llama_cpp.llama_memory_seq_cp(memory, 0, 1, 0, -1)
    assert llama_cpp.llama_memory_seq_rm(memory, 1, -1, -1), "nothing to remove"
    for first, end in ((0, 10), (10, 20), (stats.n_intact - 1, -1)):
        assert not llama_cpp.llama_memory_seq_rm(memory, 0, first, end)
    assert (llm.kept_positions() == kept).all()
    assert llm.kv_stats() == stats
    llm.eval([1])
    assert llm.kv_stats().n_resident == 65
