"""Lookahead Q-Cache (arXiv 2505.20334) for llama.cpp: long documents out of a small KV cache.

Importing the package loads no native code. It only tells llama_cpp, through LLAMA_CPP_LIB_PATH,
which library to load; the first use of `Llama` loads it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._lib import select_library
from ._version import __version__
from .errors import LaqError

if TYPE_CHECKING:
    from .config import LaqConfig
    from .llama import Llama
    from .parking import ParkedChat
    from .stats import KvStats

__all__ = ["KvStats", "LaqConfig", "LaqError", "Llama", "ParkedChat", "__version__"]

select_library()


def __getattr__(name: str) -> Any:
    modules = {
        "Llama": "llama", "LaqConfig": "config", "KvStats": "stats", "ParkedChat": "parking",
    }  # fmt: skip
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{modules[name]}", __name__), name)
