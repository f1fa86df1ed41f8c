"""How a cache answers: freely, and led along the full cache's own answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from laq_gguf.bench.decoder import Decoder

# counters of KvStats that add up: a row shows what its own prompt added
COUNTERS = (
    "n_evictions", "n_probe", "n_pseudo",
    "ms_probe", "ms_lookahead", "ms_score", "ms_select", "ms_compact", "ms_fit",
    "n_recalls", "n_recalled", "n_reread", "ms_recall", "ms_reread",
)  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """What a cache replied.

    Attributes:
        tokens: greedy, an end token included.
        logits: (n, n_vocab) along the reference.
        cost: figures in ms and numbers of tokens, JSON values.
    """

    tokens: list[int]
    logits: npt.NDArray[np.float32]
    cost: dict[str, Any] = field(default_factory=dict)


def added(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any]:
    """What the COUNTERS rose by; nothing for a cache that has none."""
    if before is None or after is None:
        return {}
    return {name: after[name] - before[name] for name in COUNTERS}


def answer(
    decoder: Decoder,
    path: Sequence[int],
    max_new_tokens: int,
    again: Callable[[], None],
    *,
    stepwise: bool = False,
) -> Reply:
    """Follow a path, then answer freely.

    As long as the greedy token is the path's, following it and answering freely are the same; at
    the first other token the cache goes back there.

    Args:
        decoder: a prompt has been read, its last logits are there.
        path: at least one token.
        max_new_tokens: of the free answer; 0: there is none.
        again: brings the cache back to where the prompt ends, but for the logits: for caches that
            evicted on the way and cannot go back.
        stepwise: follow token by token: an eviction waits for the first ones.

    Returns:
        The free answer, and logits along the path.
    """
    start, first = decoder.n_tokens, decoder.logits().copy()
    if stepwise:
        logits = led(decoder, first, path)
    else:
        logits = np.concatenate([first[None], decoder.decode(path[:-1])])
    greedy = logits.argmax(axis=-1).tolist()
    n_same = next((i for i, token in enumerate(path) if greedy[i] != token), len(path))
    tokens = [*path[:n_same], *greedy[n_same : n_same + 1]][:max_new_tokens]
    if len(tokens) == max_new_tokens or decoder.is_end(tokens[-1]):
        return Reply(tokens, logits)
    n_back = start + len(tokens) - 1
    # what waited for the path's tokens did not see those of the free answer
    if decoder.n_tokens > n_back and (stepwise or not decoder.rewind(n_back)):
        again()
        for token in tokens[:-1]:
            decoder.step(token)
    decoder.step(tokens[-1])
    more, _ = freely(decoder, decoder.logits(), max_new_tokens - len(tokens))
    return Reply([*tokens, *more], logits)


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
