"""A prompt is read once for each K/V type, and every method begins where that reading ended."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from laq_gguf.bench.answers import freely
from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.methods import METHODS, Method, allocation, bounded_size, parse_method
from laq_gguf.bench.options import llama_options
from laq_gguf.cli import CACHE_TYPES


def options_of(args: argparse.Namespace, n_ctx: int, type_name: str) -> dict[str, Any]:
    """Keyword arguments of laq_gguf.Llama for a K/V type, beside those of the eviction."""
    type_id = CACHE_TYPES[type_name]
    return {**llama_options(args, n_ctx), "type_k": type_id, "type_v": type_id}


class Reader:
    """A cache that holds any prompt whole, and takes the settings of every method that reads so.

    Attributes:
        bytes_per_cell: over all layers, read back.
        ms_read: what the last prompt took.
    """

    #: settings under which a prompt is read with nothing evicted, and those of the model
    READ: ClassVar[dict[str, Any]] = METHODS["full"].options
    ALLOCATE: ClassVar[dict[str, Any]] = {}

    #: ggml's CPU backend sums the attention of fewer tokens in another order: so that no method
    #: differs by that, the prompt is read in batches of at least so many, as BoundedReader does
    N_LAST = 64

    def __init__(
        self, args: argparse.Namespace, n_ctx: int, type_name: str, methods: Iterable[Method] = ()
    ) -> None:
        """Load the model.

        Args:
            args: with model and threads.
            n_ctx: tokens of the longest prompt and what is decoded after it.
            type_name: of K and V.
            methods: those with settings that more has to be allocated for.
        """
        options = options_of(args, n_ctx, type_name)
        # a policy that scores: what all of them need is allocated
        options.update(kv_budget=n_ctx, kv_policy="laq++", lookahead="pseudo", **self.ALLOCATE)
        options.update(allocation(methods))
        self.decoder = Decoder("laq_gguf", str(args.model), options)
        self.n_ctx, self.ms_read, self._ms_first = n_ctx, 0.0, 0.0
        stats = self.stats()
        self.bytes_per_cell = stats["kv_bytes"] / stats["n_cells"]

    def stats(self) -> dict[str, Any]:
        """kv_stats() as a dict."""
        stats = self.decoder.stats()
        assert stats is not None
        return stats

    def read(self, tokens: list[int]) -> None:
        """Read a prompt but for its last tokens, with nothing evicted, and keep the state.

        Those are decoded by `start`: a state has no logits.
        """
        decoder = self.decoder
        decoder.llm.reset()
        decoder.llm.set_eviction(self.n_ctx, **self.READ)
        start = time.perf_counter()
        n = (len(tokens) // self.N_LAST - 1) * self.N_LAST
        n = n if n > 0 else len(tokens) - 1
        decoder.prefill(tokens[:n])
        self._ms_first = 1e3 * (time.perf_counter() - start)
        self._state, self._last = decoder.save(), tokens[n:]

    def start(self, method: Method, budget: int | None) -> float:
        """Bring the cache to the end of the prompt, evicted as a method does it.

        Args:
            budget: tokens per layer and KV head; None: nothing is evicted.
        Returns:
            What it took from the whole prompt on, ms.
        """
        self._read_last(self.n_ctx if budget is None else budget, method)
        start = time.perf_counter()
        self.decoder.llm._laq.prompt_end()
        return 1e3 * (time.perf_counter() - start)

    def _read_last(self, budget: int, method: Method, **changes: Any) -> None:
        decoder = self.decoder
        decoder.load(self._state)
        options = {**vars(method.config), "pinned": (), **changes}
        decoder.llm.set_eviction(budget, **options)
        start = time.perf_counter()
        decoder.feed(self._last)
        decoder.logits()  # waits for it
        self.ms_read = self._ms_first + 1e3 * (time.perf_counter() - start)

    def close(self) -> None:
        """Free the model."""
        self.decoder.close()


class TwoStageReader(Reader):
    """As Reader, for methods of two stages, with an archive of what SnapKV evicts."""

    READ: ClassVar[dict[str, Any]] = METHODS["snapkv"].options
    ALLOCATE: ClassVar[dict[str, Any]] = {"kv_recall": "ram"}

    def start(self, method: Method, budget: int | None) -> float:
        """As Reader's: SnapKV evicts, pseudo tokens are decoded from what is left, their queries
        recall from all of the prompt, and they are dropped."""
        assert budget is not None
        decoder, options = self.decoder, {**vars(method.config), "pinned": ()}
        self._read_last(budget, method, kv_policy="snapkv")
        start = time.perf_counter()
        n_prompt, logits = decoder.n_tokens, decoder.logits().copy()
        decoder.llm._laq.prompt_end()
        ahead, _ = freely(decoder, logits, method.config.lookahead_size + 1)
        n_ahead = decoder.n_tokens - n_prompt
        if n_ahead == 0:  # the answer has no second token
            decoder.step(ahead[0])
            n_ahead = 1
        decoder.llm.set_eviction(budget + n_ahead, **{**options, "lookahead_size": n_ahead})
        decoder.llm.recall()
        if not decoder.rewind(n_prompt):
            raise RuntimeError("the pseudo tokens could not be dropped")
        decoder.logits()[:] = logits
        return 1e3 * (time.perf_counter() - start)


class BoundedReader:
    """A cache of few cells, which reads each prompt in chunks."""

    def __init__(self, args: argparse.Namespace, n_ctx: int, method: Method, n_tokens: int) -> None:
        """Load the model. n_tokens: cells at most, or the budget (--bounded-staging).

        Raises:
            ValueError: too few, see methods.bounded_size.
        """
        size = bounded_size(n_tokens, method.config, args.bounded_staging)
        if size is None:
            raise ValueError(f"{n_tokens} cells are too few for {method.name}")
        budget, staging = size
        options = options_of(args, n_ctx, method.type)
        options.update(method.options, kv_budget=budget, kv_staging=staging)
        self.decoder = Decoder("laq_gguf", str(args.model), options)

    def start(self, tokens: list[int]) -> float:
        """Read a prompt. Returns what it took, ms."""
        start = time.perf_counter()
        self.decoder.prefill(tokens)
        self._state = self.decoder.save()
        return 1e3 * (time.perf_counter() - start)

    def again(self) -> None:
        """Back to the end of the prompt, but for the logits."""
        self.decoder.load(self._state)

    def close(self) -> None:
        """Free the model."""
        self.decoder.close()


class Readers:
    """The readers of a run, each opened when it is first needed.

    A model of more than ONE_AT_A_TIME bytes is loaded once at a time: it may not fit the memory
    as often as there are K/V types and sizes.
    """

    ONE_AT_A_TIME = 2**30

    def __init__(self, args: argparse.Namespace, n_ctx: int) -> None:
        self._args, self._n_ctx = args, n_ctx
        self._methods = [parse_method(name) for name in args.methods]
        self._open: dict[tuple[str, int | str | None], Reader | BoundedReader] = {}
        self._bytes_per_cell: dict[str, float] = {}

    def whole(self, type_name: str, two_stages: bool = False) -> Reader:
        """The reader of a K/V type, for methods of one stage or two."""
        kind = TwoStageReader if two_stages else Reader
        reader = self._get(
            (type_name, "two stages" if two_stages else None),
            lambda: kind(self._args, self._n_ctx, type_name, self._methods),
        )
        assert isinstance(reader, Reader)
        self._bytes_per_cell[type_name] = reader.bytes_per_cell
        return reader

    def bounded(self, method: Method, n_tokens: int) -> BoundedReader:
        """The reader of a bounded method with so many cells at most."""
        size = bounded_size(n_tokens, method.config, self._args.bounded_staging)
        reader = self._get(
            (method.name, sum(size) if size else 0),
            lambda: BoundedReader(self._args, self._n_ctx, method, n_tokens),
        )
        assert isinstance(reader, BoundedReader)
        return reader

    def bytes_per_cell(self, type_name: str) -> float:
        """Bytes of a cell of a K/V type over all layers, read back from an allocated cache."""
        if type_name not in self._bytes_per_cell:
            self.whole(type_name)
        return self._bytes_per_cell[type_name]

    def _get(
        self, key: tuple[str, int | str | None], make: Callable[[], Reader | BoundedReader]
    ) -> Reader | BoundedReader:
        if key not in self._open:
            if self._args.model.stat().st_size > self.ONE_AT_A_TIME:
                self.close()
            self._open[key] = make()
        return self._open[key]

    def close(self) -> None:
        """Free all models."""
        while self._open:
            self._open.popitem()[1].close()
