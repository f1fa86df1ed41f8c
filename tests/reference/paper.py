"""The paper's own two stages (arXiv 2505.20334), for comparison.

SnapKV cuts a copy of the cache to the budget; pseudo tokens are drafted from the copy; their
queries choose from everything. Their keys go with the copy: the softmax runs over the prompt alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

from laq_gguf.reference import KVCache, Tokens, query_range
from laq_gguf.reference.cells import NONE
from laq_gguf.reference.evict import Plan, carry_out


def draft(cache: KVCache) -> KVCache:
    """A copy that SnapKV has cut to the budget; the cache itself stays as it is."""
    drafted = copy.deepcopy(cache)
    drafted.params = replace(cache.params, policy="snapkv")
    drafted.prompt_end()
    return drafted


def prompt_end_of_paper(cache: KVCache, generate: Callable[[KVCache], Tokens]) -> None:
    """The end of a prompt that does not fit the budget, without an archive.

    Args:
        generate: pseudo tokens that follow the prompt, decoded from the cache that it is given.
    """
    params, n_prompt = cache.params, cache.n_tokens
    ahead = generate(draft(cache))[: params.lookahead_size]
    cache.queries.append(n_prompt, ahead, NONE)
    queries = query_range(params, n_prompt, n_prompt + len(ahead))
    n_intact = max(cache.n_intact, n_prompt - params.window, 0)
    carry_out(cache, Plan(params.budget, n_intact, queries, n_prompt))
