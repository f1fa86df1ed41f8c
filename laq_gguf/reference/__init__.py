"""The definition of correct, in numpy: what is kept, and why.

Written to be read, not to be fast. The native code must agree with it: selections exactly, scores
within the tolerances of tests/tolerances.py. A change in behaviour changes this package, its golden
file and the native code together.

The method is Lookahead Q-Cache (arXiv 2505.20334) with the differences that README.md names: one
selection per KV head instead of one per query head, each local query masked at its own position,
and sinks, a recent window and user spans that always stay. Read attention (scores), select (which
keys stay) and values (their fit), cells and seq (what a sequence holds and does), then evict (one
eviction or recall), plan (one chunk of a prompt) and cache (when what is done).
"""

# ruff: noqa: F401 - these are its names

from .attention import POOLINGS, attention_scores, attention_weights, causal_mask, pool_scores
from .cache import KVCache
from .cells import Layer, Tokens
from .plan import ChunkPlan, default_chunk, plan_attending, plan_chunk
from .select import (
    POLICIES,
    PolicyParams,
    Span,
    query_range,
    random_scores,
    select_head,
    select_keys,
)
from .values import attention_outputs, fit_values
