"""The fit of values: V of the tokens that stay makes up for those that go.

The observed queries got outputs o from the whole cache, and get P v from what stays. With X = P in
the columns of the values that may change and 0 in the others,

    v += X^T (X X^T + ridge I)^-1 (o - P v)

is the least change, by ridge regression, after which they get what they got. Attention Matching
(arXiv 2602.16284) solves for the values of a compacted cache alike; its queries come from reading
the text once more, here they are those of the lookahead, and the values are held where they were.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .attention import FloatArray

#: Values are fitted to so many of the last observed queries: the cost grows with their square.
FIT_QUERIES = 32


def last_queries(used: npt.NDArray[np.bool_], n_fit: int = FIT_QUERIES) -> npt.NDArray[np.bool_]:
    """The last n_fit, at least one, of the queries (n,) that are used."""
    last = used.copy()
    last[np.flatnonzero(used)[:-n_fit]] = False
    return last


def attention_outputs(weights: npt.NDArray[np.float64], v: npt.ArrayLike) -> FloatArray:
    """What each query gets: (n_head_kv, n_group, n_queries, d_v) float32.

    Args:
        weights: (n_head_kv, n_group, n_queries, n_kv), of `attention_weights`.
        v: (n_head_kv, n_kv, d_v).
    """
    return np.einsum("grji,gid->grjd", weights, np.asarray(v, np.float64)).astype(np.float32)


def fit_values(
    weights: npt.NDArray[np.float64],
    v: npt.ArrayLike,
    outputs: npt.ArrayLike,
    free: npt.ArrayLike,
    ridge: float,
) -> FloatArray:
    """Values with which the queries get the outputs, or nearly.

    Args:
        weights: (n_head_kv, n_group, n_queries, n_kv): attention to the cells that stay.
        v: (n_head_kv, n_kv, d_v).
        outputs: (n_head_kv, n_group, n_queries, d_v), wanted.
        free: (n_head_kv, n_kv) bool: values that may change.
        ridge: in units of squared attention; the larger, the less they do.
    Returns:
        (n_head_kv, n_kv, d_v) float32.
    Raises:
        ValueError: ridge is not positive.
    """
    if ridge <= 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    result = np.array(v, np.float32)
    wanted = np.asarray(outputs, np.float64)
    for head, values in enumerate(result):
        rows = weights[head].reshape(-1, len(values))
        missing = wanted[head].reshape(len(rows), -1) - rows @ values.astype(np.float64)
        x = rows * np.asarray(free[head], np.float64)  # type: ignore[index]
        system = x @ x.T + ridge * np.eye(len(rows))
        result[head] = values + x.T @ np.linalg.solve(system, missing)
    return result
