"""A KV cache over arrays that evicts by lookahead: append, evict, remove, and where every key came
from.

Each layer and KV head holds its own tokens, sorted by position; all hold the same number. The
positions are the origin table: they say which token a cell holds. Positions from `n_intact` on are
held by every head (the intact suffix), below it every head may miss different tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from .attention import FloatArray, attention_scores, causal_mask
from .select import PolicyParams, query_range, select_head


@dataclass(frozen=True)
class Tokens:
    """Keys, values and queries (after RoPE) of consecutive tokens in every layer.

    k, v: (n_layer, n_tokens, n_head_kv, d); q: (n_layer, n_tokens, n_head, d).
    """

    k: FloatArray
    v: FloatArray
    q: FloatArray

    def __len__(self) -> int:
        return self.k.shape[1]

    def __getitem__(self, tokens: slice) -> Tokens:
        return Tokens(self.k[:, tokens], self.v[:, tokens], self.q[:, tokens])


@dataclass
class _Layer:
    """One layer: positions (n_head_kv, n_resident), k and v (n_head_kv, n_resident, d)."""

    positions: npt.NDArray[np.int32]
    k: FloatArray
    v: FloatArray

    def heads(self) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
        yield from enumerate(self.positions)

    def keep(self, index: npt.NDArray[np.int64]) -> None:
        """index (n_head_kv, n_kept): cells of each head that stay, ascending."""
        self.positions = np.take_along_axis(self.positions, index, axis=1)
        self.k = np.take_along_axis(self.k, index[:, :, None], axis=1)
        self.v = np.take_along_axis(self.v, index[:, :, None], axis=1)

    def append(self, positions: npt.NDArray[np.int32], k: FloatArray, v: FloatArray) -> None:
        """k, v: (n_tokens, n_head_kv, d)."""
        rows = np.broadcast_to(positions, (len(self.positions), len(positions)))
        self.positions = np.concatenate([self.positions, rows], axis=1)
        self.k = np.concatenate([self.k, k.swapaxes(0, 1)], axis=1)
        self.v = np.concatenate([self.v, v.swapaxes(0, 1)], axis=1)


class KVCache:
    """The cache of one sequence under a policy.

    Args:
        params: policy, budget and the rest.
        n_layer, n_head, n_head_kv, n_embd_head: shape of the model.
        scale: of q . k; by default 1 / sqrt(n_embd_head).
        softcap, sinks: as in attention_scores; sinks (n_layer, n_head).
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
    ) -> None:
        self.params = params
        self.n_layer, self.n_head, self.n_head_kv = n_layer, n_head, n_head_kv
        self.n_embd_head = n_embd_head
        self.scale = n_embd_head**-0.5 if scale is None else scale
        self.softcap = softcap
        self.sinks = sinks
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        empty = np.zeros((self.n_head_kv, 0, self.n_embd_head), np.float32)
        self.layers = [
            _Layer(np.zeros((self.n_head_kv, 0), np.int32), empty, empty)
            for _ in range(self.n_layer)
        ]
        self.query_positions = np.zeros(0, np.int32)
        self.queries = np.zeros((self.n_layer, 0, self.n_head, self.n_embd_head), np.float32)
        self.scores: list[FloatArray] = []  # raw, of the last eviction, (n_head_kv, n_kv) a layer
        self.n_tokens = 0  # last position + 1
        self.n_prompt = 0
        self.n_intact = 0  # 0 = nothing evicted
        self.n_evictions = 0
        self.pending = False  # an eviction waits for its lookahead queries

    @property
    def n_resident(self) -> int:
        return self.layers[0].positions.shape[1]

    @property
    def positions(self) -> npt.NDArray[np.int32]:
        """The origin table: (n_layer, n_head_kv, n_resident), sorted along the last axis."""
        return np.stack([layer.positions for layer in self.layers])

    def append(self, tokens: Tokens) -> None:
        """Add tokens at the positions that follow.

        An eviction that waits is carried out first if its lookahead is complete.
        """
        if self.pending and self.n_tokens >= self.n_prompt + self.params.lookahead_size:
            self.flush()
        positions = np.arange(self.n_tokens, self.n_tokens + len(tokens), dtype=np.int32)
        for il, layer in enumerate(self.layers):
            layer.append(positions, tokens.k[il], tokens.v[il])
        self._append_queries(tokens)

    def _append_queries(self, tokens: Tokens) -> None:
        positions = np.arange(self.n_tokens, self.n_tokens + len(tokens), dtype=np.int32)
        self.query_positions = np.concatenate([self.query_positions, positions])
        self.queries = np.concatenate([self.queries, tokens.q], axis=1)
        self.n_tokens += len(tokens)

    def prompt_end(self, pseudo: Tokens | None = None) -> None:
        """Say that the prompt ends here. Nothing happens while the cache holds no more than the
        budget.

        Deferred lookahead: the eviction waits for the next lookahead_size tokens. Pseudo lookahead:
        evicts now, with the given tokens, which take part in the softmax and are then dropped
        (with draft "snapkv" their keys are gone with the small cache, only their queries score).
        Policies without lookahead evict now.

        Raises:
            ValueError: pseudo tokens missing where they are needed, or given where they are not;
                more cells pinned than the budget holds. The cache is as before.
        """
        params = self.params
        wants_pseudo = params.needs_lookahead and params.lookahead == "pseudo"
        if pseudo is not None and not wants_pseudo:
            raise ValueError(
                f"policy {params.policy!r} with lookahead {params.lookahead!r} takes no pseudo "
                f"tokens"
            )
        if params.policy == "full" or self.n_resident <= params.budget:
            self.n_prompt, self.pending = self.n_tokens, False
            return
        if wants_pseudo and (pseudo is None or len(pseudo) == 0):
            raise ValueError("lookahead 'pseudo' needs the pseudo tokens that follow the prompt")
        self._check_pinned(n_prompt=self.n_tokens)
        self.n_prompt = self.n_tokens
        if params.needs_lookahead and not wants_pseudo:
            self.pending = True
            return
        self.pending = False
        if pseudo is not None:
            add = self.append if params.draft == "full" else self._append_queries
            add(pseudo[: params.lookahead_size])
        self._evict(self.n_prompt, drop_from=self.n_prompt)

    def draft(self) -> KVCache:
        """The cache that the paper generates its pseudo tokens from: a copy of this one, cut to the
        budget by SnapKV. The full cache stays as it is and is scored with the pseudo queries
        afterwards.
        """
        drafted = copy.deepcopy(self)
        drafted.params = replace(self.params, policy="snapkv")
        drafted.prompt_end()
        return drafted

    def flush(self) -> None:
        """Carry out an eviction that waits, with the lookahead queries there are.

        If more tokens than lookahead_size follow the prompt, the last of them are the lookahead:
        what is pinned may not outgrow the budget.
        """
        if not self.pending:
            return
        self.pending = False
        if self.n_resident > self.params.budget:
            self._evict(max(self.n_prompt, self.n_tokens - self.params.lookahead_size))

    def keep(self, positions: npt.NDArray[np.int32], n_intact: int) -> None:
        """Evict down to given positions, as another implementation selected them.

        Args:
            positions: (n_layer, n_head_kv, n_kept), ascending, all resident.
            n_intact: position from which every head holds every token.
        Raises:
            ValueError: a position that is not resident.
        """
        index = np.zeros(positions.shape, np.int64)
        for il, layer in enumerate(self.layers):
            for head, resident in layer.heads():
                if not np.isin(positions[il, head], resident).all():
                    raise ValueError(f"layer {il}, head {head}: a position is not resident")
                index[il, head] = np.searchsorted(resident, positions[il, head])
        for layer, rows in zip(self.layers, index, strict=True):
            layer.keep(rows)
        self.n_intact = n_intact
        self.n_evictions += 1
        self.pending = False

    def remove(self, p0: int, p1: int = -1) -> bool:
        """Remove the positions [p0, p1); p1 < 0 means to the end. False: refused, nothing was
        changed.

        Below the intact suffix every head misses other tokens, so that a removal there cannot leave
        a prefix that may be continued: it is refused. Removing everything always works.
        """
        p0 = max(p0, 0)
        p1 = self.n_tokens if p1 < 0 else min(p1, self.n_tokens)
        if p0 == 0 and p1 == self.n_tokens:
            self.clear()
            return True
        if p0 >= p1:
            return True
        if p0 < self.n_intact:
            return False
        for layer in self.layers:
            # the same cells count in every head: they lie in the intact suffix
            rows = (layer.positions < p0) | (layer.positions >= p1)
            layer.keep(np.stack([np.flatnonzero(row) for row in rows]))
        stays = (self.query_positions < p0) | (self.query_positions >= p1)
        self.query_positions = self.query_positions[stays]
        self.queries = self.queries[:, stays]
        # when nothing of the intact suffix is left, its beginning is where tokens go on
        last = int(self.layers[0].positions[0].max(initial=-1))
        self.n_tokens = max(last + 1, self.n_intact)
        if p0 < self.n_prompt:
            self.pending = False  # the prompt that it belonged to is gone
        return True

    def _evict(self, n_prompt: int, drop_from: int | None = None) -> None:
        """Score and select in every layer. Tokens from position drop_from on are dropped."""
        n_intact = max(self.n_intact, n_prompt - self.params.window, 0)
        first, last = query_range(self.params, n_prompt, self.n_tokens)
        used = (self.query_positions >= first) & (self.query_positions < last)
        end = self.n_tokens if drop_from is None else drop_from
        scores, kept = [], []
        for il, layer in enumerate(self.layers):
            raw = self._score_layer(il, used) if self.params.needs_queries else None
            # what is dropped is the newest, in every head
            n_kv = int((layer.positions[0] < end).sum())
            if raw is not None:
                raw = raw[:, :n_kv]
                scores.append(raw)
            kept.append(
                [
                    select_head(
                        self.params,
                        positions[:n_kv],
                        n_intact,
                        None if raw is None else raw[head],
                        ikv=il,
                        head=head,
                    )
                    for head, positions in layer.heads()
                ]
            )
        for layer, index in zip(self.layers, kept, strict=True):
            layer.keep(np.stack(index))
        stays = self.query_positions < end
        self.query_positions = self.query_positions[stays]
        self.queries = self.queries[:, stays]
        self.n_tokens = end
        self.scores = scores
        self.n_intact = n_intact
        self.n_evictions += 1
        self.pending = False

    def _score_layer(self, il: int, used: npt.NDArray[np.bool_]) -> FloatArray:
        layer = self.layers[il]
        return attention_scores(
            self.queries[il, used].swapaxes(0, 1),
            layer.k.swapaxes(0, 1),
            scale=self.scale,
            mask=causal_mask(self.query_positions[used], layer.positions),
            softcap=self.softcap,
            sinks=None if self.sinks is None else self.sinks[il],
        )

    def _check_pinned(self, n_prompt: int) -> None:
        """Refuse an eviction whose pinned cells exceed the budget, before anything is changed."""
        params = self.params
        n_ahead = params.lookahead_size if params.needs_lookahead else 0
        end = n_prompt + (n_ahead if params.lookahead == "deferred" else 0)
        n_intact = max(self.n_intact, n_prompt - params.window, 0)
        pinned = set(range(min(params.n_sink, end))) | set(range(n_intact, end))
        for p0, p1 in params.pinned:
            pinned |= set(range(max(p0, 0), min(p1, end)))
        if len(pinned) > params.budget:
            raise ValueError(
                f"{len(pinned)} cells are pinned (n_sink {params.n_sink}, window and lookahead "
                f"{end - n_intact}, spans {list(params.pinned)}), the budget is {params.budget}: "
                f"raise the budget or pin less"
            )
