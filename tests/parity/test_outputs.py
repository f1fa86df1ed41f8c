"""What the native score op gives with values, scores and attention outputs, equals numpy's."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import cases
from laq_gguf.reference.attention import attention_weights
from laq_gguf.reference.values import attention_outputs
from parity.rows import encode, ggml_type
from tolerances import SCORE_NMSE, assert_nmse

WORK_BYTES = 64 << 20


class InitParams(ctypes.Structure):
    """struct ggml_init_params of ggml.h."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """The functions of ggml that one op needs. Its tensors are in memory of the context."""

    def __init__(self, folder: Path) -> None:
        base, *_ = folder.glob("*ggml-base*")
        cpu, *others = folder.glob("*ggml-cpu*")
        if others:
            pytest.skip("the CPU's backend is built for several machines: which one is loaded?")
        self.base, self.cpu = ctypes.CDLL(str(base)), ctypes.CDLL(str(cpu))
        pointer = ctypes.c_void_p
        self.base.ggml_init.argtypes = [InitParams]
        self.base.ggml_new_tensor_3d.argtypes = [pointer, ctypes.c_int, *[ctypes.c_int64] * 3]
        self.base.ggml_laq_score_outputs.argtypes = [*[pointer] * 6, *[ctypes.c_float] * 2]
        self.base.ggml_build_forward_expand.argtypes = [pointer] * 2
        self.base.ggml_build_forward_expand.restype = None
        self.base.ggml_free.argtypes = [pointer]
        self.base.ggml_free.restype = None
        self.cpu.ggml_graph_compute_with_ctx.argtypes = [pointer, pointer, ctypes.c_int]
        for name in ("init", "new_tensor_3d", "laq_score_outputs", "new_graph", "get_data"):
            function = getattr(self.base, f"ggml_{name}")
            function.restype = pointer
            function.argtypes = function.argtypes or [pointer]

    def compute(self, tensors: list[Any], scale: float, softcap: float, n_out: int, threads: int):
        """The op's result, n_out floats; a tensor is (ggml type, ne, bytes), or None."""
        context = self.base.ggml_init(InitParams(WORK_BYTES, None, False))
        try:
            args = [t and self._tensor(context, *t) for t in tensors]
            result = self.base.ggml_laq_score_outputs(context, *args, scale, softcap)
            graph = self.base.ggml_new_graph(context)
            self.base.ggml_build_forward_expand(graph, result)
            assert self.cpu.ggml_graph_compute_with_ctx(context, graph, threads) == 0
            data = ctypes.string_at(self.base.ggml_get_data(result), 4 * n_out)
            return np.frombuffer(data, np.float32)
        finally:
            self.base.ggml_free(context)

    def _tensor(self, context: int, kind: int, ne: tuple[int, int, int], data: bytes) -> int:
        tensor = self.base.ggml_new_tensor_3d(context, kind, *ne)
        ctypes.memmove(self.base.ggml_get_data(tensor), data, len(data))
        return tensor


@pytest.fixture(scope="module")
def ggml(native) -> Ggml:
    import laq_gguf

    return Ggml(Path(laq_gguf.__file__).parent / "lib")


def by_head(rows: npt.NDArray[np.float32], type_name: str):
    """(bytes, values) of rows (n_kv, n_head_kv, d) with those of a head behind each other."""
    raw, read = encode(np.ascontiguousarray(rows.transpose(1, 0, 2)), type_name)
    return raw.tobytes(), read.transpose(1, 0, 2)


# more keys than a chunk has; n_embd_head_v that is no whole block of channels; all else of a table
CASES = [
    (cases.ScoreCase("f32", 1, 64, 1, 7, "none", 0.0, False), "f32", 64),
    (cases.ScoreCase("f16", 3, 64, 40, 1500, "causal", 0.0, False), "f16", 64),
    (cases.ScoreCase("f16", 3, 64, 8, 513, "causal", 20.0, True), "f32", 44),
    (cases.ScoreCase("f32", 4, 80, 33, 544, "causal", 0.0, True), "q8_0", 96),
    (cases.ScoreCase("q8_0", 8, 128, 5, 2049, "none", 30.0, False), "q4_0", 128),
]


@pytest.mark.parametrize(("case", "type_v", "d_v"), CASES, ids=lambda x: str(x))
def test_outputs(ggml, case, type_v, d_v) -> None:
    inputs = cases.score_inputs(case)
    k_bytes, k = by_head(inputs.k, case.type_k)
    values = np.random.default_rng(7).normal(size=(case.n_kv, case.n_head_kv, d_v))
    v_bytes, v = by_head(values.astype(np.float32), type_v)
    options = {"scale": case.scale, "mask": inputs.mask, "softcap": case.softcap}
    weights = attention_weights(inputs.q, k, sinks=inputs.sinks, **options)
    outputs = attention_outputs(weights, v.swapaxes(0, 1))

    def floats(array, *ne):
        return array is not None and (0, ne, np.ascontiguousarray(array, np.float32).tobytes())

    tensors = [
        floats(inputs.q, case.d, case.n_queries, case.n_head),
        (ggml_type(case.type_k), (case.d, case.n_kv, case.n_head_kv), k_bytes),
        (ggml_type(type_v), (d_v, case.n_kv, case.n_head_kv), v_bytes),
        floats(inputs.mask, case.n_kv, case.n_queries, 1) or None,
        floats(inputs.sinks, case.n_head, 1, 1) or None,
    ]
    n_scores = case.n_head_kv * case.n_kv
    results = [
        ggml.compute(tensors, case.scale, case.softcap, n_scores + outputs.size, n_threads)
        for n_threads in cases.N_THREADS
    ]
    for result in results:
        assert (result == results[0]).all(), "the number of threads changes results"
    tolerance = SCORE_NMSE[case.type_k, "cpu"]
    expected = cases.expected_scores(case, inputs, k)
    assert_nmse(results[0][:n_scores].reshape(expected.shape), expected, tolerance, "scores")
    actual = results[0][n_scores:].reshape(outputs.shape)
    assert_nmse(actual, outputs, tolerance, "outputs")
