"""Calls on a Llama and on its numpy model, one rule for each, for random sequences of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from laq_gguf.errors import LaqArgumentError, LaqContextFullError, LaqError, LaqStateError
from property.mirror import Mirror
from property.setups import Setup
from reference.saved import snapshot

few = st.integers(1, 12)
names = st.sampled_from(["a", "b"])
lengths = st.one_of(few, st.integers(1, 400))


class CacheMachine(RuleBasedStateMachine):
    """Calls on one Llama; the mirror makes each on the model, too, and compares them."""

    native: Any
    setup: Setup
    path: Path  # of the model
    folder: Path
    foreign: tuple[Any, ...] = ()  # states that do not fit, made when they are needed

    states: Bundle[Any] = Bundle("states")
    sessions: Bundle[Any] = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        # restored by `machines`
        os.environ["LAQ_COMPACT"] = self.setup.compaction
        os.environ["LAQ_CELLS"] = "device" if self.setup.on_device else "host"
        self.llm = self.setup.open(self.path)
        assert self.llm.kv_stats().compaction == self.setup.compaction
        self.mirror = Mirror(
            self.llm,
            self.native,
            self.path,
            self.setup.params,
            self.setup.tolerance,
            self.setup.recall,
            self.setup.on_device,
        )
        self.cache, self.rng = self.mirror.cache, np.random.default_rng(0)
        self.has_gap = False
        self.parked: dict[str, Any] = {}  # what the mirror needs to resume them, by name
        self.file_names = (self.folder / f"{i}.session" for i in count())

    def teardown(self) -> None:
        self.llm.close()

    @invariant()
    def both_count_alike(self) -> None:
        assert self.llm.n_tokens == self.cache.n_tokens
        chats = {name: held["cache"]["n_tokens"] for name, held in self.parked.items()}
        assert {name: chat.n_tokens for name, chat in self.llm.parked().items()} == chats

    def fresh(self, n: int) -> list[int]:
        return self.rng.integers(3, self.llm.n_vocab(), n).tolist()

    def attempt(
        self, call: Callable[[], Any], *, is_full: bool = False, is_gone: bool = False
    ) -> None:
        """Call; it has to be refused where n_ctx is full or what it needs is gone, and may be
        where the model refuses as well."""
        self.mirror.refused = False
        try:
            call()
        except LaqContextFullError:
            assert is_full
        except LaqStateError:
            assert is_gone
        except RuntimeError:
            if not self.mirror.refused:
                raise
            self.llm._pinned_prefix = ()  # perhaps that was it
            # llama_cpp knows nothing of a gap, and tokens at a position inside one are refused
            assert self.has_gap or self.llm.n_tokens == self.cache.n_tokens
            self.llm.n_tokens = self.cache.n_tokens
        else:
            assert not is_full and not is_gone, "it should have been refused"
        self.mirror.check()

    # reading and generating

    @rule(n=lengths)
    def read(self, n: int) -> None:
        is_full = self.llm.n_tokens + n > self.llm.n_ctx()
        self.attempt(lambda: self.llm.eval(self.fresh(n)), is_full=is_full)

    @rule(n=few)
    def decode(self, n: int) -> None:
        for token in self.fresh(n):
            is_full = self.llm.n_tokens + 1 > self.llm.n_ctx()
            self.attempt(lambda token=token: self.llm.eval([token]), is_full=is_full)

    @rule(n=st.integers(1, 200))
    def decode_in_batches(self, n: int) -> None:
        """As a program that does not call laq_prompt_next: only what is free and what lies above
        the budget can be had."""
        import llama_cpp

        tokens = self.fresh(min(n, self.llm.n_ctx() - self.llm.n_tokens))
        self.attempt(lambda: llama_cpp.Llama.eval(self.llm, tokens))

    @rule(n_cut=st.integers(0, 80), n_new=lengths, n_answer=few)
    def generate(self, n_cut: int, n_new: int, n_answer: int) -> None:
        """The conversation without its last n_cut tokens goes on with n_new others."""
        llm = self.llm
        prompt = llm._input_ids[: max(0, llm.n_tokens - n_cut)].tolist() + self.fresh(n_new)

        def answer() -> None:
            with closing(llm.generate(prompt, temp=0.0)) as tokens:
                next(tokens)
                for _ in range(n_answer):
                    is_full = llm.n_tokens + 1 > llm.n_ctx()
                    try:
                        next(tokens)
                    except LaqContextFullError:
                        assert is_full
                        return

        self.attempt(answer, is_full=len(prompt) > llm.n_ctx())

    @rule(n=lengths)
    def ask(self, n: int) -> None:
        """Make room for a prompt that does not come."""
        self.attempt(lambda: self.llm._laq.prompt_next(np.array(self.fresh(n), np.int32)))
        self.llm._requires_eval = True

    @precondition(lambda self: self.mirror.logits is not None)
    @rule()
    def prompt_end(self) -> None:
        self.attempt(self.llm._laq.prompt_end)

    @rule(n=st.integers(0, 60))
    def pin(self, n: int) -> None:
        """The system turn of a chat: its beginning, if n tokens are there."""
        self.llm._pinned_prefix = self.llm._input_ids[:n].tolist()

    # evicting and removing

    @rule(n_keep=st.one_of(st.integers(0, 60), st.integers(0, 300)))
    def evict(self, n_keep: int) -> None:
        self.attempt(lambda: self.mirror.evict(n_keep))

    @rule()
    def recall(self) -> None:
        self.attempt(self.mirror.recall)

    @rule()
    def flush(self) -> None:
        self.attempt(self.llm._laq.flush)

    @rule(n=st.integers(0, 120), n_new=lengths)
    def go_back(self, n: int, n_new: int) -> None:
        """n_tokens is set back by n, as llama_cpp's users do it."""
        before = self.llm.n_tokens
        self.llm.n_tokens = back = max(0, before - n)
        is_full = back + n_new > self.llm.n_ctx()
        is_gone = not is_full and 0 < back < min(before, self.cache.n_intact)
        self.attempt(lambda: self.llm.eval(self.fresh(n_new)), is_full=is_full, is_gone=is_gone)
        self.llm.n_tokens = self.cache.n_tokens

    @rule(
        begin=st.sampled_from(["end", "intact", "first"]),
        offset=st.one_of(st.just(0), st.integers(-60, 20)),
        n=st.one_of(st.none(), st.integers(1, 60)),
    )
    def remove(self, begin: str, offset: int, n: int | None) -> None:
        cache = self.cache
        p0 = {"end": cache.n_tokens, "intact": cache.n_intact, "first": 0}[begin] + offset
        p1 = -1 if n is None else p0 + n
        if p0 <= 0 <= p1 < cache.n_tokens and cache.n_intact == 0:
            return  # a sequence without its beginning may go on anywhere once the rest is gone, too
        self.has_gap |= 0 <= p1 < cache.n_tokens
        self.llm._ctx.kv_cache_seq_rm(0, p0, p1)
        self.llm.n_tokens, self.llm._requires_eval = cache.n_tokens, True

    @rule()
    def reset(self) -> None:
        self.llm.reset()

    # saving and loading

    @rule(target=states)
    def save(self) -> Any:
        state = self.llm.save_state(), snapshot(self.cache)
        self.mirror.check()
        return state

    @rule(state=states)
    def load(self, state: Any) -> None:
        self.llm.load_state(state[0])
        self.mirror.restore(state[1])

    @rule(target=sessions)
    def save_session(self) -> Any:
        path = next(self.file_names)
        self.llm.save_session(path)
        self.mirror.check()
        return path, snapshot(self.cache)

    @rule(target=sessions)
    def save_session_without_archive(self) -> Any:
        path = next(self.file_names)
        self.llm.save_session(path, archive=False)
        self.mirror.check()
        return path, snapshot(self.cache, archive=False)

    @rule(session=sessions)
    def load_session(self, session: Any) -> None:
        self.llm.load_session(session[0])
        self.mirror.restore(session[1])

    @rule(i=st.integers(0, 2))
    def load_what_does_not_fit(self, i: int) -> None:
        if not self.foreign:
            type(self).foreign = foreign_states(self.setup, self.path)
        state = self.foreign[i]
        is_full = state.n_tokens > self.llm.n_ctx()
        self.attempt(lambda: self.llm.load_state(state), is_full=is_full, is_gone=not is_full)
        if not is_full:
            self.mirror.tokens = {}

    @rule(state=states, share=st.floats(0, 1, exclude_max=True))
    def load_a_truncated_state(self, state: Any, share: float) -> None:
        cut = copy.copy(state[0])
        cut.llama_state = cut.llama_state[: int(share * len(cut.llama_state))]
        self.attempt(lambda: self.llm.load_state(cut), is_gone=True)
        self.mirror.tokens = {}

    # parking

    @rule(name=names)
    def park(self, name: str) -> None:
        if name in self.parked or self.cache.n_tokens == 0:
            with pytest.raises(LaqError, match=r"already|is empty"):
                self.llm.park(name)
        else:
            self.parked[name] = self.mirror.park(name)
        self.mirror.check()

    @rule(name=names)
    def resume(self, name: str) -> None:
        if name in self.parked and self.cache.n_tokens > 0:
            self.llm.reset()
        if name in self.parked:
            self.mirror.resume(name, self.parked.pop(name))
        else:
            with pytest.raises(LaqArgumentError, match="parked"):
                self.llm.resume(name)
        self.mirror.check()

    @precondition(lambda self: self.cache.n_tokens > 0 and self.parked)
    @rule()
    def resume_into_another_chat(self) -> None:
        with pytest.raises(LaqStateError, match="is in the cache"):
            self.llm.resume(next(iter(self.parked)))
        self.mirror.check()

    @precondition(lambda self: self.parked)
    @rule()
    def forget(self) -> None:
        name = next(iter(self.parked))
        self.llm.forget(name)
        del self.parked[name]
        self.mirror.check()

    # what changes nothing

    @rule(name=st.sampled_from(["seq_add", "seq_div", "seq_keep"]))
    def call_in_vain(self, name: str) -> None:
        import llama_cpp

        arguments = {"seq_add": (0, 0, -1, 3), "seq_div": (0, 0, -1, 2), "seq_keep": (0,)}[name]
        memory = llama_cpp.llama_get_memory(self.llm.ctx)
        getattr(llama_cpp, f"llama_memory_{name}")(memory, *arguments)
        self.mirror.check()

    @rule(i=st.integers(0, 9))
    def call_wrongly(self, i: int) -> None:
        ffi, lib = self.native.ffi, self.native.lib
        laq, null = self.llm._laq._laq, self.native.ffi.NULL
        floats, ints, n = ffi.new("float[4]"), ffi.new("int32_t[4]"), ffi.new("uint32_t *")
        call = (
            lambda: lib.laq_flush(laq, 1),
            lambda: lib.laq_evict(laq, -1, 99),
            lambda: lib.laq_prompt_next(laq, 0, ints, 0, n),
            lambda: lib.laq_prompt_next(laq, 0, ints, 4, null),
            lambda: lib.laq_set_pinned(laq, 0, null, 1),
            lambda: lib.laq_kept_positions(laq, 0, ints, 3),
            lambda: lib.laq_get_keys(laq, 0, 0, floats, 3),
            lambda: lib.laq_get_queries(laq, 0, 0, ints, floats, 3),
            lambda: lib.laq_get_scores(laq, 0, 99, floats, 4, n),
            lambda: lib.laq_get_stats(laq, 0, null),
        )[i]
        assert call() == lib.LAQ_STATUS_INVALID_ARGUMENT
        assert ffi.string(lib.laq_last_error())
        self.mirror.check()


def foreign_states(setup: Setup, path: Path) -> tuple[Any, ...]:
    """Of a cache with more cells, of one with another ring of queries, of a longer conversation."""
    import llama_cpp

    states = []
    for n_tokens, changes in (
        (700, {"kv_staging": 700, "n_ctx": 1024}),
        (20, {"lookahead_size": 1}),
        (1030, {"kv_staging": 1100, "n_ctx": 1280}),
    ):
        with closing(setup.open(path, **changes)) as llm:
            llama_cpp.Llama.eval(llm, np.arange(n_tokens) % 300 + 3)
            states.append(llm.save_state())
    return tuple(states)
