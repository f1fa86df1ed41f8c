"""METRICS: how an answer is scored, and how near a cache stays to the full one.

Answers: case-insensitive containment as in RULER (arXiv 2404.06654), F1 and EM as in SQuAD, and
LongBench's (longbench.py).
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from laq_gguf.bench import longbench


def share_found(text: str, outputs: Sequence[str]) -> float:
    """Share of `outputs` that occur in `text`, in [0, 1]."""
    _require_outputs(outputs)
    text = text.lower()
    return sum(output.lower() in text for output in outputs) / len(outputs)


def any_found(text: str, outputs: Sequence[str]) -> float:
    """1.0 if one of `outputs` occurs in `text`, else 0.0."""
    _require_outputs(outputs)
    text = text.lower()
    return float(any(output.lower() in text for output in outputs))


def squad_f1(text: str, outputs: Sequence[str]) -> float:
    """SQuAD's F1 (arXiv 1606.05250): harmonic mean of the shares of words that are the same.

    The best over the `outputs`, each compared after `squad_words`.
    """
    _require_outputs(outputs)
    return max(_word_f1(squad_words(text), squad_words(output)) for output in outputs)


def squad_em(text: str, outputs: Sequence[str]) -> float:
    """1.0 if `text` is one of `outputs` after `squad_words`, else 0.0."""
    _require_outputs(outputs)
    return float(any(squad_words(text) == squad_words(output) for output in outputs))


def squad_words(text: str) -> list[str]:
    """Words as SQuAD compares them: lower case, without ASCII punctuation, without articles."""
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return [word for word in letters.split() if word not in ("a", "an", "the")]


def _word_f1(words: list[str], expected: list[str]) -> float:
    if not words or not expected:
        return float(words == expected)
    same = sum((Counter(words) & Counter(expected)).values())
    return 2 * same / (len(words) + len(expected))


def _require_outputs(outputs: Sequence[str]) -> None:
    if not outputs:
        raise ValueError("an example without expected outputs cannot be scored")


METRICS: dict[str, Callable[..., float]] = {
    "share_found": share_found,
    "any_found": any_found,
    "squad_f1": squad_f1,
    **longbench.METRICS,
}


def log_softmax(logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64. logits: (..., n_vocab)."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl_divergence(logits_full: npt.ArrayLike, logits: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """KL(full || other) of next-token distributions, nats. Both (n, n_vocab); returns (n,)."""
    log_p, log_q = _pair(logits_full, logits)
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (log_p - log_q), 0.0)
    return np.maximum(terms.sum(axis=-1), 0.0)


def top1_agreement(logits_full: npt.ArrayLike, logits: npt.ArrayLike) -> float:
    """Share of rows whose most likely token is the same. Both (n, n_vocab)."""
    log_p, log_q = _pair(logits_full, logits)
    return float(np.mean(log_p.argmax(axis=-1) == log_q.argmax(axis=-1)))


def negative_log_likelihood(logits: npt.ArrayLike, tokens: Sequence[int]) -> float:
    """Mean over rows of -log p(token), nats. logits: (n, n_vocab), tokens: (n,)."""
    log_p = log_softmax(logits)
    if log_p.ndim != 2 or len(log_p) != len(tokens) or not len(tokens):
        raise ValueError(f"a token for each row is needed, got {log_p.shape} and {len(tokens)}")
    return float(-log_p[np.arange(len(tokens)), np.asarray(tokens)].mean())


def _pair(
    logits_full: npt.ArrayLike, logits: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    log_p, log_q = log_softmax(logits_full), log_softmax(logits)
    if log_p.shape != log_q.shape or log_p.ndim != 2 or not len(log_p):
        raise ValueError(
            f"logits of the same non-empty shape (n, n_vocab) are compared, "
            f"got {log_p.shape} and {log_q.shape}"
        )
    return log_p, log_q
