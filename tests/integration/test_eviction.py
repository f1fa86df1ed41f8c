"""What an evicted cache holds, what it costs, and when the eviction comes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import device
from integration.decoding import greedy, open_llama, tokens_of

POLICIES = ("laq", "laq++", "snapkv", "streaming", "random")
N_PROMPT = 300


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("lookahead", ["deferred", "pseudo"])
def test_budget_above_the_prompt_gives_the_tokens_of_stock(
    tiny_gguf: Callable[..., Path], lookahead: str, flash_attn: bool
) -> None:
    import llama_cpp

    path, prompt = tiny_gguf("llama"), tokens_of(N_PROMPT)
    stock = llama_cpp.Llama(
        str(path), n_ctx=1024, n_batch=256, verbose=False, flash_attn=flash_attn
    )
    expected = greedy(stock, prompt, 40)
    plain = open_llama(path, flash_attn=flash_attn)
    assert greedy(plain, prompt, 40) == expected
    for policy in POLICIES:
        llm = open_llama(
            path, kv_budget=512, kv_policy=policy, lookahead=lookahead, flash_attn=flash_attn
        )
        assert greedy(llm, prompt, 40) == expected, policy
        assert llm.kv_stats().n_evictions == 0
        assert llm.kv_stats().n_resident == N_PROMPT + 39


def test_full_policy_never_evicts(tiny_gguf: Callable[..., Path]) -> None:
    prompt = tokens_of(N_PROMPT)
    llm = open_llama(tiny_gguf("llama"), kv_budget=64, kv_policy="full")
    assert greedy(llm, prompt, 20) == greedy(open_llama(tiny_gguf("llama")), prompt, 20)
    assert llm.kv_stats().n_resident == N_PROMPT + 19
    assert llm.kv_stats().n_evictions == 0


def check_kept(llm: object, budget: int, window: int, n_sink: int = 4) -> None:
    """Right after an eviction at the end of the prompt."""
    stats, kept = llm.kv_stats(), llm.kept_positions()
    assert stats.n_resident == budget and stats.n_evictions == 1 and not stats.pending
    assert stats.n_tokens == N_PROMPT and stats.n_intact == N_PROMPT - window
    # CUDA lets a tensor of blocks end on a whole number of them
    n_added = stats.kv_bytes - stats.kv_bytes_full * 768 / 1024
    assert stats.n_cells == 768 and 0 <= n_added <= (0 if device.ON_CPU else 2048 * stats.n_layer)
    assert kept.dtype == np.int32
    assert kept.shape == (stats.n_layer, stats.n_head_kv, budget)
    assert (np.diff(kept, axis=-1) > 0).all(), "ascending, each position once"
    assert kept.min() == 0 and kept.max() == N_PROMPT - 1
    always = [*range(n_sink), *range(N_PROMPT - window, N_PROMPT)]
    for head in kept.reshape(-1, budget):
        assert np.isin(always, head).all()


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_pseudo_keeps_the_budget(
    tiny_gguf: Callable[..., Path], policy: str, flash_attn: bool
) -> None:
    llm = open_llama(
        tiny_gguf("llama"),
        kv_budget=64,
        kv_policy=policy,
        lookahead="pseudo",
        flash_attn=flash_attn,
    )
    llm.eval(tokens_of(N_PROMPT))
    check_kept(llm, 64, window=32 if policy == "snapkv" else 8)
    scored = policy in ("laq", "laq++", "snapkv")
    assert (llm.kv_stats().score_kernel is not None) == scored
    assert llm.kv_stats().n_pseudo == (8 if policy.startswith("laq") else 0)


@pytest.mark.parametrize("policy", ["laq", "laq++"])
@pytest.mark.parametrize(("n_prompt", "n_ahead"), [(1016, 8), (1020, 4), (1024, 0)])
def test_pseudo_looks_ahead_as_far_as_the_cells_allow(
    tiny_gguf: Callable[..., Path], policy: str, n_prompt: int, n_ahead: int
) -> None:
    llm = open_llama(
        tiny_gguf("llama"), kv_budget=64, kv_staging=1024, kv_policy=policy, lookahead="pseudo"
    )
    llm._laq.prompt_next = lambda left: 256  # as a caller that does not ask for room
    llm.eval(tokens_of(n_prompt))
    stats = llm.kv_stats()
    assert (stats.n_tokens, stats.n_resident, stats.n_pseudo) == (n_prompt, 64, n_ahead)


@pytest.mark.parametrize(("type_k", "type_v"), [(0, 0), (8, 8), (2, 6), (30, 1)])
def test_pseudo_with_every_kind_of_cache(
    tiny_gguf: Callable[..., Path], type_k: int, type_v: int
) -> None:
    llm = open_llama(
        tiny_gguf("llama"),
        kv_budget=64,
        lookahead="pseudo",
        type_k=type_k,
        type_v=type_v,
    )
    llm.eval(tokens_of(N_PROMPT))
    check_kept(llm, 64, window=8)
    assert len(greedy(llm, [*tokens_of(N_PROMPT), 300], 10)) == 10


def test_heads_keep_different_tokens(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead="pseudo")
    llm.eval(tokens_of(N_PROMPT))
    kept = llm.kept_positions()
    assert not (kept == kept[:1, :1]).all()


def test_settings_change_what_is_kept(tiny_gguf: Callable[..., Path]) -> None:
    prompt = tokens_of(N_PROMPT)

    def kept(**settings: object) -> np.ndarray:
        llm = open_llama(tiny_gguf("llama"), kv_budget=80, lookahead="pseudo", **settings)
        llm.eval(prompt)
        return llm.kept_positions()

    base = kept()
    assert (kept() == base).all(), "the same twice"
    assert np.isin(np.arange(100, 120), kept(pinned=[(100, 120)])[1, 1]).all()
    assert np.isin(np.arange(20), kept(n_sink=20)[1, 1]).all()
    assert np.isin(np.arange(N_PROMPT - 20, N_PROMPT), kept(window_size=20)[1, 1]).all()
    for settings in ({"kernel_size": 1}, {"pooling": "none"}, {"pooling": "avg"},
                     {"lookahead_size": 2}, {"kv_policy": "laq"}):  # fmt: skip
        assert (kept(**settings) != base).any(), settings
    random = kept(kv_policy="random", seed=1)
    assert (kept(kv_policy="random", seed=1) == random).all()
    assert (kept(kv_policy="random", seed=2) != random).any()
    streaming = kept(kv_policy="streaming")
    assert (streaming == [*range(4), *range(N_PROMPT - 76, N_PROMPT)]).all()


def test_score_kernels_agree(
    tiny_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {}
    for kernel in device.KERNELS:
        if kernel == "composed":
            monkeypatch.setenv("LAQ_SCORE", "composed")
        llm = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead="pseudo", type_k=0)
        llm.eval(tokens_of(N_PROMPT))
        stats = llm.kv_stats()
        assert stats.score_kernel == kernel
        assert stats.devices == (device.NAME,)
        assert (stats.compaction == "host") == device.ON_CPU
        kept[kernel] = llm.kept_positions()
    assert (kept[device.KERNELS[0]] != kept["composed"]).mean() < 0.02


def test_deferred_evicts_after_the_lookahead(tiny_gguf: Callable[..., Path]) -> None:
    prompt = tokens_of(N_PROMPT)
    full = greedy(open_llama(tiny_gguf("llama")), prompt, 9)
    llm = open_llama(tiny_gguf("llama"), kv_budget=64)
    tokens = llm.generate(prompt, temp=0.0)
    got = []
    for n_decoded in range(9):
        got.append(next(tokens))
        stats = llm.kv_stats()
        assert stats.pending and stats.n_evictions == 0
        assert stats.n_resident == stats.n_tokens == N_PROMPT + n_decoded
    assert got == full, "the lookahead itself runs on the full cache"
    next(tokens)  # decodes the ninth token, and evicts before that
    stats = llm.kv_stats()
    assert not stats.pending and stats.n_evictions == 1
    assert stats.n_resident == 64 + 1 and stats.n_tokens == N_PROMPT + 9
    kept = llm.kept_positions()
    assert np.isin(np.arange(N_PROMPT - 8, N_PROMPT + 9), kept[1, 1]).all()
    tokens.close()


@pytest.mark.parametrize("n_answer", [2, 5])
def test_a_short_answer_leaves_its_eviction_to_the_next_prompt(
    tiny_gguf: Callable[..., Path], n_answer: int
) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64)
    greedy(llm, tokens_of(N_PROMPT), n_answer)
    stats = llm.kv_stats()
    assert stats.pending and stats.n_evictions == 0 and stats.n_resident == N_PROMPT + n_answer - 1
    llm.eval(tokens_of(2))
    stats = llm.kv_stats()
    assert stats.n_evictions == 1 and stats.n_resident == 64 + 2


def test_single_tokens_are_no_prompt(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=32, lookahead="pseudo")
    for token in tokens_of(50):
        llm.eval([token])
    assert llm.kv_stats().n_evictions == 0 and llm.kv_stats().n_resident == 50


def test_prompt_in_two_evals(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64)
    prompt = tokens_of(N_PROMPT)
    llm.eval(prompt[:100])
    llm.eval(prompt[100:])
    assert llm.kv_stats().n_evictions == 0, "the prompt goes on"
    for token in tokens_of(9, seed=1):
        llm.eval([token])
    stats = llm.kv_stats()
    assert stats.n_tokens == N_PROMPT + 9 and not stats.pending
    assert stats.n_resident <= 64 + 9


@pytest.mark.model
def test_smaller_budget_lowers_the_memory_of_the_process(
    smollm2: Path, run_python: Callable
) -> None:
    code = f"""
import sys
from laq_gguf import Llama
budget = int(sys.argv[1]) or None
llm = Llama({str(smollm2)!r}, n_ctx=8192, kv_budget=budget, kv_staging=256, verbose=False)
llm.create_completion("Once upon a time there was a fox. " * 40, max_tokens=12, temperature=0.0)
rss = next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]
stats = llm.kv_stats() if budget else None
print(rss, stats.kv_bytes if stats else 0, stats.kv_bytes_full if stats else 0)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the memory of a process from /proc")
    rows = {}
    for budget in (0, 128):
        done = run_python("-c", code, str(budget))
        assert done.returncode == 0, done.stderr
        rows[budget] = [int(text) for text in done.stdout.split()]
    _, kv_bytes, kv_bytes_full = rows[128]
    assert kv_bytes * 16 == kv_bytes_full, rows
    freed = (rows[0][0] - rows[128][0]) * 1024
    assert freed >= 0.7 * (kv_bytes_full - kv_bytes), rows


@pytest.mark.model
def test_budget_above_the_prompt_on_a_real_model(smollm2: Path) -> None:
    import llama_cpp

    text = b"The river rises in the hills, and the mill stands where it meets the road. " * 12
    stock = llama_cpp.Llama(str(smollm2), n_ctx=1024, verbose=False, flash_attn=True)
    prompt = stock.tokenize(text)
    expected = greedy(stock, prompt, 32)
    llm = open_llama(smollm2, kv_budget=384, kv_staging=384, n_batch=512)
    assert greedy(llm, prompt, 32) == expected
    assert llm.kv_stats().kv_bytes < llm.kv_stats().kv_bytes_full
