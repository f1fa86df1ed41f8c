"""answer() follows a path and answers freely in one pass: compared with two passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from laq_gguf.bench.answers import COUNTERS, added, answer

N_VOCAB, END = 12, 11
PROMPT = [1, 2, 3]


class FakeDecoder:
    """A model whose logits are a function of its whole history, and of the cache being evicted.

    n_exact None: evicted at once. n: evicted before the token after the first n of a reply, for
    good: going back does not bring anything back.
    """

    def __init__(self, seed: int, *, n_exact: int | None = None, can_rewind: bool = True) -> None:
        self.seed, self.n_exact, self.can_rewind = seed, n_exact, can_rewind
        self.n_starts = 0
        self.start()

    def start(self) -> None:
        self.history, self.n_starts = [*PROMPT, self.seed], self.n_starts + 1
        self.evicted = self.n_exact is None

    @property
    def n_tokens(self) -> int:
        return len(self.history)

    def step(self, token: int) -> None:
        if self.n_exact is not None and self.n_tokens - len(PROMPT) - 1 >= self.n_exact:
            self.evicted = True
        self.history.append(token)

    def decode(self, tokens: Sequence[int]) -> np.ndarray:
        rows = np.empty((len(tokens), N_VOCAB), np.float32)
        for i, token in enumerate(tokens):
            self.step(token)
            rows[i] = self.logits()
        return rows

    def rewind(self, n_tokens: int) -> bool:
        if self.can_rewind:
            self.history = self.history[:n_tokens]
        return self.can_rewind

    def is_end(self, token: int) -> bool:
        return token == END

    def logits(self) -> np.ndarray:
        seed = hash((tuple(self.history), self.evicted)) % 2**32
        return np.random.default_rng(seed).normal(size=N_VOCAB).astype(np.float32)


def freely(decoder: FakeDecoder, n: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < n and END not in tokens:
        if tokens:
            decoder.step(tokens[-1])
        tokens.append(int(decoder.logits().argmax()))
    return tokens


def along(decoder: FakeDecoder, path: Sequence[int]) -> np.ndarray:
    return np.concatenate([decoder.logits()[None], decoder.decode(path[:-1])])


@pytest.mark.parametrize(
    ("n_exact", "stepwise", "can_rewind"),
    [
        (None, False, True),
        (None, False, False),
        (4, True, True),
        (4, True, False),
        (4, False, False),
    ],
)
def test_answer_equals_two_passes(n_exact: int | None, stepwise: bool, can_rewind: bool) -> None:
    n_left = n_whole = 0
    for seed in range(60):
        own = freely(FakeDecoder(seed, n_exact=n_exact), 6)
        # paths that are the cache's own for a while, for good, or not at all
        path = [*own[: seed % 7], *([3, 1, 4] if seed % 2 and END not in own else [])][:6] or [5]
        decoder = FakeDecoder(seed, n_exact=n_exact, can_rewind=can_rewind)
        got = answer(decoder, path, 10, decoder.start, stepwise=stepwise)
        assert got.tokens == freely(FakeDecoder(seed, n_exact=n_exact), 10)
        np.testing.assert_array_equal(got.logits, along(FakeDecoder(seed, n_exact=n_exact), path))
        n_left += decoder.n_starts == 2
        n_whole += got.tokens[: len(path)] == path
    assert n_whole > 5 and (n_left == 0) == (can_rewind and not stepwise)


def test_max_new_tokens_is_kept() -> None:
    for seed in range(10):
        for n in (0, 1, 3):
            decoder = FakeDecoder(seed)
            reply = answer(decoder, [5, 6, 7, 8], n, decoder.start)
            assert len(reply.tokens) <= n and len(reply.logits) == 4
            assert reply.tokens == freely(FakeDecoder(seed), n)


def test_a_cache_without_counters_adds_nothing() -> None:
    assert added(None, None) == {}
    before, after = dict.fromkeys(COUNTERS, 1), dict.fromkeys(COUNTERS, 4)
    assert added(before, after) == dict.fromkeys(COUNTERS, 3)
