"""Where attention goes, against numpy: the reference, and a context's own queries and keys."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from laq_gguf.bench.attention import decode_attention, mass_held, mean_attention
from laq_gguf.bench.captured import Captured
from laq_gguf.reference import attention_scores, causal_mask
from tolerances import assert_nmse

N_PROMPT = 40


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("shape", [(1, 4, 2), (6, 6, 6), (5, 9, 3)])
def test_mean_attention_is_that_of_the_reference(
    shape: tuple[int, int, int], softcap: float
) -> None:
    n_queries, n_head, n_head_kv = shape
    rng = np.random.default_rng(n_head)
    queries = rng.normal(size=(n_queries, n_head, 16)).astype(np.float32)
    keys = rng.normal(size=(50, n_head_kv, 16)).astype(np.float32)
    positions = np.arange(50 - n_queries, 50, dtype=np.int32)
    got = mean_attention(queries, positions, keys, 0.25, softcap)
    want = attention_scores(
        queries.swapaxes(0, 1), keys, scale=0.25, softcap=softcap,
        mask=causal_mask(positions, np.arange(50)),
    )  # fmt: skip
    assert got.shape == (n_head_kv, 50)
    assert_nmse(got, want / n_queries, 1e-10, "attention")
    np.testing.assert_allclose(got.sum(axis=-1), 1.0, rtol=1e-5)


def test_mass_held_by_hand() -> None:
    attention = np.array([[[0.5, 0.25, 0.0, 0.05]], [[0.1, 0.1, 0.1, 0.1]]], np.float32)
    everything = np.tile(np.arange(6, dtype=np.int32), (2, 1, 1))
    assert mass_held(attention, everything) == pytest.approx(1.0), "4 and 5 came after the prompt"
    kept = np.array([[[0, 3, 5]], [[1, 2, 5]]], np.int32)
    # 0.5 + 0.05 of the first layer and 0.2 of the second, of 1.2 in all
    assert mass_held(attention, kept) == pytest.approx(0.75 / 1.2)
    with pytest.raises(ValueError, match="heads differ"):
        mass_held(attention, kept[:1])


def test_attention_of_a_context(native: object, tiny: Path) -> None:
    from laq_gguf import Llama

    llm = Llama(
        str(tiny), n_ctx=256, kv_budget=256, kv_policy="laq++", lookahead_size=8, verbose=False,
        n_threads=1, n_threads_batch=1,
    )  # fmt: skip
    try:
        tokens = [3 + i % 50 for i in range(N_PROMPT)]
        llm.eval(tokens)
        with pytest.raises(ValueError, match="decode a token first"):
            decode_attention(llm, N_PROMPT)
        for token in (5, 6, 7):
            llm.eval([token])
        attention = decode_attention(llm, N_PROMPT)
        stats, captured = llm.kv_stats(), Captured(llm)
        assert attention.shape == (stats.n_layer, stats.n_head_kv, N_PROMPT)
        for ikv in range(stats.n_layer):
            positions, queries = captured.queries(ikv)
            new = positions >= N_PROMPT
            assert positions[new].tolist() == [40, 41, 42]
            info = captured.layer(ikv)
            want = attention_scores(
                queries[new].swapaxes(0, 1), captured.keys(ikv), scale=info.kq_scale,
                mask=causal_mask(positions[new], np.arange(43)),
            )  # fmt: skip
            assert_nmse(attention[ikv], want[:, :N_PROMPT] / 3, 1e-10, f"layer {ikv}")
        assert mass_held(attention, llm.kept_positions()) == pytest.approx(1.0)
        llm._laq._call("laq_evict", 30)
        assert 0 < mass_held(attention, llm.kept_positions()) < 1
        with pytest.raises(ValueError, match="30 of 43 tokens are left"):
            decode_attention(llm, N_PROMPT)
    finally:
        llm.close()
