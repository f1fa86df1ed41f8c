"""Operations on eight sequences of one context: prompts, decodes, evictions, settings.

After each, all sequences are read back and compared with what is known of them. Allocations fail
now and then, and decodes are aborted.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from property.conversation import Conversation
from property.several import (
    BUDGET,
    FIRST_TOKEN,
    N_BATCH,
    N_CTX,
    N_SEQS,
    N_TOKENS,
    Seen,
    Setup,
    Several,
    Twin,
)

ALL = range(N_SEQS)
CONSTANT = ("kv_bytes", "ring_bytes", "compute_bytes", "n_cells")


class Operations:
    """A context, what is known of its sequences, and the operations on them.

    Attributes:
        log: the operations so far.
        counts: of operations, and of what became of them.
    """

    def __init__(
        self, native: Any, model: Any, setup: Setup, twin: Twin, folder: Path, seed: str
    ) -> None:
        self.rng, self.setup, self.twin = random.Random(seed), setup, twin
        self.context = Several(native, model, setup, folder)
        self.lib, self.laq, self.ffi = native.lib, self.context.laq, native.ffi
        self.known = [Conversation(setup.row_bytes) for _ in ALL]
        self.seen = [self.context.look(s) for s in ALL]
        self.n_lost = [0] * N_SEQS
        self.parked: list[tuple[Any, Conversation, Seen]] = []
        self.states: list[tuple[bytes, Conversation]] = []
        self.all_states: list[tuple[bytes, list[Conversation]]] = []
        self.budget, self.may_fit, self.shares = BUDGET, setup.value_fit > 0, False
        self.constant = self._constant()
        self.n_evictions = 0
        self.log: list[str] = []
        self.counts: Counter[str] = Counter()

    def note(self, text: str) -> None:
        self.log.append(text)
        if os.environ.get("LAQ_PROPERTY_TRACE"):
            print(text, flush=True)

    # looking at what is there

    def _constant(self) -> tuple[int, ...]:
        stats = self.context.stats(0)
        return tuple(int(getattr(stats, name)) for name in CONSTANT)

    def check(self, *touched: int) -> None:
        """All sequences; those that are not `touched` are as they were."""
        assert self._constant() == self.constant, f"{CONSTANT} have changed"
        for s in ALL:
            seen = self.context.look(s)
            if s not in touched:
                assert seen.same(self.seen[s]), f"sequence {s} has changed"
            else:
                self._check_one(s, seen)
            self.seen[s] = seen
        stats = self.context.stats(0)
        n_resident = sum(seen.kept.shape[-1] for seen in self.seen)
        assert stats.n_used <= n_resident and (self.shares or stats.n_used == n_resident)
        self.n_evictions = int(stats.n_evictions)

    def _check_one(self, s: int, seen: Seen) -> None:
        self.known[s].check(seen, self.twin, self.may_fit)
        if self.known[s].n_tokens == 0:
            self.known[s].clear()
        if self.setup.archive:
            assert seen.n_lost == self.n_lost[s], f"{seen.n_lost} rows are lost"
            known, low = self.known[s], max(self.seen[s].n_intact, 0)
            # what has just left the intact suffix, and some others
            some = [*range(low, seen.n_intact), *self.rng.sample(range(N_CTX), 8)]
            known.check_archive(s, self.context, self.twin, np.array(some, np.int32))

    def check_decoded(self, *touched: int) -> None:
        """After a decode, which may have evicted any sequence."""
        evicted = int(self.context.stats(0).n_evictions) != self.n_evictions
        self.check(*(ALL if evicted else touched))

    # calls

    def attempt(self, name: str, call: Callable[[], int]) -> bool:
        """Make a call of laq.h, perhaps with an allocation that fails first: then nothing has
        changed, and it is made again."""
        if self.rng.random() < 0.3:
            n = self.rng.choice([1, 1, 1, 2, 2, 3, 4, 6])
            self.note(f"  {name} with fault {n}")
            self.lib.laq_test_fail(n)
            status = call()
            self.lib.laq_test_fail(0)
            if status != self.lib.LAQ_STATUS_NO_MEMORY:
                return self._done(name, status)
            self.counts[f"{name.split()[0]}: a fault"] += 1
            self.check()
        return self._done(name, call())

    def _done(self, name: str, status: int) -> bool:
        self.counts[f"{name.split()[0]}: {'done' if status == 0 else 'refused'}"] += 1
        self.note(f"  {name} -> {status}" + (f" {self.context.error()}" if status else ""))
        return status == 0

    def call(self, name: str, *args: Any) -> Callable[[], int]:
        return lambda: int(getattr(self.lib, name)(self.laq, *args))

    def fresh(self, n: int) -> list[int]:
        return [FIRST_TOKEN + self.rng.randrange(N_TOKENS) for _ in range(n)]

    def disturb(self) -> bool:
        """Perhaps let what comes next fail or be aborted."""
        n = self.rng.choice([1, 1, 1, 2, 2, 3, 4, 6, 9])
        how = self.rng.choices(["", "fault", "abort"], [8, 1, 1])[0]
        if how == "fault":
            self.lib.laq_test_fail(n)
        elif how == "abort":
            self.context.abort_in = self.rng.randint(0, 40)
        if how:
            self.note(f"  {how} {n if how == 'fault' else self.context.abort_in}")
        return bool(how)

    def calm(self) -> None:
        self.lib.laq_test_fail(0)
        self.context.abort_in = None

    def decode(self, wanted: Sequence[tuple[int, Sequence[int]]], alone: bool = True) -> int:
        """wanted: (sequence, its next tokens). What was aborted may be there in part."""
        rows = [
            (token, self.known[s].n_tokens + i, s)
            for s, tokens in wanted
            for i, token in enumerate(tokens)
        ]
        self.note(f"  decode {[(s, len(tokens)) for s, tokens in wanted]}")
        disturbed = self.disturb()
        n_free = self.n_free(wanted[0][0])
        status = self.context.decode(rows)
        self.calm()
        self.counts[f"decode: {status}"] += 1
        error = self.context.error()
        self.note(f"  decode -> {status} {error if status == 1 else ''}")
        assert status in (0, 1, 2), f"llama_decode returned {status}"
        assert status != 2 or disturbed, "nothing was aborted"
        if status == 1 and not disturbed and not error and self.setup.unified:
            assert n_free < len(rows), "there were cells"
        for s, tokens in wanted:
            # an eviction that waited came before the tokens
            self.known[s].n_intact = int(self.context.stats(s).n_intact)
            n = len(tokens) if status == 0 else 0
            if status == 2:
                n = max(0, self.context.stats(s).n_tokens - self.known[s].n_tokens)
            self.known[s].append(tokens[:n], alone)
        self.check_decoded(*(s for s, _ in wanted))
        return status

    def n_free(self, s: int) -> int:
        stats = self.context.stats(s)
        if self.setup.unified:
            return int(stats.n_cells - stats.n_used)
        return int(stats.n_cells // N_SEQS - stats.n_resident)

    # reading and generating

    def do_read(self, s: int) -> None:
        """A prompt, perhaps not to its end."""
        n = self.rng.choice([1, 2, 5, 12, 30, 60, 100, 160, 300])
        left, n_chunk = self.fresh(n), self.ffi.new("uint32_t *")
        self.note(f"  sequence {s} reads {n}")
        while left:
            if not self.prompt_next(s, left, n_chunk):
                return
            chunk, left = left[: n_chunk[0]], left[n_chunk[0] :]
            if self.decode([(s, chunk)], alone=False) or self.rng.random() < 0.06:
                return
        self.end_prompt(s)

    def prompt_next(self, s: int, left: list[int], n_chunk: Any) -> bool:
        """If it is disturbed, the sequence may end before the tokens that are read again."""
        known = self.known[s]
        if self.setup.archive:
            known.read_again()
        disturbed = self.disturb()
        status = self.call("laq_prompt_next", s, left, len(left), n_chunk)()
        self.calm()
        n = int(self.context.stats(s).n_tokens)
        known.alone = N_CTX if status == 0 else known.alone
        if disturbed and status and n < known.n_tokens:
            assert n >= self.seen[s].n_intact, "tokens that were evicted are gone"
            self.counts["prompt_next: disturbed and shortened"] += 1
            known.remove(n)
        too_long = known.n_tokens + len(left) > N_CTX
        assert not (too_long and status == 0), "positions beyond n_ctx"
        done = self._done("prompt_next", status)
        self.check_decoded(s)
        return done

    def do_end_prompt(self, s: int) -> None:
        self.end_prompt(s)

    def end_prompt(self, s: int) -> None:
        self.note(f"  prompt of {s} ends")
        self.disturb()
        status = self.call("laq_prompt_end", s)()
        self.calm()
        self._done("prompt_end", status)
        self.check(*ALL)

    def do_decode(self, s: int) -> None:
        """Tokens of one or of several sequences in a batch."""
        others = self.rng.sample(ALL, self.rng.choice([0, 0, 1, 3, 7]))
        wanted = []
        for one in dict.fromkeys([s, *others]):
            n = min(self.rng.choice([1, 1, 1, 2, 3]), N_CTX - self.known[one].n_tokens)
            if n > 0:
                wanted.append((one, self.fresh(n)))
        if wanted:
            self.decode(wanted)

    def do_answer(self, s: int) -> None:
        """Tokens one by one."""
        for _ in range(self.rng.randint(2, 14)):
            if self.known[s].n_tokens == N_CTX or self.decode([(s, self.fresh(1))]):
                return

    def do_decode_many(self, s: int) -> None:
        """As a program that does not call laq_prompt_next()."""
        n = min(self.rng.randint(4, N_BATCH), N_CTX - self.known[s].n_tokens)
        if n > 0:
            self.decode([(s, self.fresh(n))])

    # evicting and recalling

    def do_flush(self, s: int) -> None:
        if self.attempt(f"flush {s}", self.call("laq_flush", s)):
            self.check(s)
            assert not self.seen[s].waits
        else:
            self.check()

    def do_evict(self, s: int) -> None:
        n_keep, n = self.rng.choice([5, 20, 24, 32, 40, 60]), self.seen[s].kept.shape[-1]
        if self.attempt(f"evict {s} to {n_keep}", self.call("laq_evict", s, n_keep)):
            self.check(s)
            assert self.seen[s].kept.shape[-1] == min(n, n_keep)
        else:
            self.check()

    def do_recall(self, s: int) -> None:
        if self.attempt(f"recall {s}", self.call("laq_recall", s)):
            assert self.setup.archive
            self.check(s)
        else:
            self.check()

    def do_pin(self, s: int) -> None:
        first = self.rng.randrange(60)
        spans = self.rng.choice([(), ((first, first + 3),), ((first, first + 40),)])
        array = self.ffi.new("struct laq_span[]", [list(span) for span in spans])
        if self.attempt(f"pin {s} {spans}", self.call("laq_set_pinned", s, array, len(spans))):
            self.known[s].pin(spans, self.seen[s])
        self.check()

    def do_set_params(self, s: int) -> None:
        self.budget = self.rng.choice([BUDGET, 28])
        params = self.context.params(
            n_kv_budget=self.budget,
            lookahead=self.rng.randrange(2),
            value_fit=self.setup.value_fit * self.rng.randrange(2),
            recall=self.rng.randrange(2),
            n_follow=self.rng.choice([0, 32]),
        )
        waits = any(seen.waits for seen in [*self.seen, *(p[2] for p in self.parked)])
        done = self.attempt("set_params", self.call("laq_set_params", params))
        assert done != waits
        if done:
            for known in [*self.known, *(p[1] for p in self.parked)]:
                known.spans = ()
                known.pinned[:] = False
        self.check()

    def close(self) -> None:
        self.context.close()
