"""The native score op equals numpy's, for every case of the table, kernel and thread count."""

import numpy as np
import pytest

import cases
import device
from parity.rows import encode, ggml_type
from tolerances import SCORE_NMSE, assert_nmse

CANARY = np.float32(-12345.5)


def native_scores(native, case, inputs, k_bytes, *, kernel="auto", n_threads=1, **changes):
    """(status, scores) of laq_score; changes override fields of struct laq_score_args."""
    ffi, lib = native.ffi, native.lib

    def floats(array):
        if array is None:
            return ffi.NULL
        return ffi.from_buffer("float[]", np.ascontiguousarray(array, np.float32))

    name = ffi.new("char[]", device.NAME.encode())
    fields = {
        "size": ffi.sizeof("struct laq_score_args"),
        "type_k": ggml_type(case.type_k),
        "n_embd_head": case.d,
        "n_queries": case.n_queries,
        "n_head": case.n_head,
        "n_head_kv": case.n_head_kv,
        "n_kv": case.n_kv,
        "score_kernel": getattr(lib, f"LAQ_SCORE_KERNEL_{kernel.upper()}"),
        "n_threads": n_threads,
        "scale": case.scale,
        "softcap": case.softcap,
        "q": floats(inputs.q),
        "k": ffi.from_buffer("uint8_t[]", k_bytes),
        "mask": floats(inputs.mask),
        "sinks": floats(inputs.sinks),
        "device": name,
        **changes,
    }
    args = ffi.new("struct laq_score_args *", fields)
    dst = np.full(case.n_head_kv * case.n_kv + 16, CANARY, np.float32)
    status = lib.laq_score(args, ffi.from_buffer("float[]", dst, require_writable=True))
    assert (dst[case.n_head_kv * case.n_kv :] == CANARY).all(), "laq_score wrote past dst"
    return status, dst[: case.n_head_kv * case.n_kv].reshape(case.n_head_kv, case.n_kv)


@pytest.mark.parametrize("case", cases.SCORE_CASES, ids=str)
def test_scores(native, case) -> None:
    inputs = cases.score_inputs(case)
    k_bytes, k = encode(inputs.k, case.type_k)
    expected = cases.expected_scores(case, inputs, k)
    for kernel in device.KERNELS:
        for n_threads in cases.N_THREADS:
            status, actual = native_scores(
                native, case, inputs, k_bytes, kernel=kernel, n_threads=n_threads
            )
            what = f"{case} {kernel} {n_threads} threads"
            message = native.ffi.string(native.lib.laq_last_error()).decode()
            assert status == native.lib.LAQ_STATUS_OK, f"{what}: {message}"
            tolerance = SCORE_NMSE[case.type_k, device.scored_by(kernel)]
            assert_nmse(actual, expected, tolerance, what)


PLAIN = cases.ScoreCase("f32", 4, 64, 8, 300, "causal", 0.0, False)


def test_threads_do_not_change_a_bit(native) -> None:
    # a KV head belongs to one thread, or partial sums are added in a fixed order
    inputs = cases.score_inputs(PLAIN)
    k_bytes, _ = encode(inputs.k, "f32")
    runs = [native_scores(native, PLAIN, inputs, k_bytes, kernel="fused")[1] for _ in range(3)]
    assert (runs[0] == runs[1]).all() and (runs[0] == runs[2]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 0},
        {"type_k": 9999},
        {"type_k": -1},
        {"type_k": ggml_type("q4_k")},
        {"n_embd_head": 0},
        {"n_queries": 0},
        {"n_head": 5},
        {"n_head_kv": 0},
        {"n_kv": 0},
        {"score_kernel": 77},
        {"n_threads": -1},
        {"device": "none of them"},
        {"softcap": -1.0},
        {"scale": float("nan")},
        {"q": None},
        {"k": None},
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_wrong_arguments_are_refused(native, changes) -> None:
    inputs = cases.score_inputs(PLAIN)
    k_bytes, _ = encode(inputs.k, "f32")
    changes = {k: native.ffi.NULL if v is None else v for k, v in changes.items()}
    if "device" in changes:
        changes["device"] = native.ffi.new("char[]", changes["device"].encode())
    status, _ = native_scores(native, PLAIN, inputs, k_bytes, **changes)
    assert status == native.lib.LAQ_STATUS_INVALID_ARGUMENT
    assert native.ffi.string(native.lib.laq_last_error())
    # and the library works on
    status, _ = native_scores(native, PLAIN, inputs, k_bytes)
    assert status == native.lib.LAQ_STATUS_OK


@pytest.mark.parametrize("type_k", sorted(cases.BLOCK_TYPES))
def test_rows_of_broken_blocks_are_refused(native, type_k) -> None:
    case = cases.ScoreCase(type_k, 1, 80, 1, 7, "none", 0.0, False)
    inputs = cases.score_inputs(case)
    k_bytes = np.zeros(inputs.k.size * 4, np.uint8)
    status, _ = native_scores(native, case, inputs, k_bytes)
    assert status == native.lib.LAQ_STATUS_INVALID_ARGUMENT
