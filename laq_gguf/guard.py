"""Calls on a model take turns, and a closed model raises."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from .errors import CLOSED, LaqStateError

Method = TypeVar("Method", bound=Callable[..., Any])


def exclusive(method: Method) -> Method:
    """A method of `Llama` that waits until no other thread is in one."""

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]


class Closed:
    """What stands in place of the context and the model of a closed `Llama`."""

    def __getattr__(self, name: str) -> NoReturn:
        raise LaqStateError(CLOSED)
