"""The fit of values: V of the tokens that stay makes up for those that go.

The observed queries got outputs o, and get P v from the cells that stay. With X = P in the columns
of the values that may change and 0 in the others, the least change after which they get what they
got is, by ridge regression,

    v += X^T (X X^T + ridge I)^-1 (o - P v)

Attention Matching (arXiv 2602.16284) solves for the values of a compacted cache alike; its queries
come from reading the text once more, here they are those of the lookahead, and the values are held
where they were. In native/src, laq-evict agrees (laq_fit).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .attention import BoolArray, FloatArray, Weights

#: Values are fitted to so many of the last observed queries: the cost grows with their square.
FIT_QUERIES = 32


def last_queries(used: BoolArray) -> BoolArray:
    """The last FIT_QUERIES of the queries (n,) that are used."""
    last = used.copy()
    last[np.flatnonzero(used)[:-FIT_QUERIES]] = False
    return last


def attention_outputs(weights: Weights, v: ArrayLike) -> FloatArray:
    """What each query gets of v (n_head_kv, n_kv, d_v) by weights of `attention_weights`:
    (n_head_kv, n_group, n_queries, d_v) float32."""
    return np.einsum("grji,gid->grjd", weights, np.asarray(v, np.float64)).astype(np.float32)


def fit_values(
    weights: Weights, v: ArrayLike, outputs: ArrayLike, free: BoolArray, ridge: float
) -> FloatArray:
    """Values with which the queries get the outputs, or nearly: (n_head_kv, n_kv, d_v) float32.

    Args:
        weights: (n_head_kv, n_group, n_queries, n_kv): attention to the cells that stay.
        v: (n_head_kv, n_kv, d_v), of which those that are free (n_head_kv, n_kv) may change.
        outputs: (n_head_kv, n_group, n_queries, d_v), wanted.
        ridge: in squared attention; the larger, the less they do. A ValueError if not positive.
    """
    if ridge <= 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    result = np.array(v, np.float32)
    wanted = np.asarray(outputs, np.float64)
    for head, values in enumerate(result):
        rows = weights[head].reshape(-1, len(values))
        missing = wanted[head].reshape(len(rows), -1) - rows @ values.astype(np.float64)
        x = rows * free[head]
        system = x @ x.T + ridge * np.eye(len(rows))
        result[head] = values + x.T @ np.linalg.solve(system, missing)
    return result
