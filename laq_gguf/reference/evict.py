"""One eviction or recall: archive, score, select, fit the values, keep.

A plan says what it does. An eviction selects from what the cells of each head hold, a recall from
all tokens that are whole. In native/src, laq-evict and laq-recall agree (laq_plan, laq_carry_out).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from . import seq
from .attention import BoolArray, FloatArray, Index, attention_weights, causal_mask
from .cells import ALL, NONE, Layer
from .select import PolicyParams, Span, pinned_mask, select_head
from .values import attention_outputs, fit_values, last_queries

if TYPE_CHECKING:
    from .cache import KVCache


@dataclass(frozen=True)
class Plan:
    """What one eviction or recall does."""

    n_keep: int  # cells that stay in each head
    n_intact: int  # positions from here on are kept whole
    queries: Span  # positions [first, last) whose queries score; without any the newest tokens stay
    n_end: int  # tokens from this position on were decoded ahead and are dropped
    by_probe: bool = False  # the scores are remembered until the next eviction
    recall: bool = False  # archived tokens may become resident


def check_pinned(params: PolicyParams, n_keep: int, n_intact: int, n_end: int) -> None:
    """Raise a ValueError where an eviction of the tokens before n_end keeps n_keep cells, and more
    are pinned: sinks, positions from n_intact on and spans of the user."""
    where, spans = np.arange(n_end), params.pinned
    n_pinned = pinned_mask(where, n_sink=params.n_sink, n_intact=n_intact, spans=spans).sum()
    if n_pinned > n_keep:
        what = "the budget is" if n_keep == params.budget else "the cells to keep are"
        raise ValueError(
            f"{n_pinned} cells are pinned (n_sink {params.n_sink}, window and lookahead "
            f"{n_end - n_intact}, spans {list(spans)}), {what} {n_keep}: raise it or pin less"
        )


def carry_out(cache: KVCache, plan: Plan) -> None:
    """Evicted tokens are archived; then every head keeps the best of its cells, or recalls the best
    of all tokens. Queries before the intact suffix do not score: heads do not share the positions
    that would mask them."""
    cells, queries = cache.cells, cache.queries
    if cache.archive is not None:
        cache.archive.add(cells, cache.n_intact, min(plan.n_intact, plan.n_end))
    used = queries.within(max(plan.queries[0], cache.n_intact), plan.queries[1])
    if plan.recall and not used.any() and cells.layers[0].n_before(plan.n_end) <= plan.n_keep:
        cells.remove(plan.n_end, cache.n_tokens)  # nothing to recall by, nothing to evict
    else:
        _keep_best(cache, plan, used)
        cache.n_intact = plan.n_intact
        queries.age(cache.archive is not None)
        cache.n_evictions += 1
    queries.keep(queries.positions < plan.n_end)
    cache.n_tokens = plan.n_end


def _keep_best(cache: KVCache, plan: Plan, used: BoolArray) -> None:
    """Score by the used queries, select, fit and keep, of the tokens before the plan's end."""
    cells, params, outputs = cache.cells, cache.params, cache.queries.outputs
    recalls = plan.recall and bool(used.any())
    layers = cache.whole() if recalls else cells.layers
    n_known, n_keep = layers[0].n_before(plan.n_end), plan.n_keep
    # values are fitted to what is known of all tokens, or, in an eviction, of the cells
    fits = params.fits_values and (recalls or (not plan.by_probe and n_keep <= params.budget))
    fitted = last_queries(used & fits & (outputs == ALL if recalls else outputs != NONE))
    if recalls:
        # what was decoded ahead is resident while values are fitted
        n_ahead = len(layers[0]) - n_known if fitted.any() else 0
        n_room = n_keep if cells.n_cells is None else cells.n_cells - cells.n_foreign - n_ahead
        n_keep = min(n_keep, n_known, n_room)
    policy = params.policy if used.any() or not params.needs_queries else "streaming"
    params = replace(params, policy=policy, budget=n_keep)

    joins = params.needs_lookahead and cache.phase.how == seq.PROBED
    n_seen = layers[0].n_before(cache.n_intact) if joins else 0
    kept, cache.scores = [], []
    for il, layer in enumerate(layers):
        ranked = [None] * len(layer.positions)
        if params.needs_queries:
            raw = cache.score(il, used, layer)
            cache.scores.append(raw if recalls else raw[:, :n_known])
            ranked = raw[:, :n_known]
            if plan.by_probe or joins:
                ranked = _remembered(layer, ranked / np.float32(used.sum()), n_seen)
        rows = enumerate(zip(layer.positions[:, :n_known], ranked, strict=True))
        heads = [select_head(params, p, plan.n_intact, s, ikv=il, head=h) for h, (p, s) in rows]
        kept.append(np.stack(heads))
    if fitted.any() and n_keep < n_known:
        fit_layers(cache, layers, kept, fitted, plan.n_intact)
    cells.layers = layers
    cells.keep(kept)
    cache.n_recalls += recalls


def _remembered(layer: Layer, scores: FloatArray, n_seen: int) -> FloatArray:
    """The mean scores of a query; of the n_seen first tokens, at which a probe has looked before,
    the mean with what they scored then. The prompt that is being read asks for the same each time,
    and one look alone loses by chance what the next one would have kept."""
    scores[:, :n_seen] = (scores[:, :n_seen] + layer.memory[:, :n_seen]) * np.float32(0.5)
    layer.memory[:, : scores.shape[1]] = scores
    return scores


def attention(cache: KVCache, il: int, used: BoolArray, layer: Layer) -> dict[str, Any]:
    """Keywords of attention_weights: what the used queries attend to in rows of a layer."""
    return {
        "q": cache.queries.values[il, used].swapaxes(0, 1),
        "k": layer.k.swapaxes(0, 1),
        "mask": causal_mask(cache.queries.positions[used], layer.positions),
        "sinks": None if cache.sinks is None else cache.sinks[il],
        "scale": cache.scale,
        "softcap": cache.softcap,
    }


def fit_layers(
    cache: KVCache, layers: list[Layer], kept: list[Index], fitted: BoolArray, n_intact: int
) -> None:
    """Fit V of layers where it is kept and not pinned. What is dropped with this eviction is seen,
    too: its queries may be among the fitted ones."""
    params, all_tokens = cache.params, cache.whole()
    of_all = (cache.queries.outputs[fitted] == ALL)[:, None]
    for il, layer in enumerate(layers):
        # what they got: from all tokens, or from the cells
        got = [
            attention_outputs(attention_weights(**attention(cache, il, fitted, rows)), rows.v)
            for rows in (all_tokens[il], cache.cells.layers[il])
        ]
        where = layer.positions
        stays = where >= n_intact
        np.put_along_axis(stays, kept[il], True, axis=1)
        pinned = pinned_mask(where, n_sink=params.n_sink, n_intact=n_intact, spans=params.pinned)
        seen = attention(cache, il, fitted, layer)
        seen["mask"] = np.where(stays[:, None], seen["mask"], np.float32(-np.inf))
        weights, free = attention_weights(**seen), stays & ~pinned
        layer.v = fit_values(weights, layer.v, np.where(of_all, *got), free, params.value_fit)
