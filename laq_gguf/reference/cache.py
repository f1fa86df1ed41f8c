"""A KV cache over arrays that evicts by lookahead: when, and scored by which queries.

Three things evict: the end of a prompt (`prompt_end`), a chunk of a prompt that finds no cells
(`plan`, `make_room`), and decoding that finds none (`overflow`, which `append` does by itself).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .attention import FloatArray, attention_scores, attention_weights, causal_mask
from .cells import Cells, Layer, Tokens
from .plan import ChunkPlan, check_pinned, default_chunk, plan_chunk
from .select import PolicyParams, Span, pinned_mask, query_range, select_head
from .values import attention_outputs, fit_values, last_queries


class KVCache(Cells):
    """The cache of one sequence under a policy.

    Args:
        params: policy, budget and the rest.
        n_layer, n_head, n_head_kv, n_embd_head: shape of the model.
        scale: of q . k; by default 1 / sqrt(n_embd_head).
        softcap, sinks: as in attention_scores; sinks (n_layer, n_head).
        n_cells: cells that there are and never more; None = as many as it takes.
        n_batch: tokens that a chunk of a prompt has at most.
    Raises:
        ValueError: n_cells or n_batch below 1.
    """

    def __init__(
        self,
        params: PolicyParams,
        *,
        n_layer: int,
        n_head: int,
        n_head_kv: int,
        n_embd_head: int,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: FloatArray | None = None,
        n_cells: int | None = None,
        n_batch: int = 512,
    ) -> None:
        super().__init__(n_layer, n_head, n_head_kv, n_embd_head, n_cells)
        if n_batch < 1:
            raise ValueError(f"n_batch must be at least 1, got {n_batch}")
        self.params = params
        self.n_batch = n_batch
        self.scale = n_embd_head**-0.5 if scale is None else scale
        self.softcap = softcap
        self.sinks = sinks

    @property
    def n_over(self) -> int:
        """Cells that an eviction down to the budget frees."""
        return 0 if self.params.policy == "full" else max(self.n_resident - self.params.budget, 0)

    def recalls(self, when: str) -> bool:
        """Whether there is something to choose from again: see recall.py."""
        return False

    def append(self, tokens: Tokens) -> None:
        """Add tokens at the positions that follow, after `prepare`.

        Raises:
            ValueError: as `prepare`. The cache is as before.
        """
        self.prepare(len(tokens))
        self._append(tokens)

    def prepare(self, n_tokens: int) -> None:
        """What comes before n_tokens are decoded: a waiting eviction is carried out if its
        lookahead is complete, and the overflow if they find no cells.

        Raises:
            ValueError: they find none even then, or more cells are pinned than the budget holds.
                The cache is as before.
        """
        if not self.fits(n_tokens, self.n_over):
            raise ValueError(
                f"{n_tokens} tokens find no room: {self.n_used} of n_cells {self.n_cells} are in "
                f"use, and an eviction frees {self.n_over}: raise n_cells or decode fewer at once"
            )
        if self.pending and self.n_tokens >= self.n_prompt + self.params.lookahead_size:
            self.flush()
        if not self.fits(n_tokens):
            self.overflow()

    def prompt_end(self, pseudo: Tokens | None = None) -> None:
        """Say that the prompt ends here. Nothing happens while the cache holds no more than the
        budget.

        Deferred lookahead: the eviction waits for the next lookahead_size tokens. Pseudo lookahead
        (greedy tokens) and position lookahead (newlines at the positions that follow, in one pass):
        evicts now, with as many of the given tokens as find cells; they take part in the softmax
        and are then dropped (with draft "snapkv" their keys are gone with the small cache, only
        their queries score).
        Policies without lookahead evict now.

        Raises:
            ValueError: pseudo tokens missing where they are needed, or given where they are not;
                more cells pinned than the budget holds. The cache is as before.
        """
        params = self.params
        wants_pseudo = params.needs_lookahead and params.lookahead != "deferred"
        if pseudo is not None and not wants_pseudo:
            raise ValueError(
                f"policy {params.policy!r} with lookahead {params.lookahead!r} takes no pseudo "
                f"tokens"
            )
        recall = self.recalls("turn")
        if self.n_over == 0 and not recall:
            self.n_prompt, self.pending, self.remembers = self.n_tokens, False, False
            return
        if wants_pseudo and (pseudo is None or len(pseudo) == 0):
            raise ValueError(
                f"lookahead {params.lookahead!r} needs the tokens that follow the prompt"
            )
        n_prompt, n_intact = self.n_tokens, self._intact(self.n_tokens)
        defers = params.needs_lookahead and not wants_pseudo
        n_end = n_prompt + (params.lookahead_size if defers else 0)
        check_pinned(params, params.budget, n_intact, n_end)
        if pseudo is not None:
            self._append_ahead(pseudo)
        self.n_prompt, self.pending = n_prompt, defers
        if not defers:
            queries = query_range(params, n_prompt, self.n_tokens)
            self._evict(params.budget, n_intact, queries, n_end, recall=recall)

    def _append_ahead(self, pseudo: Tokens) -> None:
        ahead = pseudo[: self.params.lookahead_size]
        if self.drafts:
            self._append_queries(ahead)
        else:
            self._append(ahead[: self.n_free])

    @property
    def drafts(self) -> bool:
        """Whether pseudo tokens come from a smaller cache: not where this one is small already."""
        return self.params.draft == "snapkv" and self.n_over > 0

    def draft(self) -> KVCache:
        """The cache that the paper generates its pseudo tokens from: a copy of this one, cut to the
        budget by SnapKV. The full cache stays as it is and is scored with the pseudo queries
        afterwards.
        """
        drafted = copy.deepcopy(self)
        drafted.params = replace(self.params, policy="snapkv")
        drafted.prompt_end()
        return drafted

    def flush(self, when: str = "turn") -> None:
        """Carry out an eviction that waits, with the lookahead queries there are.

        If more tokens than lookahead_size follow the prompt, the last of them are the lookahead:
        what is pinned may not outgrow the budget. `when` is that of `recalls`.
        """
        if not self.pending:
            return
        self.pending = False
        recall = self.recalls(when)
        if self.n_over or recall:
            n_prompt = max(self.n_prompt, self.n_tokens - self.params.lookahead_size)
            queries = query_range(self.params, n_prompt, self.n_tokens)
            n_intact = self._intact(n_prompt)
            self._evict(self.params.budget, n_intact, queries, self.n_tokens, recall=recall)

    def plan(self, n_left: int) -> ChunkPlan:
        """The next chunk of a prompt of which n_left tokens are left. Changes nothing."""
        if self.n_cells is None:
            return ChunkPlan(min(n_left, self.n_batch))
        params = replace(self.params, chunk_size=self._chunk_size())
        return self._plan_chunk(params, n_left, self.n_cells)

    def _chunk_size(self) -> int:
        return self.params.chunk_size or default_chunk(self.params, self.n_cells)

    def _plan_chunk(self, params: PolicyParams, n_left: int, n_cells: int) -> ChunkPlan:
        """plan_chunk of this cache, with other params and as if there were n_cells."""
        return plan_chunk(
            params,
            n_cells=n_cells,
            n_used=self.n_used,
            n_resident=self.n_resident,
            n_left=n_left,
            n_batch=self.n_batch,
        )

    def make_room(self, n_evict: int, probe: Tokens | None = None, n_probe: int = 0) -> None:
        """Carry out the eviction of a plan. Comes before each chunk; with n_evict 0 nothing goes.

        An eviction that waits is given up: the end of this prompt brings its own.

        Args:
            probe: for the policies that look ahead: the last n_probe tokens of the prompt, decoded
                after what is cached, then the pseudo tokens. Their keys take part in the softmax;
                then they are dropped. For other policies None.
            n_probe: of the plan.
        Raises:
            ValueError: more is to go than lies above the budget; a probe is missing where it is
                needed, given where it is not, or too long for the free cells; more cells are
                pinned than are to stay. The cache is as before.
        """
        params, n_end = self.params, self.n_tokens
        self.remembers &= not self.pending  # those were probes of another prompt
        if not 0 <= n_evict <= self.n_over:
            raise ValueError(
                f"n_evict must be from 0 to {self.n_over}, what lies above the budget "
                f"{params.budget}; got {n_evict}"
            )
        if n_evict == 0:
            self.pending = False
            return
        if not params.needs_lookahead and (probe is not None or n_probe):
            raise ValueError(f"policy {params.policy!r} takes no probe")
        if params.needs_lookahead and (probe is None or not 1 <= n_probe < len(probe)):
            raise ValueError(
                f"policy {params.policy!r} needs a probe: n_probe tokens of the prompt and pseudo "
                f"tokens; got {0 if probe is None else len(probe)} with n_probe {n_probe}"
            )
        n_keep = self.n_resident - n_evict
        n_intact = self._intact_in_prompt(n_end, n_keep)
        check_pinned(params, n_keep, n_intact, n_end)
        probe = None if probe is None else probe[: n_probe + params.probe_ahead]
        if probe is not None and not self.fits(len(probe)):
            raise ValueError(f"a probe of {len(probe)} tokens finds {self.n_free} free cells")
        if probe is not None:
            self._append(probe)
        first, last = query_range(params, n_end + n_probe, self.n_tokens)
        # a probe shorter than the window does not fall back on what is cached
        queries = (max(first, n_end), last) if probe is not None else (first, last)
        self._evict(n_keep, n_intact, queries, n_end, by_probe=probe is not None)

    def overflow(self) -> None:
        """Evict down to the budget, scored by the last lookahead_size tokens decoded. Nothing
        happens while no more is resident. An eviction that waits is thereby done.

        Raises:
            ValueError: more cells are pinned than the budget holds. The cache is as before.
        """
        if self.n_over:
            recall = self.recalls("turn" if self.pending else "always")
            self.evict(self.params.budget, recall)

    def evict(self, n_keep: int, recall: bool = False) -> None:
        """As `overflow`, down to n_keep cells in place of the budget.

        Raises:
            ValueError: n_keep below 1, policy "full", or more cells are pinned than n_keep. The
                cache is as before.
        """
        params = self.params
        if n_keep < 1:
            raise ValueError(f"n_keep must be at least 1, got {n_keep}")
        if params.policy == "full":
            raise ValueError("policy 'full' never evicts: choose another policy")
        if self.n_resident <= n_keep:
            return
        n_prompt = max(self.n_tokens - params.ahead, 0)
        n_intact = self._intact(n_prompt)
        check_pinned(params, n_keep, n_intact, self.n_tokens)
        queries = query_range(params, n_prompt, self.n_tokens)
        self._evict(n_keep, n_intact, queries, self.n_tokens, recall=recall)
        self.pending = False

    def _intact(self, n_prompt: int) -> int:
        """Where the intact suffix begins after an eviction; the window ends at n_prompt."""
        return max(self.n_intact, n_prompt - self.params.window, 0)

    def _intact_in_prompt(self, n_past: int, n_keep: int) -> int:
        """The same when n_past tokens of a prompt have been read and n_keep stay."""
        return self._intact(n_past)

    def _evict(
        self,
        n_keep: int,
        n_intact: int,
        queries: Span,
        n_end: int,
        by_probe: bool = False,
        recall: bool = False,
    ) -> None:
        """Score and select in every layer.

        Args:
            n_keep: cells that stay in each head.
            n_intact: positions from here on are kept whole.
            queries: positions [first, last) whose queries score. Only those of the intact suffix
                do; where none is left (they go with tokens that are removed) the newest tokens
                stay, as under policy "streaming".
            n_end: tokens from this position on are dropped.
            by_probe: the scores are remembered until the next eviction.
            recall: tokens of an archive may come back; here there is none.
        """
        params = replace(self.params, budget=n_keep)
        # a query of the evicted part would be masked by positions that heads do not share
        first = max(queries[0], self.n_intact)
        used = (self.query_positions >= first) & (self.query_positions < queries[1])
        if params.needs_queries and not used.any():
            params = replace(params, policy="streaming")  # all there is to go by
        scores, kept = [], []
        for il, layer in enumerate(self.layers):
            raw = self._score_layer(il, used) if params.needs_queries else None
            # what is dropped is the newest, in every head
            n_kv = int((layer.positions[0] < n_end).sum())
            if raw is not None:
                raw = raw[:, :n_kv]
                scores.append(raw)
                if params.needs_lookahead and (by_probe or self.remembers):
                    raw = layer.memory[:, :n_kv] = self._remember(layer, raw, int(used.sum()))
            rows = [
                select_head(
                    params,
                    positions[:n_kv],
                    n_intact,
                    None if raw is None else raw[head],
                    ikv=il,
                    head=head,
                )
                for head, positions in layer.heads()
            ]
            kept.append(np.stack(rows))
        if params.fits_values and params.needs_queries:
            used = self._fitted_to(used, n_intact, n_end, by_probe)
            self._fit(params, kept, used, n_intact)
        self._keep(kept, n_intact)
        self.remembers = by_probe
        self._keep_queries(self.query_positions < n_end)
        self.n_tokens = self.n_settled = n_end
        self.scores = scores

    def _remember(self, layer: Layer, raw: FloatArray, n_queries: int) -> FloatArray:
        """The mean over the queries, for cells that a probe has looked at before the mean with what
        they scored then: the prompt that is being read asks for the same each time, and one look
        alone loses by chance what the next one would have kept.
        """
        n_kv = raw.shape[1]
        mean = (raw / np.float32(n_queries)).astype(np.float32)
        if not self.remembers:
            return mean
        known = layer.positions[:, :n_kv] < self.n_intact
        return np.where(known, (mean + layer.memory[:, :n_kv]) * np.float32(0.5), mean)

    def keep_fitted(
        self,
        positions: npt.NDArray[np.int32],
        n_intact: int,
        params: PolicyParams,
        queries: Span,
    ) -> None:
        """As `keep`, with V fitted as `params` say to what the queries [first, last) got.

        Raises:
            ValueError: a position that is not resident.
        """
        kept = self.cells_of(positions)
        if params.fits_values:
            used = (self.query_positions >= queries[0]) & (self.query_positions < queries[1])
            used = self._fitted_to(used, n_intact, self.n_tokens, False)
            self._fit(params, kept, used, n_intact)
        self._keep(kept, n_intact)
        self.n_settled = self.n_tokens

    def _fitted_to(
        self, used: npt.NDArray[np.bool_], n_intact: int, n_end: int, by_probe: bool
    ) -> npt.NDArray[np.bool_]:
        """Of the queries that score, those that values are fitted to: the last FIT_QUERIES that
        read what is there now. A probe sees a part of the prompt: fitted to it, values drift from
        one chunk to the next.
        """
        if by_probe:
            return np.zeros_like(used)
        return last_queries(used & (self.query_positions >= self.n_settled))

    def _outputs(self, il: int, used: npt.NDArray[np.bool_]) -> FloatArray:
        """What the queries get, which values are fitted to: (n_head_kv, n_group, n_used, d)."""
        layer = self.layers[il]
        mask = causal_mask(self.query_positions[used], layer.positions)
        return attention_outputs(self._weights(il, used, mask), layer.v)

    def _fit(
        self,
        params: PolicyParams,
        kept: list[npt.NDArray[np.int64]],
        used: npt.NDArray[np.bool_],
        n_intact: int,
    ) -> None:
        """Fit V where it is kept and not pinned. What is dropped with this eviction is seen, too:
        its queries may be among those that are fitted to.
        """
        if not used.any():
            return
        for il, layer in enumerate(self.layers):
            stays = layer.positions >= n_intact
            np.put_along_axis(stays, kept[il], True, axis=1)
            self._fit_layer(params, il, used, self._outputs(il, used), stays, n_intact)

    def _fit_layer(
        self,
        params: PolicyParams,
        il: int,
        used: npt.NDArray[np.bool_],
        outputs: FloatArray,
        stays: npt.NDArray[np.bool_],
        n_intact: int,
    ) -> None:
        """V of the cells of a layer that stay (n_head_kv, n_kv), until the queries get outputs."""
        layer = self.layers[il]
        mask = causal_mask(self.query_positions[used], layer.positions)
        weights = self._weights(il, used, np.where(stays[:, None], mask, np.float32(-np.inf)))
        pinned = pinned_mask(
            layer.positions, n_sink=params.n_sink, n_intact=n_intact, spans=params.pinned
        )
        layer.v = fit_values(weights, layer.v, outputs, stays & ~pinned, params.value_fit)

    def _weights(
        self, il: int, used: npt.NDArray[np.bool_], mask: FloatArray
    ) -> npt.NDArray[np.float64]:
        return attention_weights(self.queries[il, used].swapaxes(0, 1), **self._keys(il), mask=mask)

    def _score_layer(self, il: int, used: npt.NDArray[np.bool_]) -> FloatArray:
        mask = causal_mask(self.query_positions[used], self.layers[il].positions)
        return attention_scores(self.queries[il, used].swapaxes(0, 1), **self._keys(il), mask=mask)

    def _keys(self, il: int) -> dict[str, Any]:
        return {
            "k": self.layers[il].k.swapaxes(0, 1),
            "scale": self.scale,
            "softcap": self.softcap,
            "sinks": None if self.sinks is None else self.sinks[il],
        }
