"""What the benchmark tests need: the model, the command, the unpatched libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct, named by LAQ_MODEL_SMOLLM2."""
    path = os.environ.get("LAQ_MODEL_SMOLLM2")
    if not path:
        pytest.skip("LAQ_MODEL_SMOLLM2 is not set")
    return Path(path)


@pytest.fixture(scope="session")
def plain_lib() -> Path:
    """The unpatched libraries, which scripts/dev.py builds."""
    path = ROOT / "build" / "plain" / "bin"
    if not path.is_dir():
        pytest.skip("build/plain is not built")
    return path


@pytest.fixture(scope="session")
def bench() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run scripts/bench.py with these arguments, in the repository."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "bench.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)

    return run


@pytest.fixture(scope="session")
def tiny(tiny_gguf: Callable[..., Path]) -> Path:
    """A tiny llama with random weights."""
    return tiny_gguf("llama")
