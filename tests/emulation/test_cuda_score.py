"""The CUDA kernels of the score op, run on the emulator, equal numpy's."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cases
from emulation.build import build
from parity.rows import encode
from tolerances import SCORE_NMSE, assert_nmse

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "native" / "ggml"
CANARY = np.float32(-12345.5)

#: shared memory that a block can have: sm_75; sm_86, sm_89 and sm_120; sm_90
SHARED = {75: 64 << 10, 86: 99 << 10, 90: 227 << 10}


class Args(ctypes.Structure):
    """struct emulate_args."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("type", "sm", "shared", "n_blocks", "seed")),
        *((name, ctypes.c_int32) for name in ("n_embd", "n_q", "n_head", "n_head_kv", "n_kv")),
        ("row_bytes", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("nbq1", "nbq2", "nbk1", "nbk2")),
        *((name, ctypes.c_int64) for name in ("q_bytes", "k_bytes")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "mask", "sinks", "res")),
    ]


@pytest.fixture(scope="module")
def emulator() -> ctypes.CDLL:
    library = build(
        [HERE / "cuda" / "score.cpp"],
        read=[HERE / "cuda" / "device.h", *sorted(KERNELS.glob("*.cuh"))],
        flags=[f"-I{KERNELS}", "-Wno-unknown-pragmas"],
    )
    library.emulate_score.restype = ctypes.c_char_p
    return library


def emulate(emulator, case, inputs, k_bytes, *, sm=90, n_blocks=8, seed=0, pad=0):
    """Scores of the kernels, for a device of `sm` that runs n_blocks blocks at a time.

    The queries lie as the graph has them (permuted); `pad` bytes follow each cell of K.
    """
    # as ggml lays them out: the head changes faster than the query
    q = np.ascontiguousarray(inputs.q.transpose(1, 0, 2), np.float32)
    cells = np.asarray(k_bytes, np.uint8).reshape(case.n_kv, -1)
    k = np.full((case.n_kv, cells.shape[1] + pad), 0xFF, np.uint8)
    k[:, : cells.shape[1]] = cells
    row_bytes = cells.shape[1] // case.n_head_kv
    mask, sinks = (
        None if x is None else np.ascontiguousarray(x, np.float32)
        for x in (inputs.mask, inputs.sinks)
    )
    res = np.full(case.n_head_kv * case.n_kv + 64, CANARY, np.float32)

    def pointer(array):
        return None if array is None else array.ctypes.data

    args = Args(
        cases.K_TYPES.index(case.type_k), sm, SHARED[sm], n_blocks, seed,
        case.d, case.n_queries, case.n_head, case.n_head_kv, case.n_kv, row_bytes,
        case.scale, case.softcap,
        q.strides[0], q.strides[1], k.strides[0], row_bytes, q.nbytes, k.nbytes,
        pointer(q), pointer(k), pointer(mask), pointer(sinks), pointer(res),
    )  # fmt: skip
    problem = emulator.emulate_score(ctypes.byref(args))
    assert problem is None, f"{case}: {problem.decode()}"
    scores, rest = np.split(res, [case.n_head_kv * case.n_kv])
    assert (rest == CANARY).all(), f"{case}: wrote past the result"
    return scores.reshape(case.n_head_kv, case.n_kv)


def check(emulator, case, inputs, tolerance=None, **options) -> None:
    k_bytes, k = encode(inputs.k, case.type_k)
    actual = emulate(emulator, case, inputs, k_bytes, **options)
    expected = cases.expected_scores(case, inputs, k)
    assert_nmse(actual, expected, tolerance or SCORE_NMSE[case.type_k, "cuda"], case)


@pytest.mark.parametrize("case", cases.SCORE_CASES, ids=str)
def test_scores(emulator, case) -> None:
    check(emulator, case, cases.score_inputs(case), seed=1)


Case = cases.ScoreCase
PLAIN = Case("f16", 4, 64, 8, 300, "bias", 0.0, True)

SHAPES = (
    # head sizes that are not whole chunks, and those of MLA
    *(Case("f16", 2, d, 8, 100, "causal", 0.0, False) for d in (16, 96, 112, 192, 576)),
    Case("f16", 48, 576, 1, 70, "causal", 0.0, False),
    Case("bf16", 3, 112, 7, 100, "bias", 0.0, True),
    Case("f32", 2, 576, 8, 40, "causal", 5.0, False),
    Case("q8_0", 2, 576, 8, 40, "causal", 0.0, False),
    # rows: 512; 40 = 5 eighths of a tile; 96 = three tiles of 32; 65 = one too many
    Case("f16", 4, 32, 128, 200, "causal", 0.0, True),
    Case("q4_0", 5, 64, 8, 100, "bias", 0.0, False),
    Case("q5_1", 3, 64, 32, 100, "causal", 0.0, False),
    Case("f32", 5, 32, 13, 100, "bias", 0.0, True),
    # ends of tiles, and of the tiles of a block
    *(Case("f16", 1, 64, 3, n_kv, "bias", 0.0, False) for n_kv in (31, 32, 33, 128, 129)),
)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(emulator, case) -> None:
    check(emulator, case, cases.score_inputs(case), seed=2)


@pytest.mark.parametrize("sm", SHARED)
@pytest.mark.parametrize("type_k", cases.K_TYPES)
def test_devices(emulator, type_k, sm) -> None:
    # 80 rows: the row tile depends on the shared memory; sm_75 has neither BF16 nor the larger mma
    case = Case(type_k, 5, 256, 16, 70, "bias", 0.0, True)
    check(emulator, case, cases.score_inputs(case), sm=sm)


@pytest.mark.parametrize("n_blocks", [1, 3, 1000])
def test_shares_of_the_keys(emulator, n_blocks) -> None:
    # one warp takes many tiles; an odd share; a share for each tile
    check(emulator, replace(PLAIN, n_kv=1100), cases.score_inputs(replace(PLAIN, n_kv=1100)),
          n_blocks=n_blocks)  # fmt: skip


@pytest.mark.parametrize("case", [PLAIN, replace(PLAIN, n_queries=48)], ids=str)
def test_the_order_of_threads_does_not_change_a_bit(emulator, case) -> None:
    inputs = cases.score_inputs(case)
    k_bytes, _ = encode(inputs.k, case.type_k)
    first, *others = (emulate(emulator, case, inputs, k_bytes, seed=seed) for seed in (0, 5, 6))
    assert all((first == other).all() for other in others)


def test_queries_and_keys_that_are_hidden(emulator) -> None:
    case = replace(PLAIN, n_kv=200)
    inputs = cases.score_inputs(case)
    mask = np.zeros((case.n_queries, case.n_kv), np.float32)
    mask[3] = -np.inf  # a query that sees nothing
    mask[:, 32:96] = -np.inf  # two tiles that no query sees
    mask[:, 180:] = -np.inf
    for sinks in (inputs.sinks, None):
        hidden = replace(inputs, mask=mask, sinks=sinks)
        check(emulator, case, hidden)
        k_bytes, k = encode(hidden.k, case.type_k)
        # nobody looks at them: they may hold anything
        k_bytes.reshape(case.n_kv, -1)[32:96] = 0xFF
        scores = emulate(emulator, case, hidden, k_bytes)
        expected = cases.expected_scores(case, hidden, k)
        assert_nmse(scores, expected, SCORE_NMSE["f16", "cuda"])
        assert (scores[:, 32:96] == 0).all() and (scores[:, 180:] == 0).all()
    nothing = replace(inputs, mask=np.full_like(mask, -np.inf), sinks=None)
    assert (emulate(emulator, case, nothing, k_bytes) == 0).all()


@pytest.mark.parametrize("type_k", ["f32", "f16", "bf16", "q8_0"])
def test_cells_may_be_wider_than_the_heads(emulator, type_k) -> None:
    case = replace(PLAIN, type_k=type_k)
    check(emulator, case, cases.score_inputs(case), pad=48 if type_k != "q8_0" else 34)


@pytest.mark.parametrize("type_k", ["f32", "f16", "bf16"])
def test_queries_keep_their_bits(emulator, type_k) -> None:
    # logits with a standard deviation of 12: queries rounded to F16 once would have an NMSE of 2e-7
    case = replace(PLAIN, type_k=type_k, d=128)
    inputs = cases.score_inputs(case)
    check(emulator, case, replace(inputs, q=inputs.q * np.float32(8)), 1e-9)


def test_bf16_keys_beyond_the_range_of_f16(emulator) -> None:
    case = replace(PLAIN, type_k="bf16")
    inputs = cases.score_inputs(case)
    big = np.float32(2.0**20)
    for sm in SHARED:
        check(emulator, case, replace(inputs, q=inputs.q / big, k=inputs.k * big), sm=sm)


def test_what_does_not_fit_is_refused(emulator) -> None:
    case = replace(PLAIN, d=2048)
    inputs = cases.score_inputs(case)
    k_bytes, _ = encode(inputs.k, case.type_k)
    with pytest.raises(AssertionError, match="do not fit into shared memory"):
        emulate(emulator, case, inputs, k_bytes, sm=75)
