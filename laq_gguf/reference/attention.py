"""Scores: how much attention the observed queries pay to each key.

    a[h,j,i] = softmax over i of ( softcap(scale * q[h,j] . k[i]) + mask[j,i] )
    s[g,i]   = mean over the heads h of group g of the sum over j of a[h,j,i]

Lookahead Q-Cache (arXiv 2505.20334) takes the queries of tokens decoded ahead, SnapKV (arXiv
2404.14469) those of the prompt's end; both pool s over neighbouring keys. In native/src,
laq-graph-score agrees on the scores and laq-policy on their pooling.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]
Index = NDArray[np.int64]
Weights = NDArray[np.float64]

POOLINGS = ("none", "max", "avg")


def causal_mask(query_positions: ArrayLike, key_positions: ArrayLike) -> FloatArray:
    """0 where a key is not after the query, -inf elsewhere: of positions (n_queries,) and
    (..., n_kv), float32 (..., n_queries, n_kv)."""
    query = np.asarray(query_positions)[:, None]
    key = np.asarray(key_positions)[..., None, :]
    return np.where(key <= query, np.float32(0), np.float32(-np.inf))


def attention_weights(
    q: ArrayLike,
    k: ArrayLike,
    *,
    scale: float,
    mask: ArrayLike | None = None,
    softcap: float = 0.0,
    sinks: ArrayLike | None = None,
) -> Weights:
    """Attention that each query pays to each key: (n_head_kv, n_group, n_queries, n_kv), whose rows
    sum to 1 less what a sink has. In float64: what is measured against it is the other's rounding.

    Args:
        q, k: queries (n_head, n_queries, d) and keys (n_kv, n_head_kv, d) after RoPE; query head h
            reads KV head h // n_group, n_group = n_head // n_head_kv.
        scale: factor of q . k.
        mask: (n_queries, n_kv), or (n_head_kv, n_queries, n_kv) where heads hold different tokens;
            added after the soft-cap. A query whose mask is -inf everywhere pays no attention.
        softcap: c > 0 replaces a logit x by c * tanh(x / c); 0 = none.
        sinks: (n_head,) one more logit for each head, in the denominator only.
    Raises:
        ValueError: shapes that do not fit together, or softcap < 0.
    """
    q64, k64 = np.asarray(q, np.float64), np.asarray(k, np.float64)
    if q64.ndim != 3 or k64.ndim != 3 or q64.shape[2] != k64.shape[2] or len(q64) % k64.shape[1]:
        raise ValueError(
            f"q {q64.shape} and k {k64.shape} are not (n_head, n_queries, d) and "
            f"(n_kv, n_head_kv, d), n_head a multiple of n_head_kv"
        )
    if softcap < 0:
        raise ValueError(f"softcap must be 0 (none) or positive, got {softcap}")
    (n_head, n_queries, d), (n_kv, n_head_kv, _) = q64.shape, k64.shape
    n_group = n_head // n_head_kv
    grouped = q64.reshape(n_head_kv, n_group, n_queries, d)
    logits = scale * np.einsum("grjd,igd->grji", grouped, k64)
    if softcap > 0:
        logits = softcap * np.tanh(logits / softcap)
    if mask is not None:
        logits = logits + np.broadcast_to(mask, (n_head_kv, n_queries, n_kv))[:, None]
    sink_logits = np.full(n_head, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    sink_logits = sink_logits.reshape(n_head_kv, n_group, 1, 1)
    top = np.maximum(logits.max(axis=-1, keepdims=True), sink_logits)
    # a query that sees nothing has top = -inf; any finite shift leaves its weights at 0
    top = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sink_logits - top)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def attention_scores(q: ArrayLike, k: ArrayLike, **settings: Any) -> FloatArray:
    """Scores of keys: the attention that queries pay to them, summed over queries and averaged over
    the heads of a group, (n_head_kv, n_kv). Arguments and errors are those of attention_weights."""
    return attention_weights(q, k, **settings).sum(axis=2).mean(axis=1).astype(np.float32)


def pool_scores(scores: ArrayLike, kernel_size: int = 7, pooling: str = "max") -> FloatArray:
    """Pool scores (..., n_kv) over neighbouring keys, after the group mean. Same shape, float32.

    Args:
        kernel_size: width of the window, odd, centred on the key.
        pooling: "max": the window is clipped at both ends. "avg": zeros beyond the ends, always
            divided by kernel_size; float32 sums from left to right. "none": unchanged.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}, possible: {', '.join(POOLINGS)}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
    src = np.array(scores, np.float32)
    if pooling == "none":
        return src
    radius, n_kv = kernel_size // 2, src.shape[-1]
    width = [(0, 0)] * (src.ndim - 1) + [(radius, radius)]
    padded = np.pad(src, width, constant_values=-np.inf if pooling == "max" else 0)
    shifted = [padded[..., i : i + n_kv] for i in range(kernel_size)]
    if pooling == "max":
        return np.maximum.reduce(shifted)
    return sum(shifted, np.zeros_like(src)) / np.float32(kernel_size)
