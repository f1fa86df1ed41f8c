"""Find the patched libllama, make llama_cpp load it, and reach laq.h in the same file by cffi.

env: LAQ_LIB_PATH       folder of the built libraries, for developers; default: laq_gguf/lib
env: LLAMA_CPP_LIB_PATH read by llama_cpp when it is imported; set here
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._version import LLAMA_CPP_PYTHON_VERSION
from .errors import CLOSED, LaqLibraryError, LaqStateError, native_error
from .stats import KvStats

SEQ_ID = 0  # llama_cpp.Llama has one sequence


def library_dir() -> Path:
    """The folder that holds, or should hold, libllama and the ggml libraries."""
    override = os.environ.get("LAQ_LIB_PATH")
    return Path(override) if override else Path(__file__).resolve().parent / "lib"


def _find(folder: Path, base: str) -> Path | None:
    # the names and the order in which llama_cpp looks
    names = {"darwin": [f"lib{base}.so", f"lib{base}.dylib"], "win32": [f"{base}.dll"]}
    for name in names.get(sys.platform, [f"lib{base}.so"]):
        if (folder / name).exists():
            return folder / name
    return None


def select_library() -> Path | None:
    """Tell llama_cpp which library to load; no native code runs.

    Returns:
        The path of libllama, or None where there is none (`load` explains it).
    """
    path = _find(library_dir(), "llama")
    if path is not None and "llama_cpp" not in sys.modules:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(path.parent)
        if _find(path.parent, "mtmd") is not None:
            os.environ.setdefault("MTMD_CPP_LIB", str(path.parent))
    return path


@dataclass(frozen=True)
class Native:
    """The loaded library.

    Attributes:
        path: the file of libllama that llama_cpp and cffi share.
        ffi: cffi's FFI with the declarations of laq.h, and of laq-test.h for tests and benchmarks.
        lib: the functions of both.
    """

    path: Path
    ffi: Any
    lib: Any

    def text(self, chars: Any) -> str:
        """A `const char *` as a string."""
        return self.ffi.string(chars).decode("utf-8", "replace")

    def build_info(self) -> dict[str, str]:
        """`laq_build_info()` as a dict."""
        text = self.text(self.lib.laq_build_info())
        return dict(pair.partition("=")[::2] for pair in text.split())

    def last_error(self) -> str:
        """`laq_last_error()` of this thread."""
        return self.text(self.lib.laq_last_error())

    def has_kernel(self, i_device: int, type_k: int, n_embd_head: int) -> bool:
        """Whether a device of `devices` has the fused score kernel for keys of a `ggml_type`."""
        return bool(self.lib.laq_device_has_kernel(i_device, type_k, n_embd_head))

    def check(self, function: str, status: int) -> None:
        """Raise for a `laq_status` other than OK.

        Raises:
            LaqNativeError: with the message of `laq_last_error()`.
        """
        if status != self.lib.LAQ_STATUS_OK:
            message = self.last_error()
            name = self.text(self.lib.laq_status_str(status))
            raise native_error(function, status, name, message)


def _import_llama_cpp(path: Path) -> Any:
    """Import llama_cpp and make sure that it loaded `path`."""
    imported_before = "llama_cpp" in sys.modules
    try:
        llama_cpp = importlib.import_module("llama_cpp")
        loaded = Path(importlib.import_module("llama_cpp.llama_cpp")._lib._name)
    except ModuleNotFoundError as error:
        raise LaqLibraryError(
            f"llama-cpp-python is not installed ({error}): "
            f"CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install llama-cpp-python=={LLAMA_CPP_PYTHON_VERSION}"
        ) from error
    except (FileNotFoundError, RuntimeError) as error:
        raise LaqLibraryError(f"llama_cpp could not load {path}: {error}") from error
    if not loaded.exists() or not os.path.samefile(loaded, path):
        when = "was imported before laq_gguf and " if imported_before else ""
        raise LaqLibraryError(
            f"llama_cpp {when}loaded {loaded}, but laq_gguf needs {path}: one process can hold one "
            "of them; import laq_gguf before llama_cpp"
        )
    if llama_cpp.__version__ != LLAMA_CPP_PYTHON_VERSION:
        raise LaqLibraryError(
            f"llama-cpp-python {llama_cpp.__version__} is installed, but laq_gguf is built for "
            f"{LLAMA_CPP_PYTHON_VERSION}: CMAKE_ARGS=-DLLAMA_BUILD=OFF pip install "
            f"llama-cpp-python=={LLAMA_CPP_PYTHON_VERSION}"
        )
    return llama_cpp


@functools.cache
def load() -> Native:
    """Load libllama once, for llama_cpp and for laq.h, and check that all parts fit together.

    Raises:
        LaqLibraryError: no library, another one is loaded already, or versions differ.
    """
    path = select_library()
    if path is None:
        raise LaqLibraryError(
            f"no libllama in {library_dir()}: install the package (pip install .), or set "
            "LAQ_LIB_PATH to the folder of a build"
        )
    _import_llama_cpp(path)
    try:
        ffi = importlib.import_module("laq_gguf._laq_cffi").ffi
    except ModuleNotFoundError as error:
        raise LaqLibraryError(
            f"the cffi binding cannot be imported ({error}): install the package, or in a "
            "checkout run python laq_gguf/_cffi_build.py --header native/include/laq.h "
            "native/include/laq-test.h --output laq_gguf/_laq_cffi.py"
        ) from error
    lib = ffi.dlopen(str(path))
    try:
        version = lib.laq_abi_version()
    except (AttributeError, ffi.error) as error:
        raise LaqLibraryError(
            f"{path} is a plain llama.cpp without the functions of laq.h; set LAQ_LIB_PATH to a "
            "build of the patched one"
        ) from error
    if version != lib.LAQ_ABI_VERSION:
        raise LaqLibraryError(
            f"{path} has version {version} of laq.h, the binding {lib.LAQ_ABI_VERSION}: build and "
            "install them together (pip install .)"
        )
    sizes = (lib.laq_default_params().size, ffi.sizeof("struct laq_params"))
    if sizes[0] != sizes[1]:
        raise LaqLibraryError(
            f"struct laq_params has {sizes[0]} bytes in {path}, {sizes[1]} in the binding: build "
            "and install them together (pip install .)"
        )
    return Native(path=path, ffi=ffi, lib=lib)


class Attachment:
    """A `struct laq_context *` and its context. Must be closed before the context is freed."""

    def __init__(self, native: Native, ctx: int, params: Any) -> None:
        """Attach to a context.

        Args:
            native: from `load`.
            ctx: address of the `llama_context`.
            params: `struct laq_params *`.

        Raises:
            LaqNativeError: the model or the settings are refused; the context is as before.
        """
        self._native = native
        self._laq: Any = None
        out = native.ffi.new("struct laq_context **")
        ptr = native.ffi.cast("struct llama_context *", ctx)
        native.check("laq_attach", native.lib.laq_attach(ptr, params, out))
        self._laq = out[0]

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._laq is None

    def close(self) -> None:
        """Detach. Safe to call twice."""
        laq, self._laq = self._laq, None
        if laq is not None:
            self._native.lib.laq_detach(laq)

    def _call(self, function: str, *args: Any) -> None:
        self._call_any(function, SEQ_ID, *args)

    def _call_any(self, function: str, *args: Any) -> None:
        if self._laq is None:
            raise LaqStateError(CLOSED)
        self._native.check(function, getattr(self._native.lib, function)(self._laq, *args))

    def prompt_next(self, tokens: npt.NDArray[np.int32]) -> int:
        """Make room for the next tokens of a prompt; how many of them to decode in one batch.

        Args:
            tokens: (n_left,) all that is left of the prompt.
        """
        n_chunk = self._native.ffi.new("uint32_t *")
        src = self._native.ffi.from_buffer("int32_t[]", np.ascontiguousarray(tokens, np.int32))
        self._call("laq_prompt_next", src, len(tokens), n_chunk)
        return int(n_chunk[0])

    def prompt_end(self) -> None:
        """The prompt ends with the last token decoded: evict, or wait for the lookahead queries."""
        self._call("laq_prompt_end")

    def flush(self) -> None:
        """Carry out an eviction that waits, with the lookahead queries there are."""
        self._call("laq_flush")

    def set_params(self, params: Any) -> None:
        """Other settings from now on: `struct laq_params *`."""
        self._call_any("laq_set_params", params)

    def recall(self) -> None:
        """Choose from archived and resident tokens together."""
        self._call("laq_recall")

    @contextmanager
    def without_archive(self) -> Iterator[None]:
        """States that are saved inside the block do not carry the archive."""
        save = self._native.lib.laq_save_archive
        self._native.check("laq_save_archive", save(self._laq, False))
        try:
            yield
        finally:
            self._native.check("laq_save_archive", save(self._laq, True))

    def park(self) -> Any:
        """The sequence leaves the cells: `struct laq_parked *`, of the native side."""
        out = self._native.ffi.new("struct laq_parked **")
        self._call("laq_park", out)
        return out[0]

    def resume(self, parked: Any) -> None:
        """It comes back into a sequence without tokens, and is no longer parked."""
        self._call("laq_resume", parked)

    def forget(self, parked: Any) -> None:
        """It is dropped."""
        self._call_any("laq_forget", parked)

    def parked_info(self, parked: Any) -> Any:
        """`struct laq_parked_info` of it."""
        info = self._native.ffi.new("struct laq_parked_info *")
        info.size = self._native.ffi.sizeof("struct laq_parked_info")
        self._call_any("laq_get_parked", parked, info)
        return info

    def set_pinned(self, spans: Sequence[tuple[int, int]]) -> None:
        """Positions [first, end) that no eviction frees from now on."""
        pinned = self._native.ffi.new("struct laq_span[]", [list(span) for span in spans])
        self._call("laq_set_pinned", pinned, len(spans))

    def stats(self, scored: bool) -> KvStats:
        """Counters; `scored` says whether the policy ranks tokens by attention."""
        stats = self._native.ffi.new("struct laq_stats *")
        stats.size = self._native.ffi.sizeof("struct laq_stats")
        self._call("laq_get_stats", stats)
        return KvStats.from_native(stats, scored, self._native.text)

    def kept_positions(self) -> npt.NDArray[np.int32]:
        """Position of every resident token, ascending: (n_layer, n_head_kv, n_resident)."""
        stats = self.stats(scored=False)
        kept = np.empty((stats.n_layer, stats.n_head_kv, stats.n_resident), dtype=np.int32)
        dst = self._native.ffi.from_buffer("int32_t[]", kept, require_writable=True)
        self._call("laq_kept_positions", dst, kept.size)
        return kept


class Device(NamedTuple):
    """A device that ggml finds; memory in bytes."""

    name: str
    description: str
    n_free: int
    n_total: int


def devices(folder: Path) -> list[Device]:
    """The devices that ggml finds, in its order."""
    base, registry = (_find(folder, name) for name in ("ggml-base", "ggml"))
    if base is None or registry is None:
        raise LaqLibraryError(f"no libggml beside libllama in {folder}: install the package again")
    base_lib, lib = ctypes.CDLL(str(base)), ctypes.CDLL(str(registry))
    lib.ggml_backend_dev_count.restype = ctypes.c_size_t
    lib.ggml_backend_dev_get.restype = ctypes.c_void_p
    lib.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    size_p = ctypes.POINTER(ctypes.c_size_t)
    base_lib.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size_p, size_p]
    found = []
    for i in range(lib.ggml_backend_dev_count()):
        device = lib.ggml_backend_dev_get(i)
        texts = []
        for field in ("name", "description"):
            function = getattr(base_lib, f"ggml_backend_dev_{field}")
            function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
            texts.append(function(device).decode("utf-8", "replace"))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base_lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append(Device(texts[0], texts[1], free.value, total.value))
    return found
