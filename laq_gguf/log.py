"""llama.cpp's log: one callback for the process. Errors are collected for the thread that waits."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_LOG_ERROR = 4  # GGML_LOG_LEVEL_ERROR in ggml.h; llama_cpp's own list of levels is outdated

_waiting = threading.local()  # .lists: of the blocks of native_errors() that a thread is in
_kept: list[Any] = []  # native code calls them as long as the process lives


def bridge(llama_cpp: Any) -> None:
    """Put the callback in front of llama_cpp's, which prints. Called once, when it is imported."""
    previous, user_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(previous), ctypes.byref(user_data))
    _set(llama_cpp, lambda level, text: previous(level, text, user_data) if previous else None)


def silence(llama_cpp: Any) -> None:
    """Print no line any more; `native_errors` still sees the errors."""
    _set(llama_cpp, lambda level, text: None)


def _set(llama_cpp: Any, show: Callable[[int, bytes], None]) -> None:
    @llama_cpp.llama_log_callback
    def callback(level: int, text: bytes, _: Any) -> None:
        if level == _LOG_ERROR and text.strip():
            for lines in getattr(_waiting, "lists", ()):
                lines.append(text.decode("utf-8", "replace").strip())
        show(level, text)

    _kept.append(callback)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p())


@contextmanager
def native_errors() -> Iterator[list[str]]:
    """Collect the error lines that llama.cpp logs in this thread inside the block.

    Yields:
        The error lines so far, oldest first.
    """
    lists = _waiting.__dict__.setdefault("lists", [])
    lists.append([])
    try:
        yield lists[-1]
    finally:
        lists.pop()
