"""What is allocated at construction is all there ever is, whatever is read and generated."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from integration.decoding import Reads, greedy, open_llama, tokens_of
from laq_gguf.errors import LaqContextFullError, LaqNativeError

#: bytes of one cell of SmolLM2: K and V, 30 layers, 3 KV heads of 64 values
CELL_BYTES = {"f16": 2 * 30 * 3 * 64 * 2, "q8_0": 2 * 30 * 3 * 64 // 32 * 34}
TYPES = {"f16": 1, "q8_0": 8}


@pytest.mark.model
@pytest.mark.parametrize("name", TYPES)
def test_bytes_are_those_of_the_cells(smollm2: Path, name: str) -> None:
    llm = open_llama(
        smollm2, n_ctx=131072, kv_budget=256, kv_staging=512, type_k=TYPES[name],
        type_v=TYPES[name], n_batch=512,
    )  # fmt: skip
    assert llm.n_ctx() == 131072
    before = llm.kv_stats()
    assert before.n_cells == 768 and before.kv_bytes == 768 * CELL_BYTES[name]
    assert before.n_positions == 8192, "what the model was trained for"
    assert before.kv_bytes_full == 8192 * CELL_BYTES[name]
    assert before.compute_bytes > 0
    tokens = llm.generate(tokens_of(1200), temp=0.0)
    for _ in islice(tokens, 540):
        stats = llm.kv_stats()
        assert stats.n_resident <= stats.n_cells == 768
    tokens.close()
    after = llm.kv_stats()
    assert after.n_evictions >= 4 and after.n_tokens == 1200 + 539
    for field in ("kv_bytes", "ring_bytes", "compute_bytes"):
        assert getattr(after, field) == getattr(before, field), field


@pytest.mark.model
@pytest.mark.parametrize("name", TYPES)
def test_peak_of_the_process_is_that_of_a_small_context(
    smollm2: Path, run_python: Callable, name: str
) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the memory of a process from /proc")
    code = f"""
import sys
from laq_gguf import Llama
import llama_cpp
n_ctx, budget, staging = map(int, sys.argv[1:])
settings = dict(n_ctx=n_ctx, type_k={TYPES[name]}, type_v={TYPES[name]}, verbose=False)
if budget:
    llm = Llama({str(smollm2)!r}, kv_budget=budget, kv_staging=staging, **settings)
else:
    llm = llama_cpp.Llama({str(smollm2)!r}, flash_attn=True, **settings)
prompt = [1 + i % 999 for i in range(1500 if budget else 700)]
for _, token in zip(range(64), llm.generate(prompt, temp=0.0)):
    pass
print(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
"""
    peaks = []
    for arguments in (("768", "0", "0"), ("131072", "256", "512")):
        done = run_python("-c", code, *arguments)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] <= 1.05 * peaks[0], f"VmHWM in KiB, stock and ours: {peaks}"


@pytest.mark.model
def test_budget_in_bytes(smollm2: Path) -> None:
    llm = open_llama(smollm2, kv_budget="20MiB", n_ctx=8192)
    stats = llm.kv_stats()
    assert stats.kv_bytes <= 20 * 2**20 < stats.kv_bytes + 256 * CELL_BYTES["f16"]
    assert llm.kv_budget < stats.n_cells


POLICIES = ("laq++", "laq", "snapkv", "streaming", "random")


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_prompt_longer_than_the_cells(
    tiny_gguf: Callable[..., Path], policy: str, flash_attn: bool
) -> None:
    llm = open_llama(
        tiny_gguf("llama"), n_ctx=2048, kv_budget=64, kv_staging=192, kv_policy=policy,
        flash_attn=flash_attn, pinned=[(30, 34)],
    )  # fmt: skip
    most = 0

    def look(n_done: int, n_total: int) -> None:
        nonlocal most
        most = max(most, llm.kv_stats().n_resident)
        assert n_total == 1000

    llm.progress = look
    assert len(greedy(llm, tokens_of(1000), 20)) == 20
    stats, kept = llm.kv_stats(), llm.kept_positions()
    assert stats.n_cells == 256 >= most > 64 and stats.n_tokens == 1019
    looks_ahead = policy.startswith("laq")
    assert (stats.n_probe > 0) == (stats.n_pseudo > 0) == looks_ahead
    # laq evicts after 8 answer tokens, the others at the end of the prompt
    assert stats.n_resident == 64 + (11 if looks_ahead else 19)
    assert stats.n_decoded == 1019 + stats.n_probe + stats.n_pseudo
    assert (np.diff(kept, axis=-1) > 0).all()
    for head in kept.reshape(-1, kept.shape[-1]):
        assert np.isin([0, 1, 2, 3, 30, 31, 32, 33, *range(992, 1019)], head).all()


def test_chunks_see_what_a_larger_cache_sees_until_something_goes(
    tiny_gguf: Callable[..., Path],
) -> None:
    """As long as nothing was evicted, the logits are those of a cache with room for all."""
    prompt = tokens_of(180)
    small = open_llama(tiny_gguf("llama"), kv_budget=64, kv_staging=192, logits_all=True)
    large = open_llama(tiny_gguf("llama"), kv_budget=64, kv_staging=1024, logits_all=True)
    for llm in (small, large):
        llm.eval(prompt)
    assert small.kv_stats().n_evictions == large.kv_stats().n_evictions == 0
    assert (small.scores[:180] == large.scores[:180]).all()


def test_chunk_size_and_probe_size(tiny_gguf: Callable[..., Path]) -> None:
    def read(**settings: int) -> object:
        llm = open_llama(tiny_gguf("llama"), kv_budget=64, kv_staging=192, **settings)
        llm.progress = Sizes()
        llm.eval(tokens_of(1000))
        return llm.progress.sizes, llm.kv_stats()

    class Sizes:
        def __init__(self) -> None:
            self.sizes, self.last = [], 0

        def __call__(self, n_done: int, n_total: int) -> None:
            self.sizes.append(n_done - self.last)
            self.last = n_done

    sizes, stats = read(chunk_size=32, probe_size=16)
    assert max(sizes) == 32 and sum(sizes) == 1000
    assert stats.n_probe == 16 * stats.n_evictions
    larger, fewer = read(probe_size=16)
    assert max(larger) == (256 - 16 - 8) // 3 and fewer.n_evictions < stats.n_evictions


def test_generation_that_fills_the_cells(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), n_ctx=2048, kv_budget=64, kv_staging=192)
    tokens = llm.generate(tokens_of(50), temp=0.0)
    n_decoded = 50
    for _ in islice(tokens, 1000):
        stats, kept = llm.kv_stats(), llm.kept_positions()
        assert stats.n_resident <= stats.n_cells == 256
        assert stats.n_tokens == n_decoded
        newest = np.arange(max(0, n_decoded - 16), n_decoded)
        assert all(np.isin(newest, head).all() for head in kept.reshape(-1, kept.shape[-1]))
        n_decoded += 1
    tokens.close()
    # 256 cells are full after 206 tokens, then after every 192
    assert stats.n_evictions == 1 + (1050 - 256 - 1) // 192
    assert stats.n_decoded == 1049, "nothing is read twice"


def test_follow_up_on_a_full_cache(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), n_ctx=2048, kv_budget=64, kv_staging=192)
    llm.progress = reads = Reads()
    prompt = tokens_of(50)
    for turn in range(12):
        prompt += greedy(llm, prompt, 100)
        prompt += tokens_of(20, seed=turn)
    stats = llm.kv_stats()
    assert stats.n_resident <= 256 and stats.n_tokens == len(prompt) - 21
    assert reads.totals == [50] + [21] * 11, "the last sampled token and the new message"


def test_long_and_short_rope_factors_follow_the_logical_length(
    tiny_gguf: Callable[..., Path],
) -> None:
    import llama_cpp

    path, prompt = tiny_gguf("longrope"), tokens_of(200)

    def logits(llm: llama_cpp.Llama) -> np.ndarray:
        llm.eval(prompt)
        pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).copy()

    stock = {
        n_ctx: logits(llama_cpp.Llama(str(path), n_ctx=n_ctx, flash_attn=True, verbose=False))
        for n_ctx in (512, 2048)
    }
    assert (stock[512] != stock[2048]).any(), "the model has two sets of factors"
    for n_ctx, expected in stock.items():
        llm = open_llama(path, n_ctx=n_ctx, n_batch=512, kv_budget=250, kv_staging=250)
        assert llm.kv_stats().n_cells == 512
        assert (logits(llm) == expected).all()


def test_what_grows_with_n_ctx_and_with_the_chat(tiny_gguf: Callable[..., Path]) -> None:
    """Cells never; with an archive compute buffers, at construction, and its host memory."""
    size = {"kv_budget": 64, "kv_staging": 192}
    for kv_recall in (None, "ram"):
        made = [
            open_llama(tiny_gguf("llama"), n_ctx=n_ctx, kv_recall=kv_recall, **size)
            for n_ctx in (1024, 2048)
        ]
        small, large = (llm.kv_stats() for llm in made)
        assert (small.kv_bytes, small.ring_bytes) == (large.kv_bytes, large.ring_bytes)
        assert (large.compute_bytes > small.compute_bytes) == (kv_recall == "ram")
        held = []
        for _ in range(3):
            made[1].eval(tokens_of(400))
            stats = made[1].kv_stats()
            assert (stats.kv_bytes, stats.compute_bytes) == (large.kv_bytes, large.compute_bytes)
            held.append(stats.archive_bytes)
        assert (0 < held[0] < held[1] < held[2]) == (kv_recall == "ram")


@pytest.mark.parametrize("call", ["eval", "generate", "completion"])
def test_beyond_the_trained_length_is_refused(tiny_gguf: Callable[..., Path], call: str) -> None:
    llm = open_llama(tiny_gguf("llama", n_ctx_train=512), n_ctx=4096, kv_budget=64)
    assert llm.n_ctx() == 4096
    stats = llm.kv_stats()
    assert stats.n_positions == 512
    assert stats.kv_bytes_full == 512 * stats.kv_bytes // stats.n_cells
    prompt = tokens_of(513)
    calls = {
        "eval": lambda: llm.eval(prompt),
        "generate": lambda: next(llm.generate(prompt)),
        "completion": lambda: llm.create_completion(prompt),
    }
    with pytest.raises(LaqContextFullError, match=r"window of 512, the positions.*rope_freq_scale"):
        calls[call]()
    llm.reset()
    done = llm.create_completion(tokens_of(500), max_tokens=100, temperature=0.0)
    assert done["choices"][0]["finish_reason"] == "length"
    assert llm.n_tokens <= 512
    stretched = open_llama(
        tiny_gguf("llama", n_ctx_train=512), n_ctx=4096, kv_budget=64, rope_freq_scale=0.5
    )
    stretched.eval(prompt)
    with pytest.raises(LaqContextFullError, match="window of 1024, the positions"):
        stretched.eval(prompt)
    stats = stretched.kv_stats()
    assert stats.kv_bytes_full == 1024 * stats.kv_bytes // stats.n_cells


def test_aborted_prompt_leaves_the_object_usable(tiny_gguf: Callable[..., Path]) -> None:
    import llama_cpp

    llm = open_llama(tiny_gguf("llama"), n_ctx=2048, kv_budget=64, kv_staging=192)
    prompt = tokens_of(1000)
    expected = greedy(llm, prompt, 12)
    for n_calls in (1, 40, 200, 500, 900):
        llm.reset()
        left = n_calls

        @llama_cpp.ggml_abort_callback
        def abort(_: object) -> bool:
            nonlocal left
            left -= 1
            return left < 0

        llama_cpp.llama_set_abort_callback(llm.ctx, abort, None)
        with pytest.raises(LaqNativeError, match="abort"):
            greedy(llm, prompt, 12)
        llama_cpp.llama_set_abort_callback(llm.ctx, llama_cpp.ggml_abort_callback(), None)
        stats = llm.kv_stats()
        assert stats.n_resident <= stats.n_cells
        assert (np.diff(llm.kept_positions(), axis=-1) > 0).all()
        llm.reset()
        assert greedy(llm, prompt, 12) == expected


def test_no_memory_at_construction(tiny_gguf: Callable[..., Path], run_python: Callable) -> None:
    pytest.importorskip("resource")
    code = f"""
import resource, sys
from laq_gguf import Llama, LaqError
path = {str(tiny_gguf("llama"))!r}
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
try:
    Llama(path, n_ctx=2**24, kv_budget=2**23, verbose=False)
except (LaqError, MemoryError) as error:
    print("refused:", error)
llm = Llama(path, n_ctx=1024, kv_budget=64, verbose=False)
llm.eval([5] * 300)
print("works:", llm.kv_stats().n_tokens)
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "refused: " in done.stdout and "works: 300" in done.stdout
