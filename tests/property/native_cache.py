"""The model of a mirror: the reference with what native has less; and native's rows."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from laq_gguf.reference import PolicyParams, RecallCache, Tokens
from laq_gguf.reference.plan import n_always
from parity.test_evict import Inspector
from tolerances import assert_nmse

FloatArray = npt.NDArray[np.float32]


class NativeCache(RecallCache):
    """The reference's cache with what native has less: it keeps the queries of few tokens.

    Attributes:
        given: native's scores of the evictions that come, for each of them (n_head_kv, n_kv) a
            layer; None = the model's own are used.
        n_before: evictions before the first of these.
        tolerance: NMSE of them; None = not compared.
        skips: native has found that a re-selection would hardly change anything.
        made: the tokens of the last `append`.
    """

    def __init__(self, params: PolicyParams, n_ring: int | None, **settings: Any) -> None:
        """n_ring: queries kept; None = all. The others are those of RecallCache."""
        self.skips = False
        self.n_ring, self.n_evictions = n_ring, 0
        self.given: list[list[FloatArray]] | None = []
        self.n_before = 0
        self.tolerance: float | None = None
        super().__init__(params, **settings)

    def fork(self) -> NativeCache:
        """A copy that takes any number of tokens."""
        fork = copy.deepcopy(self)
        fork.n_cells, fork.n_ring, fork.pending, fork.fits_to_archive = None, None, False, False
        fork.recall_when = self.recall_when if self.attending else None
        return fork

    def append(self, tokens: Tokens) -> None:
        self.made = tokens
        super().append(tokens)

    def clear(self) -> None:
        n_evictions = self.n_evictions
        super().clear()
        self.n_evictions = n_evictions

    def restore(self, snapshot: dict[str, Any]) -> None:
        super().restore({**snapshot, "n_evictions": self.n_evictions})

    def remove(self, p0: int, p1: int = -1) -> bool:
        n_end = self.n_tokens if p1 < 0 else min(p1, self.n_tokens)
        done = super().remove(p0, p1)
        if done and max(p0, 0) < n_end:
            self._keep_queries(self.query_positions < p0)
        return done

    def evict(self, n_keep: int, recall: bool = False) -> None:
        if n_keep < n_always(self.params):
            raise ValueError(f"{n_always(self.params)} tokens are always kept, not {n_keep}")
        super().evict(n_keep, recall)

    def make_room(
        self, n_evict: int, probe: Tokens | None = None, n_probe: int = 0, **others: Any
    ) -> None:
        before, n_ring = (self.query_positions, self.queries), self.n_ring
        self.n_ring = None
        try:
            super().make_room(n_evict, probe, n_probe, **others)
        finally:
            self.n_ring = n_ring
            if probe is not None:  # its queries are kept apart
                self.query_positions, self.queries = before

    def _append_queries(self, tokens: Tokens) -> None:
        super()._append_queries(tokens)
        if self.n_ring is not None:
            newest = {int(p) % self.n_ring: int(p) for p in self.query_positions}
            self._keep_queries(np.isin(self.query_positions, list(newest.values())))

    def _reselect(self, *eviction: Any, always: bool = False, **others: Any) -> bool:
        if self.skips and not always:  # one that is always made may come first
            self.n_recalls_skipped += 1
            return False
        return super()._reselect(*eviction, always=always, **others)

    def _is_new(self, *selected: Any) -> bool:
        super()._is_new(*selected)  # near the threshold native may say otherwise
        return True

    def _score_candidates(self, il: int, *candidates: Any) -> FloatArray:
        return self._given(il, super()._score_candidates(il, *candidates))

    def _score_layer(self, il: int, used: npt.NDArray[np.bool_]) -> FloatArray:
        return self._given(il, super()._score_layer(il, used))

    def _given(self, il: int, own: FloatArray) -> FloatArray:
        if self.given is None:
            return own
        i = self.n_evictions - self.n_before
        assert i < len(self.given), "the model evicts and native has not"
        given = self.given[i][il]
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
        status = self.native.lib.laq_get_rows(self.laq, il, head, is_v, dst, raw.size)
        self.native.check("laq_get_rows", status)
        return self._values(raw, is_v)

    def archived(self, il: int, head: int, is_v: bool, position: int) -> FloatArray:
        """(d,) of a position that is archived."""
        raw, held = np.zeros(self._row_bytes(is_v), np.uint8), self.native.ffi.new("bool *")
        dst = self.native.ffi.from_buffer("uint8_t[]", raw, require_writable=True)
        status = self.native.lib.laq_get_archived(
            self.laq, il, head, is_v, position, dst, raw.size, held
        )
        self.native.check("laq_get_archived", status)
        assert held[0], f"position {position} is not archived"
        return self._values(raw, is_v)
