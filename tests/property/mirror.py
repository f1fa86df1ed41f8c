"""A Llama and its numpy model side by side: each call that changes the cache is made on both.

The model is the reference's KVCache under a llama in numpy. It sees the keys and queries that the
context holds (compared with its own where they are new, bit by bit ever after) and selects by the
scores that native computed (compared with its own), so that what stays has to be the same exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from laq_gguf.reference import PolicyParams, Tokens
from laq_gguf.reference.plan import N_ATTEND, REREAD
from parity.numpy_llama import NumpyLlama
from parity.test_evict import Inspector
from property.native_cache import NativeCache, Rows, n_always, n_captured
from reference.saved import restore, snapshot
from tolerances import VALUE_NMSE, assert_equal, assert_nmse

EOS = 2  # of the tiny models
FloatArray = npt.NDArray[np.float32]

#: counters that the model has as well
COUNTED = ("n_tokens", "n_resident", "n_intact", "pending", "n_evictions", "n_recalls", "n_lost")
#: counters that stay what they were when the context was made
CONSTANT = ("n_cells", "n_ctx", "kv_bytes", "kv_bytes_full", "ring_bytes", "compute_bytes")

numpy_llama = functools.cache(NumpyLlama)


class Mirror:
    """Follows a Llama from its construction on; whatever is called on it, the model does the same.

    Attributes:
        cache: the model's.
        logits: the model's, of the last token; None where that was not the last one decoded.
        refused: whether the last call was refused, by both.
    """

    def __init__(
        self,
        llm: Any,
        native: Any,
        path: Path,
        params: PolicyParams,
        tolerance: float | None,
        recall: str | None = None,
        on_device: bool = False,
    ) -> None:
        """
        Args:
            llm: a Llama with kv_budget, made with LAQ_DEBUG set, just made; path: of its model.
            params: the same settings for the reference.
            tolerance: NMSE of keys, queries, logits and scores; None: K is stored in blocks, which
                the model in numpy knows nothing of, and only compared with itself.
            recall: of the Llama, whose archive has the cache's own type; None: it has none.
            on_device: it treats its cells as those of a device.
        """
        self.llm, self.model, self.tolerance = llm, numpy_llama(path), tolerance
        self.inspector, self.eos = Inspector(llm, native), EOS
        self.cache = NativeCache(
            params,
            n_captured(params),
            n_cells=llm.kv_stats().n_cells,
            n_batch=llm.n_batch,
            recall=recall,
            ahead_from_cells=on_device,
            n_attend=llm.context_params.n_ubatch if on_device else N_ATTEND,
            **self.model.shape,
        )
        self.rows = Rows(llm, native)
        # what native remembers of the last tokens decoded, by position: one for each slot
        self.tokens: dict[int, int] = {}
        self.n_slots = REREAD + params.lookahead_size
        self.before = self.after = self.first = llm.kv_stats()
        self.logits: npt.NDArray[np.float64] | None = None
        self.n_decoded, self.n_reread, self.refused = 0, 0, False
        self._call = {}
        of_ctx = {"decode", "kv_cache_seq_rm", "kv_cache_clear"}
        for name in (*sorted(of_ctx), "prompt_next", "prompt_end", "flush", "set_pinned"):
            owner = llm._ctx if name in of_ctx else llm._laq
            self._call[name] = getattr(owner, name)
            setattr(owner, name, getattr(self, name))

    def _both(self, native: Callable[[], Any], model: Callable[[Any], None]) -> Any:
        """Call native, then the model with its result; both or none may refuse."""
        self.before = self.llm.kv_stats()
        result, error, refusal = None, None, None
        try:
            result = native()
        except RuntimeError as raised:
            error = raised
        self.after = self.llm.kv_stats()
        layers = range(self.cache.n_layer if self.cache.params.needs_queries else 0)
        self.cache.n_before = self.before.n_evictions
        self.cache.given = [
            [self.inspector.scores(il, i) for il in layers]
            for i in range(self.before.n_evictions, self.after.n_evictions)
        ]
        self.cache.tolerance = self.tolerance
        try:
            model(result)
        except ValueError as raised:
            refusal = raised
        assert (error is None) == (refusal is None), (
            f"native: {error or 'done'}; the model: {refusal or 'done'}"
        )
        self.check()
        if error is not None:
            self.refused = True
            raise error
        return result

    # what the Llama calls

    def decode(self, batch: Any) -> None:
        raw = batch.batch
        tokens = [raw.token[i] for i in range(raw.n_tokens)]

        def model(_: Any) -> None:
            if raw.pos[0] != self.cache.n_tokens:
                raise ValueError("the batch does not go on after the last position")
            try:
                self.cache.prepare(len(tokens))
            except ValueError:
                if self.after.n_evictions > self.before.n_evictions:
                    self.cache.flush()  # what waits comes first, whether there is room or not
                raise
            self._note(tokens)
            self.logits = self.model.forward(tokens, self.cache)
            self.n_decoded += len(tokens)
            self._adopt(len(tokens))

        self._both(lambda: self._call["decode"](batch), model)

    def prompt_next(self, tokens: npt.NDArray[np.int32]) -> int:
        def model(n_chunk: int | None) -> None:
            if len(tokens) == 0 or self.cache.n_tokens + len(tokens) > self.first.n_ctx:
                raise ValueError("no tokens, or too many")
            phase, n_again = self.cache.phase, 0
            try:
                n_again = self._read_answer_again()
                self._read_on(tokens, n_chunk)
            except ValueError:
                self.cache.phase = phase
                raise
            finally:
                self._adopt(n_again)

        return self._both(lambda: self._call["prompt_next"](tokens), model)

    def _read_answer_again(self) -> int:
        """Last tokens that were read again, not adopted yet."""
        tail = self._tail(self.cache.prompt_next())
        if tail:
            self.cache.take_back(len(tail))
            self._note(tail)
            for i in range(0, len(tail), self.cache.n_attend):
                piece = tail[i : i + self.cache.n_attend]
                self.logits = self.model.forward(piece, self.cache)
            self.n_decoded += len(tail)
            self.n_reread += len(tail)
        return len(tail)

    def _read_on(self, tokens: npt.NDArray[np.int32], n_chunk: int | None) -> None:
        cache, n_left = self.cache, len(tokens)
        plan = cache.plan(n_left)
        if plan.n_tokens == 0 and cache.n_over:
            cache.evict(cache.params.budget)
            plan = cache.plan(n_left)
        if plan.n_tokens == 0:
            raise ValueError("no cells")
        assert n_chunk in (None, plan.n_tokens), f"reads {n_chunk} tokens on, not {plan}"
        probe, n_probe = None, self.after.n_probe - self.before.n_probe
        if plan.n_probe:
            assert n_probe == (plan.n_probe if plan.n_evict else 0)
        if plan.n_evict and plan.n_probe:
            probe = self._probe(tokens[n_left - n_probe :])
            self.logits = None
        cache.make_room(plan.n_evict, probe, n_probe)

    def prompt_end(self) -> None:
        cache, params = self.cache, self.cache.params
        looks_ahead = params.needs_lookahead and params.lookahead == "pseudo"
        looks_ahead &= cache.n_over > 0 or cache.recalls("turn")
        logits = self.inspector.logits() if looks_ahead else None

        def model(_: Any) -> None:
            n_prompt = cache.n_tokens
            cache.choose_for_lookahead()
            cache.prompt_end(self._pseudo() if looks_ahead else None)
            self._note([0] * (self.after.n_pseudo - self.before.n_pseudo))
            self.tokens = {p: token for p, token in self.tokens.items() if p < n_prompt}

        self._both(self._call["prompt_end"], model)
        if logits is not None:
            assert_equal(self.inspector.logits(), logits, "the prompt's own logits are back")

    def _note(self, tokens: list[int]) -> None:
        """Tokens are decoded after what is cached; each takes the slot of an earlier one."""
        for p, token in enumerate(tokens, self.cache.n_tokens):
            taken = [q for q in self.tokens if q % self.n_slots == p % self.n_slots]
            self.tokens = {q: t for q, t in self.tokens.items() if q not in taken} | {p: token}

    def _tail(self, n_most: int) -> list[int]:
        """The last tokens that every head holds and that are known."""
        cache, tail = self.cache, []
        for p in range(cache.n_tokens - 1, cache.n_intact - 1, -1):
            if p not in self.tokens or len(tail) == n_most:
                break
            tail.insert(0, self.tokens[p])
        return tail

    def flush(self) -> None:
        self._both(self._call["flush"], lambda _: self.cache.flush())

    def evict(self, n_keep: int) -> None:
        """laq_evict, which the Llama does not call by itself."""
        call = self.llm._laq._call
        self._both(lambda: call("laq_evict", n_keep), lambda _: self.cache.evict(n_keep))

    def recall(self) -> None:
        self._both(self.llm.recall, lambda _: self.cache.recall())

    def set_pinned(self, spans: list[tuple[int, int]]) -> None:
        def model(_: Any) -> None:
            params = replace(self.cache.params, pinned=tuple(spans))
            if params.policy != "full" and n_always(params) > params.budget:
                raise ValueError("more is pinned than the budget holds")
            self.cache.params = params

        self._both(lambda: self._call["set_pinned"](spans), model)

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        n_tokens = self.cache.n_tokens
        done = self._call["kv_cache_seq_rm"](seq_id, p0, p1)
        if done and max(p0, 0) < n_tokens:
            self.logits = None  # a removal that is refused leaves them
        if done and max(p0, 0) < (n_tokens if p1 < 0 else min(p1, n_tokens)):
            self.tokens = {p: token for p, token in self.tokens.items() if p < max(p0, 0)}
        assert done == self.cache.remove(p0, p1), f"native: {done}, the model says otherwise"
        self.check()
        return done

    def kv_cache_clear(self) -> None:
        self._call["kv_cache_clear"]()
        self.cache.clear()
        self.tokens = {}
        self.logits = None
        self.check()

    def restore(self, saved: dict[str, Any]) -> None:
        """A state was loaded: what the model was then."""
        restore(self.cache, saved)
        self.tokens = {}
        self.logits = None
        self.check()

    def park(self, name: str) -> dict[str, Any]:
        """Park the chat; what the model needs to resume it."""
        held = {
            "cache": snapshot(self.cache),
            "params": self.cache.params,
            "tokens": self.tokens,
            "logits": None if self.llm._requires_eval else self.logits,
        }
        self.llm.park(name)
        self.check()
        return held

    def resume(self, name: str, held: dict[str, Any]) -> None:
        logits = held["logits"]
        self.llm.resume(name)
        restore(self.cache, held["cache"])
        self.cache.params, self.tokens, self.logits = held["params"], held["tokens"], logits
        self.check()
        assert self.llm._requires_eval == (logits is None)
        if logits is not None and self.tolerance is not None:
            assert_nmse(self.inspector.logits(), logits, self.tolerance, "the logits are back")

    # what comes ahead of a prompt's end

    def _forward(self, tokens: Any, fork: NativeCache, made: list[Tokens]) -> Any:
        logits = self.model.forward(tokens, fork)
        made.append(fork.made)
        return logits

    def _probe(self, tokens: npt.NDArray[np.int32]) -> Tokens:
        fork, made = self.cache.fork(), []
        n_free = self.cache.cells.n_free - len(tokens)
        n_most = min(self.cache.params.probe_ahead, n_free)
        return self._ahead(fork, self._forward(tokens, fork, made), n_most, made)

    def _pseudo(self) -> Tokens:
        n_most = min(self.cache.params.ahead, self.cache.cells.n_free)
        return self._ahead(self.cache.fork(), self.logits, n_most, [])

    def _ahead(self, fork: NativeCache, logits: Any, n_most: int, made: list[Tokens]) -> Tokens:
        """`made` and the greedy tokens that follow, as many as native decoded. Where two tokens are
        nearly as good, native may have taken the other one: then the scores are not compared.
        """
        n_made = self.after.n_pseudo - self.before.n_pseudo
        for i in range(max(n_made, 1)):  # the reference wants one even where none finds a cell
            token = self._greedy(logits)
            assert i == 0 or token != self.eos or self.cache.tolerance is None
            logits = self._forward([token], fork, made)
        if n_made < n_most:
            assert self._greedy(logits) == self.eos or self.cache.tolerance is None
        assert n_made <= n_most
        parts = ("k", "v", "q")
        return Tokens(*(np.concatenate([getattr(t, c) for t in made], axis=1) for c in parts))

    def _greedy(self, logits: Any) -> int:
        second, first = np.sort(logits)[-2:]
        if self.tolerance is None or first - second < 3 * self.tolerance**0.5 * logits.std():
            self.cache.tolerance = None
        return int(logits.argmax())

    # comparing

    def _adopt(self, n_new: int) -> None:
        """Compare the last tokens and the logits with the model's, and go on with native's."""
        cache, first = self.cache, self.cache.n_tokens - n_new
        if n_new == 0:
            return
        if self.tolerance is not None:
            assert_nmse(self.inspector.logits(), self.logits, self.tolerance, "logits")
        for il, layer in enumerate(cache.cells.layers):
            where, queries = self.inspector.queries(il)
            assert_equal(where, cache.queries.positions, f"positions of the queries of layer {il}")
            is_new = where >= first
            keys, held = self.inspector.keys(il).swapaxes(0, 1), layer.positions >= first
            if self.tolerance is not None:
                assert_nmse(keys[held], layer.k[held], self.tolerance, f"new keys of layer {il}")
                own = cache.queries.values[il][is_new]
                assert_nmse(queries[is_new], own, self.tolerance, f"new queries of layer {il}")
            layer.k[held] = keys[held]
            cache.queries.values[il][is_new] = queries[is_new]
            for head in range(cache.n_head_kv):
                layer.v[head, held[head]] = self.rows.resident(il, head, True)[held[head]]
                self._adopt_archived(il, head, first)

    def _adopt_archived(self, il: int, head: int, first: int) -> None:
        """Of tokens that were read again and evicted in one call."""
        archive = self.cache.archive
        for i in [] if archive is None else np.flatnonzero(archive.positions >= first):
            for is_v, part in enumerate("kv"):
                rows = getattr(archive.layers[il], part)
                row = self.rows.archived(il, head, bool(is_v), int(archive.positions[i]))
                if self.tolerance is not None:
                    what = f"archived position {archive.positions[i]}"
                    assert_nmse(row, rows[head, i], self.tolerance, what)
                rows[head, i] = row

    def check(self) -> None:
        """What native holds is what the model holds."""
        stats, cache = self.llm.kv_stats(), self.cache
        for name in COUNTED:
            actual, expected = getattr(stats, name), getattr(cache, name)
            assert actual == expected, f"{name}: {actual}, the model's is {expected}"
        for name in CONSTANT:
            actual, expected = getattr(stats, name), getattr(self.first, name)
            assert actual == expected, f"{name}: {actual}, it was {expected}"
        assert stats.n_resident <= stats.n_cells
        assert stats.n_decoded - stats.n_probe - stats.n_pseudo == self.n_decoded
        assert stats.n_reread == self.n_reread
        assert_equal(self.llm.kept_positions(), cache.positions, "resident positions")
        for il, layer in enumerate(cache.cells.layers):
            keys = self.inspector.keys(il).swapaxes(0, 1)
            assert_equal(keys.view(np.uint32), layer.k.view(np.uint32), f"keys of layer {il}")
            where, queries = self.inspector.queries(il)
            assert_equal(where, cache.queries.positions, f"positions of the queries of layer {il}")
            own = np.ascontiguousarray(cache.queries.values[il])
            assert_equal(queries.view(np.uint32), own.view(np.uint32), f"queries of layer {il}")
            for head in range(cache.n_head_kv):
                values = self.rows.resident(il, head, True)
                what = f"values of layer {il}, head {head}"
                if cache.params.fits_values:
                    assert_nmse(values, layer.v[head], VALUE_NMSE, what)
                else:
                    assert_equal(values, layer.v[head], what)
        self._check_archive(stats)

    def _check_archive(self, stats: Any) -> None:
        """Of what is archived, the first token, the last one and some between: byte for byte."""
        archive = self.cache.archive
        where = [] if archive is None else archive.positions
        assert stats.n_archived == len(where) * self.cache.n_layer * self.cache.n_head_kv
        for i in sorted({0, len(where) // 3, 2 * len(where) // 3, len(where) - 1}):
            if not 0 <= i < len(where):
                continue
            for il, head in np.ndindex(self.cache.n_layer, self.cache.n_head_kv):
                for is_v, part in enumerate("kv"):
                    rows = getattr(archive.layers[il], part)
                    row = self.rows.archived(il, head, bool(is_v), int(where[i]))
                    assert_equal(row, rows[head, i], f"archived position {where[i]}")
