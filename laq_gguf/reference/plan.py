"""The plan of a chunk: how many tokens of a prompt are read next, and how many are evicted before.

A cache has n_cells and not one more. A prompt that fits is read whole and evicted once. A longer
one is read in chunks; before each, as many cells are freed as it needs. For the policies that look
ahead the room of the next probe stays free, since the probe is decoded before anything is freed.
With an archive there is no probe. In native/src, laq-policy agrees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .select import PolicyParams

MIN_CHUNK = 32
#: Most tokens that attend to cells and archive at once.
N_ATTEND = 128
#: Most tokens of an answer that are removed and read again, attending, before the next prompt.
REREAD = 256


@dataclass(frozen=True)
class ChunkPlan:
    """What to do next with a prompt. With n_tokens 0 although tokens are left the plan fails: the
    staging is too small, or other sequences use the cells."""

    n_tokens: int  # tokens to decode next
    n_evict: int = 0  # cells of the sequence to free before that
    n_probe: int = 0  # where something is evicted, last tokens of the prompt that its probe decodes


def default_chunk(params: PolicyParams, n_cells: int) -> int:
    """Most tokens of a chunk where chunk_size is 0: a third of the cells that no probe needs. The
    larger the chunks, the fewer the evictions, and the deeper each cuts."""
    return max(MIN_CHUNK, (n_cells - params.room) // 3)


def plan_chunk(
    params: PolicyParams, *, n_cells: int, n_used: int, n_resident: int, n_left: int, n_batch: int
) -> ChunkPlan:
    """The next chunk of a prompt: at most n_batch tokens, and no eviction below the budget. Of
    n_cells all sequences use n_used, this one n_resident; n_left tokens of the prompt are not
    decoded yet. A chunk_size of 0 is any."""
    looks_ahead, room, free = params.needs_lookahead, params.room, n_cells - n_used
    if params.policy == "full":
        return ChunkPlan(max(min(n_left, n_batch, free), 0))
    # the rest fits: it is evicted once, with all of it in view. So it is, with less to look ahead
    # in, where nothing could be evicted now
    if n_left + params.ahead <= free or (n_left <= free and n_resident <= params.budget):
        return ChunkPlan(min(n_left, n_batch))
    step = min(n_batch, n_left, params.chunk_size or n_batch)
    if free - room >= step:
        return ChunkPlan(step)
    # the cells stay as full as they may: only what the next chunk needs goes
    n_evict = min(step + room - free, max(n_resident - params.budget, 0))
    n_tokens = min(step, free + n_evict - room)
    n_probe = min(params.probe_size, n_left, free - params.probe_ahead) if looks_ahead else 0
    if n_tokens < 1 or (looks_ahead and n_probe < 1):
        return ChunkPlan(0)
    return ChunkPlan(n_tokens, n_evict, n_probe)


def plan_attending(
    params: PolicyParams, *, n_attend: int, n_intact: int, n_cells: int, **counts: int
) -> ChunkPlan:
    """The next chunk of a prompt with an archive. What is in the cells makes no difference to what
    is read: the fewer evictions, the better, and each goes down to the budget. n_attend: most
    tokens that attend at once; n_intact: 0 = nothing is evicted yet; the others of `plan_chunk`."""
    n_cells = max(n_cells - params.ahead, 0)  # there stays room to look ahead
    plan = plan_chunk(replace(params, policy="snapkv"), n_cells=n_cells, **counts)
    n_tokens, n_evict, n_left = plan.n_tokens, plan.n_evict, counts["n_left"]
    if n_evict > 0:
        n_tokens = min(n_left, counts["n_batch"])
        n_evict = counts["n_resident"] - params.budget
    if n_evict > 0 or n_intact > 0:
        # two halves at the end, no small rest
        is_end = n_attend < n_left < 2 * n_attend
        n_tokens = min(n_tokens, (n_left + 1) // 2 if is_end else n_attend)
    return ChunkPlan(min(n_tokens, max(n_cells - (counts["n_used"] - n_evict), 0)), n_evict)
