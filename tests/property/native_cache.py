"""The model of a mirror: the reference with what native has less; and native's rows."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from laq_gguf.reference import KVCache, Layer, PolicyParams, Tokens
from laq_gguf.reference.seq import Phase
from parity.test_evict import Inspector
from tolerances import assert_nmse

FloatArray = npt.NDArray[np.float32]


def n_always(params: PolicyParams) -> int:
    """Tokens that are always kept, however many there are."""
    fixed = set(range(params.n_sink)).union(*(range(*span) for span in params.pinned))
    return len(fixed) + params.window + params.ahead


def n_captured(params: PolicyParams) -> int:
    """Last queries that are captured."""
    return max(params.window_size, params.snapkv_window) + params.lookahead_size


class NativeCache(KVCache):
    """The reference's cache with what native has less: it captures the queries of few tokens.

    Attributes:
        given: native's scores of the evictions that come, for each of them (n_head_kv, n_kv) a
            layer.
        n_before: evictions before the first of these.
        tolerance: NMSE of them; None = not compared.
        made: the tokens of the last `append`.
    """

    def __init__(self, params: PolicyParams, n_ring: int | None, **settings: Any) -> None:
        """n_ring: queries kept; None = all. The others are those of KVCache."""
        self.n_ring = n_ring
        self.given: list[list[FloatArray]] = []
        self.n_before = 0
        self.tolerance: float | None = None
        super().__init__(params, **settings)

    def fork(self) -> NativeCache:
        """A copy that takes any number of tokens, decoded as they would be now."""
        fork = copy.deepcopy(self)
        fork.cells.n_cells = fork.n_ring = None
        fork.phase = Phase(self.phase.how, begin=0)
        return fork

    def append(self, tokens: Tokens) -> None:
        self.made = tokens
        super().append(tokens)

    def remove(self, p0: int, p1: int = -1) -> bool:
        n_end = self.n_tokens if p1 < 0 else min(p1, self.n_tokens)
        done = super().remove(p0, p1)
        if done and max(p0, 0) < n_end:
            self.queries.keep(self.queries.positions < p0)
        return done

    def evict(self, n_keep: int, recall: bool = False) -> None:
        if n_keep < n_always(self.params):
            raise ValueError(f"{n_always(self.params)} tokens are always kept, not {n_keep}")
        super().evict(n_keep, recall)

    def make_room(self, n_evict: int, probe: Tokens | None = None, n_probe: int = 0) -> None:
        before, n_ring = copy.deepcopy(self.queries), self.n_ring
        self.n_ring = None
        try:
            super().make_room(n_evict, probe, n_probe)
        finally:
            self.n_ring = n_ring
            if probe is not None:  # its queries are kept apart
                before.outputs = self.queries.outputs
                self.queries = before

    def _append(self, tokens: Tokens) -> None:
        super()._append(tokens)
        if self.n_ring is not None:
            where = self.queries.positions
            newest = {int(p) % self.n_ring: int(p) for p in where}
            self.queries.keep(np.isin(where, list(newest.values())))

    def score(self, il: int, used: npt.NDArray[np.bool_], layer: Layer) -> FloatArray:
        own, i = super().score(il, used, layer), self.n_evictions - self.n_before
        assert i < len(self.given), "the model evicts and native has not"
        given = self.given[i][il]
        if (
            given.shape[1] == self.n_tokens > own.shape[1]
        ):  # a recall has a column for each position
            given = given[:, layer.positions[0]]
        assert given.shape == own.shape, f"{given.shape} scores, not {own.shape}"
        if self.tolerance is not None:
            assert_nmse(given, own, self.tolerance, f"scores of layer {il}")
        return given


class Rows:
    """K and V as the cells and the archive store them, as float32."""

    def __init__(self, llm: Any, native: Any) -> None:
        self.llm, self.native, self.laq = llm, native, llm._laq._laq
        type_k, type_v = int(llm.context_params.type_k), int(llm.context_params.type_v)
        self.types = [GGMLQuantizationType(t) for t in (type_k, type_v)]
        self.n_embd = Inspector(llm, native).layer(0).n_embd_head_k

    def _values(self, raw: npt.NDArray[np.uint8], is_v: bool) -> FloatArray:
        return dequantize(raw, self.types[is_v]).astype(np.float32)

    def _row_bytes(self, is_v: bool) -> int:
        n_values, n_bytes = GGML_QUANT_SIZES[self.types[is_v]]
        return self.n_embd // n_values * n_bytes

    def resident(self, il: int, head: int, is_v: bool) -> FloatArray:
        """(n_resident, d), in order of position."""
        raw = np.zeros((self.llm.kv_stats().n_resident, self._row_bytes(is_v)), np.uint8)
        dst = self.native.ffi.from_buffer("uint8_t[]", raw, require_writable=True)
        status = self.native.lib.laq_get_rows(self.laq, 0, il, head, is_v, dst, raw.size)
        self.native.check("laq_get_rows", status)
        return self._values(raw, is_v)

    def archived(self, il: int, head: int, is_v: bool, position: int) -> FloatArray:
        """(d,) of a position that is archived."""
        raw, held = np.zeros(self._row_bytes(is_v), np.uint8), self.native.ffi.new("bool *")
        dst = self.native.ffi.from_buffer("uint8_t[]", raw, require_writable=True)
        status = self.native.lib.laq_get_archived(
            self.laq, 0, il, head, is_v, position, dst, raw.size, held
        )
        self.native.check("laq_get_archived", status)
        assert held[0], f"position {position} is not archived"
        return self._values(raw, is_v)
