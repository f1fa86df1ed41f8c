"""The KV cache of a sequence: when it evicts and recalls, scored by which queries.

Three things evict: the end of a prompt (`prompt_end`), a chunk of a prompt that finds no cells
(`plan`, `make_room`), and decoding that finds none (`overflow`, which `append` does by itself).
With an archive a prompt attends: it is decoded in view of cells and archive (`visible`). In
native/src, laq-trigger and laq-read agree. A prompt ends with `choose_for_lookahead` and then
`prompt_end`; before that, for each chunk:

    n = cache.prompt_next()         # with an archive, an answer that did not attend
    cache.take_back(n)              # is removed
    cache.append(the same tokens)   # and read again
    chunk = cache.plan(n_left)
    cache.make_room(chunk.n_evict, probe, chunk.n_probe)
    cache.append(the next chunk.n_tokens)
"""

from __future__ import annotations

from dataclasses import replace

from . import evict, seq
from .attention import BoolArray, FloatArray, IntArray, attention_scores
from .cells import ALL, CELLS, Archive, Cells, Layer, Queries, Tokens, empty_layers
from .plan import N_ATTEND, REREAD, ChunkPlan, default_chunk, plan_attending, plan_chunk
from .select import PolicyParams, query_range

#: When archived tokens are recalled: at the end of a prompt, or after its lookahead; also where
#: generated tokens find no cells.
RECALLS = ("turn", "always")


class KVCache:
    """The cache of one sequence under a policy. A refused call (ValueError) leaves it as it was."""

    def __init__(
        self,
        params: PolicyParams,
        *,
        n_layer: int,  # this and the next three: shape of the model
        n_head: int,
        n_head_kv: int,
        n_embd_head: int,
        scale: float | None = None,  # of q . k; by default 1 / sqrt(n_embd_head)
        softcap: float = 0.0,  # of attention_weights
        sinks: FloatArray | None = None,  # (n_layer, n_head), of attention_weights
        n_cells: int | None = None,  # cells that there are and never more; None = any
        n_batch: int = 512,  # most tokens of a chunk of a prompt
        recall: str | None = None,  # one of RECALLS; None: there is no archive
        ahead_from_cells: bool = False,  # look ahead from what a first recall chose; or attend
        n_attend: int = N_ATTEND,  # most tokens that attend at once
    ) -> None:
        if n_batch < 1:
            raise ValueError(f"n_batch must be at least 1, got {n_batch}")
        if recall not in (None, *RECALLS):
            raise ValueError(f"unknown recall {recall!r}, possible: {', '.join(RECALLS)}")
        if recall is not None and not params.needs_queries:
            raise ValueError(f"policy {params.policy!r} has no scores to recall by")
        self.params, self.n_batch, self.n_attend = params, n_batch, n_attend
        self.n_layer, self.n_head = n_layer, n_head
        self.n_head_kv, self.n_embd_head = n_head_kv, n_embd_head
        self.scale = n_embd_head**-0.5 if scale is None else scale
        self.softcap, self.sinks = softcap, sinks
        self.recall_when, self.ahead_from_cells = recall, ahead_from_cells
        self.cells = Cells([], n_cells)
        self.n_evictions = self.n_recalls = 0
        self.n_lost = 0  # rows that were archived, and missing in a state that was restored
        self.clear()

    def clear(self) -> None:
        """Remove every token."""
        shape = self.n_layer, self.n_head_kv, self.n_embd_head
        self.cells.layers = empty_layers(*shape)
        self.archive = None if self.recall_when is None else Archive(empty_layers(*shape))
        self.queries = Queries(self.n_layer, self.n_head, self.n_embd_head)
        self.phase = seq.IDLE
        self.n_tokens = 0  # last position + 1
        self.n_intact = 0  # from here on every head holds every token; 0 = nothing is evicted
        self.n_exact: int | None = None  # from here on decoded from the cells alone; None: none is
        self.scores: list[FloatArray] = []  # raw, of the last eviction, (n_head_kv, n_kv) a layer

    @property
    def pending(self) -> bool:
        """Whether an eviction waits for its lookahead."""
        return self.phase.is_waiting

    @property
    def n_resident(self) -> int:
        return len(self.cells.layers[0])

    @property
    def positions(self) -> IntArray:
        return self.cells.positions

    @property
    def n_over(self) -> int:
        """Cells that an eviction down to the budget frees."""
        return 0 if self.params.policy == "full" else max(self.n_resident - self.params.budget, 0)

    @property
    def attends(self) -> bool:
        """Whether what is decoded now is decoded in view of cells and archive."""
        from_cells = self.pending and self.ahead_from_cells
        return self.phase.how == seq.ATTENDING and self.n_intact > 0 and not from_cells

    def recalls(self, when: str) -> bool:
        """Whether it is time for a recall, and something is archived."""
        return self.recall_when in (when, "always") and self.archive.positions.size > 0

    def configure(self, params: PolicyParams) -> None:
        """Other settings from now on."""
        self.params, self.phase = params, self.phase.forgotten()

    def append(self, tokens: Tokens) -> None:
        """Add tokens at the positions that follow, after `prepare`."""
        self.prepare(len(tokens))
        if self.attends and len(tokens) > self.n_attend:
            raise ValueError(f"{len(tokens)} tokens at once attend, {self.n_attend} at most can")
        is_exact = self.archive is None or self.n_intact == 0 or self.attends
        if self.n_exact is None and not is_exact:
            self.n_exact = self.n_tokens
        self._append(tokens)

    def _append(self, tokens: Tokens) -> None:
        output = ALL if self.n_intact == 0 or self.attends else CELLS
        self.cells.append(self.n_tokens, tokens)
        self.queries.append(self.n_tokens, tokens, output)
        self.n_tokens += len(tokens)

    def prepare(self, n_tokens: int) -> None:
        """What comes before n_tokens are decoded: a waiting eviction is carried out if its
        lookahead is complete, and the overflow if they find no cells."""
        if not self.cells.fits(n_tokens, self.n_over):
            raise ValueError(f"{n_tokens} tokens find no room where {self.n_over} cells are freed")
        if self.pending and self.n_tokens >= self.phase.n_prompt + self.params.lookahead_size:
            self.flush()
        if not self.cells.fits(n_tokens):
            self.overflow()

    def visible(self) -> list[Layer]:
        """What the tokens that come attend to of what there is, for each layer."""
        return self.whole() if self.attends else self.cells.layers

    def whole(self) -> list[Layer]:
        """The tokens that are whole: archived, or held by every head of every layer."""
        return self.cells.layers if self.archive is None else self.archive.whole(self.cells)

    def score(self, il: int, used: BoolArray, layer: Layer) -> FloatArray:
        """What the used queries pay to rows of a layer: (n_head_kv, n)."""
        return attention_scores(**evict.attention(self, il, used, layer))

    def prompt_next(self) -> int:
        """Begin to read a prompt, unless one is being read. Comes before each `plan`; where that
        finds no cells, `evict` down to the budget comes before another one. Returns how many of the
        last tokens, at most, are to be taken back and read again. An eviction that waits is made
        if tokens were generated: their answer was shorter than the lookahead."""
        if self.pending and self.n_tokens > self.phase.n_prompt:
            self.flush()
        self._read()
        if not self.attends or self.n_exact is None:
            return 0
        n_exact, self.n_exact = self.n_exact, None
        return max(min(self.n_tokens - max(n_exact, self.n_intact), REREAD), 0)

    def _read(self) -> None:
        self.phase = self.phase.reading(self.n_tokens, self.archive is not None)

    def take_back(self, n: int) -> None:
        """Remove the last n tokens, which then attend."""
        phase = self.phase
        self.remove(self.n_tokens - n)
        self.phase = phase

    def plan(self, n_left: int) -> ChunkPlan:
        """The next chunk of a prompt of which n_left tokens are left. Changes nothing."""
        cells, params, n_batch = self.cells, self.params, self.n_batch
        if cells.n_cells is None:
            n_most = self.n_attend if self.archive is not None and self.n_intact else n_left
            return ChunkPlan(min(n_left, n_most, n_batch))
        counts = {"n_used": cells.n_used, "n_resident": self.n_resident, "n_left": n_left}
        counts |= {"n_cells": cells.n_cells, "n_batch": n_batch}
        chunk_size = params.chunk_size or default_chunk(params, cells.n_cells)
        params = replace(params, chunk_size=chunk_size)
        if self.archive is None:
            return plan_chunk(params, **counts)
        return plan_attending(params, n_attend=self.n_attend, n_intact=self.n_intact, **counts)

    def make_room(self, n_evict: int, probe: Tokens | None = None, n_probe: int = 0) -> None:
        """Carry out the eviction of a chunk's plan; comes before each chunk. With n_evict 0 nothing
        goes; with an archive the newest tokens stay. Without one, the policies that look ahead need
        a probe: the last n_probe tokens of the prompt, decoded after what is cached, then pseudo
        tokens. Their keys take part in the softmax; then they are dropped."""
        params, n_end = self.params, self.n_tokens
        n_keep, probes = self.n_resident - n_evict, params.needs_lookahead and self.archive is None
        if not 0 <= n_evict <= self.n_over:
            raise ValueError(f"n_evict must be from 0 to {self.n_over}, got {n_evict}")
        if n_evict == 0:
            self._read()
            return
        if not probes and (probe is not None or n_probe):
            raise ValueError("this cache takes no probe")
        if probes and (probe is None or not 1 <= n_probe < len(probe)):
            raise ValueError("it needs a probe: n_probe tokens of the prompt and pseudo tokens")
        evict.check_pinned(params, n_keep, self._intact(n_end), n_end)
        probe = probe[: n_probe + params.probe_ahead] if probes else None
        if probes and not self.cells.fits(len(probe)):
            raise ValueError(f"a probe of {len(probe)} tokens finds {self.cells.n_free} free cells")
        self._read()
        queries = (0, 0) if self.archive is not None else query_range(params, n_end, n_end)
        if probes:
            self._append(probe)
            first, last = query_range(params, n_end + n_probe, self.n_tokens)
            queries = max(first, n_end), last  # a short probe does not fall back on what is cached
        plan = evict.Plan(n_keep, self._intact(n_end), queries, n_end, by_probe=probes)
        evict.carry_out(self, plan)
        self.phase = self.phase.evicted(by_probe=probes)

    def choose_for_lookahead(self) -> None:
        """Before `prompt_end`: a prompt that attended, and is looked ahead from the cells, recalls
        by its last snapkv_window tokens as many as there are cells for beside a lookahead."""
        params, cells, n_end = self.params, self.cells, self.n_tokens
        is_due = self.attends and self.ahead_from_cells and params.needs_lookahead
        if not is_due or not self.recalls("turn"):
            return
        evict.check_pinned(params, params.budget, self._intact(n_end), n_end)
        n_room = n_end if cells.n_cells is None else cells.n_cells - cells.n_foreign - params.ahead
        # values are fitted to all of these queries: every head holds what they see of each other
        n_intact = max(self.n_intact, n_end - max(params.snapkv_window, params.window))
        queries = max(n_end - params.snapkv_window, 0), n_end
        n_keep = max(n_room, params.budget)
        evict.carry_out(self, evict.Plan(n_keep, n_intact, queries, n_end, recall=True))
        self.phase = replace(self.phase, how=seq.WHOLE)

    def prompt_end(self, pseudo: Tokens | None = None) -> None:
        """Say that the prompt ends here. Nothing happens while the cache holds no more than the
        budget and nothing is archived. A deferred lookahead is waited for. Otherwise evicts or, if
        something is archived, recalls now, with as many of the pseudo tokens as find cells; they
        take part in the softmax and are then dropped."""
        params, n_prompt, recall = self.params, self.n_tokens, self.recalls("turn")
        wants_pseudo = params.needs_lookahead and params.lookahead == "pseudo"
        waits = params.needs_lookahead and not wants_pseudo
        if pseudo is not None and not wants_pseudo:
            raise ValueError("this policy and lookahead take no pseudo tokens")
        if self.n_over == 0 and not recall:
            self.phase = seq.IDLE
            return
        if wants_pseudo and not pseudo:
            raise ValueError("lookahead 'pseudo' needs the tokens that follow the prompt")
        n_end = n_prompt + (params.ahead if waits else 0)
        evict.check_pinned(params, params.budget, self._intact(n_prompt), n_end)
        if waits:
            self.phase = self.phase.waiting(n_prompt)
            return
        if pseudo is not None:
            self._append(pseudo[: params.ahead][: self.cells.n_free])
        self._evict(params.budget, n_prompt, n_prompt, recall)
        self.phase = seq.IDLE

    def flush(self) -> None:
        """Carry out an eviction that waits, with the lookahead queries there are: the last
        lookahead_size ones, since what is pinned may not outgrow the budget."""
        recall = self.recalls("turn")
        if self.pending and (self.n_over or recall):
            n_prompt = max(self.phase.n_prompt, self.n_tokens - self.params.lookahead_size)
            self._evict(self.params.budget, n_prompt, self.n_tokens, recall)
        if self.pending:
            self.phase = seq.IDLE

    def overflow(self) -> None:
        """Evict down to the budget, scored by the last lookahead_size tokens decoded. Nothing
        happens while no more is resident. An eviction that waits is thereby done."""
        if self.n_over:
            self.evict(self.params.budget, self.recalls("turn" if self.pending else "always"))

    def evict(self, n_keep: int, recall: bool = False) -> None:
        """As `overflow`, down to n_keep cells in place of the budget; or a recall."""
        if n_keep < 1:
            raise ValueError(f"n_keep must be at least 1, got {n_keep}")
        if self.params.policy == "full":
            raise ValueError("policy 'full' never evicts: choose another policy")
        if self.n_resident <= n_keep and not recall:
            return
        n_prompt = max(self.n_tokens - self.params.ahead, 0)
        evict.check_pinned(self.params, n_keep, self._intact(n_prompt), self.n_tokens)
        self._evict(n_keep, n_prompt, self.n_tokens, recall)
        self.phase = self.phase.evicted()

    def recall(self) -> None:
        """Choose again from all tokens, by the last ones decoded or by the lookahead that an
        eviction waits for. Nothing happens while nothing is archived."""
        if self.archive is None:
            raise ValueError("there is no archive")
        if self.pending:
            self.flush()
        elif self.recalls("turn"):
            self.evict(self.params.budget, recall=True)

    def _evict(self, n_keep: int, n_prompt: int, n_end: int, recall: bool) -> None:
        """The tokens from n_prompt on are the lookahead; those before n_end stay."""
        queries = query_range(self.params, n_prompt, self.n_tokens)
        plan = evict.Plan(n_keep, self._intact(n_prompt), queries, n_end, recall=recall)
        evict.carry_out(self, plan)

    def _intact(self, n_prompt: int) -> int:
        """Where the intact suffix begins after an eviction; the window ends at n_prompt."""
        return max(self.n_intact, n_prompt - self.params.window, 0)

    def remove(self, p0: int, p1: int = -1) -> bool:
        """Remove the positions [p0, p1); p1 < 0 means to the end. False: refused. Below the intact
        suffix every head misses other tokens: a removal there cannot leave a prefix that may be
        continued. Removing everything always works."""
        p0, n = max(p0, 0), self.n_tokens
        p1 = n if p1 < 0 else min(p1, n)
        if p0 >= p1:
            return True
        if (p0, p1) == (0, n):
            self.clear()
            return True
        if p0 < self.n_intact:
            return False
        self.cells.remove(p0, p1)
        self.queries.keep(~self.queries.within(p0, p1))
        # when nothing of the intact suffix is left, its beginning is where tokens go on
        last = int(self.cells.layers[0].positions[0].max(initial=-1))
        self.n_tokens = max(last + 1, self.n_intact)
        self.phase = self.phase.removed(p0)
        if self.n_exact is not None and p0 <= self.n_exact:
            self.n_exact = None
        return True
