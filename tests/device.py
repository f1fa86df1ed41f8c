"""The device that the tests of evictions run on; scripts/gpu_check.py sets it.

env: LAQ_TEST_DEVICE  as ggml names it (laq-gguf doctor shows the names): CUDA0, Vulkan0; unset: CPU

Mesa's llvmpipe 22.3 takes a reference to every descriptor of a set, also to those that a shader
does not use. ggml-vulkan uses sets again, with descriptors of buffers that were freed since. So a
test may crash in the driver where ggml makes a buffer larger, as for FlashAttention to a longer
text.
"""

from __future__ import annotations

import os
from typing import Any

NAME = os.environ.get("LAQ_TEST_DEVICE", "CPU")
BACKEND = NAME.rstrip("0123456789").lower()
ON_CPU = BACKEND == "cpu"

#: of `Llama`, so that all layers and their cache are on the device
OPTIONS: dict[str, Any] = {} if ON_CPU else {"n_gpu_layers": -1}


#: of cases.KERNELS, those that the device has
KERNELS = ("fused", "composed") if BACKEND in ("cpu", "cuda", "metal") else ("composed",)


def scored_by(kernel: str) -> str:
    """Key of tolerances.SCORE_NMSE for a kernel, fused or composed, on the device."""
    return BACKEND if kernel == "fused" else f"{BACKEND}-composed"
