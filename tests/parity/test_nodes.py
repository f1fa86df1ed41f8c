"""The two nodes of the score op: who knows them, and that kept logits change no bit."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

N_QUERIES, N_GROUP, N_HEAD_KV, D = 40, 4, 4, 32
N_KV = 4096  # the logits of all heads are more than the first node keeps; those of one are not
F32 = 0
POINTER = ctypes.c_void_p


class InitParams(ctypes.Structure):
    """struct ggml_init_params of ggml.h."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", POINTER),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """ggml-base and ggml-cpu, and a context whose tensors have memory."""

    def __init__(self, folder: Path) -> None:
        base, *_ = folder.glob("*ggml-base*")
        cpu, *others = folder.glob("*ggml-cpu*")
        if others:
            pytest.skip("the CPU's backend is built for several machines: which one is loaded?")
        self.base, self.cpu = ctypes.CDLL(str(base)), ctypes.CDLL(str(cpu))
        int64, i32, real = ctypes.c_int64, ctypes.c_int, ctypes.c_float
        self.init = self._get(self.base, "init", POINTER, InitParams)
        self.free = self._get(self.base, "free", None, POINTER)
        self.tensor = self._get(self.base, "new_tensor_3d", POINTER, POINTER, i32, *[int64] * 3)
        self.score = self._get(self.base, "laq_score", POINTER, *[POINTER] * 5, real, real)
        self.work = self._get(self.base, "laq_score_work", POINTER, POINTER)
        self.is_score = self._get(self.base, "laq_is_score", ctypes.c_bool, POINTER)
        self.is_work = self._get(self.base, "laq_is_score_work", ctypes.c_bool, POINTER)
        self.supported = self._get(
            self.base, "laq_score_supported", ctypes.c_bool, POINTER, POINTER
        )
        self.custom = self._get(
            self.base, "custom_4d", POINTER, POINTER, i32, *[int64] * 4, POINTER, i32, POINTER, i32,
            POINTER,
        )  # fmt: skip
        self.data = self._get(self.base, "get_data", POINTER, POINTER)
        self.graph = self._get(self.base, "new_graph", POINTER, POINTER)
        self.expand = self._get(self.base, "build_forward_expand", None, POINTER, POINTER)
        self.compute = self._get(self.cpu, "graph_compute_with_ctx", i32, POINTER, POINTER, i32)
        self.cpu_reg = self._get(self.cpu, "backend_cpu_reg", POINTER)
        self.device = self._get(self.base, "backend_reg_dev_get", POINTER, POINTER, ctypes.c_size_t)

    @staticmethod
    def _get(library: ctypes.CDLL, name: str, result, *arguments):
        function = getattr(library, f"ggml_{name}")
        function.restype, function.argtypes = result, arguments
        return function


@pytest.fixture(scope="module")
def ggml(native) -> Ggml:
    return Ggml(native.path.parent)


@pytest.fixture
def context(ggml):
    pointer = ggml.init(InitParams(64 << 20, None, False))
    yield pointer
    ggml.free(pointer)


def filled(ggml: Ggml, context: int, array: np.ndarray) -> int:
    """An F32 tensor with the values and, turned around, the dimensions of an array."""
    tensor = ggml.tensor(context, F32, *array.shape[::-1])
    ctypes.memmove(ggml.data(tensor), np.ascontiguousarray(array).ctypes.data, array.nbytes)
    return tensor


def score_node(ggml: Ggml, context: int, q: np.ndarray, k: np.ndarray) -> int:
    tensors = (filled(ggml, context, array) for array in (q, k))
    return ggml.score(context, *tensors, None, None, 0.25, 0.0)


def scores(ggml: Ggml, q: np.ndarray, k: np.ndarray, n_threads: int) -> np.ndarray:
    context = ggml.init(InitParams(64 << 20, None, False))
    try:
        node = score_node(ggml, context, q, k)
        graph = ggml.graph(context)
        ggml.expand(graph, node)
        assert ggml.compute(context, graph, n_threads) == 0
        data = ctypes.string_at(ggml.data(node), 4 * k.shape[0] * k.shape[1])
        return np.frombuffer(data, np.float32).reshape(k.shape[:2])
    finally:
        ggml.free(context)


def made(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


Q = made((N_HEAD_KV * N_GROUP, N_QUERIES, D), 1)
K = made((N_HEAD_KV, N_KV, D), 2)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_kept_logits_and_threads_do_not_change_a_bit(ggml, n_threads) -> None:
    all_heads = scores(ggml, Q, K, n_threads)
    one_by_one = [
        scores(ggml, Q[g * N_GROUP : (g + 1) * N_GROUP], K[g : g + 1], 1) for g in range(N_HEAD_KV)
    ]
    assert np.isclose(all_heads.sum(), N_HEAD_KV * N_QUERIES)
    assert (all_heads == np.concatenate(one_by_one)).all()


def test_nodes_are_known(ggml, context) -> None:
    node = score_node(ggml, context, Q, K[:, :100])
    work = ggml.work(node)
    assert ggml.is_score(node) and not ggml.is_work(node)
    assert ggml.is_work(work) and not ggml.is_score(work)
    callback = ctypes.CFUNCTYPE(None, POINTER, ctypes.c_int, ctypes.c_int, POINTER)(lambda *_: None)
    function = ctypes.cast(callback, POINTER)
    foreign = ggml.custom(context, F32, 4, 1, 1, 1, None, 0, function, -1, None)
    plain = ggml.tensor(context, F32, 4, 1, 1)
    for other in (foreign, plain):
        assert not ggml.is_score(other) and not ggml.is_work(other)


class RegInterface(ctypes.Structure):
    """struct ggml_backend_reg of ggml-backend-impl.h."""

    _fields_ = (
        ("api_version", ctypes.c_int),
        ("get_name", POINTER),
        ("others", POINTER * 3),
        ("context", POINTER),
    )


class Device(ctypes.Structure):
    """struct ggml_backend_device of ggml-backend-impl.h."""

    _fields_ = (
        ("before", POINTER * 9),
        ("supports_op", POINTER),
        ("others", POINTER * 5),
        ("reg", POINTER),
        ("context", POINTER),
    )


def test_devices_that_claim_every_op_are_refused(ggml, context) -> None:
    node = score_node(ggml, context, Q, K[:, :100])
    assert ggml.supported(ggml.device(ggml.cpu_reg(), 0), node)
    supports_op = ctypes.CFUNCTYPE(ctypes.c_bool, POINTER, POINTER)(lambda *_: True)
    for name, expected in ((b"RPC", False), (b"Vulkan", False), (b"CUDA", True), (b"MTL", True)):
        text = ctypes.create_string_buffer(name)
        get_name = ctypes.CFUNCTYPE(POINTER, POINTER)(lambda _, t=text: ctypes.addressof(t))
        reg = RegInterface(get_name=ctypes.cast(get_name, POINTER))
        device = Device(supports_op=ctypes.cast(supports_op, POINTER), reg=ctypes.addressof(reg))
        assert ggml.supported(ctypes.addressof(device), node) == expected, name
    several = Device(supports_op=ctypes.cast(supports_op, POINTER), reg=None)
    assert not ggml.supported(ctypes.addressof(several), node)
