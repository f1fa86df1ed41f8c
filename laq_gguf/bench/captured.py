"""What a context holds, as numpy arrays, by the functions of laq-test.h."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from laq_gguf import _lib

FloatArray = npt.NDArray[np.float32]


class Captured:
    """Queries and keys of sequence 0 of a laq_gguf.Llama with kv_budget."""

    def __init__(self, llm: Any) -> None:
        self._llm, self._native = llm, _lib.load()

    def layer(self, ikv: int) -> Any:
        """`struct laq_layer_info` of a layer of the KV cache."""
        info = self._native.ffi.new("struct laq_layer_info *")
        info.size = self._native.ffi.sizeof("struct laq_layer_info")
        self._call("laq_get_layer_info", ikv, info)
        return info

    def queries(self, ikv: int) -> tuple[npt.NDArray[np.int32], FloatArray]:
        """Captured queries of a layer after RoPE, oldest first.

        Returns:
            Their positions (n_queries,), and the queries (n_queries, n_head, d).
        """
        info, ffi = self.layer(ikv), self._native.ffi
        positions = np.empty(info.n_queries, np.int32)
        queries = np.empty((info.n_queries, info.n_head, info.n_embd_head_k), np.float32)
        where = ffi.from_buffer("int32_t[]", positions, require_writable=True)
        dst = ffi.from_buffer("float[]", queries, require_writable=True)
        self._call("laq_get_queries", ikv, where, dst, queries.size)
        return positions, queries

    def keys(self, ikv: int) -> FloatArray:
        """Resident keys of a layer after RoPE, in order of position: (n_resident, n_head_kv, d)."""
        info, n_resident = self.layer(ikv), self._llm.kv_stats().n_resident
        keys = np.empty((n_resident, info.n_head_kv, info.n_embd_head_k), np.float32)
        dst = self._native.ffi.from_buffer("float[]", keys, require_writable=True)
        self._call("laq_get_keys", ikv, dst, keys.size)
        return keys

    def _call(self, function: str, *args: Any) -> None:
        call = getattr(self._native.lib, function)
        self._native.check(function, call(self._llm._laq._laq, _lib.SEQ_ID, *args))
