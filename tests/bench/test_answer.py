"""answer() follows the full cache and answers freely in one pass: compared with two passes."""

from __future__ import annotations

import numpy as np
import pytest

from laq_gguf.bench.answers import COUNTERS, Reply, added, answer
from laq_gguf.bench.prompts import Prompt
from laq_gguf.bench.tasks import Example

N_VOCAB, END = 12, 11
EXAMPLE = Example("needles", "0", "", "", ("x",))


class FakeDecoder:
    """A model whose logits are a function of its whole history, and of the cache being evicted.

    n_exact None: evicted at once. n: evicted before the token after the first n of a reply, for
    good: going back does not bring anything back.
    """

    def __init__(self, seed: int, *, n_exact: int | None, can_rewind: bool) -> None:
        self.seed, self.n_exact, self.can_rewind = seed, n_exact, can_rewind
        self.history: list[int] = []
        self.n_prefills = 0
        self.n_evictions = 0

    @property
    def n_tokens(self) -> int:
        return len(self.history)

    def prefill(self, tokens: list[int]) -> int:
        self.history, self.n_prompt = list(tokens), len(tokens)
        self.evicted = self.n_exact is None
        self.n_prefills += 1
        self.n_evictions += self.evicted
        return int(self.logits().argmax())

    def step(self, token: int) -> None:
        if self.n_exact is not None and self.n_tokens - self.n_prompt >= self.n_exact:
            self.n_evictions += not self.evicted
            self.evicted = True
        self.history.append(token)

    def stats(self) -> dict:
        counters = {"n_evictions": self.n_evictions, "ms_score": 2.0 * self.n_evictions}
        return {**dict.fromkeys(COUNTERS, 0), **counters}

    def rewind(self, n_tokens: int) -> bool:
        if self.can_rewind:
            self.history = self.history[:n_tokens]
        return self.can_rewind

    def is_end(self, token: int) -> bool:
        return token == END

    def logits(self) -> np.ndarray:
        seed = hash((tuple(self.history), self.seed if self.evicted else 0)) % 2**32
        return np.random.default_rng(seed).normal(size=N_VOCAB).astype(np.float32)


def two_passes(
    decoder: FakeDecoder, prompt: Prompt, path: list[int] | None, n: int, n_compare: int
) -> Reply:
    """The definition: a pass led along `path`, and a free one from the prompt on."""
    rows, tokens = [], []
    for led in (True, False):
        decoder.prefill(prompt.tokens)
        for token in prompt.lead:
            decoder.step(token)
        for i in range(n_compare if led else n):
            if led and (path is None or i == len(path)):
                break
            if i:
                decoder.step(path[i - 1] if led else tokens[-1])
            if led:
                rows.append(decoder.logits())
            else:
                tokens.append(int(decoder.logits().argmax()))
                if tokens[-1] == END:
                    break
    return Reply(tokens, np.stack(rows) if rows else np.zeros((0, N_VOCAB), np.float32))


@pytest.mark.parametrize("can_rewind", [True, False])
@pytest.mark.parametrize("n_exact", [None, 4])
@pytest.mark.parametrize("lead", [[], [3, 1, 4, 1, 5]])
def test_answer_equals_two_passes(can_rewind: bool, n_exact: int | None, lead: list[int]) -> None:
    n_rewound = 0
    for seed in range(40):
        prompt = Prompt(EXAMPLE, [seed, 2, 3], lead)
        limits = {"max_new_tokens": 10, "n_compare": 6, "n_exact": n_exact or 0}
        full = answer(FakeDecoder(0, n_exact=None, can_rewind=True), prompt, None, **limits)
        decoder = FakeDecoder(seed % 3, n_exact=n_exact, can_rewind=can_rewind)
        got = answer(decoder, prompt, full, **limits)
        n_rewound += decoder.n_prefills == 1 and got.tokens != full.tokens
        want = two_passes(
            FakeDecoder(seed % 3, n_exact=n_exact, can_rewind=True), prompt, full.tokens, 10, 6
        )
        assert got.tokens == want.tokens
        np.testing.assert_array_equal(got.logits, want.logits)
        assert got.cost["ms_prefill"] >= 0
        if decoder.n_evictions:
            assert (got.cost["n_evictions"], got.cost["ms_score"]) == (1, 2.0)
    assert n_rewound > 0


def test_a_method_that_is_the_full_cache_reads_the_prompt_once() -> None:
    prompt = Prompt(EXAMPLE, [1, 2, 3], [])
    decoder = FakeDecoder(0, n_exact=None, can_rewind=False)
    limits = {"max_new_tokens": 10, "n_compare": 6, "n_exact": 0}
    full = answer(decoder, prompt, None, **limits)
    again = answer(decoder, prompt, full, **limits)
    assert decoder.n_prefills == 2
    assert again.tokens == full.tokens
    np.testing.assert_array_equal(again.logits, full.logits)
    assert len(full.logits) == min(6, len(full.tokens))


def test_max_new_tokens_is_kept() -> None:
    decoder = FakeDecoder(0, n_exact=None, can_rewind=True)
    limits = {"max_new_tokens": 3, "n_compare": 16, "n_exact": 0}
    for seed in range(10):
        assert len(answer(decoder, Prompt(EXAMPLE, [seed], []), None, **limits).tokens) <= 3


def test_a_cache_without_counters_adds_nothing() -> None:
    assert added(None, None) == {}
    before, after = dict.fromkeys(COUNTERS, 1), dict.fromkeys(COUNTERS, 4)
    assert added(before, after) == dict.fromkeys(COUNTERS, 3)
