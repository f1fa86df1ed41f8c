"""Fixtures and rules of all tests: where the library and the models are, what is skipped and why.

env: LAQ_MODEL_SMOLLM2  path of SmolLM2-135M-Instruct in GGUF, for the tests marked `model`
env: LAQ_LIB_PATH       folder of a developer's build; default: the installed package's own
env: LAQ_PLAIN_LIB      folder of the libraries built without patches; default: build/plain/bin
env: LAQ_COMPACT        what moves K and V at an eviction: "host" or "graph"; tests set it
env: LAQ_SCORE          "composed": scores come from existing operations; tests set it
env: LAQ_CELLS          "device": cells in host memory are treated as a device's; tests set it
env: LAQ_PROPERTY_EXAMPLES  see property/test_cache.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import device
import laq_gguf
from laq_gguf import _lib

ROOT = Path(__file__).resolve().parent.parent
MARKERS = {
    "model": "needs SmolLM2-135M-Instruct (LAQ_MODEL_SMOLLM2)",
    "slow": "takes more than ten seconds",
    "cuda": "needs a library built with CUDA",
    "metal": "needs a library built with Metal",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--min-executed",
        type=int,
        default=0,
        metavar="N",
        help="fail if fewer than N tests were executed: a run that skips everything is not green",
    )


class Floor:
    """Counts executed tests, in the process that reports, and fails a run with too few."""

    def __init__(self, minimum: int) -> None:
        self._minimum, self._executed = minimum, 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._executed += report.when == "call" and not report.skipped

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == 0 and self._executed < self._minimum:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._executed < self._minimum:
            terminalreporter.write_line(
                f"only {self._executed} tests were executed, at least {self._minimum} must be"
                " (--min-executed)",
                red=True,
            )


def pytest_configure(config: pytest.Config) -> None:
    for name, text in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {text}")
    known = [] if device.ON_CPU else [d.name for d in _lib.devices(_lib.library_dir())]
    if not device.ON_CPU and device.NAME not in known:
        raise pytest.UsageError(f"LAQ_TEST_DEVICE={device.NAME}: there are {', '.join(known)}")
    # a worker of pytest-xdist sees a part of the tests; the process that started it, all reports
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Floor(config.getoption("--min-executed")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    devices = {"cuda", "metal"}
    needed = {name for item in items for name in devices if item.get_closest_marker(name)}
    if not needed:
        return
    backends = _lib.load().build_info().get("backends", "").lower()
    for item in items:
        for name in needed:
            if item.get_closest_marker(name) and name not in backends:
                reason = f"the library is built without -DGGML_{name.upper()}=ON"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def native() -> _lib.Native:
    """The loaded library."""
    if _lib.select_library() is None:
        pytest.skip(f"no libllama in {_lib.library_dir()}: pip install . or set LAQ_LIB_PATH")
    return _lib.load()


@pytest.fixture(scope="session")
def smollm2(native: _lib.Native) -> Path:
    """Path of SmolLM2-135M-Instruct."""
    path = os.environ.get("LAQ_MODEL_SMOLLM2")
    if not path:
        pytest.skip("LAQ_MODEL_SMOLLM2 is not set")
    return Path(path)


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny_gguf(kind, **params): path of a tiny random GGUF, made once a session."""
    import make_tiny_gguf

    folder = tmp_path_factory.mktemp("gguf")
    made: dict[str, Path] = {}

    def make(kind: str = "llama", **params: int | float) -> Path:
        name = "-".join([kind, *(f"{k}{v}" for k, v in sorted(params.items()))])
        if name not in made:
            made[name] = Path(make_tiny_gguf.make(folder / f"{name}.gguf", kind, **params))
        return made[name]

    return make


@pytest.fixture(scope="session")
def plain_lib() -> Path:
    """Folder of the libraries built from the same llama.cpp without patches."""
    folder = Path(os.environ.get("LAQ_PLAIN_LIB", ROOT / "build" / "plain" / "bin"))
    if not any(folder.glob("libllama.*")):
        pytest.skip(f"no libllama in {folder}: set LAQ_PLAIN_LIB")
    return folder


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """run_python(*args, **env): python in its own process, in an empty folder."""

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        paths = [str(Path(laq_gguf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        full = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **env}
        return subprocess.run(
            [sys.executable, *args], env=full, cwd=tmp_path, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip

    return run
