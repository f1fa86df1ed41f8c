"""Save, restore, continue equals never having saved."""

import pickle
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from integration.decoding import Reads, greedy, open_llama, tokens_of
from laq_gguf.errors import LaqStateError

#: name -> (prompt tokens, tokens taken before saving, settings)
POINTS = {
    "below the budget": (40, 6, {"kv_budget": 64}),
    "before the first token": (300, 1, {"kv_budget": 64}),
    "eviction waits": (300, 5, {"kv_budget": 64}),
    "evicted, deferred": (300, 14, {"kv_budget": 64}),
    "evicted, pseudo": (300, 3, {"kv_budget": 64, "lookahead": "pseudo"}),
    "evicted, no FlashAttention": (300, 14, {"kv_budget": 64, "flash_attn": False}),
    "evicted, q8_0": (300, 14, {"kv_budget": 64, "type_k": 8, "type_v": 8}),
    "snapkv": (300, 3, {"kv_budget": 64, "kv_policy": "snapkv"}),
}


@pytest.mark.parametrize("point", POINTS)
def test_continuing_a_saved_state(tiny_gguf: Callable[..., Path], point: str) -> None:
    n_prompt, n_taken, settings = POINTS[point]
    prompt = tokens_of(n_prompt)
    llm = open_llama(tiny_gguf("llama"), **settings)
    tokens = llm.generate(prompt, temp=0.0)
    taken = list(islice(tokens, n_taken))
    state = pickle.loads(pickle.dumps(llm.save_state()))
    before, kept = llm.kv_stats(), llm.kept_positions()
    expected = list(islice(tokens, 30))
    tokens.close()

    other = open_llama(tiny_gguf("llama"), **settings)
    greedy(other, tokens_of(200, seed=5), 12)  # whatever it held before is gone
    other.load_state(state)
    after = other.kv_stats()
    assert (after.n_tokens, after.n_resident) == (before.n_tokens, before.n_resident)
    assert (after.n_intact, after.pending) == (before.n_intact, before.pending)
    assert (other.kept_positions() == kept).all()
    assert greedy(other, prompt + taken, 30) == expected
    assert (other.kept_positions() == llm.kept_positions()).all()


def test_going_back_in_the_same_object(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead="pseudo")
    prompt = tokens_of(300)
    taken = greedy(llm, prompt, 4)
    state = llm.save_state()
    expected = greedy(llm, prompt + taken, 20)
    greedy(llm, tokens_of(100, seed=9), 5)
    llm.load_state(state)
    assert greedy(llm, prompt + taken, 20) == expected


def test_restored_cache_still_refuses_what_was_evicted(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead="pseudo")
    llm.eval(tokens_of(300))
    state = llm.save_state()
    other = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead="pseudo")
    other.load_state(state)
    other.n_tokens = 20
    with pytest.raises(LaqStateError, match="set back to 20"):
        other.eval([300])


def test_evicted_state_does_not_fit_a_cache_without_budget(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64, lookahead="pseudo")
    llm.eval(tokens_of(300))
    plain = open_llama(tiny_gguf("llama"))
    with pytest.raises(LaqStateError, match="does not fit this model"):
        plain.load_state(llm.save_state())
    prompt = tokens_of(50)
    assert greedy(plain, prompt, 5) == greedy(open_llama(tiny_gguf("llama")), prompt, 5)


def test_state_of_another_shape_is_refused(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), kv_budget=64)
    llm.eval(tokens_of(300))
    state = llm.save_state()
    small = open_llama(tiny_gguf("llama"), kv_budget=64, n_ctx=256)
    with pytest.raises(ValueError, match=r"Requested tokens .300. exceed context window of 256"):
        small.load_state(state)
    deeper = open_llama(tiny_gguf("llama", n_layer=3), kv_budget=64)
    with pytest.raises(LaqStateError, match="does not fit this model"):
        deeper.load_state(state)
    assert len(greedy(deeper, tokens_of(20), 3)) == 3
    all_logits = open_llama(tiny_gguf("llama"), kv_budget=64, logits_all=True)
    with pytest.raises(LaqStateError, match="logits_all"):
        all_logits.load_state(state)


@pytest.mark.parametrize("name", ["LlamaRAMCache", "LlamaDiskCache"])
def test_llama_cpp_prompt_cache(tiny_gguf: Callable[..., Path], tmp_path: Path, name: str) -> None:
    import llama_cpp

    cls = getattr(llama_cpp, name)
    llm = open_llama(tiny_gguf("llama"), kv_budget=64, kv_staging=192, lookahead="pseudo")
    llm.set_cache(cls() if name == "LlamaRAMCache" else cls(cache_dir=str(tmp_path)))
    prompt, other = tokens_of(600), tokens_of(600, seed=3)
    settings = {"max_tokens": 12, "temperature": 0.0}
    first = llm.create_completion(prompt, **settings)["choices"][0]["text"]
    llm.create_completion(other, **settings)
    llm.progress = reads = Reads()
    # the prompt's last token is decoded again, on the evicted cache
    again = llm.create_completion(prompt, **settings)["choices"][0]["text"]
    assert llm.create_completion(prompt, **settings)["choices"][0]["text"] == again
    assert len(first) > 0 and again[:3] == first[:3]
    assert reads.totals == [1, 1], "it came from the cache"
    assert llm.n_tokens >= 600
