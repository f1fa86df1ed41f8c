"""The one tolerance table, and the comparison that uses it.

NMSE = sum((actual - expected)^2) / sum(expected^2), with the float64 reference as expected. K is
read from the same bytes on both sides: what is left is how the queries enter the dot product.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

import device

# keyed by what K is stored in and what scored it: a backend's fused kernel ("cpu", "cuda",
# "metal"), or the graph of existing operations on it ("cpu-composed")
SCORE_NMSE: dict[tuple[str, str], float] = {
    # upstream's default for F32 operators; the fused kernel converts K to F32 whatever it is
    ("f32", "cpu"): 1e-7,
    ("f16", "cpu"): 1e-7,
    ("bf16", "cpu"): 1e-7,
    ("q8_0", "cpu"): 1e-7,
    ("q4_0", "cpu"): 1e-7,
    ("q4_1", "cpu"): 1e-7,
    ("q5_0", "cpu"): 1e-7,
    ("q5_1", "cpu"): 1e-7,
    # on the emulator, whose arithmetic is F32 throughout: 9e-13 at most
    ("f32", "metal"): 1e-10,
    ("f16", "metal"): 1e-10,
    ("bf16", "metal"): 1e-10,
    ("q8_0", "metal"): 1e-10,
    ("q4_0", "metal"): 1e-10,
    ("q4_1", "metal"): 1e-10,
    ("q5_0", "metal"): 1e-10,
    ("q5_1", "metal"): 1e-10,
    # two F16 or BF16 numbers for each query element, sums in F32; on the emulator at most 6e-12
    ("f32", "cuda"): 1e-7,
    ("f16", "cuda"): 1e-7,
    ("bf16", "cuda"): 1e-7,
    # K is rounded once more, to F16; on the emulator at most 7e-8
    ("q8_0", "cuda"): 1e-6,
    ("q4_0", "cuda"): 1e-6,
    ("q4_1", "cuda"): 1e-6,
    ("q5_0", "cuda"): 1e-6,
    ("q5_1", "cuda"): 1e-6,
    # mul_mat rounds the queries to the type that K's dot product wants. Rounding them so in the
    # reference alone (logits with a standard deviation of 2) gives the error named with each type.
    ("f32", "cpu-composed"): 1e-7,
    ("f16", "cpu-composed"): 1e-6,  # F16: 1.4e-7
    ("bf16", "cpu-composed"): 5e-5,  # BF16: 1.9e-5
    # Q8 blocks: 2.0e-4; upstream allows 5e-4 for FLASH_ATTN_EXT
    ("q8_0", "cpu-composed"): 5e-4,
    ("q4_0", "cpu-composed"): 5e-4,
    ("q4_1", "cpu-composed"): 5e-4,
    ("q5_0", "cpu-composed"): 5e-4,
    ("q5_1", "cpu-composed"): 5e-4,
}
# other devices round at least as much in mul_mat; upstream's bar for FLASH_ATTN_EXT
for _name in ("cuda", "vulkan", "metal"):
    for _type_k, _backend in list(SCORE_NMSE):
        if _backend == "cpu":
            SCORE_NMSE[_type_k, f"{_name}-composed"] = 5e-4

# logits of a tiny model of two layers (F32 weights) against the numpy model, by what K or V is
# stored in. Measured on the unpatched build, K and V of the same type, FA on except for F32:
LOGITS_NMSE: dict[str, float] = {
    "f32": 1e-9,  # 9.5e-12, summation order
    "f16": 1e-5,  # 4.0e-8 with FA off
    "bf16": 5e-5,  # 3.7e-6
    "q8_0": 5e-4,  # 3.3e-5
    "q5_1": 2e-2,  # 5.7e-4
    "q5_0": 2e-2,  # 1.7e-3
    "q4_1": 5e-2,  # 3.4e-3
    "q4_0": 5e-2,  # 4.3e-3
}
LOGITS_NMSE_FA = 1e-5  # 1.1e-6 with F32: the CPU's FlashAttention rounds on its way
LOGITS_NMSE_DEVICE = 5e-4  # other devices multiply in F16: upstream's bar for FLASH_ATTN_EXT


# what the rings hold is rounded to F16: a relative error of up to 2^-11
RING_NMSE = 1e-7
# and what is fitted to that, stored as F16: at most 1.7e-6 over the calls of the property tests
VALUE_NMSE = 1e-5


def logits_nmse(type_k: str, type_v: str, flash_attn: bool) -> float:
    """Tolerance of a model's logits with K and V stored in these types."""
    floor = LOGITS_NMSE_FA if flash_attn else 0.0
    floor = floor if device.ON_CPU else LOGITS_NMSE_DEVICE
    return max(LOGITS_NMSE[type_k], LOGITS_NMSE[type_v], floor)


def nmse(actual: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Squared error of actual over the squared norm of expected."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    norm = float(np.square(b).sum())
    error = float(np.square(a - b).sum())
    return error / norm if norm > 0 else (0.0 if error == 0 else np.inf)


def describe(actual: npt.ArrayLike, expected: npt.ArrayLike) -> str:
    """What a failing comparison prints: shape, first 5 pairs, largest error and its index."""
    a, b = np.asarray(actual), np.asarray(expected)
    if a.shape != b.shape:
        return f"shapes differ: actual {a.shape}, expected {b.shape}"
    if a.size == 0:
        return f"shape {a.shape}, empty"
    error = np.abs(a.astype(np.float64) - b.astype(np.float64))
    error = np.where(np.isnan(error), np.inf, error)
    index = tuple(int(i) for i in np.unravel_index(int(error.argmax()), a.shape))
    pairs = ", ".join(
        f"{x} / {y}" for x, y in zip(a.ravel()[:5].tolist(), b.ravel()[:5].tolist(), strict=True)
    )
    return (
        f"shape {a.shape}; first actual / expected: {pairs}; "
        f"max error {error[index]:.6g} at {index}: {a[index]} / {b[index]}"
    )


def assert_nmse(
    actual: npt.ArrayLike, expected: npt.ArrayLike, tolerance: float, what: object = ""
) -> None:
    """Fail with describe() unless shapes agree, all is finite and the NMSE is within tolerance."""
    a, b = np.asarray(actual), np.asarray(expected)
    assert a.shape == b.shape, f"{what}: {describe(a, b)}"
    assert np.isfinite(a).all(), f"{what}: not finite; {describe(a, b)}"
    error = nmse(a, b)
    assert error <= tolerance, f"{what}: NMSE {error:.3g} > {tolerance:.3g}; {describe(a, b)}"


def assert_equal(actual: npt.ArrayLike, expected: npt.ArrayLike, what: object = "") -> None:
    """Fail with describe() unless shape and every element are the same."""
    a, b = np.asarray(actual), np.asarray(expected)
    assert a.shape == b.shape and np.array_equal(a, b), f"{what}: {describe(a, b)}"
