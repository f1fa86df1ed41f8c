"""The Metal kernel and its host side, built for the emulator and called."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import cases
from emulation.build import ROOT, build
from parity.rows import encode, ggml_type

HERE = Path(__file__).resolve().parent
GGML = ROOT / "native" / "ggml"
SOURCE = GGML / "laq-score.metal"
HOST = GGML / "laq-score-metal.cpp"
MAX_SMEM = 32768  # of a thread group, on every Apple GPU

INSTANCE = re.compile(
    r'^template \[\[host_name\("(\w+)"\)\]\] +kernel kernel_laq_score_t (.+);$', re.M
)


class ScoreArgs(ctypes.Structure):
    """struct score_args of harness.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type_k", "n_embd", "n_q", "n_head", "n_head_kv")),
        ("n_kv", ctypes.c_int32),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_uint64) for name in ("nbq1", "nbq2", "nbk1", "nbk2")),
        *((name, ctypes.c_uint64) for name in ("size_q", "size_k", "seed", "max_smem")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "mask", "sinks")),
    )


def upstream_tree() -> Path:
    """The patched llama.cpp, whose headers the host side includes; skips if it is not there."""
    for name in ("upstream", "llama.cpp"):
        tree = ROOT / "build" / name
        if (tree / "ggml/src/ggml-metal/ggml-metal-device.h").exists():
            return tree
    pytest.skip("needs llama.cpp's headers: scripts/patch.py prepare")


def load(edit: tuple[str, str] | None = None, types: Sequence[str] = cases.K_TYPES) -> ctypes.CDLL:
    """Build the kernel and its host side.

    Args:
        edit: (text, what to put in its place); the text is in one of the two files, once.
        types: of K, that are to be built.
    """
    texts = {path.name: path.read_text(encoding="utf-8") for path in (SOURCE, HOST)}
    if edit is not None:
        assert sum(text.count(edit[0]) for text in texts.values()) == 1, f"once: {edit[0]}"
        texts = {name: text.replace(*edit) for name, text in texts.items()}
    named = INSTANCE.findall(texts[SOURCE.name])
    assert len(named) == 2 * len(cases.K_TYPES)
    texts["kernels.inc"] = "".join(
        f'KERNEL("{name}", {instance})\n'
        for name, instance in named
        if name.endswith(tuple(f"_{kind}" for kind in types))
    )
    # two things that no macro can turn into C++: named instantiations (the table has them instead),
    # and an attribute with the name of an address space
    plain = INSTANCE.sub("", texts[SOURCE.name])
    texts[SOURCE.name] = plain.replace("[[threadgroup(0)]]", "")
    tree = upstream_tree() / "ggml"
    include = (HERE, tree / "include", tree / "src", tree / "src/ggml-metal", GGML)
    return build(
        [HERE / "kernels.cpp", Path(HOST.name)],
        fixed=[HERE / "harness.cpp"],
        read=[
            *(HERE / name for name in ("metal_stdlib", "kernels.h")),
            *(GGML / name for name in ("laq-metal.h", "laq-score.h", "laq-score-impl.h")),
        ],
        texts=texts,
        flags=[
            "-Wno-attributes",
            "-Wno-unknown-pragmas",
            "-Wno-unused-function",
            "-ffp-contract=off",
            *(f"-I{folder}" for folder in include),
        ],
    )


class Refused(Exception):
    """The backend says that it has no kernel for this."""


class Failed(Exception):
    """The emulator found a fault."""


def score(
    library: ctypes.CDLL,
    case: cases.ScoreCase,
    inputs: cases.ScoreInputs,
    *,
    seed: int = 0,
    q: npt.NDArray[np.float32] | None = None,
    k_bytes: npt.NDArray[np.uint8] | None = None,
    **changes: int,
) -> npt.NDArray[np.float32]:
    """Scores of a case.

    Args:
        library: from `load`.
        case: the shape.
        inputs: what attention_scores gets.
        seed: order of the threads; 0: that of their indices.
        q: memory of the queries, if it is not inputs.q.
        k_bytes: memory of the keys, if it is not inputs.k encoded.
        changes: fields of struct score_args: strides, and sizes that the device has.
    """
    k = encode(inputs.k, case.type_k)[0] if k_bytes is None else k_bytes
    floats = [inputs.q if q is None else q, inputs.mask, inputs.sinks]
    q_, mask, sinks = (None if x is None else np.ascontiguousarray(x, np.float32) for x in floats)
    head = encode(inputs.k[:1, :1], case.type_k)[0].size
    fields = {
        "type_k": ggml_type(case.type_k), "n_embd": case.d, "n_q": case.n_queries,
        "n_head": case.n_head, "n_head_kv": case.n_head_kv, "n_kv": case.n_kv,
        "nbq1": 4 * case.d, "nbq2": 4 * case.d * case.n_queries,
        "nbk1": head * case.n_head_kv, "nbk2": head,
        "size_q": q_.nbytes, "size_k": k.nbytes, "seed": seed, "max_smem": MAX_SMEM,
    } | changes  # fmt: skip
    args = ScoreArgs(scale=case.scale, softcap=case.softcap, **fields)
    args.q, args.k = q_.ctypes.data, k.ctypes.data
    args.mask = None if mask is None else mask.ctypes.data
    args.sinks = None if sinks is None else sinks.ctypes.data
    dst = np.full((case.n_head_kv, case.n_kv), np.nan, np.float32)
    message = ctypes.create_string_buffer(4096)
    out = dst.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    status = library.laq_emulate(ctypes.byref(args), out, message, ctypes.c_size_t(4096))
    if status == 1:
        raise Refused
    if status != 0:
        raise Failed(message.value.decode())
    return dst
