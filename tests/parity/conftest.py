"""The built library, and tiny models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def native() -> Any:
    """The loaded library: .ffi and .lib of laq.h."""
    from laq_gguf._lib import load
    from laq_gguf.errors import LaqLibraryError

    try:
        return load()
    except LaqLibraryError as error:
        pytest.skip(f"needs the built library: {error}")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_model(**params) -> path of a tiny llama, made once for each set of parameters."""
    from make_tiny_gguf import make

    folder = tmp_path_factory.mktemp("tiny")

    def get(**params: int) -> Path:
        name = "-".join(f"{k}{v}" for k, v in sorted(params.items())) or "default"
        path = folder / f"{name}.gguf"
        return path if path.exists() else make(path, "llama", **params)

    return get
