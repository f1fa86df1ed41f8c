"""The plan of a chunk: how many tokens of a prompt are read next, and what has to go before.

A cache has n_cells and not one more. A prompt that fits is read whole and evicted once, with all of
it in view. A longer one is read in chunks; before each, as many cells are freed as it needs. For
the policies that look ahead the room of the next probe stays free: the end of the prompt is
decoded after what is cached, then pseudo tokens, and what they attend to is what stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from .select import PolicyParams

MIN_CHUNK = 32


@dataclass(frozen=True)
class ChunkPlan:
    """What to do next with a prompt.

    Args:
        n_tokens: tokens to decode next. 0 although tokens are left: the plan fails, the staging is
            too small or the cells are full of other things.
        n_evict: cells of the sequence to free before that.
        n_probe: where something is evicted, the last tokens of the prompt to decode for its scores.
    """

    n_tokens: int
    n_evict: int = 0
    n_probe: int = 0


def default_chunk(params: PolicyParams, n_cells: int) -> int:
    """Most tokens of a chunk where chunk_size is 0: a third of the cells that no probe needs.

    Larger chunks need fewer evictions, but each cuts deeper into what has been read: one that takes
    all of the staging cuts down to the budget every time.
    """
    return max(MIN_CHUNK, (n_cells - params.room) // 3)


def plan_chunk(
    params: PolicyParams,
    *,
    n_cells: int,
    n_used: int,
    n_resident: int,
    n_left: int,
    n_batch: int,
) -> ChunkPlan:
    """The next chunk of a prompt: at most n_batch tokens, and no eviction below the budget.

    Args:
        n_cells: cells of the cache.
        n_used: those in use, by all sequences.
        n_resident: those of this sequence.
        n_left: tokens of the prompt that are not decoded yet.
        n_batch: tokens that one batch may have.
    """
    looks_ahead, room = params.needs_lookahead, params.room
    free = n_cells - n_used
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
    # the probe is decoded before anything is freed
    n_probe = min(params.probe_size, n_left, free - params.probe_ahead) if looks_ahead else 0
    if n_tokens < 1 or (looks_ahead and n_probe < 1):
        return ChunkPlan(0)
    return ChunkPlan(n_tokens, n_evict, n_probe)


def check_pinned(params: PolicyParams, n_keep: int, n_intact: int, n_end: int) -> None:
    """Refuse an eviction that what is pinned leaves no room for.

    Args:
        n_keep: cells that are to stay.
        n_intact: positions from here on are kept whole.
        n_end: one past the last position.
    Raises:
        ValueError: sinks, positions kept whole and spans of the user are more than n_keep.
    """
    pinned = set(range(min(params.n_sink, n_end))) | set(range(n_intact, n_end))
    for p0, p1 in params.pinned:
        pinned |= set(range(max(p0, 0), min(p1, n_end)))
    if len(pinned) > n_keep:
        what = "the budget is" if n_keep == params.budget else "the cells to keep are"
        raise ValueError(
            f"{len(pinned)} cells are pinned (n_sink {params.n_sink}, window and lookahead "
            f"{n_end - n_intact}, spans {list(params.pinned)}), {what} {n_keep}: "
            f"raise the budget or pin less"
        )


def n_always(params: PolicyParams) -> int:
    """Tokens that are always kept, however many there are: a smaller cache is never asked for."""
    fixed = set(range(params.n_sink)).union(*(range(*span) for span in params.pinned))
    return len(fixed) + params.window + params.ahead


def reread_size(params: PolicyParams, n_most: int) -> int:
    """Most tokens at the end of a conversation that are read again with what a message has
    selected, since they were read while what they look at may not have been there: n_most, but a
    quarter of the budget at most, and no more than the budget holds beside what is pinned."""
    n_room = params.budget - n_always(params) + params.window
    return max(0, min(n_most, params.budget // 4, n_room))
