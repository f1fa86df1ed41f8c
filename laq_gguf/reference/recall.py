"""What is read again, since it was read while what it looks at may have been in the archive alone.

A message chooses for itself once it has been read, by its own queries, and is read again.

Where values are fitted to the archive, a prompt that does not fit is read twice, in parts of as
many tokens as queries are kept. The first reading brings the queries of a part. They choose from
all tokens, and values are fitted until these queries get what they would get from all of them. The
second reading then is nearly what it would be in view of the whole prompt, and nothing needs to be
known of the question: no probes. For each next chunk of a prompt, with n_left tokens to go:

    n = cache.part_again()
    if n and cache.choose_for_part(n):
        remove the last n tokens, and append them as they are now
    chunk = cache.plan(n_left)
    cache.make_room(chunk.n_evict, goes_on=chunk.n_tokens < n_left)
    append the next chunk.n_tokens

At its end, as often as `message_again` says, the same with `choose_for_message`; then `prompt_end`.

Where the archive can be attended to while a prompt is read (`reads_archive`), none of that is
needed: the prompt, and the lookahead from its end, are decoded in view of all tokens (`visible`),
and the lookahead alone chooses. Only an answer was generated in view of the cells alone: it is read
again before the next prompt (`attend`). Where a token costs too much in view of all of them, the
prompt's last queries choose what it is looked ahead from (`choose_for_lookahead`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .attention import FloatArray
from .cells import Tokens
from .plan import ChunkPlan, check_pinned, reread_size
from .reselect import ReselectCache
from .select import PolicyParams, query_range
from .values import FIT_QUERIES

#: Most tokens that are decoded at once in view of the archive.
N_ATTEND = 128


@dataclass(frozen=True)
class Again:
    """How a message that ends here chooses for itself before its end.

    Args:
        n_rounds: times that it chooses and is read again, or until nothing new comes.
        n_tokens: last tokens that are read again, at most: as many of them as are known.
        probed: its prompt did not fit: see choose_for_message. Where something came, two lookaheads
            follow, the first one through choose_ahead.
    """

    n_rounds: int
    n_tokens: int
    probed: bool


class RecallCache(ReselectCache):
    """A KVCache with an archive, that reads again what has chosen for itself.

    Args:
        recall_rounds: times that a message chooses for itself; 0: it does not, and no prompt is
            read twice.
        n_reread: tokens at the end of a conversation that are read again with it, at most.
        reads_archive: a prompt is read in view of its archive.
        ahead_from_cells: it is looked ahead from what its last queries choose, without the archive.
        others: of ReselectCache.
    Attributes:
        in_parts: the prompt that is being read did not fit: it is read twice.
        attending: what is decoded now is decoded in view of the archive, too; an eviction ends it.
        n_exact: tokens from here on were decoded in view of the cells alone; None: none were.
    """

    def __init__(
        self,
        params: PolicyParams,
        *,
        recall_rounds: int = 1,
        n_reread: int = 256,
        reads_archive: bool = False,
        ahead_from_cells: bool = False,
        **others: Any,
    ) -> None:
        self.recall_rounds, self.n_reread = recall_rounds, n_reread
        self.reads_archive, self.ahead_from_cells = reads_archive, ahead_from_cells
        super().__init__(params, **others)

    def clear(self) -> None:
        super().clear()
        self.in_parts = self.attending = False
        self.n_exact: int | None = None

    def snapshot(self, archive: bool = True) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("in_parts", "attending", "n_exact")}
        return {**super().snapshot(archive), **own}

    def restore(self, snapshot: dict[str, Any]) -> None:
        super().restore({"in_parts": False, "attending": False, "n_exact": None, **snapshot})

    def remove(self, p0: int, p1: int = -1) -> bool:
        done = super().remove(p0, p1)
        if done and self.n_exact is not None and p0 <= self.n_exact:
            self.n_exact = None
        return done

    @property
    def may_attend(self) -> bool:
        """Whether a prompt can be read in view of the archive: it has all that left the cells."""
        complete = len(self.archive.positions) == self.n_intact
        return self.reads_archive and complete and self._may_recall("turn")

    def attends(self, n_tokens: int) -> bool:
        """Whether so many tokens are decoded in view of the archive as well."""
        is_due = self.attending and self.n_intact > 0 and n_tokens <= N_ATTEND
        return is_due and self.may_attend

    def visible(
        self, il: int, n_tokens: int
    ) -> tuple[npt.NDArray[np.int32], FloatArray, FloatArray]:
        """What n_tokens more attend to of what there is: positions (n_head_kv, n), k and v
        (n_head_kv, n, d). In view of the archive, what left the intact suffix comes from there."""
        positions, k, v = super().visible(il, n_tokens)
        if not self.attends(n_tokens):
            return positions, k, v
        # the suffix is the same cells in every head
        suffix = positions[0] >= self.n_intact
        positions = np.concatenate([self.archive.positions, positions[0, suffix]])
        return (
            np.tile(positions, (self.n_head_kv, 1)),
            np.concatenate([self.archive.k[il], k[:, suffix]], axis=1),
            np.concatenate([self.archive.v[il], v[:, suffix]], axis=1),
        )

    def append(self, tokens: Tokens) -> None:
        self.prepare(len(tokens))
        if self.recall_when is not None and self.n_intact > 0 and not self.attends(len(tokens)):
            self.n_exact = self.n_tokens if self.n_exact is None else self.n_exact
        self._append(tokens)

    def attend(self) -> int:
        """Comes before each `plan` of a prompt: it is read in view of the archive, if that can be.
        Last tokens that are to be removed and read again first, at most; `answer_read` then."""
        self.attending = self.may_attend
        if not self.attending:
            return 0
        self.remembers = False
        n_answer = 0 if self.n_exact is None else max(self.n_tokens - self.n_exact, 0)
        return min(n_answer, self.n_reread)

    def answer_read(self) -> None:
        """What could be read again has been."""
        self.n_exact = None if self.attending else self.n_exact

    @property
    def part_size(self) -> int:
        """Tokens of a part that is read twice: as many as queries are kept, but a quarter of what a
        head holds at most, and no more than it holds beside what is pinned. 0: none is read twice.
        """
        reads_twice = self.n_cells is not None and self.recall_rounds > 0 and self.fits_to_archive
        if not (reads_twice and self._may_recall("turn")):
            return 0
        n_most = min(self._chunk_size(), self.params.n_queries)
        return reread_size(replace(self.params, budget=self._n_beside(n_most)), n_most)

    def _n_beside(self, n_part: int) -> int:
        """Tokens that a head holds while there is room for a part, and to look ahead."""
        return max(self.params.budget, self._n_draft() - n_part)

    def part_again(self) -> int:
        """Last tokens that are read again before the next ones are read, at most. 0: there are
        none, or they were read in view of all there is."""
        return self.part_size if self.in_parts and self._observes_archive() else 0

    def choose_for_part(self, n_tokens: int) -> bool:
        """Choose by the queries of the last n_tokens, to all of which values are then fitted: room
        for the next part is left. True: they are then to be removed and read again.

        Raises:
            ValueError: more cells are pinned than are to stay.
        """
        n_end, n_keep = self.n_tokens, self._n_beside(self.part_size)
        first = n_end - n_tokens
        check_pinned(self.params, n_keep, first, n_end)
        self._archive_leaving(first)
        eviction = n_keep, first, (first, n_end), n_end
        return self._reselect(*eviction, always=True, n_fit=n_tokens)

    def plan(self, n_left: int) -> ChunkPlan:
        """As KVCache's, where no part is read twice. Otherwise the next part, or as many tokens as
        there are cells for before anything goes."""
        if self.attending:
            return self._plan_attending(n_left)
        n_part = self.part_size
        if n_part == 0:
            return super().plan(n_left)
        n_free = max(self._n_cells_beside_ahead - self.n_used, 0)
        chunk_size = n_part
        if not self._observes_archive() and n_free > n_part:
            chunk_size = min(self._chunk_size(), n_free)
        return self._plan_without_probe(n_left, chunk_size)

    @property
    def _n_cells_beside_ahead(self) -> int:
        """Cells but those that stay free to look ahead."""
        return max(self.n_cells - self.params.ahead, 0)

    def _plan_without_probe(self, n_left: int, chunk_size: int) -> ChunkPlan:
        params = replace(self.params, policy="snapkv", chunk_size=chunk_size)
        return self._plan_chunk(params, n_left, self._n_cells_beside_ahead)

    def _plan_attending(self, n_left: int) -> ChunkPlan:
        """What is in the cells meanwhile makes no difference: the fewer evictions, the better."""
        if self.n_cells is None:
            return ChunkPlan(min(n_left, self.n_batch))
        plan = self._plan_without_probe(n_left, self._chunk_size())
        n_tokens, n_evict = plan.n_tokens, plan.n_evict
        if n_evict > 0:
            n_tokens, n_evict = min(n_left, self.n_batch), self.n_resident - self.params.budget
        if n_evict > 0 or self.n_intact > 0:
            # two halves at the end, no small rest
            is_end = N_ATTEND < n_left < 2 * N_ATTEND
            n_tokens = min(n_tokens, (n_left + 1) // 2 if is_end else N_ATTEND)
        n_free = max(self._n_cells_beside_ahead - (self.n_used - n_evict), 0)
        return ChunkPlan(min(n_tokens, n_free), n_evict)

    def make_room(
        self,
        n_evict: int,
        probe: Tokens | None = None,
        n_probe: int = 0,
        *,
        goes_on: bool = False,
    ) -> None:
        """As KVCache's; where a part is read twice, n_evict go by the last tokens decoded, where it
        is read in view of the archive, the oldest: there is no probe.

        Args:
            goes_on: tokens of the prompt are left after the ones that there is room made for.
        """
        attending = self.attending
        if not attending and self.part_size == 0:
            super().make_room(n_evict, probe, n_probe)
            return
        if not 0 <= n_evict <= self.n_over:
            raise ValueError(f"n_evict must be from 0 to {self.n_over}, got {n_evict}")
        self.remembers &= not self.pending  # those were probes of another prompt
        n_keep = self.n_resident - n_evict
        if n_evict > 0 and attending:
            n_intact = self._intact(self.n_tokens)
            check_pinned(self.params, n_keep, n_intact, self.n_tokens)
            self._evict(n_keep, n_intact, (0, 0), self.n_tokens)
        elif n_evict > 0:
            self.evict(n_keep)
        self.pending, self.attending = False, attending
        self.in_parts |= goes_on and not attending

    def message_again(self) -> Again:
        """Before `prompt_end`. Not where probes have looked for the message, and ahead of it: what
        they kept is more than its own queries know of. Where values are fitted, they come to give
        what all tokens give, from which it is read again: once more then.
        """
        probed = self.remembers or self.in_parts
        n_tokens = reread_size(self.params, self.n_reread)
        if self.in_parts:
            n_tokens = min(n_tokens, self.params.n_queries)
        n_rounds = self.recall_rounds if self.recalls("turn") and not self.attending else 0
        if probed and n_rounds > 0:
            n_rounds = n_rounds + 1 if self.fits_to_archive else 0
        return Again(n_rounds, n_tokens, probed)

    def choose_for_message(self, n_tokens: int, probed: bool = False) -> bool:
        """Choose by the queries of the last snapkv_window tokens before the prompt ends, or of all
        the last n_tokens where it is read in parts: as many tokens as there are cells for beside a
        lookahead, until it is generated. Whether something came back, as it always does where the
        message was probed: the last n_tokens, which stay whole, are then to be removed and read
        again. Otherwise nothing was changed.

        Raises:
            ValueError: more cells are pinned than the budget holds.
        """
        n_end = self.n_tokens
        first = n_end - n_tokens
        by = max(first, n_end - self.params.snapkv_window)
        n_fit = FIT_QUERIES
        if self.in_parts:
            by, n_fit = first, n_tokens
        check_pinned(self.params, self.params.budget, first, n_end)
        self._archive_leaving(first)
        eviction = self._n_draft(), first, (by, n_end), n_end
        return self._reselect(*eviction, always=probed, n_fit=n_fit)

    def choose_for_lookahead(self) -> bool:
        """Before `prompt_end`: what was read in view of its archive chooses, by the queries of its
        last snapkv_window tokens, as many tokens as there are cells for beside a lookahead, and is
        looked ahead from these alone. False: that is not asked for.

        Raises:
            ValueError: more cells are pinned than the budget holds.
        """
        is_due = self.attending and self.ahead_from_cells and self.params.needs_lookahead
        if not (is_due and self.recalls("turn")):
            return False
        n_end = self.n_tokens
        n_intact = self._intact(n_end)
        check_pinned(self.params, self.params.budget, n_intact, n_end)
        self._archive_leaving(n_intact)
        by = max(n_end - self.params.snapkv_window, 0), n_end
        self._reselect(self._n_draft(), n_intact, by, n_end, always=True)
        self.attending = False
        return True

    def choose_ahead(self, pseudo: Tokens) -> None:
        """The first of two lookaheads: it chooses as many tokens as there are cells for, from which
        the second one is generated. `pseudo` as in `prompt_end`.

        Raises:
            ValueError: more cells are pinned than the budget holds.
        """
        n_prompt, n_intact = self.n_tokens, self._intact(self.n_tokens)
        check_pinned(self.params, self.params.budget, n_intact, n_prompt)
        n_keep = self._n_draft()
        self._append_ahead(pseudo)
        queries = query_range(self.params, n_prompt, self.n_tokens)
        self._evict(n_keep, n_intact, queries, n_prompt, recall=self.recalls("turn"))

    def prompt_end(self, pseudo: Tokens | None = None) -> None:
        super().prompt_end(pseudo)
        self.in_parts = False
        self.attending &= self.pending

    def _evict(self, *eviction: Any, **others: Any) -> None:
        self.attending = False
        super()._evict(*eviction, **others)

    def _n_draft(self) -> int:
        if self.n_cells is None:
            return self.n_tokens
        return max(self.n_cells - self.n_foreign - self.params.ahead, self.params.budget)
