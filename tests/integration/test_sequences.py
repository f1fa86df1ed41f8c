"""laq.h on a cache of several sequences: one is evicted, the others are not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from integration.decoding import tokens_of
from laq_gguf import _lib
from laq_gguf.errors import LaqInvalidError, LaqNativeError

N_CELLS, BUDGET = 512, 64


@pytest.fixture(autouse=True, params=["host", "graph"])
def compaction(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What moves K and V."""
    monkeypatch.setenv("LAQ_COMPACT", request.param)


class Context:
    """A llama_context of three sequences, with a unified cache or not, attached or not."""

    def __init__(self, native: _lib.Native, path: Path, **settings: Any) -> None:
        import llama_cpp

        self.api, self.native = llama_cpp, native
        llama_cpp.llama_log_set(QUIET(llama_cpp), llama_cpp.ctypes.c_void_p())
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = N_CELLS, 256, 256
        params.n_seq_max, params.kv_unified = 3, settings.pop("unified", True)
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.ctx = llama_cpp.llama_init_from_model(self.model, params)
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.laq = native.ffi.NULL
        if settings.pop("attach", True):
            self.laq = self._attach(settings)

    def _attach(self, settings: dict[str, Any]) -> Any:
        ffi, lib = self.native.ffi, self.native.lib
        params = ffi.new("struct laq_params *", lib.laq_default_params())
        params.n_ctx, params.n_kv_budget = 4096, BUDGET
        for name, value in settings.items():
            setattr(params, name, value)
        out = ffi.new("struct laq_context **")
        address = self.api.ctypes.cast(self.ctx, self.api.ctypes.c_void_p).value
        self.native.check(
            "laq_attach", lib.laq_attach(ffi.cast("struct llama_context *", address), params, out)
        )
        return out[0]

    def call(self, name: str, *args: Any) -> None:
        self.native.check(name, getattr(self.native.lib, name)(self.laq, *args))

    def decode(self, *rows: tuple[int, int, int]) -> np.ndarray:
        """rows (token, position, sequence); the logits of the last one."""
        batch = self.api.llama_batch_init(len(rows), 0, 1)
        for i, (token, pos, seq) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, pos, 1
            batch.seq_id[i][0], batch.logits[i] = seq, i + 1 == len(rows)
        batch.n_tokens = len(rows)
        status = self.api.llama_decode(self.ctx, batch)
        self.api.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        n_vocab = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        pointer = self.api.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(n_vocab,)).copy()

    def read(self, seq: int, tokens: list[int], first: int = 0) -> np.ndarray:
        """A prompt, chunk by chunk."""
        n_chunk, left, logits = self.native.ffi.new("uint32_t *"), list(tokens), np.zeros(0)
        while left:
            self.call("laq_prompt_next", seq, left, len(left), n_chunk)
            chunk, left = left[: n_chunk[0]], left[n_chunk[0] :]
            logits = self.decode(*[(t, first + i, seq) for i, t in enumerate(chunk)])
            first += len(chunk)
        self.call("laq_prompt_end", seq)
        return logits

    def stats(self, seq: int) -> Any:
        stats = self.native.ffi.new("struct laq_stats *")
        stats.size = self.native.ffi.sizeof("struct laq_stats")
        self.call("laq_get_stats", seq, stats)
        return stats

    def kept(self, seq: int) -> np.ndarray:
        """(n_layer, n_head_kv, n_resident)."""
        s = self.stats(seq)
        kept = np.full((s.n_layer, s.n_head_kv, s.n_resident), -1, np.int32)
        dst = self.native.ffi.from_buffer("int32_t[]", kept, require_writable=True)
        self.call("laq_kept_positions", seq, dst, kept.size)
        return kept

    def state(self, seq: int) -> bytes:
        size = self.api.llama_state_seq_get_size(self.ctx, seq)
        data = (self.api.ctypes.c_uint8 * size)()
        assert self.api.llama_state_seq_get_data(self.ctx, data, size, seq) == size
        return bytes(data)

    def load(self, seq: int, data: bytes) -> bool:
        source = (self.api.ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        return self.api.llama_state_seq_set_data(self.ctx, source, len(data), seq) == len(data)

    def close(self) -> None:
        if self.laq != self.native.ffi.NULL:
            self.native.lib.laq_detach(self.laq)
        self.api.llama_free(self.ctx)
        self.api.llama_model_free(self.model)


_quiet: list[Any] = []


def QUIET(api: Any) -> Any:
    """A log callback that drops everything; kept alive here."""
    if not _quiet:
        _quiet.append(api.llama_log_callback(lambda level, text, user_data: None))
    return _quiet[0]


@pytest.fixture
def opened(native: _lib.Native, tiny_gguf: Callable[..., Path]) -> Iterator[Callable[..., Context]]:
    """opened(**settings): a Context of a tiny model; settings of laq_params, or attach=False."""
    contexts: list[Context] = []

    def make(**settings: Any) -> Context:
        contexts.append(Context(native, tiny_gguf("llama"), **settings))
        return contexts[-1]

    yield make
    for context in contexts:
        context.close()


def policy(native: _lib.Native, name: str) -> dict[str, int]:
    from laq_gguf.config import LOOKAHEADS, POLICIES

    return {"policy": POLICIES[name], "lookahead": LOOKAHEADS["pseudo"]}


@pytest.mark.parametrize("name", ["laq++", "snapkv", "streaming"])
def test_one_sequence_is_evicted_and_the_others_go_on(opened, native, name: str) -> None:
    prompts = {s: tokens_of(n, seed=s) for s, n in ((0, 150), (1, 200), (2, 40))}
    several, alone = opened(**policy(native, name)), opened(**policy(native, name))
    # interleaved: the cells of the sequences are mixed
    for first in range(0, 40, 20):
        several.decode(*[
            (t, first + i, s)
            for s in (2, 0, 1)
            for i, t in enumerate(prompts[s][first : first + 20])
        ])  # fmt: skip
    untouched = several.state(2)
    logits = several.read(1, prompts[1][40:], first=40)
    assert (several.stats(1).n_resident, several.stats(1).n_tokens) == (BUDGET, 200)
    assert several.state(2) == untouched, "byte for byte"
    assert (several.stats(0).n_intact, several.stats(2).n_intact) == (0, 0)
    assert several.kept(0).tolist() == np.broadcast_to(np.arange(40), (2, 2, 40)).tolist()

    alone.decode(*[(t, i, 1) for i, t in enumerate(prompts[1][:20])])
    alone.decode(*[(t, 20 + i, 1) for i, t in enumerate(prompts[1][20:40])])
    expected = alone.read(1, prompts[1][40:], first=40)
    # which cells a sequence has may change the order of sums, not what they are
    np.testing.assert_allclose(logits, expected, rtol=1e-2, atol=2e-2)
    same = np.mean(
        [
            np.isin(a, b).mean()
            for a, b in zip(
                several.kept(1).reshape(-1, BUDGET), alone.kept(1).reshape(-1, BUDGET), strict=True
            )
        ]
    )
    assert same > 0.97, "the same tokens but for ties that rounding decides"


def test_sequences_decode_together_past_the_cells(opened, native) -> None:
    context = opened(**policy(native, "laq++"))
    length = {0: 100, 1: 60, 2: 5}
    for seq, n in length.items():
        context.read(seq, tokens_of(n, seed=seq))
    for step in range(400):
        context.decode(*[(300 + step % 50, length[s], s) for s in length])
        length = {s: n + 1 for s, n in length.items()}
        assert context.stats(0).n_used <= N_CELLS == context.stats(0).n_cells
    for seq, n in length.items():
        stats, kept = context.stats(seq), context.kept(seq)
        assert stats.n_tokens == n
        assert (np.diff(kept, axis=-1) > 0).all() and kept.min() == 0 and kept.max() == n - 1
        assert np.isin(np.arange(n - 8, n), kept[1, 1]).all()
    assert context.stats(0).n_evictions >= 3


def test_shared_cells_stay_whole(opened, native) -> None:
    context = opened(**policy(native, "streaming"))
    context.decode(*[(t, i, 0) for i, t in enumerate(tokens_of(30))])
    context.api.llama_memory_seq_cp(context.memory, 0, 1, 0, -1)
    before = context.state(0)
    context.read(1, tokens_of(120, seed=1), first=30)
    assert context.stats(1).n_resident == BUDGET
    assert context.state(0) == before
    assert np.isin(np.arange(30), context.kept(1)[1, 1]).all()
    assert context.stats(0).n_resident == 30 and context.stats(0).n_intact == 0
    # what has been evicted is not shared any more
    context.api.llama_memory_seq_cp(context.memory, 1, 2, 0, -1)
    assert context.stats(2).n_resident == 0
    assert not context.api.llama_memory_seq_rm(context.memory, 1, 40, -1)
    assert context.api.llama_memory_seq_rm(context.memory, 0, -1, -1)
    assert np.isin(np.arange(30), context.kept(1)[1, 1]).all(), "it owns them alone now"
    context.call("laq_evict", 1, 40)
    assert context.stats(1).n_resident == 40


def test_too_much_is_shared(opened, native) -> None:
    context = opened(**policy(native, "streaming"))
    context.decode(*[(t, i, 0) for i, t in enumerate(tokens_of(80))])
    context.api.llama_memory_seq_cp(context.memory, 0, 1, 0, -1)
    with pytest.raises(LaqInvalidError, match=r"shared with another.*raise kv_budget"):
        context.read(1, tokens_of(40, seed=1), first=80)
    assert context.stats(1).n_resident == 120, "nothing was lost"
    context.decode((300, 120, 1))


def test_state_of_one_sequence_moves_to_another(opened, native) -> None:
    context, other = opened(**policy(native, "laq++")), opened(**policy(native, "laq++"))
    context.read(0, tokens_of(90))
    context.read(1, tokens_of(150, seed=1))
    data, kept = context.state(1), context.kept(1)
    other.read(0, tokens_of(33, seed=2))
    first = other.state(0)
    assert other.load(2, data)
    assert (other.kept(2) == kept).all() and other.stats(2).n_intact == context.stats(1).n_intact
    assert other.state(0) == first
    a, b = context.decode((301, 150, 1)), other.decode((301, 150, 2))
    np.testing.assert_allclose(a, b, rtol=1e-2, atol=2e-2)
    plain = opened(attach=False)
    assert not plain.load(0, data) and not other.load(0, plain.state(0))
    assert other.stats(2).n_tokens == 151


def test_keep_and_clear(opened, native) -> None:
    context = opened(**policy(native, "laq++"))
    for seq in (0, 1):
        context.read(seq, tokens_of(120, seed=seq))
    kept = context.kept(1)
    context.api.llama_memory_seq_keep(context.memory, 1)
    assert context.stats(0).n_tokens == context.stats(0).n_intact == 0
    assert (context.kept(1) == kept).all()
    context.api.llama_memory_clear(context.memory, False)
    assert context.stats(1).n_tokens == context.stats(1).n_intact == 0
    context.read(1, tokens_of(50))


def test_wrong_arguments(opened, native) -> None:
    context = opened(**policy(native, "laq++"))
    for seq in (-1, 3):
        with pytest.raises(LaqInvalidError, match="seq_id"):
            context.call("laq_prompt_end", seq)
    with pytest.raises(LaqInvalidError, match="n_ctx = 4096"):
        context.read(0, tokens_of(4097))
    span = native.ffi.new("struct laq_span[]", [[0, BUDGET]])
    with pytest.raises(LaqInvalidError, match="kv_budget = 64 is below"):
        context.call("laq_set_pinned", 0, span, 1)
    context.read(0, tokens_of(100))
    with pytest.raises(LaqNativeError, match="kv_budget = 10 is below"):
        context.call("laq_evict", 0, 10)
    assert context.stats(0).n_resident == BUDGET


def test_pins_of_one_sequence(opened, native) -> None:
    context = opened(**policy(native, "streaming"))
    span = native.ffi.new("struct laq_span[]", [[10, 30]])
    context.call("laq_set_pinned", 1, span, 1)
    for seq in (0, 1):
        context.read(seq, tokens_of(200, seed=seq))
    assert np.isin(np.arange(10, 30), context.kept(1)[0, 0]).all()
    assert not np.isin(np.arange(10, 30), context.kept(0)[0, 0]).any()


def test_streams_of_their_own_keep_what_a_unified_cache_keeps(opened, native) -> None:
    kept = []
    for unified in (True, False):
        context = opened(unified=unified, **policy(native, "laq++"))
        for seq, n in ((0, 200), (1, 150)):
            context.read(seq, tokens_of(n, seed=seq))
        assert [context.stats(seq).n_resident for seq in (0, 1, 2)] == [BUDGET, BUDGET, 0]
        kept.append([context.kept(seq).tolist() for seq in (0, 1)])
    assert kept[0] == kept[1]


def park(context: Context, seq: int) -> Any:
    out = context.native.ffi.new("struct laq_parked **")
    context.call("laq_park", seq, out)
    return out[0]


def test_one_sequence_is_parked_and_the_others_go_on(opened, native) -> None:
    context = opened(**policy(native, "laq++"))
    for seq, n in ((0, 100), (1, 300), (2, 40)):
        context.read(seq, tokens_of(n, seed=seq))
    evicted, untouched, kept = context.state(1), context.state(2), context.kept(1)
    parked = park(context, 1)
    assert context.stats(1).n_resident == context.stats(1).n_tokens == 0
    assert context.stats(0).n_used == BUDGET + 40, "its cells are free"
    context.read(1, tokens_of(200, seed=5))
    with pytest.raises(LaqInvalidError, match="holds tokens"):
        context.call("laq_resume", 1, parked)
    other = park(context, 1)
    context.call("laq_resume", 1, parked)
    assert context.state(1) == evicted and context.state(2) == untouched, "byte for byte"
    assert context.kept(1).tolist() == kept.tolist()
    context.decode((300, 300, 1), (301, 40, 2))
    context.call("laq_forget", other)


def test_a_parked_sequence_waits_until_there_are_cells(opened, native) -> None:
    context = opened(policy=0)
    context.read(0, tokens_of(200))
    state, parked = context.state(0), park(context, 0)
    for first in (0, 200):
        context.decode(*[(t, first + i, 1) for i, t in enumerate(tokens_of(200, seed=1))])
    with pytest.raises(LaqNativeError, match="no cells for"):
        context.call("laq_resume", 0, parked)
    assert (context.stats(0).n_tokens, context.stats(1).n_tokens) == (0, 400)
    assert context.api.llama_memory_seq_rm(context.memory, 1, -1, -1)
    context.call("laq_resume", 0, parked)
    assert context.state(0) == state
