"""How a cache answers: freely, and led along the full cache's own answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.prompts import Prompt

# counters of KvStats that add up: a row shows what its own prompt added
COUNTERS = (
    "n_evictions", "n_probe", "n_pseudo",
    "ms_probe", "ms_lookahead", "ms_score", "ms_select", "ms_compact",
    "n_recalls", "n_recalls_skipped", "n_recalled", "n_reread", "ms_recall",
)  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """What a cache replied.

    Attributes:
        tokens: greedy, an end token included.
        logits: (n, n_vocab) along the reference.
        cost: ms_prefill (time to the first token), and of an evicting cache its COUNTERS.
    """

    tokens: list[int]
    logits: npt.NDArray[np.float32]
    cost: dict[str, Any] = field(default_factory=dict)


class _Reading:
    """One reading of a prompt, and what it cost until `end`."""

    def __init__(self, decoder: Decoder, prompt: Prompt, shared: list[int]) -> None:
        self._decoder, self._before = decoder, decoder.stats()
        start = time.perf_counter()
        decoder.prefill(prompt.tokens)
        self._ms = 1e3 * (time.perf_counter() - start)
        for token in [*prompt.lead, *shared]:
            decoder.step(token)

    def end(self) -> dict[str, Any]:
        return {"ms_prefill": self._ms, **added(self._before, self._decoder.stats())}


def added(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any]:
    """What the COUNTERS rose by; nothing for a cache that has none."""
    if before is None or after is None:
        return {}
    return {name: after[name] - before[name] for name in COUNTERS}


def answer(
    decoder: Decoder,
    prompt: Prompt,
    reference: Reply | None,
    *,
    max_new_tokens: int,
    n_compare: int,
    n_exact: int,
) -> Reply:
    """Follow the reference for up to `n_compare` tokens, then answer freely.

    As long as the greedy token is the reference's, following it and answering freely are the same;
    at the first other token the cache goes back there. Without a reference: a free answer.

    Args:
        n_exact: length of a reply, lead included, before which the cache is not yet evicted and to
            which it cannot go back: the prompt is read again then.

    Returns:
        The free answer, and logits along the reference (along itself without one). Where the
        prompt was read twice, the cost is that of the first reading that evicted.
    """
    reading, costs = _Reading(decoder, prompt, []), []
    start = decoder.n_tokens
    rows: list[npt.NDArray[np.float32]] = []
    tokens: list[int] = []
    if reference is not None:
        tokens, rows = follow(decoder, reference.tokens[:n_compare])
        shared = tokens[:-1]
        if decoder.n_tokens > start + len(shared):
            can_go_back = len(prompt.lead) + len(shared) >= n_exact
            if not (can_go_back and decoder.rewind(start + len(shared))):
                costs.append(reading.end())
                reading = _Reading(decoder, prompt, shared)
    while not tokens or (len(tokens) < max_new_tokens and not decoder.is_end(tokens[-1])):
        if tokens:
            decoder.step(tokens[-1])
        if reference is None and len(rows) < n_compare:
            rows.append(decoder.logits().copy())
        tokens.append(int(decoder.logits().argmax()))
    costs.append(reading.end())
    cost = next((c for c in costs if c.get("n_evictions")), costs[-1])
    return Reply(tokens, np.stack(rows), cost)


def follow(decoder: Decoder, path: list[int]) -> tuple[list[int], list[npt.NDArray[np.float32]]]:
    """Decode along `path`: the greedy tokens up to the first that leaves it, the logits of all."""
    rows = []
    greedy: list[int] = []
    for i in range(len(path)):
        if i:
            decoder.step(path[i - 1])
        rows.append(decoder.logits().copy())
        if greedy == path[:i]:
            greedy.append(int(rows[-1].argmax()))
    return greedy, rows


def read(decoder: Decoder, conversation: list[int], *, is_first: bool) -> int:
    """Read what of a conversation was not decoded yet; how many tokens that was."""
    if is_first:
        decoder.prefill(conversation)
        return len(conversation)
    new = conversation[decoder.n_tokens :]
    decoder.extend(new)
    return len(new)


def freely(
    decoder: Decoder, first: npt.NDArray[np.float32], n: int
) -> tuple[list[int], list[npt.NDArray[np.float32]]]:
    """Greedy tokens, an end token included, at most `n`; the last one is not decoded.

    Args:
        first: logits of the first one.
    """
    rows, tokens = [first], [int(first.argmax())]
    while len(tokens) < n and not decoder.is_end(tokens[-1]):
        decoder.step(tokens[-1])
        rows.append(decoder.logits().copy())
        tokens.append(int(rows[-1].argmax()))
    return tokens, rows


def led(
    decoder: Decoder, first: npt.NDArray[np.float32], path: Sequence[int]
) -> npt.NDArray[np.float32]:
    """Decode along `path`, but for its last token: logits (n, n_vocab), one row a token."""
    rows = [first]
    for token in path[:-1]:
        decoder.step(token)
        rows.append(decoder.logits().copy())
    return np.stack(rows)


def without_end(decoder: Decoder, tokens: Sequence[int]) -> list[int]:
    """A reply as it stands in a conversation, where the template writes its end."""
    return list(tokens[:-1] if decoder.is_end(tokens[-1]) else tokens)


def reply_text(decoder: Decoder, tokens: list[int]) -> str:
    """A reply's words, without the token that ends it."""
    return decoder.text(without_end(decoder, tokens))
