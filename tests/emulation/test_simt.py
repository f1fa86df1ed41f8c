"""The emulator: what it computes, and that it reports what would hang or race on a device."""

import ctypes

import numpy as np
import pytest

from emulation.build import HERE, build

N_THREADS = 48  # a SIMD group and a half


@pytest.fixture(scope="module")
def run():
    library = build([HERE / "simt_kernels.cpp"])

    def run(name, n_groups=1, n_threads=N_THREADS, seed=0):
        out = np.full(4 * n_groups * n_threads, -1, np.float32)
        message = ctypes.create_string_buffer(2048)
        failed = library.simt_run(
            name.encode(), n_groups, n_threads, ctypes.c_uint64(seed),
            out.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), message, ctypes.c_size_t(2048),
        )  # fmt: skip
        if failed:
            raise RuntimeError(message.value.decode())
        return out

    return run


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_barrier(run, seed) -> None:
    out = run("reversed", n_groups=3, seed=seed)[: 3 * N_THREADS].reshape(3, N_THREADS)
    assert (out == np.arange(N_THREADS)[::-1]).all()


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_missing_barrier_shows(run, seed) -> None:
    # group memory starts as NaNs
    out = run("no barrier", seed=seed)[:N_THREADS]
    assert np.isnan(out).any()


@pytest.mark.parametrize("seed", (0, 1))
def test_lanes(run, seed) -> None:
    out = run("lanes", seed=seed).reshape(N_THREADS, 4)
    index = np.arange(N_THREADS)
    simd = index // 32
    assert (out[:, 0] == np.where(simd == 0, 496, 632)).all()
    assert (out[:, 1] == -32 * simd).all()
    assert (out[:, 2] == simd).all()
    assert (out[:, 3] == (index ^ 1)).all()


@pytest.mark.parametrize("seed", (0, 1))
def test_masks(run, seed) -> None:
    out = run("halves", n_threads=32, seed=seed)[:32]
    assert (out[:16] == 120).all() and (out[16:] == 376).all()


@pytest.mark.parametrize(
    "name, message",
    {
        "different barriers": "while others wait at the group barrier",
        "different sums": "threads wait for each other in different places",
        "sum and barrier": "threads wait for each other in different places",
        "leaves before a barrier": "left",
        "leaves before a sum": "left",
        "not in its mask": "without being in its mask",
        "absent lane": "a lane that does not take part",
        "past its memory": "a group wrote past its memory",
        "no such kernel": "unknown kernel",
    }.items(),
)
@pytest.mark.parametrize("seed", (0, 1, 2))
def test_faults_are_reported(run, name, message, seed) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(name, n_threads=64, seed=seed)
    # and the next kernel runs
    assert (run("reversed", seed=seed)[:N_THREADS] == np.arange(N_THREADS)[::-1]).all()
