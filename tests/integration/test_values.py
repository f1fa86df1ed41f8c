"""The fit of values in a cache: what changes, what does not, and that it helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration.decoding import greedy, open_llama, tokens_of
from integration.needles import make_needle
from laq_gguf.bench.metrics import kl_divergence
from laq_gguf.errors import LaqNativeError
from parity.rows import ggml_type
from parity.test_evict import Inspector
from property.native_cache import Rows

MADE: dict[str, Any] = {
    "n_ctx": 512, "kv_budget": 96, "kv_staging": 416, "lookahead": "pseudo", "pinned": [(40, 50)],
}  # fmt: skip
N_PROMPT, N_SINK, WINDOW = 300, 4, 8


def evicted(path: Path, **settings: Any) -> Any:
    """A cache that has read a prompt and come down to its budget."""
    llm = open_llama(path, **{**MADE, **settings})
    llm.eval(tokens_of(N_PROMPT))
    assert llm.kv_stats().n_evictions == (llm.laq_config.kv_policy != "full")
    return llm


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("name", ["f32", "f16", "bf16", "q8_0", "q5_1", "q4_1", "q4_0"])
def test_free_values_alone_change(
    tiny_gguf: Callable[..., Path], native: Any, name: str, flash_attn: bool
) -> None:
    if not flash_attn and name.startswith("q"):
        pytest.skip("llama.cpp quantizes V with FlashAttention alone")
    types = {"type_k": ggml_type(name), "type_v": ggml_type(name), "flash_attn": flash_attn}
    fitted, plain = (evicted(tiny_gguf("llama"), value_fit=v, **types) for v in (0.01, 0))
    where = fitted.kept_positions()
    assert (where == plain.kept_positions()).all()
    pinned = (where < N_SINK) | (where >= N_PROMPT - WINDOW) | ((where >= 40) & (where < 50))
    n_same = n_free = 0
    for il, head in np.ndindex(*where.shape[:2]):
        k, v = (
            [Rows(llm, native).resident(il, head, is_v) for llm in (fitted, plain)]
            for is_v in (False, True)
        )
        assert np.array_equal(*k)
        same = (v[0] == v[1]).all(axis=1)
        assert same[pinned[il, head]].all()
        n_same += int(same[~pinned[il, head]].sum())
        n_free += int((~pinned[il, head]).sum())
        assert np.isfinite(v[0]).all()
    assert n_same < 0.5 * n_free
    assert fitted.kv_stats().ms_fit > 0 == plain.kv_stats().ms_fit


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_policy": "laq"},
        {"kv_policy": "snapkv"},
    ],
    ids=str,
)
def test_not_where_it_is_not_said_to_be(
    tiny_gguf: Callable[..., Path], settings: dict[str, Any]
) -> None:
    assert evicted(tiny_gguf("llama"), **settings).kv_stats().ms_fit == 0


def test_set_eviction_turns_it_on_and_off(tiny_gguf: Callable[..., Path]) -> None:
    path, prompt = tiny_gguf("llama"), tokens_of(N_PROMPT)
    outcomes = {}
    for value_fit in (0.01, 0):
        outcomes[value_fit] = greedy(open_llama(path, value_fit=value_fit, **MADE), prompt, 30)
    llm = open_llama(path, **MADE)
    before = llm.kv_stats()
    for value_fit, expected in outcomes.items():
        llm.set_eviction(value_fit=value_fit)
        llm.reset()
        assert greedy(llm, prompt, 30) == expected
    after = llm.kv_stats()
    for name in ("kv_bytes", "ring_bytes", "compute_bytes"):
        assert getattr(before, name) == getattr(after, name)

    without = open_llama(path, value_fit=0, **MADE)
    assert without.kv_stats().ring_bytes < before.ring_bytes
    with pytest.raises(LaqNativeError, match="value_fit"):
        without.set_eviction(value_fit=0.01)
    assert greedy(without, prompt, 30) == outcomes[0]


def test_a_state_goes_on_with_its_values(tiny_gguf: Callable[..., Path]) -> None:
    llm, other = (evicted(tiny_gguf("llama")) for _ in range(2))
    state = llm.save_state()
    more = [*tokens_of(N_PROMPT), *tokens_of(40, seed=1)]
    expected = greedy(llm, more, 20)
    other.reset()
    other.load_state(state)
    assert greedy(other, more, 20) == expected


@pytest.mark.slow
@pytest.mark.model
def test_the_answer_is_nearer_to_the_full_caches(smollm2: Path, native: Any) -> None:
    """The next 24 tokens' distributions after a needle prompt, the lookahead's 8 and behind."""
    settings = {"n_ctx": 2048, "n_batch": 512, "kv_budget": 96, "kv_staging": 2048}
    needle = make_needle(3, 800)
    logits: dict[str, Any] = {}
    answer: list[int] = []
    for name, own in (
        ("full", {"kv_policy": "full"}),
        ("plain", {"lookahead": "pseudo", "value_fit": 0}),
        ("fitted", {"lookahead": "pseudo"}),
    ):
        llm = open_llama(smollm2, logits_all=False, **settings, **own)
        prompt = llm.tokenize(f"{needle.document}{needle.question}".encode())
        answer = answer or greedy(llm, prompt, 25)
        llm.reset()
        llm.eval(prompt)
        rows = []
        for token in answer[:24]:
            llm.eval([token])
            rows.append(Inspector(llm, native).logits())
        logits[name] = np.stack(rows)
    plain, fitted = (kl_divergence(logits["full"], logits[n]) for n in ("plain", "fitted"))
    assert fitted[:8].mean() < 0.5 * plain[:8].mean()
    assert fitted[8:].mean() < plain[8:].mean()
