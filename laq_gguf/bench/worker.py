"""Processes that each keep one model loaded and obey commands (decoder.py run as a script)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from laq_gguf.bench import decoder


class WorkerError(RuntimeError):
    """A worker could not do what it was told."""


class Worker:
    """A process that keeps one model loaded (decoder.py run as a script)."""

    def __init__(self, lib: Path | None) -> None:
        """Start it. lib: folder of the libraries that llama_cpp loads; None: laq_gguf's own."""
        env = dict(os.environ)
        env.pop("LLAMA_CPP_LIB_PATH", None)
        if lib is not None:
            env["LLAMA_CPP_LIB_PATH"] = str(lib)
        self._process = subprocess.Popen(
            [sys.executable, decoder.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=env,
        )

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Send a command, wait for its answer.

        Raises:
            WorkerError: with the worker's own words, or its exit status if it died.
        """
        self.send(command, **arguments)
        return self.receive(command)

    def send(self, command: str, **arguments: Any) -> None:
        """Let it begin; `receive` must follow.

        Raises:
            WorkerError: it has died.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(f"{command}: the worker has exited") from None

    def receive(self, command: str) -> Any:
        """Wait for the answer to the command that was sent.

        Raises:
            WorkerError: with the worker's own words, or its exit status if it died.
        """
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise WorkerError(f"{command}: the worker exited with status {status}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{command}: {answer['error']}")
        return answer["ok"]

    def close(self) -> None:
        """Let it end by itself: it does when its stdin ends."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
