"""A KV cache whose evicted tokens are kept elsewhere and chosen from again.

A token is archived whole, in every layer and KV head, when the intact suffix moves past it: from
then on some heads may drop it. A re-selection scores archived and resident tokens as one set of
keys, since attention is a softmax over all of them, and every head holds the best of both.

Where values are fitted, it is to what the queries get from both: that is what they would have got,
had nothing been evicted. While a prompt is read, they are the queries of what was read last: what
is read next is most like it. V in the archive stays as it was, so that nothing drifts.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .archive import Archive, Candidates
from .attention import FloatArray, attention_scores, attention_weights, causal_mask
from .cache import KVCache
from .plan import check_pinned, reread_size
from .select import PolicyParams, Span, query_range, select_head
from .values import FIT_QUERIES, attention_outputs, last_queries

RECALLS = ("never", "turn", "always")
#: Of the tokens that the budget takes in the first layers this share must be new, or nothing comes
#: back.
RECALL_NEW, RECALL_LAYERS = 0.02, 4


class ReselectCache(KVCache):
    """A KVCache with an archive.

    Args:
        recall: when tokens are chosen again by themselves: "never", "turn" (the end of a prompt, or
            its lookahead), "always" (also where generated tokens find no cells). None: there is no
            archive.
        fits_to_archive: whether values are fitted to what queries get from the archive and the
            cells; otherwise to what they get from the cells, and not while a prompt is read.
        others: of KVCache.
    Attributes:
        n_recalls, n_recalls_skipped: re-selections, and those that would have changed too little.
        n_lost: rows that a snapshot did not carry.
    """

    def __init__(
        self,
        params: PolicyParams,
        *,
        recall: str | None = None,
        fits_to_archive: bool = True,
        **others: Any,
    ) -> None:
        if recall is not None and recall not in RECALLS:
            raise ValueError(f"unknown recall {recall!r}, possible: {', '.join(RECALLS)}")
        if recall is not None and not params.needs_queries:
            raise ValueError(f"policy {params.policy!r} has no scores to choose again by")
        self.recall_when = recall
        self.fits_to_archive = fits_to_archive and recall is not None and params.fits_values
        self.n_recalls = self.n_recalls_skipped = self.n_lost = 0
        super().__init__(params, **others)

    def clear(self) -> None:
        super().clear()
        self.archive = Archive.empty(self.n_layer, self.n_head_kv, self.n_embd_head)

    def snapshot(self, archive: bool = True) -> dict[str, Any]:
        """archive: whether the copy has it; what one has not is lost where it is restored."""
        state = super().snapshot()
        if archive and self.recall_when is not None:
            state["archive"] = copy.deepcopy(self.archive)
        return state

    def restore(self, snapshot: dict[str, Any]) -> None:
        empty = Archive.empty(self.n_layer, self.n_head_kv, self.n_embd_head)
        super().restore({"archive": empty, **snapshot})
        if self.recall_when is not None and "archive" not in snapshot:
            n_held = int((self.layers[0].positions[0] < self.n_intact).sum())
            self.n_lost += (self.n_intact - n_held) * self.n_layer * self.n_head_kv

    def draft(self) -> KVCache:
        drafted = super().draft if self.recall_when is None else self._without_archive().draft
        return drafted()

    def _without_archive(self) -> ReselectCache:
        other = copy.deepcopy(self)
        other.recall_when, other.fits_to_archive = None, False
        return other

    def recalls(self, when: str) -> bool:
        return self._may_recall(when) and len(self.archive.positions) > 0

    def _may_recall(self, when: str) -> bool:
        return self.recall_when is not None and RECALLS.index(self.recall_when) >= RECALLS.index(
            when
        )

    def recall(self) -> None:
        """Choose again now, by the last tokens decoded, or by those that an eviction waits for.

        Raises:
            ValueError: there is no archive; more cells are pinned than the budget holds.
        """
        if self.recall_when is None:
            raise ValueError("there is no archive")
        params, n_end = self.params, self.n_tokens
        if self.pending:
            self.flush("never")
        elif self.recalls("never"):
            n_prompt = max(n_end - params.ahead, 0)
            n_intact = self._intact(n_prompt)
            check_pinned(params, params.budget, n_intact, n_end)
            queries = query_range(params, n_prompt, n_end)
            self._evict(params.budget, n_intact, queries, n_end, recall=True)
            self.pending = False

    def _intact_in_prompt(self, n_past: int, n_keep: int) -> int:
        """The queries that values are fitted to see what every head holds."""
        n_intact = super()._intact_in_prompt(n_past, n_keep)
        if self.fits_to_archive and self.params.needs_lookahead:
            params = replace(self.params, budget=n_keep)
            n_intact = min(n_intact, n_past - reread_size(params, FIT_QUERIES))
        return max(self.n_intact, n_intact, 0)

    def _evict(
        self,
        n_keep: int,
        n_intact: int,
        queries: Span,
        n_end: int,
        by_probe: bool = False,
        recall: bool = False,
    ) -> None:
        if self.recall_when is not None:
            self._archive_leaving(min(n_intact, n_end))
        # what fits to the archive passes over it anyhow: it is not skipped, so that V starts from
        # what it was and not from an earlier fit
        eviction = n_keep, n_intact, queries, n_end
        if not (recall and self._reselect(*eviction, always=self._observes_archive())):
            if recall and int((self.layers[0].positions[0] < n_end).sum()) <= n_keep:
                self._drop(n_end)
                return
            super()._evict(*eviction, by_probe)

    def _drop(self, n_end: int) -> None:
        """Tokens from n_end on were decoded ahead; nothing else changes."""
        for layer in self.layers:
            layer.keep(np.stack([np.flatnonzero(row < n_end) for row in layer.positions]))
        self._keep_queries(self.query_positions < n_end)
        self.n_tokens = n_end

    def _archive_leaving(self, end: int) -> None:
        """Archive the tokens of the intact suffix before `end`: every head holds them still."""
        known = self.layers[0].positions[0]
        leaves = (known >= self.n_intact) & (known < end)
        leaves &= ~np.isin(known, self.archive.positions)
        # the suffix is the same cells in every head
        self.archive.add(
            known[leaves],
            np.stack([layer.k[:, leaves] for layer in self.layers]),
            np.stack([layer.v[:, leaves] for layer in self.layers]),
        )

    def _candidates(self, il: int, positions: npt.NDArray[np.int32]) -> Candidates:
        layer, archive = self.layers[il], self.archive
        shape = (self.n_head_kv, len(positions))
        resident = np.zeros(shape, bool)
        held = np.broadcast_to(np.isin(positions, archive.positions), shape).copy()
        k, v = (np.zeros((*shape, self.n_embd_head), np.float32) for _ in range(2))
        memory = np.zeros(shape, np.float32)
        for head, own in layer.heads():
            at = np.searchsorted(positions, own)
            resident[head, at] = held[head, at] = True
            k[head, at], v[head, at] = layer.k[head], layer.v[head]
            memory[head, at] = layer.memory[head]
        # V that was fitted comes back as it was
        at = np.searchsorted(positions, archive.positions)
        k[:, at], v[:, at] = archive.k[il], archive.v[il]
        return Candidates(positions, held, resident, k, v, memory)

    def _score_candidates(
        self, il: int, used: npt.NDArray[np.bool_], candidates: Candidates
    ) -> FloatArray:
        """(n_head_kv, n), 0 where a head has no such token."""
        return attention_scores(
            self.queries[il, used].swapaxes(0, 1), **self._candidate_keys(il, used, candidates)
        )

    def _candidate_keys(
        self, il: int, used: npt.NDArray[np.bool_], candidates: Candidates
    ) -> dict[str, Any]:
        """As _keys, with the mask of what each head has."""
        mask = causal_mask(self.query_positions[used], candidates.positions)
        absent = np.where(candidates.held, np.float32(0), np.float32(-np.inf))
        k = candidates.k.swapaxes(0, 1)
        return {**self._keys(il), "k": k, "mask": mask[None] + absent[:, None]}

    def _fitted_to(
        self, used: npt.NDArray[np.bool_], n_intact: int, n_end: int, by_probe: bool
    ) -> npt.NDArray[np.bool_]:
        """As KVCache's; with an archive outputs do not age, and what was read last is fitted to
        where a probe has looked."""
        if not self.fits_to_archive:
            return super()._fitted_to(used, n_intact, n_end, by_probe)
        if by_probe:
            used = (self.query_positions >= n_intact) & (self.query_positions < n_end)
        if self._observes_archive():
            return last_queries(used)
        return super()._fitted_to(used, n_intact, n_end, False)

    def _outputs(self, il: int, used: npt.NDArray[np.bool_]) -> FloatArray:
        if self._observes_archive():
            return self._outputs_of_all(il, used, self._candidates(il, self._all_positions()))
        return super()._outputs(il, used)

    def _observes_archive(self) -> bool:
        """Whether values are fitted to the archive and not every head holds all of it: otherwise
        what queries get from the cells is what they get from all tokens."""
        rows = [row for layer in self.layers for row in layer.positions]
        return self.fits_to_archive and not all(
            np.isin(self.archive.positions, row).all() for row in rows
        )

    def _all_positions(self) -> npt.NDArray[np.int32]:
        parts = [self.archive.positions, *(layer.positions.ravel() for layer in self.layers)]
        return np.unique(np.concatenate(parts)).astype(np.int32)

    def _outputs_of_all(
        self, il: int, used: npt.NDArray[np.bool_], candidates: Candidates
    ) -> FloatArray:
        weights = attention_weights(
            self.queries[il, used].swapaxes(0, 1), **self._candidate_keys(il, used, candidates)
        )
        return attention_outputs(weights, candidates.v)

    def _reselect(
        self,
        n_keep: int,
        n_intact: int,
        queries: Span,
        n_end: int,
        *,
        always: bool = False,
        n_fit: int = FIT_QUERIES,
    ) -> bool:
        """Every head comes to hold the best of what is archived and resident. False: nothing was
        changed, since no query is held or too little would be new and it need not be `always`.
        Values are fitted to the last n_fit of the queries."""
        first = max(queries[0], self.n_intact)
        used = (self.query_positions >= first) & (self.query_positions < queries[1])
        if not used.any():
            return False
        positions = self._all_positions()
        layers = [self._candidates(il, positions) for il in range(self.n_layer)]
        may_stay = positions < n_end
        n_least = min(int((c.held & may_stay).sum(axis=1).min()) for c in layers)
        scores = [
            self._score_candidates(il, used, candidates) for il, candidates in enumerate(layers)
        ]

        def choose(n: int, il: int) -> npt.NDArray[np.int64]:
            """Columns of n tokens for each head of a layer."""
            params, columns = replace(self.params, budget=min(n, n_least)), []
            rank = self._rank(scores[il], layers[il], int(used.sum()))
            for head in range(self.n_head_kv):
                own = np.flatnonzero(layers[il].held[head] & may_stay)
                view = (params, positions[own], n_intact, rank[head, own])
                columns.append(own[select_head(*view, ikv=il, head=head)])
            return np.stack(columns)

        n_first = min(RECALL_LAYERS, self.n_layer)
        n_budget = min(n_keep, self.params.budget)
        is_new = self._is_new(layers[:n_first], [choose(n_budget, il) for il in range(n_first)])
        if not (is_new or always):
            self.n_recalls_skipped += 1
            return False
        n_most = max(int((c.held & may_stay).sum(axis=1).max()) for c in layers)
        fits = self.fits_to_archive and min(n_keep, n_least) < n_most
        fitted = last_queries(used, n_fit) if fits else np.zeros_like(used)
        ahead = np.flatnonzero(~may_stay) if fitted.any() else np.zeros(0, np.int64)
        for il, (layer, candidates) in enumerate(zip(self.layers, layers, strict=True)):
            columns = choose(n_keep, il)
            columns = np.concatenate([columns, np.tile(ahead, (len(columns), 1))], axis=1)
            layer.positions = positions[columns]
            layer.k = np.take_along_axis(candidates.k, columns[:, :, None], axis=1)
            layer.v = np.take_along_axis(candidates.v, columns[:, :, None], axis=1)
            layer.memory = np.zeros(columns.shape, np.float32)
            if fitted.any():
                # what was decoded ahead is seen, too
                outputs = self._outputs_of_all(il, fitted, candidates)
                all_stay = np.ones(columns.shape, bool)
                self._fit_layer(self.params, il, fitted, outputs, all_stay, n_intact)
                n_kept = columns.shape[1] - len(ahead)
                layer.keep(np.tile(np.arange(n_kept), (len(columns), 1)))
        self.n_intact, self.remembers, self.pending = n_intact, False, False
        self._keep_queries(self.query_positions < n_end)
        self.n_tokens, self.n_settled, self.scores = n_end, n_end, scores
        self.n_evictions += 1
        self.n_recalls += 1
        return True

    def _rank(self, raw: FloatArray, candidates: Candidates, n_queries: int) -> FloatArray:
        """As KVCache._remember. What had left the cells when a probe looked counts as 0 then."""
        if not (self.remembers and self.params.needs_lookahead):
            return raw
        mean = (raw / np.float32(n_queries)).astype(np.float32)
        joined = (mean + candidates.memory) * np.float32(0.5)
        return np.where(candidates.positions < self.n_intact, joined, mean)

    def _is_new(self, layers: list[Candidates], kept: list[npt.NDArray[np.int64]]) -> bool:
        """Whether enough of what is selected is not resident."""
        pairs = list(zip(layers, kept, strict=True))
        n_same = sum(int(np.take_along_axis(c.resident, k, axis=1).sum()) for c, k in pairs)
        n_all = sum(k.size for _, k in pairs)
        return n_all - n_same >= RECALL_NEW * n_all
