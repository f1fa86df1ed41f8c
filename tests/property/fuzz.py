"""Feed mutated bytes to the readers of states and of sessions, for a time, in this process.

    python -m property.fuzz MODEL FOLDER SECONDS SEED

The case at hand is in FOLDER/case: what was going on when the process ended is there. Each case is
made from the seed and its number alone.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import random
import resource
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from laq_gguf import _lib
from laq_gguf.errors import LaqError

native = _lib.load()

from property.several import FIRST_TOKEN, N_SEQS, N_TOKENS, SETUPS, Seen, Several  # noqa: E402

INTEGERS = [0, 1, 2, 63, 64, 511, 512, 513, 2**16, 2**30, 2**31 - 1, 2**31, 2**32 - 1, 2**40]
INTEGERS += [2**63 - 1, 2**63, 2**64 - 1]
MOST_GROWTH = 2**29  # bytes of the process
HEADROOM = 2**30  # of its address space
CASE_SECONDS = 30
N_NAME = 4 + len("llama")  # bytes of the architecture in front of a whole context's state

Mutation = Callable[[random.Random, bytearray, bytes], None]


# mutations: of data, in place; other is other valid data


def _at(rng: random.Random, data: bytearray) -> int:
    """A place; where a format says what comes, more often than elsewhere."""
    n = rng.choice([64, 256, 1024, len(data), len(data)])
    return rng.randrange(max(1, min(n, len(data))))


def flip(rng: random.Random, data: bytearray, other: bytes) -> None:
    data[_at(rng, data)] ^= 1 << rng.randrange(8)


def set_byte(rng: random.Random, data: bytearray, other: bytes) -> None:
    data[_at(rng, data)] = rng.randrange(256)


def set_integer(rng: random.Random, data: bytearray, other: bytes) -> None:
    """Of four or eight bytes, where one may be."""
    at, value = _at(rng, data) // 4 * 4, rng.choice([*INTEGERS, rng.randrange(2**12)])
    size = rng.choice([4, 4, 8])
    data[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


def add(rng: random.Random, data: bytearray, other: bytes) -> None:
    """To an integer."""
    at = _at(rng, data) // 4 * 4
    value = int.from_bytes(data[at : at + 4], "little") + rng.choice([-64, -2, -1, 1, 2, 64])
    data[at : at + 4] = (value % 2**32).to_bytes(4, "little")


def truncate(rng: random.Random, data: bytearray, other: bytes) -> None:
    del data[rng.choice([_at(rng, data), rng.randrange(len(data)), len(data) - 1]) :]


def insert(rng: random.Random, data: bytearray, other: bytes) -> None:
    at, n = _at(rng, data), rng.choice([1, 4, 8, 64, 4096])
    data[at:at] = rng.choice([bytes(n), rng.randbytes(n)])


def delete(rng: random.Random, data: bytearray, other: bytes) -> None:
    at = _at(rng, data)
    del data[at : at + rng.choice([1, 4, 8, 64])]


def splice(rng: random.Random, data: bytearray, other: bytes) -> None:
    """The end comes from other data."""
    at = _at(rng, data)
    data[at:] = other[min(len(other), rng.choice([at, rng.randrange(len(other) + 1)])) :]


MUTATIONS: tuple[Mutation, ...] = (
    flip, flip, set_byte, set_integer, set_integer, set_integer, set_integer, add, add, truncate,
    insert, delete, splice,
)  # fmt: skip


def mutate(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A few changes."""
    res = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        if res:
            rng.choice(MUTATIONS)(rng, res, other)
    return bytes(res)


class States:
    """A context whose sequences are given mutated states."""

    def __init__(self, model: Any, setup: Any, folder: Path) -> None:
        self.context = Several(native, model, setup, folder)
        self.n_chunk = self.context.ffi.new("uint32_t *")
        self.prompt = [FIRST_TOKEN + i * i % N_TOKENS for i in range(150)]
        self.expected = self.answer(0)
        self.context.api.llama_memory_seq_rm(self.context.memory, 0, -1, -1)
        self.states, self.whole = self.valid_states()
        self.former: dict[int, Seen] = {}
        self.restore()

    def call(self, name: str, *args: Any) -> int:
        return int(getattr(self.context.lib, name)(self.context.laq, *args))

    def next(self, s: int, n: int) -> None:
        """The next n tokens of a prompt."""
        while n > 0:
            first = int(self.context.stats(s).n_tokens)
            left = [self.prompt[(first + i) % 150] for i in range(n)]
            if self.call("laq_prompt_next", s, left, n, self.n_chunk):
                return
            chunk = left[: self.n_chunk[0]]
            if self.context.decode([(t, first + i, s) for i, t in enumerate(chunk)]):
                return
            n -= len(chunk)

    def answer(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        """What an empty sequence answers to the prompt: what it keeps, and the last logits."""
        self.next(s, 150)
        logits = self.context.logits()
        assert self.call("laq_prompt_end", s) == 0 and self.call("laq_flush", s) == 0
        return self.context.look(s).kept, logits

    def valid_states(self) -> tuple[list[bytes], list[bytes]]:
        """Of sequences of several shapes; of the whole context."""
        context, states = self.context, []
        self.next(1, 20)
        self.next(2, 90)
        self.call("laq_prompt_end", 2)  # an eviction may wait
        self.next(3, 400)  # a prompt is read
        for s, n in ((4, 120), (5, 300)):
            self.next(s, n)
            self.call("laq_prompt_end", s)
            self.call("laq_flush", s)
            first = int(context.stats(s).n_tokens)
            for i in range(10):
                context.decode([(self.prompt[i], first + i, s)])
        context.api.llama_memory_seq_rm(context.memory, 5, context.stats(5).n_tokens - 4, -1)
        states = [context.save(s) for s in range(6)]
        self.call("laq_save_archive", False)
        states.append(context.save(5))
        self.call("laq_save_archive", True)
        return states, [context.save(-1)]

    def restore(self) -> None:
        """Two conversations that go on, and nothing else: attention looks at free cells, too, and
        what was loaded may be no number."""
        self.context.api.llama_memory_clear(self.context.memory, True)
        for s, i in ((6, 1), (7, 4)):
            assert self.context.load(s, self.states[i])
            self.former[s] = self.context.look(s)

    def check_others(self, s: int) -> None:
        for other, seen in self.former.items():
            if other != s:
                assert self.context.look(other).same(seen), f"sequence {other} has changed"

    def case(self, rng: random.Random) -> str:
        """Load a mutated state and use what became of it."""
        if rng.random() < 0.1:
            return self.whole_case(rng)
        s = rng.choice([0, 1, 6, 7])
        data = mutate(rng, rng.choice(self.states), rng.choice(self.states))
        done = self.context.load(s, data) > 0
        self.check_others(s)
        if done:
            self.use(rng, s)
        else:
            seen = self.context.look(s)
            before = self.former.get(s)
            assert seen.n_tokens == 0 or (before and seen.same(before)), "neither old nor empty"
        gone = s in self.former and not self.context.look(s).same(self.former[s])
        if done or gone or rng.random() < 0.02:
            self.restore()
        for one in (0, 1):
            assert self.context.api.llama_memory_seq_rm(self.context.memory, one, -1, -1)
            assert self.context.stats(one).n_resident == 0, "cells that cannot be freed"
        assert self.context.stats(0).n_used == sum(s.kept.shape[-1] for s in self.former.values())
        if rng.random() < 0.05:
            self.check_answer()
        return "loaded" if done else "refused"

    def whole_case(self, rng: random.Random) -> str:
        data, other = rng.choice(self.whole), rng.choice(self.whole)
        # before the cells, llama.cpp itself allocates what the length of a name asks for
        data = data[:N_NAME] + mutate(rng, data[N_NAME:], other[N_NAME:])
        done = self.context.load(-1, data) > 0
        if done:
            self.use(rng, rng.randrange(N_SEQS))
        for s in range(N_SEQS):
            self.context.look(s)
        self.restore()
        return "whole context loaded" if done else "whole context refused"

    def check_answer(self) -> None:
        kept, logits = self.answer(0)
        # which cells a sequence has may change the order of sums, not what they are
        heads = zip(*(k.reshape(-1, k.shape[-1]) for k in (kept, self.expected[0])), strict=True)
        same = np.mean([np.isin(one, other).mean() for one, other in heads])
        assert same > 0.9, f"a new prompt keeps other tokens: {same} are the same"
        np.testing.assert_allclose(logits, self.expected[1], rtol=1e-2, atol=2e-2)
        assert self.context.api.llama_memory_seq_rm(self.context.memory, 0, -1, -1)

    def use(self, rng: random.Random, s: int) -> None:
        """What was loaded may be anything: calls are done or refused."""
        context = self.context
        out = context.ffi.new("struct laq_parked **")
        first = int(context.stats(s).n_tokens)
        calls: list[Callable[[], Any]] = [
            lambda: context.look(s),
            lambda: self.call("laq_flush", s),
            lambda: self.call("laq_evict", s, 24),
            lambda: self.call("laq_recall", s),
            lambda: self.call("laq_prompt_end", s),
            lambda: self.next(s, 30),
            lambda: context.decode([(FIRST_TOKEN, first, s)]),
            lambda: context.load(s, context.save(s)),
        ]
        for call in rng.sample(calls, 4):
            call()
        context.look(s)
        if self.call("laq_park", s, out) == 0 and self.call("laq_resume", s, out[0]):
            self.call("laq_forget", out[0])
        context.look(s)


class Sessions:
    """A Llama that is given mutated session files."""

    def __init__(self, model: Path, folder: Path, **settings: Any) -> None:
        from laq_gguf import Llama

        self.llm = Llama(
            str(model), n_ctx=512, n_batch=128, kv_budget=64, kv_staging=192, lookahead_size=8,
            n_threads=1, n_threads_batch=1, verbose=False, **settings,
        )  # fmt: skip
        self.path, self.saved = folder / "session", []
        self.prompt = [FIRST_TOKEN + i * i % N_TOKENS for i in range(300)]
        self.expected = self.answer()
        for n in (0, 40, 300):
            self.llm.reset()
            if n:
                self.llm.eval(self.prompt[:n])
                self.answer_on()
            self.llm.save_session(self.path)
            self.saved.append(self.path.read_bytes())
        self.kept = self.llm.kept_positions()

    def answer_on(self) -> list[int]:
        """The next tokens of what was read."""
        tokens = []
        for _ in range(12):
            tokens.append(int(self.llm.sample(temp=0.0)))
            self.llm.eval(tokens[-1:])
        return tokens

    def answer(self) -> list[int]:
        self.llm.reset()
        self.llm.eval(self.prompt)
        return self.answer_on()

    def case(self, rng: random.Random) -> str:
        """A file of any bytes, with a checksum that fits now and then."""
        data, other = rng.choice(self.saved), rng.choice(self.saved)
        how = rng.random()
        if how < 0.2:
            data = mutate(rng, data, other)
        elif how < 0.4:
            data = with_another_header(rng, data)
        else:
            body = mutate(rng, data[:-32], other[:-32])
            if rng.random() < 0.7:
                body = resized(rng, body, len(data) - 32)
            data = body + hashlib.sha256(body).digest()
        self.path.write_bytes(data)
        try:
            self.llm.load_session(self.path)
            done = True
        except LaqError:
            done = False
        if not done:
            kept = self.llm.kept_positions()
            assert kept.shape == self.kept.shape and (kept == self.kept).all(), "it has changed"
            return "session refused"
        with suppress(LaqError, RuntimeError):
            self.llm.eval(self.prompt[:20])
        if rng.random() < 0.2:
            assert self.answer() == self.expected, "a new prompt is answered otherwise"
        self.path.write_bytes(self.saved[-1])
        self.llm.load_session(self.path)
        return "session loaded"


def resized(rng: random.Random, body: bytes, n_before: int) -> bytes:
    """With the size of the state that the file has now."""
    if len(body) < 32:
        return body
    n_state = struct.unpack_from("<Q", body, 24)[0] + len(body) - n_before
    return body[:24] + struct.pack("<Q", n_state % 2**64) + body[32:]


def with_another_header(rng: random.Random, data: bytes) -> bytes:
    """One entry is another JSON value, or none."""
    n_header = struct.unpack_from("<Q", data, 8)[0]
    header = json.loads(data[32 : 32 + n_header])
    key = rng.choice(sorted(header))
    header[key] = rng.choice([None, 0, 5, -1, 1.5, "x", [], ["x"], [1.5], [[1]], {"x": 1}, True])
    if rng.random() < 0.2:
        del header[key]
    text = json.dumps(header).encode()
    body = data[:8] + struct.pack("<Q", len(text)) + data[16:32] + text + data[32 + n_header : -32]
    return body + hashlib.sha256(body).digest()


def rss() -> int:
    """Bytes of the process, at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory() -> None:
    """What is allocated from here on is bounded."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        most = pages * os.sysconf("SC_PAGE_SIZE") + HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


wild: list[str] = []  # lines of the log that tell of allocations that could not be
kept_alive: list[Any] = []


def main(model_path: str, folder: str, seconds: str, seed: str) -> None:
    """Cases until the time is over."""
    import llama_cpp

    from property.several import load_model

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, _: Any) -> None:
        if b"bad_alloc" in text or b"vector::" in text:
            wild.append(text.decode())

    kept_alive.append(listen)
    model, path = load_model(Path(model_path)), Path(folder)
    os.environ["LAQ_COMPACT"] = "host"
    targets: list[Any] = [States(model, setup, path) for setup in SETUPS]
    targets += [Sessions(Path(model_path), path, **s) for s in ({}, {"kv_recall": "ram"})]
    llama_cpp.llama_log_set(listen, llama_cpp.ctypes.c_void_p())
    at, counts = os.open(path / "case", os.O_RDWR | os.O_CREAT), Counter[str]()
    limit_memory()
    end, n, before = time.monotonic() + float(seconds), 0, rss()
    while time.monotonic() < end:
        rng = random.Random(f"{seed}/{n}")
        i = rng.randrange(len(targets))
        name = SETUPS[i].name if i < len(SETUPS) else "session"
        os.pwrite(at, f"seed {seed}, case {n} ({name})".ljust(100).encode(), 0)
        faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
        counts[targets[i].case(rng)] += 1
        assert not wild, wild
        assert rss() - before < MOST_GROWTH, f"{rss() - before} bytes more"
        n += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"{n} cases: {dict(counts)}, {(rss() - before) >> 20} MiB more")


if __name__ == "__main__":
    main(*sys.argv[1:])
