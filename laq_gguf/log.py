"""llama.cpp's log: one callback for the process. Errors are collected for the thread that waits."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR in ggml.h; llama_cpp's own list of levels is outdated

_waiting = threading.local()  # .lists: of the blocks of native_errors() that a thread is in
_lock = threading.Lock()
_kept: list[Any] = []  # callbacks of this module: native code calls them as long as it lives


def _listen(llama_cpp: Any, passes_on: bool = True) -> None:
    """Put a callback in front of the one that is set, by llama_cpp or by a user."""
    with _lock:
        previous, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(previous), ctypes.byref(user_data))
        address = _address(previous)
        if passes_on and any(address == _address(callback) for callback in _kept):
            return

        @llama_cpp.llama_log_callback
        def callback(level: int, text: bytes, _: Any) -> None:
            if level == _LOG_ERROR and text.strip():
                for lines in getattr(_waiting, "lists", ()):
                    lines.append(text.decode("utf-8", "replace").strip())
            if passes_on and previous:
                previous(level, text, user_data)

        _kept.append(callback)
        llama_cpp.llama_log_set(callback, ctypes.c_void_p())


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value


def silence(llama_cpp: Any) -> None:
    """Print no line any more; `native_errors` still sees the errors."""
    _listen(llama_cpp, passes_on=False)


@contextmanager
def native_errors(llama_cpp: Any) -> Iterator[list[str]]:
    """Collect the error lines that llama.cpp logs in this thread inside the block.

    Yields:
        The error lines so far, oldest first.
    """
    _listen(llama_cpp)
    lists = _waiting.__dict__.setdefault("lists", [])
    lists.append([])
    try:
        yield lists[-1]
    finally:
        lists.pop()
