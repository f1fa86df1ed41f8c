"""What a GGUF file says about its KV cache, read before a context is made.

Only libggml-base is loaded, by ctypes: no backend starts, no tensor is read.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._lib import _find, library_dir
from .errors import LaqArgumentError, LaqLibraryError, LaqModelError

GGML_TYPE_F16 = 1
GGML_TYPE_COUNT = 43  # of the pinned llama.cpp; ggml reads past its table for a number beyond
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS: llama.cpp loads no model with more

# enum gguf_type: the name in gguf_get_val_*, and the C type
_SCALARS: dict[int, tuple[str, Any]] = {
    0: ("u8", ctypes.c_uint8),
    1: ("i8", ctypes.c_int8),
    2: ("u16", ctypes.c_uint16),
    3: ("i16", ctypes.c_int16),
    4: ("u32", ctypes.c_uint32),
    5: ("i32", ctypes.c_int32),
    6: ("f32", ctypes.c_float),
    7: ("bool", ctypes.c_bool),
    10: ("u64", ctypes.c_uint64),
    11: ("i64", ctypes.c_int64),
    12: ("f64", ctypes.c_double),
}
_STRING, _ARRAY = 8, 9
_LOG_LEVEL_ERROR = 4
_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


class _InitParams(ctypes.Structure):
    """struct gguf_init_params"""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


@functools.cache
def _load(path: Path) -> Any:
    """libggml-base with the functions used here declared; the same file as llama_cpp's own."""
    lib = ctypes.CDLL(str(path))
    ptr, key_id = ctypes.c_void_p, ctypes.c_int64
    functions: dict[str, tuple[Any, list[Any]]] = {
        "gguf_init_from_file": (ptr, [ctypes.c_char_p, _InitParams]),
        "gguf_free": (None, [ptr]),
        "gguf_find_key": (key_id, [ptr, ctypes.c_char_p]),
        "gguf_get_kv_type": (ctypes.c_int, [ptr, key_id]),
        "gguf_get_arr_type": (ctypes.c_int, [ptr, key_id]),
        "gguf_get_arr_n": (ctypes.c_size_t, [ptr, key_id]),
        "gguf_get_arr_data": (ptr, [ptr, key_id]),
        "gguf_get_val_str": (ctypes.c_char_p, [ptr, key_id]),
        "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
        "ggml_blck_size": (ctypes.c_int64, [ctypes.c_int]),
        "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
        "ggml_log_get": (None, [ctypes.POINTER(ptr), ctypes.POINTER(ptr)]),
        "ggml_log_set": (None, [ptr, ptr]),
    }
    for name, ctype in _SCALARS.values():
        functions[f"gguf_get_val_{name}"] = (ctype, [ptr, key_id])
    for name, (restype, argtypes) in functions.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = restype, argtypes
    return lib


def _ggml() -> Any:
    path = _find(library_dir(), "ggml-base")
    if path is None:
        raise LaqLibraryError(
            f"no libggml-base in {library_dir()}: install the package (pip install .), or set "
            "LAQ_LIB_PATH to the folder of a build"
        )
    return _load(path)


@contextmanager
def _logged_errors(ggml: Any) -> Iterator[list[str]]:
    """Collect ggml's error lines inside the block; other lines go where they went before."""
    previous, user_data = ctypes.c_void_p(), ctypes.c_void_p()
    ggml.ggml_log_get(ctypes.byref(previous), ctypes.byref(user_data))
    forward = _LOG_CALLBACK(previous.value) if previous.value else None
    lines: list[str] = []

    @_LOG_CALLBACK
    def collect(level: int, text: bytes, _: Any) -> None:
        if level == _LOG_LEVEL_ERROR:
            # ggml begins a line with the name of its function
            lines.append(re.sub(r"^\w+: ", "", text.decode("utf-8", "replace").strip()))
        elif forward is not None:
            forward(level, text, user_data)

    ggml.ggml_log_set(ctypes.cast(collect, ctypes.c_void_p), None)
    try:
        yield lines
    finally:
        ggml.ggml_log_set(previous, user_data)


class _Metadata:
    """The key-value pairs of an open GGUF file."""

    def __init__(self, ggml: Any, context: int, path: str) -> None:
        self._ggml, self._context, self._path = ggml, context, path

    def get(self, key: str) -> Any:
        """Value of a key: a number, bool, str or tuple of numbers; None where it is missing.

        Raises:
            LaqModelError: the value is an array of strings.
        """
        ggml, context = self._ggml, self._context
        key_id = ggml.gguf_find_key(context, key.encode())
        if key_id < 0:
            return None
        kind = ggml.gguf_get_kv_type(context, key_id)
        if kind == _STRING:
            return ggml.gguf_get_val_str(context, key_id).decode("utf-8", "replace")
        if kind != _ARRAY:
            return getattr(ggml, f"gguf_get_val_{_SCALARS[kind][0]}")(context, key_id)
        kind = ggml.gguf_get_arr_type(context, key_id)
        if kind not in _SCALARS:
            raise self.error(f"{key} is an array of strings, not of numbers")
        n = ggml.gguf_get_arr_n(context, key_id)
        if n == 0:
            return ()
        return tuple((_SCALARS[kind][1] * n).from_address(ggml.gguf_get_arr_data(context, key_id)))

    def integer(
        self, key: str, default: int | None = None, low: int = 0, high: int = 2**31 - 1
    ) -> int:
        """An integer from `low` to `high`.

        Raises:
            LaqModelError: it is missing and there is no default, or it is something else.
        """
        value = self.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(f"{key} is missing")
        if not _is_count(value, low, high):
            raise self.error(f"{key} is {value!r}, not an integer from {low} to {high}")
        return int(value)

    def integers(self, key: str, n: int, default: tuple[int, ...]) -> tuple[int, ...]:
        """One integer for each of n layers; a single one in the file holds for all.

        Raises:
            LaqModelError: the value is something else, or the array has another length.
        """
        value = self.get(key)
        if value is None:
            return default
        values = value if isinstance(value, tuple) else (value,) * n
        if not all(_is_count(v, 0, 2**31 - 1) for v in values):
            raise self.error(f"{key} is {value!r}, not integers of at least 0")
        if len(values) != n:
            raise self.error(f"{key} has {len(values)} values for {n} layers")
        return values

    def error(self, reason: str) -> LaqModelError:
        return LaqModelError(f"model_path: {self._path}: {reason}")


def _is_count(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


@contextmanager
def _open(path: str) -> Iterator[_Metadata]:
    ggml = _ggml()
    with _logged_errors(ggml) as lines:
        context = ggml.gguf_init_from_file(os.fsencode(path), _InitParams(no_alloc=True))
    if not context:
        reason = "; ".join(dict.fromkeys(lines)) or "ggml gave no reason"
        raise LaqModelError(f"model_path: {path} cannot be read: {reason}")
    try:
        yield _Metadata(ggml, context, path)
    finally:
        ggml.gguf_free(context)


@dataclass(frozen=True)
class RopeScaling:
    """How the model's positions are scaled beyond the length it was first trained on.

    Attributes:
        kind: "none", "linear", "yarn" or "longrope", as the file has it.
        factor: how many times longer; 1.0 = not.
        n_ctx_orig: length before scaling. Where the model has long and short factors, llama.cpp
            takes the long ones for an n_ctx above this.
    """

    kind: str
    factor: float
    n_ctx_orig: int


@dataclass(frozen=True)
class ModelShape:
    """What decides how large a KV cache is.

    Attributes:
        architecture: general.architecture.
        n_layer: layers that have a KV cache in a plain model.
        n_head_kv: KV heads of each layer; 0 = a layer without attention.
        n_embd_head_k: values in a head of K.
        n_embd_head_v: values in a head of V.
        n_ctx_train: tokens that the model was trained for.
        rope_scaling: see there.
    """

    architecture: str
    n_layer: int
    n_head_kv: tuple[int, ...]
    n_embd_head_k: int
    n_embd_head_v: int
    n_ctx_train: int
    rope_scaling: RopeScaling

    def length(self, overrides: Mapping[str, Any] | None = None) -> int:
        """n_ctx_train, or what `kv_overrides` of `Llama` say in its place."""
        return int((overrides or {}).get(f"{self.architecture}.context_length", self.n_ctx_train))

    def bytes_per_cell(
        self, type_k: int | None = None, type_v: int | None = None, flash_attn: bool = True
    ) -> int:
        """Bytes of K and V that one cell takes, over all layers.

        Args:
            type_k: ggml type of K; None = F16, as in llama_cpp.
            type_v: ggml type of V; None = F16.
            flash_attn: without it V is stored transposed, and llama.cpp gives every layer as many
                V heads as the largest has.

        Raises:
            LaqArgumentError: there is no such type, or its blocks do not divide a head.
        """
        ggml = _ggml()
        n_head_v = self.n_head_kv if flash_attn else (max(self.n_head_kv),) * self.n_layer
        total = 0
        for setting, kind, n_embd_head, heads in (
            ("type_k", type_k, self.n_embd_head_k, self.n_head_kv),
            ("type_v", type_v, self.n_embd_head_v, n_head_v),
        ):
            kind = GGML_TYPE_F16 if kind is None else kind
            _check_type(ggml, setting, kind, n_embd_head)
            total += sum(ggml.ggml_row_size(kind, n_embd_head * n_head) for n_head in heads)
        return total


def _check_type(ggml: Any, setting: str, kind: int, n_embd_head: int) -> None:
    block = ggml.ggml_blck_size(kind) if 0 <= kind < GGML_TYPE_COUNT else 0
    if block < 1:  # also that of a type which was removed
        raise LaqArgumentError(f"{setting}={kind} is no ggml type of this llama.cpp")
    if n_embd_head % block:
        name = ggml.ggml_type_name(kind).decode()
        raise LaqArgumentError(
            f"{setting}={kind} ({name}) stores blocks of {block} values, which do not divide the "
            f"model's heads of {n_embd_head}; choose another {setting}"
        )


def _check_split(meta: _Metadata) -> None:
    """The first file of a split model holds the metadata; llama.cpp loads it from there alone."""
    n_split, number = meta.integer("split.count", 0), meta.integer("split.no", 0)
    if n_split > 1 and number > 0:
        raise meta.error(
            f"this is file {number + 1} of {n_split} of a split model; give the first one "
            f"(...-00001-of-{n_split:05d}.gguf)"
        )


def _rope_scaling(meta: _Metadata, arch: str, n_ctx_train: int) -> RopeScaling:
    factor = meta.get(f"{arch}.rope.scaling.factor")
    if factor is None:
        factor = meta.get(f"{arch}.rope.scale_linear")  # the old name
    kind = meta.get(f"{arch}.rope.scaling.type")
    if kind is None:
        kind = "linear" if factor else "none"
    return RopeScaling(
        kind=str(kind),
        factor=float(factor or 1.0),
        n_ctx_orig=meta.integer(f"{arch}.rope.scaling.original_context_length", n_ctx_train),
    )


def read_shape(path: str | os.PathLike[str]) -> ModelShape:
    """Read a model's shape; defaults are those of llama.cpp.

    Args:
        path: the GGUF file, of a split model the first one.

    Raises:
        LaqModelError: the file cannot be read, or does not describe a model.
        LaqLibraryError: libggml-base is missing.
    """
    with _open(os.fspath(path)) as meta:
        _check_split(meta)
        arch = meta.get("general.architecture")
        if not isinstance(arch, str) or not arch:
            raise meta.error("general.architecture is missing: this is no model")
        n_layer_all = meta.integer(f"{arch}.block_count", low=1, high=MAX_LAYERS)
        n_embd = meta.integer(f"{arch}.embedding_length", low=1)
        n_ctx_train = meta.integer(f"{arch}.context_length")
        attention = f"{arch}.attention"
        n_head = meta.integers(f"{attention}.head_count", n_layer_all, (0,) * n_layer_all)
        n_head_kv = meta.integers(f"{attention}.head_count_kv", n_layer_all, n_head)
        n_embd_head = n_embd // n_head[0] if n_head[0] else 0
        # layers that only draft tokens come last and have a cache of their own context
        n_layer = n_layer_all - meta.integer(f"{arch}.nextn_predict_layers", 0)
        if n_layer < 1:
            raise meta.error(f"all of its {n_layer_all} layers are for drafting tokens")
        return ModelShape(
            architecture=arch,
            n_layer=n_layer,
            n_head_kv=n_head_kv[:n_layer],
            n_embd_head_k=meta.integer(f"{attention}.key_length", n_embd_head),
            n_embd_head_v=meta.integer(f"{attention}.value_length", n_embd_head),
            n_ctx_train=n_ctx_train,
            rope_scaling=_rope_scaling(meta, arch, n_ctx_train),
        )
