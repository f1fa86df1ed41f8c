"""Where the attention of decoding goes in a full cache, and how much of it another one holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from laq_gguf.bench.captured import Captured

FloatArray = npt.NDArray[np.float32]


def decode_attention(llm: Any, n_prompt: int) -> FloatArray:
    """Attention that the captured queries after a prompt pay to its tokens, in a full cache.

    As the model computes it: softmax over all tokens up to the query's own of
    softcap(scale * q . k). Mean over the queries (the last that the cache captures, 40 by default)
    and over the query heads of a KV head; a model's attention sinks are left out of the softmax.

    Args:
        llm: laq_gguf.Llama with kv_budget, nothing evicted, and tokens decoded after the prompt.
        n_prompt: tokens of the prompt.
    Returns:
        (n_layer, n_head_kv, n_prompt).
    Raises:
        ValueError: something was evicted, or no query after the prompt was captured.
    """
    stats = llm.kv_stats()
    if stats.n_resident != stats.n_tokens:
        raise ValueError(f"{stats.n_resident} of {stats.n_tokens} tokens are left, all are needed")
    captured = Captured(llm)
    rows = []
    for ikv in range(stats.n_layer):
        info = captured.layer(ikv)
        positions, queries = captured.queries(ikv)
        after = positions >= n_prompt
        if not after.any():
            raise ValueError("no query after the prompt was captured: decode a token first")
        rows.append(
            mean_attention(
                queries[after], positions[after], captured.keys(ikv), info.kq_scale, info.softcap
            )[:, :n_prompt]
        )
    return np.stack(rows)


def mean_attention(
    queries: FloatArray,
    positions: npt.NDArray[np.int32],
    keys: FloatArray,
    scale: float,
    softcap: float = 0.0,
) -> FloatArray:
    """Attention to each key, mean over queries and the heads of a group: (n_head_kv, n_kv).

    Args:
        queries: (n_queries, n_head, d) after RoPE.
        positions: (n_queries,) of the queries; key i is at position i.
        keys: (n_kv, n_head_kv, d) after RoPE.
        softcap: c > 0 replaces a logit x by c * tanh(x / c).
    """
    n_queries, n_head, d = queries.shape
    n_kv, n_head_kv, _ = keys.shape
    rows = []
    for head in range(n_head_kv):
        group = queries[:, head * (n_head // n_head_kv) : (head + 1) * (n_head // n_head_kv)]
        logits = scale * (group.reshape(-1, d) @ keys[:, head].T)
        if softcap > 0:
            logits = softcap * np.tanh(logits / softcap)
        logits = logits.reshape(n_queries, -1, n_kv)
        logits[np.broadcast_to(np.arange(n_kv) > positions[:, None, None], logits.shape)] = -np.inf
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        rows.append(weights.mean(axis=(0, 1)))
    return np.stack(rows)


def mass_held(attention: FloatArray, kept: npt.NDArray[np.int32]) -> float:
    """Share of the attention to a prompt that goes to tokens that a cache still holds, in [0, 1].

    Args:
        attention: (n_layer, n_head_kv, n_prompt), see `decode_attention`.
        kept: (n_layer, n_head_kv, n_resident) positions; those after the prompt do not count.
    """
    if kept.shape[:2] != attention.shape[:2]:
        raise ValueError(f"heads differ: attention {attention.shape}, kept {kept.shape}")
    n_prompt = attention.shape[2]
    padded = np.concatenate([attention, np.zeros_like(attention[..., :1])], axis=-1)
    where = np.where(kept < n_prompt, kept, n_prompt)
    held = np.take_along_axis(padded, where, axis=-1).sum(dtype=np.float64)
    return float(held / attention.sum(dtype=np.float64))
