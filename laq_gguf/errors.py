"""What laq_gguf raises: every class is a LaqError and the built-in that llama_cpp would raise."""

from __future__ import annotations


class LaqError(Exception):
    """Base of everything that laq_gguf raises on purpose."""


class LaqLibraryError(LaqError, ImportError):
    """The patched libllama is missing, does not fit, or llama_cpp already loaded another one."""


class LaqArgumentError(LaqError, ValueError):
    """An argument is out of range, or two arguments exclude each other."""


class LaqModelError(LaqArgumentError):
    """The model file cannot be read, or no context can be made for it."""


class LaqContextFullError(LaqArgumentError, RuntimeError):
    """More tokens than n_ctx holds. llama_cpp raises either base, depending on the call."""


CLOSED = "the model is closed: make a new Llama"


class LaqStateError(LaqError, RuntimeError):
    """The cache does not hold what the call needs: evicted, closed, or of another kind."""


class LaqNativeError(LaqError, RuntimeError):
    """A function of laq.h failed.

    Attributes:
        status: value of `enum laq_status`.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class LaqInvalidError(LaqNativeError, ValueError):
    """LAQ_STATUS_INVALID_ARGUMENT: a parameter is out of range for this model or context."""


class LaqUnsupportedError(LaqNativeError, ValueError):
    """LAQ_STATUS_UNSUPPORTED: this kind of model or context cannot be evicted."""


class LaqMemoryError(LaqNativeError, MemoryError):
    """LAQ_STATUS_NO_MEMORY: a buffer could not be allocated."""


_BY_STATUS: dict[int, type[LaqNativeError]] = {
    1: LaqInvalidError,
    2: LaqUnsupportedError,
    3: LaqMemoryError,
}


def native_error(function: str, status: int, name: str, message: str) -> LaqNativeError:
    """The exception for a `laq_status` other than OK.

    Args:
        function: name of the function that failed.
        status: its `enum laq_status`.
        name: `laq_status_str(status)`.
        message: `laq_last_error()`, which says what was asked, what is possible, what to change.
    """
    return _BY_STATUS.get(status, LaqNativeError)(f"{function}: {message or name}", status)
