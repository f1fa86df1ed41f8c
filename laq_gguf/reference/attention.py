"""Scores: how much attention a set of queries pays to each cached key.

    a[h,j,i] = softmax over i of ( softcap(scale * q[h,j] . k[i]) + mask[j,i] )
    s[g,i]   = mean over the heads h of group g of the sum over j of a[h,j,i]

and the pooling of s over neighbouring keys, as SnapKV does (arXiv 2404.14469). Lookahead Q-Cache
(arXiv 2505.20334) takes the same sum with the queries of tokens decoded ahead.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

POOLINGS = ("none", "max", "avg")


def causal_mask(query_positions: npt.ArrayLike, key_positions: npt.ArrayLike) -> FloatArray:
    """0 where a key is not after the query, -inf elsewhere.

    Args:
        query_positions: (n_queries,) positions.
        key_positions: (..., n_kv) positions; leading axes (KV heads) are kept.
    Returns:
        (..., n_queries, n_kv) float32.
    """
    query = np.asarray(query_positions)[:, None]
    key = np.asarray(key_positions)[..., None, :]
    return np.where(key <= query, np.float32(0), np.float32(-np.inf))


def attention_weights(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    *,
    scale: float,
    mask: npt.ArrayLike | None = None,
    softcap: float = 0.0,
    sinks: npt.ArrayLike | None = None,
) -> npt.NDArray[np.float64]:
    """Attention that each query pays to each key.

    Computed in float64, so that what is measured against it is the other side's rounding.

    Args:
        q: (n_head, n_queries, d) queries after RoPE.
        k: (n_kv, n_head_kv, d) keys after RoPE; n_head is a multiple of n_head_kv, and query head h
            reads KV head h // n_group, n_group = n_head // n_head_kv.
        scale: factor of q . k.
        mask: (n_queries, n_kv), or (n_head_kv, n_queries, n_kv) where heads hold different tokens;
            added to the logits after the soft-cap. A query whose mask is -inf everywhere pays no
            attention to any key.
        softcap: c > 0 replaces a logit x by c * tanh(x / c); 0 = none.
        sinks: (n_head,) one more logit for each head, in the denominator only.
    Returns:
        (n_head_kv, n_group, n_queries, n_kv); a row sums to 1, less what its sink has.
    Raises:
        ValueError: shapes that do not fit together, or softcap < 0.
    """
    q64 = np.asarray(q, dtype=np.float64)
    k64 = np.asarray(k, dtype=np.float64)
    if q64.ndim != 3 or k64.ndim != 3 or q64.shape[2] != k64.shape[2]:
        raise ValueError(
            f"expected q (n_head, n_queries, d) and k (n_kv, n_head_kv, d), "
            f"got {q64.shape} and {k64.shape}"
        )
    n_head, n_queries, d = q64.shape
    n_kv, n_head_kv, _ = k64.shape
    if n_head % n_head_kv:
        raise ValueError(f"n_head {n_head} is not a multiple of n_head_kv {n_head_kv}")
    if softcap < 0:
        raise ValueError(f"softcap must be 0 (none) or positive, got {softcap}")
    n_group = n_head // n_head_kv

    grouped = q64.reshape(n_head_kv, n_group, n_queries, d)
    logits = scale * np.einsum("grjd,igd->grji", grouped, k64)
    if softcap > 0:
        logits = softcap * np.tanh(logits / softcap)
    if mask is not None:
        bias = np.asarray(mask, dtype=np.float64)
        if bias.shape not in ((n_queries, n_kv), (n_head_kv, n_queries, n_kv)):
            raise ValueError(
                f"expected a mask ({n_queries}, {n_kv}) or ({n_head_kv}, {n_queries}, {n_kv}), "
                f"got {bias.shape}"
            )
        logits = logits + (bias[:, None] if bias.ndim == 3 else bias)

    sink_logits = np.full((n_head_kv, n_group, 1, 1), -np.inf)
    if sinks is not None:
        sink_logits = np.asarray(sinks, dtype=np.float64).reshape(n_head_kv, n_group, 1, 1)
    top = np.maximum(logits.max(axis=-1, keepdims=True), sink_logits)
    # a query that sees nothing has top = -inf; any finite shift leaves its weights at 0
    top = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True) + np.exp(sink_logits - top)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def attention_scores(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    *,
    scale: float,
    mask: npt.ArrayLike | None = None,
    softcap: float = 0.0,
    sinks: npt.ArrayLike | None = None,
) -> FloatArray:
    """Attention that the queries pay to each key: summed over queries, averaged over the heads of a
    group. Arguments and errors are those of `attention_weights`.

    Returns:
        (n_head_kv, n_kv) float32, higher = keep.
    """
    weights = attention_weights(q, k, scale=scale, mask=mask, softcap=softcap, sinks=sinks)
    return weights.sum(axis=2).mean(axis=1).astype(np.float32)


def pool_scores(scores: npt.ArrayLike, kernel_size: int = 7, pooling: str = "max") -> FloatArray:
    """Pool over neighbouring keys, after the group mean. Same length.

    Args:
        scores: (..., n_kv) float32, keys in the order of their positions.
        kernel_size: width of the window, odd, centred on the key.
        pooling: "max": the window is clipped at both ends. "avg": zeros beyond the ends, always
            divided by kernel_size; float32 sums from left to right. "none": unchanged.
    Raises:
        ValueError: an unknown pooling, or kernel_size even or below 1.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"unknown pooling {pooling!r}, possible: {', '.join(POOLINGS)}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")
    src = np.asarray(scores, dtype=np.float32)
    if pooling == "none":
        return src.copy()
    radius = kernel_size // 2
    n_kv = src.shape[-1]
    edge = np.float32(-np.inf) if pooling == "max" else np.float32(0)
    width = [(0, 0)] * (src.ndim - 1) + [(radius, radius)]
    padded = np.pad(src, width, constant_values=edge)
    shifted = [padded[..., i : i + n_kv] for i in range(kernel_size)]
    if pooling == "max":
        return np.maximum.reduce(shifted)
    total = np.zeros_like(src)
    for values in shifted:
        total = total + values
    return total / np.float32(kernel_size)
