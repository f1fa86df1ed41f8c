"""Keywords of `Llama`: which there are, and which exclude each other."""

from __future__ import annotations

import difflib
import inspect
import os
from typing import Any

from ._lib import load
from .config import CONFIG_NAMES
from .errors import LaqArgumentError, LaqModelError
from .recall import RECALL_NAMES

load()  # before llama_cpp: it decides which libllama llama_cpp gets

import llama_cpp  # noqa: E402

_STOCK = inspect.signature(llama_cpp.Llama.__init__).parameters
_STOCK_NAMES = tuple(
    name for name, p in _STOCK.items() if name != "self" and p.kind is not p.VAR_KEYWORD
)


def check_names(kwargs: dict[str, Any]) -> None:
    """llama_cpp.Llama drops unknown keywords in silence; here they are a TypeError."""
    own = {*CONFIG_NAMES, *RECALL_NAMES, "kv_budget", "kv_staging", "pin_system"}
    known = sorted({*_STOCK_NAMES, *own})
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise TypeError(
                f"Llama() got an unexpected keyword argument {name!r}; did you mean {near[0]!r}?"
            )


def check_compatible(kwargs: dict[str, Any]) -> None:
    """Refuse the llama_cpp settings under which nothing could be evicted rightly."""
    pooling = (llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED, llama_cpp.LLAMA_POOLING_TYPE_NONE)
    causal = (llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED, llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL)
    refused = {
        "draft_model": kwargs.get("draft_model") is not None,
        "embedding": bool(kwargs.get("embedding")),
        "vocab_only": bool(kwargs.get("vocab_only")),
        "pooling_type": kwargs.get("pooling_type", pooling[0]) not in pooling,
        "attention_type": kwargs.get("attention_type", causal[0]) not in causal,
    }
    reasons = {
        "draft_model": "rejected draft tokens would have to be taken back from an evicted cache",
        "embedding": "embeddings are read from the whole prompt",
        "vocab_only": "a model without weights has no KV cache",
        "pooling_type": "pooled embeddings are read from the whole prompt",
        "attention_type": "every token of a non-causal model sees all others",
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise LaqArgumentError(
                f"{name}={kwargs[name]!r} cannot be combined with kv_budget: {reasons[name]}; "
                f"leave out one of them"
            )


def check_file(path: str) -> None:
    """Refuse what is not a GGUF file."""
    if not os.path.isfile(path):
        raise LaqModelError(f"Model path does not exist: {path}")  # llama_cpp's words
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise LaqModelError(f"model_path: {path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise LaqModelError(f"model_path: {path} is not a GGUF file (it begins with {magic!r})")
