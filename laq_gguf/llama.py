"""`Llama`: llama_cpp.Llama with a KV cache that evicts by lookahead."""

from __future__ import annotations

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ._lib import Attachment, load, native_errors

native = load()  # before llama_cpp: it decides which libllama llama_cpp gets

import llama_cpp  # noqa: E402

from .config import CONFIG_NAMES, SCORED_POLICIES, LaqConfig  # noqa: E402
from .errors import (  # noqa: E402
    LaqArgumentError,
    LaqContextFullError,
    LaqModelError,
    LaqStateError,
)
from .stats import KvStats  # noqa: E402

N_CTX_STEP = 256

_STOCK = inspect.signature(llama_cpp.Llama.__init__).parameters
_STOCK_NAMES = tuple(
    name for name, p in _STOCK.items() if name != "self" and p.kind is not p.VAR_KEYWORD
)


def _check_names(kwargs: dict[str, Any]) -> None:
    """llama_cpp.Llama drops unknown keywords in silence; here they are a TypeError."""
    known = sorted({*_STOCK_NAMES, *CONFIG_NAMES, "kv_budget"})
    for name in kwargs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise TypeError(
                f"Llama() got an unexpected keyword argument {name!r}; did you mean {near[0]!r}?"
            )


def _check_compatible(kwargs: dict[str, Any]) -> None:
    """Refuse the llama_cpp settings under which nothing could be evicted rightly."""
    pooling = (llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED, llama_cpp.LLAMA_POOLING_TYPE_NONE)
    causal = (llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED, llama_cpp.LLAMA_ATTENTION_TYPE_CAUSAL)
    refused = {
        "draft_model": kwargs.get("draft_model") is not None,
        "embedding": bool(kwargs.get("embedding")),
        "vocab_only": bool(kwargs.get("vocab_only")),
        "pooling_type": kwargs.get("pooling_type", pooling[0]) not in pooling,
        "attention_type": kwargs.get("attention_type", causal[0]) not in causal,
    }
    reasons = {
        "draft_model": "rejected draft tokens would have to be taken back from an evicted cache",
        "embedding": "embeddings are read from the whole prompt",
        "vocab_only": "a model without weights has no KV cache",
        "pooling_type": "pooled embeddings are read from the whole prompt",
        "attention_type": "every token of a non-causal model sees all others",
    }
    for name, is_refused in refused.items():
        if is_refused:
            raise LaqArgumentError(
                f"{name}={kwargs[name]!r} cannot be combined with kv_budget: {reasons[name]}; "
                f"leave out one of them"
            )


def _check_file(path: str) -> None:
    if not os.path.isfile(path):
        raise LaqModelError(f"model_path: there is no file {path}")
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise LaqModelError(f"model_path: {path} cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise LaqModelError(f"model_path: {path} is not a GGUF file (it begins with {magic!r})")


class Llama(llama_cpp.Llama):
    """llama_cpp.Llama whose KV cache keeps at most `kv_budget` tokens of a prompt.

    Attributes:
        kv_budget: tokens per layer and KV head that stay once a prompt has been read, or None.
        laq_config: the other settings of the eviction.
        progress: called as progress(n_done, n_total) after each batch of a prompt, or None.
    """

    progress: Callable[[int, int], None] | None = None
    _laq: Attachment | None = None
    _is_decoding = False  # generate() is past the prompt: several tokens are a draft sent to it

    def __init__(
        self,
        model_path: str,
        *,
        kv_budget: int | float | None = None,
        kv_policy: str = "laq++",
        lookahead: str = "deferred",
        lookahead_size: int = 8,
        window_size: int = 8,
        n_sink: int = 4,
        pinned: Sequence[tuple[int, int]] | None = None,
        snapkv_window: int = 32,
        kernel_size: int = 7,
        pooling: str = "max",
        follow_size: int = 32,
        draft: str = "full",
        score_kernel: str = "auto",
        n_ctx: int = 512,
        seed: int = llama_cpp.LLAMA_DEFAULT_SEED,
        flash_attn: bool = True,
        **kwargs: Any,
    ) -> None:
        """Load a GGUF model. Every keyword of llama_cpp.Llama is taken as well.

        Args:
            model_path: the GGUF file.
            kv_budget: tokens per layer and KV head that stay once a prompt has been read: an int,
                or a float between 0 and 1 as a share of n_ctx. None: nothing is attached; the
                settings below are checked but have nothing to act on.
            kv_policy: what ranks the tokens: "laq++" (attention of the lookahead queries and of
                the last window_size prompt queries), "laq" (lookahead queries alone), "snapkv"
                (the last snapkv_window prompt queries), "streaming" (the most recent tokens),
                "random" (by seed), "full" (never evict).
            lookahead: "deferred": the lookahead queries are the first lookahead_size tokens that
                are really generated; "pseudo": greedy tokens, decoded and dropped before the
                first one is sampled.
            lookahead_size: lookahead tokens.
            window_size: last prompt tokens that every head keeps (snapkv: snapkv_window).
            n_sink: first positions, always kept.
            pinned: spans (first, end) of positions that are always kept.
            snapkv_window: last prompt tokens that snapkv observes and keeps.
            kernel_size: width of the pooling of scores over neighbouring tokens, odd.
            pooling: "max", "avg" or "none".
            follow_size: in heads that copy word for word (their best token has 7 % or more of the
                attention), "laq++" and "laq" give 3/8 of the free cells to the tokens that follow
                the best ones within so many positions: the copy goes on there. 0: no head does.
            draft: the cache that pseudo tokens are drafted from: "full", or "snapkv" (cut to the
                budget first, as in the paper).
            score_kernel: "auto", "fused" or "composed" (from existing ggml operations).
            n_ctx: tokens that a conversation may have, rounded up to a multiple of 256 as
                llama.cpp does; 0 = what the model was trained for.
            seed: of sampling, and of kv_policy="random".
            flash_attn: on by default, unlike in llama_cpp.
            **kwargs: the other keywords of llama_cpp.Llama.

        Raises:
            TypeError: unknown keyword.
            LaqArgumentError: (a ValueError) a value is out of range or two exclude each other.
            LaqModelError: (a ValueError) the file is missing, truncated or not GGUF.
            LaqUnsupportedError: (a RuntimeError and ValueError) this model cannot be evicted.
        """
        _check_names(kwargs)
        self.laq_config = LaqConfig(
            kv_policy=kv_policy,
            lookahead=lookahead,
            lookahead_size=lookahead_size,
            window_size=window_size,
            n_sink=n_sink,
            pinned=pinned,  # type: ignore[arg-type]  # normalised there
            snapkv_window=snapkv_window,
            kernel_size=kernel_size,
            pooling=pooling,
            follow_size=follow_size,
            draft=draft,
            score_kernel=score_kernel,
        )
        self._asked_budget = kv_budget
        self.kv_budget: int | None = None
        # llama.cpp rounds up by itself, but llama_cpp's arrays keep the number they are given
        n_ctx = -(-n_ctx // N_CTX_STEP) * N_CTX_STEP
        if kv_budget is not None:
            _check_compatible(kwargs)
            if n_ctx > 0:  # otherwise known only when the model is loaded
                self.laq_config.resolve_budget(kv_budget, n_ctx)
        _check_file(os.fspath(model_path))
        kwargs.update(n_ctx=n_ctx, seed=seed, flash_attn=flash_attn)
        try:
            self._load(os.fspath(model_path), kwargs)
            self._n_ctx = min(self._n_ctx, len(self.input_ids))
            if kv_budget is not None:
                self.kv_budget = self.laq_config.resolve_budget(kv_budget, self._n_ctx)
                self._attach(self.kv_budget)
        except BaseException:
            self.close()
            raise

    def _load(self, model_path: str, kwargs: dict[str, Any]) -> None:
        with native_errors() as lines:
            try:
                super().__init__(model_path, **kwargs)
            except ValueError as error:
                if type(error) is not ValueError or not str(error).startswith("Failed to"):
                    raise
                reason = "; ".join(dict.fromkeys(lines)) or "llama.cpp gave no reason"
                raise LaqModelError(f"{error}: {reason}") from error

    def _attach(self, budget: int) -> None:
        params, spans = self.laq_config.to_native(native, budget, self._seed)
        address = llama_cpp.ctypes.cast(self._ctx.ctx, llama_cpp.ctypes.c_void_p).value
        assert address is not None
        self._laq = Attachment(native, address, params)
        del spans  # laq_attach has copied them
        # last in, first out: detached before llama_free, whoever closes the context
        self._ctx._exit_stack.callback(self._laq.close)

    def _attached(self, call: str) -> Attachment:
        if self._laq is None:
            raise LaqStateError(f"{call} needs a model made with kv_budget=...")
        return self._laq

    def kv_stats(self) -> KvStats:
        """Counters of the KV cache.

        Raises:
            LaqStateError: the model was made without kv_budget, or is closed.
        """
        return self._attached("kv_stats()").stats(self.laq_config.kv_policy in SCORED_POLICIES)

    def kept_positions(self) -> npt.NDArray[np.int32]:
        """Position of every resident token, ascending: int32 (n_layer, n_head_kv, n_resident).

        Raises:
            LaqStateError: the model was made without kv_budget, or is closed.
        """
        return self._attached("kept_positions()").kept_positions()

    def _check_room(self, n_tokens: int) -> None:
        if n_tokens > self._n_ctx:
            raise LaqContextFullError(
                f"{n_tokens} tokens do not fit n_ctx={self._n_ctx}: shorten the prompt, call "
                "reset(), or make the model with a larger n_ctx"
            )

    def eval(self, tokens: Sequence[int]) -> None:
        """Decode tokens after the ones already decoded.

        More than one token is taken as a prompt, unless they were sent into `generate`.

        Raises:
            LaqContextFullError: n_tokens + len(tokens) is above n_ctx; nothing was decoded.
            LaqStateError: n_tokens was set back to where tokens have been evicted.
            LaqNativeError: no memory for the cells, or the eviction failed.
        """
        n_total = len(tokens)
        is_prompt = n_total > 1 and not self._is_decoding
        self._check_room(self.n_tokens + n_total)
        if self._laq is not None:
            self._truncate()
            if is_prompt:
                self._laq.reserve(n_total)
        try:
            for i in range(0, max(n_total, 1), self.n_batch):
                super().eval(tokens[i : i + self.n_batch])
                if is_prompt and self.progress is not None:
                    self.progress(min(i + self.n_batch, n_total), n_total)
            if is_prompt and self._laq is not None:
                self._laq.prompt_end()
        except BaseException:
            self._requires_eval = True  # the logits are not those of the last token
            raise

    def _truncate(self) -> None:
        """Drop what lies beyond n_tokens; llama_cpp ignores that an evicted cache can refuse it."""
        if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            raise LaqStateError(
                f"n_tokens was set back to {self.n_tokens}, but tokens before position "
                f"{self.kv_stats().n_intact} have been evicted: call reset() and evaluate the "
                "prompt again"
            )

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        if self._laq is not None:
            self._ctx.kv_cache_clear()

    @functools.wraps(llama_cpp.Llama.generate)
    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        tokens = list(tokens)
        self._check_room(len(tokens))
        generator = super().generate(tokens, *args, **kwargs)
        sent, has_read_prompt = None, False
        try:
            while True:
                self._is_decoding = has_read_prompt
                try:
                    token = generator.send(sent)
                except StopIteration:
                    return
                finally:
                    self._is_decoding = False
                has_read_prompt = True
                sent = yield token
        finally:
            generator.close()
            # an answer shorter than the lookahead leaves an eviction waiting
            if self._laq is not None and not self._laq.is_closed:
                self._laq.flush()

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from super()._create_completion(*args, **kwargs)
        except ValueError as error:
            if type(error) is not ValueError or not str(error).startswith("Requested tokens"):
                raise
            raise LaqContextFullError(
                f"{error} (n_ctx): shorten the prompt or make the model with a larger n_ctx"
            ) from error

    def save_state(self) -> llama_cpp.LlamaState:
        """Tokens, KV cache and what the eviction knows, for `load_state`.

        Raises:
            LaqStateError: llama.cpp could not write the state.
        """
        with native_errors() as lines:
            state = super().save_state()
        if state.llama_state_size == 0:
            raise LaqStateError(f"the state could not be saved: {'; '.join(lines)}")
        return state

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Go back to a saved state, of a model made with the same settings.

        Raises:
            LaqContextFullError: the state has more tokens than n_ctx; nothing was changed.
            LaqStateError: the state was saved under other settings; the model is reset.
        """
        self._check_room(state.n_tokens)
        input_ids = self.input_ids
        if state.scores.shape != self.scores[: state.n_tokens].shape:
            raise LaqStateError(
                "the state was saved by another model, or with another n_batch or logits_all"
            )
        with native_errors() as lines:
            try:
                super().load_state(state)
            except RuntimeError as error:
                self.input_ids = input_ids
                self.reset()
                self._ctx.kv_cache_clear()
                reason = "; ".join(dict.fromkeys(lines)) or str(error)
                raise LaqStateError(f"the state does not fit this model: {reason}") from error
        # the state's array has its own n_ctx
        input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        self.input_ids = input_ids

    def close(self) -> None:
        """Free the model, also one whose construction failed."""
        stack = getattr(self, "_stack", None)
        if stack is not None:
            stack.close()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.update({name: getattr(self.laq_config, name) for name in CONFIG_NAMES})
        state["kv_budget"] = self._asked_budget
        return state
