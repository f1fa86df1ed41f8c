"""The readers of states and sessions are given mutated bytes: no crash, no hang, no wild
allocation, and what was there is there, or nothing is.

They run in a process of their own (`fuzz.py`); a failure says which case it was at, and the same
seed makes the same cases again.

env: LAQ_FUZZ_SECONDS  how long; default 30
env: LAQ_FUZZ_SEED     other cases
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import laq_gguf
from property.several import SHAPE

pytest.importorskip("resource")

SECONDS = float(os.environ.get("LAQ_FUZZ_SECONDS", "30"))
SEED = os.environ.get("LAQ_FUZZ_SEED", "0")


@pytest.mark.slow
@pytest.mark.skipif(
    "ASAN_OPTIONS" in os.environ,
    reason="the sanitized build has ggml's asserts, which end at rows that are no numbers",
)
def test_readers_take_any_bytes(
    native: Any, tiny_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    model, tests = tiny_gguf("llama", **SHAPE), Path(__file__).parents[1]
    paths = [str(tests), str(Path(laq_gguf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "property.fuzz", str(model), str(tmp_path), str(SECONDS), SEED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}, cwd=tmp_path,
        capture_output=True, text=True, timeout=SECONDS + 300, check=False,
    )  # fmt: skip
    case = tmp_path / "case"
    at = case.read_text().strip() if case.exists() else "no case yet"
    assert done.returncode == 0, f"{at}: {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    print(f"\n{done.stdout.strip()}")
