"""Rows of a ggml type, by the gguf package: native code and reference see the same bytes."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt


def ggml_type(name: str) -> int:
    """Number of a ggml type by its lower-case name."""
    return int(gguf.GGMLQuantizationType[name.upper()])


def encode(
    values: npt.NDArray[np.float32], type_name: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Store values (..., d) as rows of a type: (the bytes, what they say as float32)."""
    kind = gguf.GGMLQuantizationType[type_name.upper()]
    flat = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    stored = gguf.quants.quantize(flat, kind)
    read = gguf.quants.dequantize(stored, kind).astype(np.float32)
    raw = np.ascontiguousarray(stored).view(np.uint8).reshape(-1)
    return raw, read.reshape(values.shape)
