"""Prefill through the public API, then decode token by token: the same way for every library.

Run as a script it serves commands, one JSON object a line on stdin and stdout, with its model kept
loaded between them. It imports nothing of laq_gguf unless told to, so that one process can drive
the plain library while another drives the patched one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LIBRARIES = ("laq_gguf", "llama_cpp")


class Decoder:
    """A loaded model. Steps go straight to llama_decode: nothing but the library is timed."""

    def __init__(self, library: str, model: str, options: dict[str, Any]) -> None:
        """Load `model` with `library`.Llama(**options).

        Raises:
            ValueError: unknown library.
        """
        if library not in LIBRARIES:
            raise ValueError(f"unknown library {library!r}; there are: {', '.join(LIBRARIES)}")
        llama_class = importlib.import_module(library).Llama
        self.api = importlib.import_module("llama_cpp.llama_cpp")
        self.llm = llama_class(model_path=model, verbose=False, **options)
        self.n_vocab: int = self.llm.n_vocab()
        self._vocab = self.api.llama_model_get_vocab(self.llm.model)
        self.n_tokens = 0

    def tokenize(self, text: str, *, add_bos: bool = False, special: bool = False) -> list[int]:
        """Tokens of a text."""
        return self.llm.tokenize(text.encode("utf-8"), add_bos=add_bos, special=special)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens; incomplete characters are replaced."""
        return self.llm.detokenize(list(tokens)).decode("utf-8", errors="replace")

    def is_end(self, token: int) -> bool:
        """Whether the token ends a reply."""
        return bool(self.api.llama_vocab_is_eog(self._vocab, token))

    def prefill(self, tokens: Sequence[int]) -> int:
        """Read a prompt from its first token, with nothing reused; return the greedy next token."""
        self.llm.reset()
        # not generate(): a generator that is dropped carries out an eviction that still waits
        self.llm.eval(list(tokens))
        self.n_tokens = len(tokens)
        return int(self.logits().argmax())

    def extend(self, tokens: Sequence[int]) -> None:
        """Read a prompt that goes on after what is decoded."""
        self.llm.n_tokens = self.n_tokens  # step() leaves it behind
        self.llm.eval(list(tokens))
        self.n_tokens += len(tokens)

    def flush(self) -> None:
        """Carry out an eviction that waits, as generate() does where a reply ends."""
        laq = getattr(self.llm, "_laq", None)
        if laq is not None:
            laq.flush()

    def save(self) -> Any:
        """The state, for `load`; the logits are no part of it."""
        self.llm.n_tokens = self.n_tokens
        return self.llm.save_state()

    def load(self, state: Any) -> None:
        """Go back to a state."""
        self.llm.load_state(state)
        self.n_tokens = self.llm.n_tokens

    def step(self, token: int) -> None:
        """Decode one token at the next position.

        Raises:
            RuntimeError: if llama_decode fails.
        """
        self.feed([token])

    def feed(self, tokens: Sequence[int]) -> None:
        """Decode tokens at the next positions, at most n_batch: logits of the last one.

        Raises:
            RuntimeError: if llama_decode fails.
        """
        n = len(tokens)
        ids = (ctypes.c_int32 * n)(*tokens)
        status = self.api.llama_decode(self.llm.ctx, self.api.llama_batch_get_one(ids, n))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} at position {self.n_tokens}")
        self.n_tokens += n

    def decode(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Decode tokens at the next positions, in batches: logits after each, (n, n_vocab).

        Raises:
            RuntimeError: if llama_decode fails.
        """
        rows = np.empty((len(tokens), self.n_vocab), np.float32)
        for i in range(0, len(tokens), self.llm.n_batch):
            part = tokens[i : i + self.llm.n_batch]
            batch = self.api.llama_batch_init(len(part), 0, 1)
            try:
                self._fill(batch, part)
                status = self.api.llama_decode(self.llm.ctx, batch)
                if status != 0:
                    raise RuntimeError(
                        f"llama_decode returned {status} at position {self.n_tokens}"
                    )
                for j in range(len(part)):
                    pointer = self.api.llama_get_logits_ith(self.llm.ctx, j)
                    rows[i + j] = np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))
            finally:
                self.api.llama_batch_free(batch)
            self.n_tokens += len(part)
        return rows

    def _fill(self, batch: Any, tokens: Sequence[int]) -> None:
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self.n_tokens + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
        batch.n_tokens = len(tokens)

    def logits(self) -> npt.NDArray[np.float32]:
        """Logits of the next token (n_vocab,): a view, valid until the next step."""
        pointer = self.api.llama_get_logits_ith(self.llm.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))

    def rewind(self, n_tokens: int) -> bool:
        """Forget the tokens from position `n_tokens` on; False if the cache cannot.

        The logits are not restored: a step must follow.
        """
        memory = self.api.llama_get_memory(self.llm.ctx)
        if not self.api.llama_memory_seq_rm(memory, 0, n_tokens, -1):
            return False
        self.n_tokens = n_tokens
        return True

    def stats(self) -> dict[str, Any] | None:
        """kv_stats() as a dict; None without a kv_budget."""
        if getattr(self.llm, "kv_budget", None) is None:
            return None
        return dataclasses.asdict(self.llm.kv_stats())

    def system(self) -> dict[str, Any]:
        """Which library was really loaded, and what it was compiled for."""
        return {
            "patched": hasattr(self.api._lib, "laq_abi_version"),
            "features": self.api.llama_print_system_info().decode().strip(),
        }

    def close(self) -> None:
        """Free the context and the model."""
        self.llm.close()


class Commands:
    """What a worker obeys: each method is a command, its keyword arguments come from the JSON."""

    def __init__(self) -> None:
        self._decoder: Decoder | None = None

    @property
    def _loaded(self) -> Decoder:
        if self._decoder is None:
            raise RuntimeError("no model is loaded: send the command open first")
        return self._decoder

    def open(
        self, *, library: str, model: str, options: dict[str, Any], log: bool = False
    ) -> dict[str, Any]:
        """Load the model. log: also return what llama.cpp logged meanwhile, as "log"."""
        if not log:
            self._decoder = Decoder(library, model, options)
            return self._decoder.system()
        with logged(library) as lines:
            self._decoder = Decoder(library, model, options)
        return {**self._decoder.system(), "log": lines}

    def tokenize(self, *, text: str, n: int) -> list[int]:
        """Exactly the first `n` tokens of a text, begin-of-text first where the model has one."""
        tokens = self._loaded.tokenize(text, add_bos=True)
        if len(tokens) < n:
            raise ValueError(f"the text has {len(tokens)} tokens, {n} are needed: pass --text FILE")
        return tokens[:n]

    def prefill(self, *, tokens: list[int], n_settle: int) -> dict[str, Any]:
        """Time to the first token, then `n_settle` steps, with the times of each in ms."""
        decoder = self._loaded
        start = time.perf_counter()
        token = decoder.prefill(tokens)
        ms_first_token = 1e3 * (time.perf_counter() - start)
        before = decoder.stats()
        ms_settle = self._steps(token, n_settle)
        return {
            "ms_first_token": ms_first_token,
            "ms_settle": ms_settle,
            "stats_before": before,
            "stats": decoder.stats(),
        }

    def peak(self) -> int:
        """Most bytes of memory that this process has had so far."""
        return peak_bytes()

    def device_free(self, *, name: str) -> int:
        """Bytes that a device has free, of those that laq_gguf's library finds."""
        from laq_gguf import _lib

        devices = _lib.devices(_lib.library_dir())
        free = [device.n_free for device in devices if device.name == name]
        if not free:
            raise ValueError(f"no device {name}; there are: {', '.join(d.name for d in devices)}")
        return free[0]

    def generate(self, *, n: int) -> dict[str, Any]:
        """Decode `n` more tokens greedily; ms of each step."""
        decoder = self._loaded
        steps = self._steps(int(decoder.logits().argmax()), n)
        return {"ms_steps": steps, "stats": decoder.stats()}

    def turn(self, *, tokens: list[int]) -> dict[str, Any]:
        """Read a message that goes on after what is decoded: ms, and the counters around it."""
        decoder = self._loaded
        decoder.flush()
        before = decoder.stats()
        start = time.perf_counter()
        decoder.extend(tokens)
        decoder.logits()  # waits for them
        ms = 1e3 * (time.perf_counter() - start)
        return {"ms": ms, "before": before, "after": decoder.stats()}

    def decode(self, *, n_past: int, n: int) -> dict[str, Any]:
        """Go back to position `n_past` and decode `n` tokens greedily; ms of each step."""
        if not self._loaded.rewind(n_past):
            raise RuntimeError(f"the cache cannot go back to position {n_past}")
        # the logits are still those of the last step
        return self.generate(n=n)

    def _steps(self, token: int, n: int) -> list[float]:
        decoder = self._loaded
        times = []
        for _ in range(n):
            start = time.perf_counter()
            decoder.step(token)
            token = int(decoder.logits().argmax())
            times.append(1e3 * (time.perf_counter() - start))
        return times


@contextmanager
def logged(library: str) -> Iterator[list[str]]:
    """Collect the lines that llama.cpp logs inside the block, which are not printed then."""
    importlib.import_module(library).Llama  # noqa: B018  # decides which llama_cpp is imported
    api = importlib.import_module("llama_cpp.llama_cpp")
    lines: list[str] = []
    previous, user_data = api.llama_log_callback(), ctypes.c_void_p()
    api.llama_log_get(ctypes.byref(previous), ctypes.byref(user_data))

    @api.llama_log_callback
    def collect(level: int, text: bytes, _: Any) -> None:
        lines.append(text.decode("utf-8", "replace").strip())

    api.llama_log_set(collect, ctypes.c_void_p())
    try:
        yield lines
    finally:
        api.llama_log_set(previous, user_data)


def peak_bytes() -> int:
    """Most bytes of memory that this process has had."""
    status = Path("/proc/self/status")
    if status.is_file():
        # not ru_maxrss: on Linux that begins with what the parent had when it forked
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def serve() -> None:
    """Obey commands until stdin ends. Answers: {"ok": ...} or {"error": ...}."""
    # the native libraries and their dependencies may print: only answers go to the real stdout
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    commands = Commands()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(commands, request.pop("command"))(**request)}
        except Exception as error:  # the parent decides; a worker must answer every command
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
