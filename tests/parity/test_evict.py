"""Evictions end to end: a context of a tiny model against the reference, cell by cell.

For every K and V type, FlashAttention on and off and GQA group: read a prompt, decode the
lookahead, look at queries, keys and positions, evict, look again. Then a second prompt, whose
eviction starts from heads that hold different tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import cases
import device
from laq_gguf.reference import (
    KVCache,
    PolicyParams,
    attention_scores,
    causal_mask,
    query_range,
    select_head,
)
from parity.numpy_llama import NumpyLlama
from parity.rows import ggml_type
from reference.made import keep
from tolerances import RING_NMSE, SCORE_NMSE, assert_equal, assert_nmse, logits_nmse

N_PROMPT, N_SECOND = 300, 120
PARAMS = {"budget": 96, "lookahead_size": 8, "window_size": 8, "snapkv_window": 32, "n_sink": 4}
PINNED = ((40, 44),)
SEED = 11


class Inspector:
    """Reads what laq.h shows of an attached Llama."""

    def __init__(self, llm: Any, native: Any) -> None:
        self.llm, self.ffi, self.lib, self._check = llm, native.ffi, native.lib, native.check
        self.laq = llm._laq._laq

    def stats(self) -> Any:
        stats = self.ffi.new("struct laq_stats *")
        stats.size = self.ffi.sizeof("struct laq_stats")
        self._check("laq_get_stats", self.lib.laq_get_stats(self.laq, 0, stats))
        return stats

    def layer(self, ikv: int) -> Any:
        info = self.ffi.new("struct laq_layer_info *")
        info.size = self.ffi.sizeof("struct laq_layer_info")
        self._check("laq_get_layer_info", self.lib.laq_get_layer_info(self.laq, 0, ikv, info))
        return info

    def _read(self, function: str, ikv: int, dst: npt.NDArray[np.float32], *before: Any) -> None:
        pointer = self.ffi.from_buffer("float[]", dst, require_writable=True)
        call = getattr(self.lib, function)
        self._check(function, call(self.laq, 0, ikv, *before, pointer, dst.size))

    def queries(self, ikv: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Positions (n_queries,), queries (n_queries, n_head, d), oldest first."""
        info = self.layer(ikv)
        positions = np.full(info.n_queries, -1, np.int32)
        dst = np.full((info.n_queries, info.n_head, info.n_embd_head_k), np.nan, np.float32)
        where = self.ffi.from_buffer("int32_t[]", positions, require_writable=True)
        self._read("laq_get_queries", ikv, dst, where)
        return positions, dst

    def keys(self, ikv: int) -> npt.NDArray[np.float32]:
        """(n_resident, n_head_kv, d)."""
        info = self.layer(ikv)
        shape = (self.stats().n_resident, info.n_head_kv, info.n_embd_head_k)
        dst = np.full(shape, np.nan, np.float32)
        self._read("laq_get_keys", ikv, dst)
        return dst

    def scores(self, ikv: int, i_eviction: int | None = None) -> npt.NDArray[np.float32]:
        """(n_head_kv, n_kv), of an eviction of all that there were; None: of the last one."""
        i = self.stats().n_evictions - 1 if i_eviction is None else i_eviction
        n_kv, get = self.ffi.new("uint32_t *"), self.lib.laq_get_scores
        self._check("laq_get_scores", get(self.laq, i, ikv, self.ffi.NULL, 0, n_kv))
        dst = np.full((self.layer(ikv).n_head_kv, n_kv[0]), np.nan, np.float32)
        pointer = self.ffi.from_buffer("float[]", dst, require_writable=True)
        self._check("laq_get_scores", get(self.laq, i, ikv, pointer, dst.size, n_kv))
        return dst

    def logits(self) -> npt.NDArray[np.float32]:
        """Of the last token decoded: (n_vocab,)."""
        import llama_cpp

        pointer = llama_cpp.llama_get_logits_ith(self.llm.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.llm.n_vocab(),)).copy()


@dataclass
class Snapshot:
    """A context before its eviction; lists have one entry a layer."""

    positions: npt.NDArray[np.int32]
    query_positions: list[npt.NDArray[np.int32]]
    queries: list[npt.NDArray[np.float32]]
    keys: list[npt.NDArray[np.float32]]


def snapshot(inspector: Inspector) -> Snapshot:
    positions = inspector.llm.kept_positions()
    layers = range(len(positions))
    queries = [inspector.queries(il) for il in layers]
    return Snapshot(
        positions,
        [where for where, _ in queries],
        [values for _, values in queries],
        [inspector.keys(il) for il in layers],
    )


@pytest.fixture(autouse=True)
def scores_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAQ_DEBUG", "1")


@contextmanager
def opened(
    case: cases.EvictCase, path: Any, *, n_threads: int = 1, **settings: Any
) -> Iterator[Any]:
    # one thread: many small graphs on a busy machine mostly wait at barriers
    from laq_gguf import Llama

    names = ("lookahead_size", "window_size", "snapkv_window", "n_sink")
    llm = Llama(
        str(path),
        kv_budget=PARAMS["budget"],
        kv_policy=case.policy,
        pinned=PINNED,
        n_ctx=512,
        n_batch=128,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        seed=SEED,
        flash_attn=case.flash_attn,
        type_k=ggml_type(case.type_k),
        type_v=ggml_type(case.type_v),
        verbose=False,
        **device.OPTIONS,
        **{name: PARAMS[name] for name in names},
        **settings,
    )
    try:
        yield llm
    finally:
        llm.close()


def check_scores(case, inspector: Inspector, before: Snapshot, used: tuple[int, int]) -> None:
    """Native scores equal numpy's from the native queries and keys."""
    for il, positions in enumerate(before.positions):
        info = inspector.layer(il)
        assert info.kq_scale == pytest.approx(case.n_embd_head**-0.5, rel=1e-6)
        assert info.softcap == 0
        where = before.query_positions[il]
        rows = (where >= used[0]) & (where < used[1])
        assert where[rows].tolist() == list(range(*used)), "queries are missing from the ring"
        expected = attention_scores(
            before.queries[il][rows].swapaxes(0, 1),
            before.keys[il],
            scale=info.kq_scale,
            mask=causal_mask(where[rows], positions),
        )
        fused = inspector.stats().score_fused
        tolerance = SCORE_NMSE[case.type_k, device.scored_by("fused" if fused else "composed")]
        assert_nmse(inspector.scores(il), expected, tolerance, f"scores of layer {il}")


def check_selection(params, inspector: Inspector, before: Snapshot, n_intact: int) -> None:
    """What stayed is what numpy selects from the native scores; its keys are the same bytes."""
    after = inspector.llm.kept_positions()
    n_layer, n_head_kv, _ = before.positions.shape
    assert after.shape == (n_layer, n_head_kv, params.budget)
    for il in range(n_layer):
        scores = inspector.scores(il) if params.needs_queries else [None] * n_head_kv
        keys = inspector.keys(il)
        for head, positions in enumerate(before.positions[il]):
            # pseudo tokens come last: they were scored against and are not ranked
            raw = None if scores[head] is None else scores[head][: len(positions)]
            kept = select_head(params, positions, n_intact, raw, ikv=il, head=head)
            what = f"layer {il}, head {head}"
            assert_equal(after[il, head], positions[kept], f"kept positions of {what}")
            assert_equal(
                keys[:, head].view(np.uint32),
                before.keys[il][kept, head].view(np.uint32),
                f"keys (as bits) of {what}",
            )


def check_queries(case, before: Snapshot, model_cache: KVCache) -> None:
    """The ring holds the model's queries. A quantized K rotates them: then their norms agree."""
    tolerance = max(logits_nmse(case.type_k, case.type_v, case.flash_attn), RING_NMSE)
    for il, where in enumerate(before.query_positions):
        rows = np.searchsorted(model_cache.queries.positions, where)
        actual, expected = before.queries[il], model_cache.queries.values[il, rows]
        norms = (np.linalg.norm(actual, axis=-1), np.linalg.norm(expected, axis=-1))
        assert_nmse(*norms, tolerance, f"norms of the queries of layer {il}")
        if case.type_k not in cases.BLOCK_TYPES:
            assert_nmse(actual, expected, tolerance, f"queries of layer {il}")


def evict(case, llm, inspector, params, prompt, ahead, model, model_cache) -> None:
    """One prompt and its eviction, checked at each step."""
    import llama_cpp

    # the stock eval: the state before the prompt's end is to be seen for every policy
    llama_cpp.Llama.eval(llm, prompt)
    model.forward(prompt, model_cache)
    n_prompt = llm.n_tokens
    n_intact = n_prompt - params.window
    if params.needs_lookahead:
        llm._laq.prompt_end()
        for token in ahead:
            llm.eval([token])
            model.forward([token], model_cache)
        assert inspector.stats().pending == 1
    before = snapshot(inspector)
    n_evictions = inspector.stats().n_evictions
    assert before.positions.shape[2] == inspector.stats().n_resident
    if params.needs_lookahead:
        llm._laq.flush()
    else:
        llm._laq.prompt_end()
    stats = inspector.stats()
    assert (stats.n_evictions, stats.pending) == (n_evictions + 1, 0)
    assert (stats.n_resident, stats.n_tokens) == (params.budget, llm.n_tokens)
    assert stats.n_intact == n_intact
    if params.needs_queries:
        check_queries(case, before, model_cache)
        check_scores(case, inspector, before, query_range(params, n_prompt, llm.n_tokens))
    check_selection(params, inspector, before, n_intact)
    used = query_range(params, n_prompt, llm.n_tokens)
    keep(model_cache, llm.kept_positions(), n_intact, (params, used))


@pytest.mark.parametrize("case", cases.EVICT_CASES, ids=str)
def test_evictions(native, tiny_model, case, monkeypatch) -> None:
    # each pair of types is moved in both ways
    compaction = "graph" if case.n_group in (3, 8) else "host"
    monkeypatch.setenv("LAQ_COMPACT", compaction)
    path = tiny_model(
        n_head=case.n_head, n_head_kv=case.n_head_kv, n_embd_head=case.n_embd_head, n_embd=32
    )
    params = PolicyParams(policy=case.policy, pinned=PINNED, seed=SEED, **PARAMS)
    model = NumpyLlama(path)
    model_cache = KVCache(PolicyParams(1, policy="full"), **model.shape)
    rng = np.random.default_rng(3)
    tokens = rng.integers(3, model.n_vocab, N_PROMPT + N_SECOND + 2 * 8 + 2).tolist()
    prompt, tokens = tokens[:N_PROMPT], tokens[N_PROMPT:]
    second, tokens = tokens[:N_SECOND], tokens[N_SECOND:]
    tolerance = logits_nmse(case.type_k, case.type_v, case.flash_attn)
    with opened(case, path) as llm:
        inspector = Inspector(llm, native)
        assert llm.kv_stats().compaction == compaction
        for text in (prompt, second):
            ahead, tokens = tokens[:8], tokens[8:]
            evict(case, llm, inspector, params, text, ahead, model, model_cache)
            # a token decoded on the evicted cache sees the right keys and the right values
            token = tokens.pop()
            llm.eval([token])
            expected = model.forward([token], model_cache)
            bar = max(tolerance, RING_NMSE) if params.fits_values else tolerance
            assert_nmse(inspector.logits(), expected, bar, "logits after the eviction")


PSEUDO_CASES = [
    cases.EvictCase("f16", "f16", True, 4, 64, "laq++"),
    cases.EvictCase("f16", "f16", False, 3, 64, "laq"),
    cases.EvictCase("q8_0", "q8_0", True, 8, 64, "laq++"),
]


@pytest.mark.parametrize("case", PSEUDO_CASES, ids=str)
def test_pseudo_tokens_leave_no_trace(native, tiny_model, case) -> None:
    path = tiny_model(
        n_head=case.n_head, n_head_kv=case.n_head_kv, n_embd_head=case.n_embd_head, n_embd=32
    )
    params = PolicyParams(policy=case.policy, lookahead="pseudo", pinned=PINNED, **PARAMS)
    prompt = np.random.default_rng(4).integers(3, 400, N_PROMPT).tolist()
    with opened(case, path, n_threads=2, lookahead="pseudo") as llm:
        import llama_cpp

        inspector = Inspector(llm, native)
        llama_cpp.Llama.eval(llm, prompt)
        before, logits = snapshot(inspector), inspector.logits()
        llm._laq.prompt_end()
        stats = inspector.stats()
        assert (stats.n_tokens, stats.n_resident) == (N_PROMPT, params.budget)
        assert stats.n_evictions == 1
        assert 1 <= stats.n_pseudo <= params.lookahead_size  # it ends at an end-of-text token
        assert_equal(inspector.logits(), logits, "the prompt's own logits are back")
        check_selection(params, inspector, before, N_PROMPT - params.window)


@pytest.mark.parametrize("n_ahead", [0, 3])
@pytest.mark.parametrize("policy", ["laq", "laq++"])
def test_an_answer_shorter_than_the_lookahead(native, tiny_model, policy, n_ahead) -> None:
    case = cases.EvictCase("f16", "f16", True, 4, 64, policy)
    path = tiny_model(n_head=8, n_head_kv=2, n_embd_head=64, n_embd=32)
    params = PolicyParams(policy=policy, pinned=PINNED, **PARAMS)
    prompt = np.random.default_rng(5).integers(3, 400, N_PROMPT).tolist()
    with opened(case, path) as llm:
        inspector = Inspector(llm, native)
        llm.eval(prompt)
        for token in prompt[:n_ahead]:
            llm.eval([token])
        before = snapshot(inspector)
        llm._laq.flush()
        used = query_range(params, N_PROMPT, N_PROMPT + n_ahead)
        check_scores(case, inspector, before, used)
        check_selection(params, inspector, before, N_PROMPT - params.window)


@pytest.mark.parametrize("n_left", [0, 1, 5])
def test_removal_inside_the_intact_suffix(native, tiny_model, n_left) -> None:
    # also down to its very beginning, where no intact token is left to continue from; random
    # leaves gaps right below it
    import llama_cpp

    case = cases.EvictCase("f16", "f16", True, 4, 64, "random")
    path = tiny_model(n_head=8, n_head_kv=2, n_embd_head=64, n_embd=32)
    model = NumpyLlama(path)
    model_cache = KVCache(PolicyParams(1, policy="full"), **model.shape)
    prompt = np.random.default_rng(6).integers(3, 400, N_PROMPT).tolist()
    with opened(case, path) as llm:
        inspector = Inspector(llm, native)
        llm.eval(prompt)
        model.forward(prompt, model_cache)
        n_intact = N_PROMPT - PARAMS["window_size"]
        keep(model_cache, llm.kept_positions(), n_intact, (model_cache.params, (0, 0)))
        memory = llama_cpp.llama_get_memory(llm.ctx)
        assert not llama_cpp.llama_memory_seq_rm(memory, 0, n_intact - 1, -1)
        first = n_intact + n_left
        assert llama_cpp.llama_memory_seq_rm(memory, 0, first, -1)
        assert model_cache.remove(first)
        assert inspector.stats().n_tokens == first == model_cache.n_tokens
        llm.n_tokens = first
        llm.eval([77])
        expected = model.forward([77], model_cache)
        tolerance = logits_nmse(case.type_k, case.type_v, case.flash_attn)
        assert_nmse(inspector.logits(), expected, tolerance, "logits after the removal")
