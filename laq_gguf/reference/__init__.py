"""The definition of correct, in numpy: what is kept, and why.

Written to be read, not to be fast. The native code must agree with it: selections exactly, scores
within the tolerances of tests/tolerances.py. A change in behaviour changes this package, its golden
file and the native code together.

The method is Lookahead Q-Cache (arXiv 2505.20334) with the differences that README.md names: one
selection per KV head instead of one per query head, each local query masked at its own position,
and sinks, a recent window and user spans that always stay.
"""

from .attention import (
    POOLINGS,
    attention_scores,
    attention_weights,
    causal_mask,
    pool_scores,
)
from .cache import KVCache
from .cells import Tokens
from .plan import ChunkPlan, default_chunk, plan_chunk
from .recall import RecallCache
from .select import (
    POLICIES,
    PolicyParams,
    copies,
    follow_scores,
    pinned_mask,
    query_range,
    random_scores,
    rank_scores,
    select,
    select_head,
    select_keys,
)
from .values import attention_outputs, fit_values

__all__ = [
    "POLICIES",
    "POOLINGS",
    "ChunkPlan",
    "KVCache",
    "PolicyParams",
    "RecallCache",
    "Tokens",
    "attention_outputs",
    "attention_scores",
    "attention_weights",
    "causal_mask",
    "copies",
    "default_chunk",
    "fit_values",
    "follow_scores",
    "pinned_mask",
    "plan_chunk",
    "pool_scores",
    "query_range",
    "random_scores",
    "rank_scores",
    "select",
    "select_head",
    "select_keys",
]
