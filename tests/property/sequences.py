"""Random operations on eight sequences of one context: nothing is lost, and nothing is mixed.

Here are those that remove, copy, park and save; the others are in `Operations`.
"""

from __future__ import annotations

from typing import Any

from property.conversation import POSITIONS, Conversation
from property.operations import ALL, Operations
from property.several import N_CTX, N_SEQS

#: how often each operation is made
WEIGHTS = {
    "do_answer": 12,
    "do_clear": 1,
    "do_copy": 4,
    "do_decode": 14,
    "do_decode_many": 3,
    "do_end_prompt": 1,
    "do_evict": 6,
    "do_flush": 4,
    "do_forget": 1,
    "do_keep": 1,
    "do_load": 5,
    "do_load_all": 1,
    "do_load_damaged": 2,
    "do_park": 5,
    "do_pin": 3,
    "do_read": 16,
    "do_recall": 6,
    "do_remove": 10,
    "do_resume": 6,
    "do_save": 5,
    "do_save_all": 1,
    "do_set_params": 2,
    "do_shift": 1,
}


class Sequences(Operations):
    """All operations; `run` makes random ones."""

    def run(self, n: int) -> None:
        """n operations."""
        for _ in range(n):
            name = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            self.note(name)
            self.counts["operations"] += 1
            getattr(self, name)(self.rng.randrange(N_SEQS))
        if self.setup.archive:
            for s in ALL:
                self.known[s].check_archive(s, self.context, self.twin, POSITIONS)

    # removing

    def do_remove(self, s: int) -> None:
        """The end, a part, or all; what lies below the intact suffix is refused."""
        known, n = self.known[s], self.known[s].n_tokens
        p0 = self.rng.choice([0, known.n_intact, n - 1, n - 5, n - 30, n // 2, known.n_intact - 3])
        p0 = max(0, p0)
        p1 = self.rng.choice([-1, -1, -1, p0 + 1, p0 + 10])
        end = N_CTX if p1 < 0 else p1
        done = self.context.api.llama_memory_seq_rm(self.context.memory, s, p0, p1)
        self.note(f"  remove [{p0}, {p1}) of {s}: {done}")
        self.counts[f"remove: {done}"] += 1
        if p0 >= min(end, n):
            assert done
        elif p0 == 0 and end >= n:
            assert done
            known.clear()
        else:
            assert done == (p0 >= known.n_intact)
            if done:
                known.remove(p0, end)
        self.check(s)

    def do_keep(self, s: int) -> None:
        """The other sequences are gone."""
        if not self.setup.unified:
            return  # of the streams, one is looked at
        self.context.api.llama_memory_seq_keep(self.context.memory, s)
        for other in ALL:
            if other != s:
                self.known[other].clear()
        self.check(*(other for other in ALL if other != s))

    def do_clear(self, s: int) -> None:
        self.context.api.llama_memory_clear(self.context.memory, bool(self.rng.randrange(2)))
        for known in self.known:
            known.clear()
        self.shares = False
        self.check(*ALL)

    def do_shift(self, s: int) -> None:
        """Positions are not moved."""
        api, memory = self.context.api, self.context.memory
        api.llama_memory_seq_add(memory, s, 0, -1, 3)
        api.llama_memory_seq_div(memory, s, 0, -1, 2)
        self.check()

    # copying

    def do_copy(self, s: int) -> None:
        """Into an empty sequence; refused once there was an eviction."""
        to = self.rng.randrange(N_SEQS)
        src, dst = self.known[s], self.known[to]
        if to == s or dst.n_tokens > 0 or src.n_tokens == 0 or src.n_tokens == N_CTX:
            return
        n = src.n_tokens
        if self.setup.unified:
            n = self.rng.choice([n, n, (n + 1) // 2])
        self.context.api.llama_memory_seq_cp(
            self.context.memory, s, to, 0, n if self.setup.unified else -1
        )
        self.note(f"  copy [0, {n}) of {s} to {to}")
        if src.n_intact > 0:
            self.check()
            return
        self.shares = self.setup.unified
        dst.tokens[:n], dst.rows[:, :, :, :n] = src.tokens[:n], src.rows[:, :, :, :n]
        dst.known[:n] = src.known[:n]
        if self.setup.unified:
            self.check(to)
            dst.pin(dst.spans, self.seen[to])
        else:
            # llama_decode() copies the rows
            status = self.decode([(to, self.fresh(1))])
            if status:
                self.check(to)

    # parking

    def do_park(self, s: int) -> None:
        known, out = self.known[s], self.ffi.new("struct laq_parked **")
        if len(self.parked) == 5:
            return
        if self.attempt(f"park {s}", self.call("laq_park", s, out)):
            assert known.n_tokens > 0
            self.parked.append((out[0], known.copy(), self.seen[s]))
            known.clear()
            self.check(s)
        else:
            self.check()
            assert known.n_tokens == 0, self.context.error()

    def do_resume(self, s: int) -> None:
        """Perhaps into another sequence."""
        if not self.parked:
            return
        i = self.rng.randrange(len(self.parked))
        handle, known, seen = self.parked[i]
        n_free, is_empty = self.n_free(s), self.known[s].n_tokens == 0
        if self.attempt(f"resume {s}", self.call("laq_resume", s, handle)):
            assert is_empty
            del self.parked[i]
            self.known[s] = known
            self.check(s)
            now = self.seen[s]
            assert (now.kept == seen.kept).all() and (now.rows == seen.rows).all()
            assert now.waits == seen.waits
        else:
            self.check()
            assert not is_empty or n_free < seen.kept.shape[-1], self.context.error()

    def do_forget(self, s: int) -> None:
        if self.parked:
            handle, _, _ = self.parked.pop(self.rng.randrange(len(self.parked)))
            assert self.attempt("forget", self.call("laq_forget", handle))
            self.check()

    # saving and loading

    def do_save(self, s: int) -> None:
        """With the archive or without."""
        known, whole = self.known[s].copy(), self.rng.random() < 0.8
        self.lib.laq_save_archive(self.laq, whole)
        self.note(f"  save {s}" + ("" if whole else " without its archive"))
        data = self.context.save(s)
        self.lib.laq_save_archive(self.laq, True)
        assert data, "the state could not be saved"
        known.lossy |= not whole and known.n_intact > 0
        self.states = [*self.states[-5:], (data, known)]
        self.check()

    def do_load(self, s: int) -> None:
        """Into the same sequence or another. Without cells for it, the sequence is empty."""
        if self.states:
            data, known = self.rng.choice(self.states)
            self._load(s, data, [known])

    def do_save_all(self, s: int) -> None:
        data = self.context.save(-1)
        assert data, "the state could not be saved"
        self.all_states = [*self.all_states[-1:], (data, [known.copy() for known in self.known])]
        self.check()

    def do_load_all(self, s: int) -> None:
        if self.all_states:
            data, known = self.rng.choice(self.all_states)
            self.shares = self.setup.unified
            self._load(-1, data, known)

    def do_load_damaged(self, s: int) -> None:
        """A state that ends early."""
        if self.states:
            data, _ = self.rng.choice(self.states)
            self._load(s, data[: self.rng.randrange(len(data))], [])

    def _load(self, s: int, data: bytes, known: list[Conversation]) -> None:
        """known: what is there then; none: the state is damaged."""
        which = list(ALL) if s < 0 else [s]
        done = False
        if self.rng.random() < 0.3:
            n = self.rng.choice([1, 1, 1, 2, 2, 3, 4, 6, 9])
            self.note(f"  load {s} with fault {n}")
            self.lib.laq_test_fail(n)
            done = 0 < self.context.load(s, data) == len(data)
            self.lib.laq_test_fail(0)
            if not done:
                self._refused(which)
        done = done or 0 < self.context.load(s, data) == len(data)
        self.note(f"  load {s}: {done}")
        self.counts[f"load: {done}"] += 1
        if not done:
            self._refused(which)
            n_cells = 0 if s < 0 or not known else int(held_cells(known[0]))
            assert s >= 0 or not known, "the whole state could not be loaded"
            assert not known or self.n_free(s) < n_cells, "there were cells"
            return
        assert known, "a state that ends early was loaded"
        for one, as_saved in zip(which, known, strict=True):
            spans = self.known[one].spans
            self.known[one] = as_saved.copy()
            seen = self.context.look(one)
            self.known[one].pin(spans, seen)
            self.n_lost[one] = seen.n_lost
        self.check(*which)

    def _refused(self, which: list[int]) -> None:
        """A sequence is as it was, or empty."""
        for one in which:
            seen: Any = self.context.look(one)
            if seen.n_tokens == 0:
                self.known[one].clear()
            else:
                assert seen.same(self.seen[one]), f"sequence {one} has changed"
        self.check(*which)


def held_cells(known: Conversation) -> int:
    """Cells that a saved sequence takes at most."""
    return int(known.exists.sum())
