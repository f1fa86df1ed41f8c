"""Other settings for a cache that is there: as if it had been made with them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration.decoding import greedy, open_llama, tokens_of
from laq_gguf.errors import LaqArgumentError, LaqNativeError, LaqStateError

PSEUDO = {"lookahead": "pseudo"}
SETTINGS: dict[str, dict[str, Any]] = {
    "laq++ pseudo": {"kv_budget": 64, **PSEUDO},
    "laq pseudo": {"kv_budget": 72, "kv_policy": "laq", **PSEUDO},
    "deferred, smaller windows": {"kv_budget": 48, "window_size": 4, "lookahead_size": 6},
    "snapkv": {"kv_budget": 64, "kv_policy": "snapkv"},
    "streaming, pinned": {"kv_budget": 64, "kv_policy": "streaming", "pinned": [(40, 50)]},
    "random": {"kv_budget": 64, "kv_policy": "random"},
    "full": {"kv_budget": 512, "kv_policy": "full"},
}
MADE = {"kv_budget": 512, "kv_staging": 512, "n_ctx": 512}


def begin(llm: Any, prompt: list[int]) -> list[int]:
    llm.reset()
    return greedy(llm, prompt, 20)


def test_as_if_made_with_them(tiny_gguf: Callable[..., Path]) -> None:
    """One cache takes all settings in turn; each time it does what a new one does."""
    path, prompt = tiny_gguf("llama"), tokens_of(300)
    llm = open_llama(path, **MADE)
    for name, settings in SETTINGS.items():
        # every setting that an earlier one changed is given, or it would stay
        defaults = {
            "kv_policy": "laq++", "lookahead": "deferred", "pinned": (),
            "window_size": 8, "lookahead_size": 8,
        }  # fmt: skip
        llm.set_eviction(**{**defaults, **settings})
        got = begin(llm, prompt)
        other = open_llama(path, **{**MADE, **settings})
        assert got == begin(other, prompt), name
        assert (llm.kept_positions() == other.kept_positions()).all(), name
        assert llm.kv_budget == other.kv_budget
        a, b = llm.kv_stats(), other.kv_stats()
        assert (a.n_resident, a.n_cells, a.kv_bytes) == (b.n_resident, b.n_cells, b.kv_bytes)
        assert b.n_evictions == (name != "full")


def test_nothing_is_allocated(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), **MADE)
    before = llm.kv_stats()
    for settings in SETTINGS.values():
        if "pinned" not in settings:
            llm.set_eviction(**settings)
            begin(llm, tokens_of(300))
            llm.set_eviction(kv_policy="laq++", lookahead="deferred")
    after = llm.kv_stats()
    for name in ("n_cells", "kv_bytes", "ring_bytes", "compute_bytes"):
        assert getattr(before, name) == getattr(after, name)


def test_a_state_is_the_beginning_of_many(tiny_gguf: Callable[..., Path]) -> None:
    """A prompt read with nothing evicted, saved, and then evicted in one way or another."""
    path, prompt = tiny_gguf("llama"), tokens_of(300)
    llm = open_llama(path, **MADE)
    llm.set_eviction(kv_policy="full")
    llm.eval(prompt[:-1])
    state = pickle.loads(pickle.dumps(llm.save_state()))
    for settings in ({"kv_policy": "snapkv"}, {"kv_policy": "laq++", **PSEUDO}):
        llm.load_state(state)
        llm.set_eviction(64, **settings)
        llm.eval(prompt[-1:])
        llm._laq.prompt_end()
        other = open_llama(path, **{**MADE, "kv_budget": 64, **settings})
        other.eval(prompt)
        assert llm.kv_stats().n_resident == 64
        assert (llm.kept_positions() == other.kept_positions()).mean() > 0.99


def test_what_cannot_be_changed_is_refused(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), **{**MADE, "kv_budget": 64})
    for settings, error, words in (
        ({"kv_budget": "1MiB"}, LaqArgumentError, "the cells are there already"),
        ({"kv_budget": 8}, LaqArgumentError, "are always kept"),
        ({"kv_budget": 600}, LaqArgumentError, "above n_ctx=512"),
        ({"kv_policy": "lak"}, LaqArgumentError, "kv_policy must be one of"),
        ({"lookahead": "position"}, LaqArgumentError, "lookahead must be one of"),
        ({"window_size": 50}, LaqNativeError, "need more queries than were allocated"),
        ({"lookahead_size": 9}, LaqNativeError, "need more queries than were allocated"),
    ):
        before = (llm.laq_config, llm.kv_budget)
        with pytest.raises(error, match=words):
            llm.set_eviction(**settings)
        assert (llm.laq_config, llm.kv_budget) == before
    with pytest.raises(TypeError, match="kv_polcy"):
        llm.set_eviction(kv_polcy="laq")
    # an eviction waits: it is made as it was to be
    llm.eval(tokens_of(300))
    assert llm.kv_stats().pending
    llm.set_eviction(kv_policy="snapkv")
    stats = llm.kv_stats()
    assert not stats.pending and stats.n_evictions == 1
    with pytest.raises(LaqStateError, match="kv_budget"):
        open_llama(tiny_gguf("llama")).set_eviction(64)


def test_a_cache_that_never_scores_cannot_begin_to(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), **{**MADE, "kv_policy": "streaming"})
    with pytest.raises(LaqNativeError, match="needs queries, which the one of laq_attach"):
        llm.set_eviction(64, kv_policy="laq++")
    llm.set_eviction(64, kv_policy="random")
    llm.eval(tokens_of(300))
    assert llm.kv_stats().n_resident == 64


def test_null_and_sizes_are_checked(native: Any, tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(tiny_gguf("llama"), **MADE)
    lib, ffi = native.lib, native.ffi
    params = ffi.new("struct laq_params *", lib.laq_default_params())
    params.n_kv_budget, params.n_lookahead = 64, 8
    laq = llm._laq._laq
    assert lib.laq_set_params(ffi.NULL, params) == lib.LAQ_STATUS_INVALID_ARGUMENT
    assert lib.laq_set_params(laq, ffi.NULL) == lib.LAQ_STATUS_INVALID_ARGUMENT
    assert lib.laq_set_params(laq, params) == lib.LAQ_STATUS_OK
    params.size = 0
    assert lib.laq_set_params(laq, params) == lib.LAQ_STATUS_INVALID_ARGUMENT
    params.size = ffi.sizeof("struct laq_params")
    params.n_ctx = 1024
    assert lib.laq_set_params(laq, params) == lib.LAQ_STATUS_INVALID_ARGUMENT
    params.n_ctx = 0
    params.lookahead = 2
    assert lib.laq_set_params(laq, params) == lib.LAQ_STATUS_INVALID_ARGUMENT
