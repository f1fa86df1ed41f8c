"""`Llama`: llama_cpp.Llama with a KV cache that evicts by lookahead."""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ._lib import Attachment, load

native = load()  # before llama_cpp: it decides which libllama llama_cpp gets

import llama_cpp  # noqa: E402

from . import session  # noqa: E402
from .arguments import check_compatible, check_file, check_names  # noqa: E402
from .chat import RENDERED, system_prefix  # noqa: E402
from .config import CONFIG_NAMES, LaqConfig, check_staging, parse_bytes, round_cells  # noqa: E402
from .errors import (  # noqa: E402
    LaqContextFullError,
    LaqInvalidError,
    LaqModelError,
    LaqNativeError,
    LaqStateError,
)
from .gguf_meta import read_shape  # noqa: E402
from .guard import Closed, exclusive  # noqa: E402
from .log import native_errors  # noqa: E402
from .parking import ParkingMixin  # noqa: E402
from .recall import RECALL_NAMES, RecallConfig  # noqa: E402
from .settings import SettingsMixin  # noqa: E402
from .state import StateMixin  # noqa: E402


def _too_many(n_tokens: int, n_ctx: int) -> str:
    # servers and clients know llama_cpp's words: they answer 400, or trim the chat and try again
    return f"Requested tokens ({n_tokens}) exceed context window of {n_ctx}"


class Llama(StateMixin, ParkingMixin, SettingsMixin, llama_cpp.Llama):
    """llama_cpp.Llama in a KV cache of fixed size, however long prompt, answer and chat grow.

    Attributes:
        kv_budget: tokens per layer and KV head that stay once a prompt has been read, or None.
        laq_config: the other settings of the eviction.
        progress: called as progress(n_done, n_total) after each batch of a prompt, or None.
    """

    progress: Callable[[int, int], None] | None = None
    _laq: Attachment | None = None
    _n_least: float | None = None  # tokens that are a prompt of `generate`; None: a caller's `eval`
    _answer: object | None = None  # the answer that is being generated, which no other call ended
    _looks_up = False  # a completion that has not begun may load a state from the cache
    _n_ctx_logical: int | None = None  # None: as many as there are cells
    _pinned_prefix: Sequence[int] = ()  # the system turn of the chat

    def __init__(
        self,
        model_path: str,
        *,
        kv_budget: int | float | str | None = None,
        kv_staging: int | None = None,
        kv_policy: str = "laq++",
        lookahead: str = "deferred",
        lookahead_size: int = 32,
        window_size: int = 8,
        n_sink: int = 4,
        pinned: Sequence[tuple[int, int]] | None = None,
        snapkv_window: int = 32,
        kernel_size: int = 7,
        pooling: str = "max",
        follow_size: int = 32,
        value_fit: float = 0.01,
        probe_size: int = 48,
        chunk_size: int = 0,
        pin_system: bool = True,
        kv_recall: str | None = None,
        kv_recall_type: str | None = None,
        kv_recall_limit: int | str | None = None,
        recall: str = "turn",
        n_ctx: int = 512,
        seed: int = llama_cpp.LLAMA_DEFAULT_SEED,
        flash_attn: bool = True,
        **kwargs: Any,
    ) -> None:
        """Load a GGUF model. Every keyword of llama_cpp.Llama is taken as well.

        Args:
            model_path: the GGUF file.
            kv_budget: tokens per layer and KV head that stay once a prompt has been read: an int,
                a float between 0 and 1 as a share of n_ctx, or a string such as "512MiB": bytes
                of the whole KV cache, staging included. None: nothing is attached (the library is
                stock llama.cpp's, bit for bit); the settings below are only checked.
            kv_staging: cells beyond the budget, for what is being read and generated. Both, rounded
                up to a multiple of 256, are allocated here and never grow. A prompt that fits them
                is evicted once; a longer one is read in chunks. None: as the budget, at least 512.
            kv_policy: what ranks the tokens: "laq++" (attention of the lookahead queries and of
                the last window_size prompt queries), "laq" (lookahead queries alone), "snapkv"
                (the last snapkv_window prompt queries), "streaming" (the most recent tokens),
                "random" (by seed), "full" (never evict).
            lookahead: "deferred": the first lookahead_size tokens that are really generated;
                "pseudo": greedy tokens, decoded and dropped before the first one is sampled.
            lookahead_size: lookahead tokens; a probe looks ahead 8 of them at most.
            window_size: last prompt tokens that every head keeps (snapkv: snapkv_window).
            n_sink: first positions, always kept.
            pinned: spans (first, end) of positions that always stay.
            snapkv_window: last prompt tokens that snapkv observes and keeps.
            kernel_size: width of the pooling of scores over neighbouring tokens, odd.
            pooling: "max", "avg" or "none".
            follow_size: in heads that copy word for word (their best token has 7 % or more of the
                attention), "laq++" and "laq" give 3/8 of the free cells to the tokens that follow
                the best ones within so many positions: the copy goes on there. 0: no head does.
            value_fit: with "laq++" V of the tokens that stay is moved, as little as it takes, until
                the observed queries get what they got before (ridge regression; the values of
                arXiv 2602.16284). The ridge, in units of squared attention; 0: V stays byte for
                byte, as it does for what is always kept and in the archive.
            probe_size: last tokens of a prompt that are read ahead, where it does not fit and there
                is no archive, to score what has been read; dropped afterwards.
            chunk_size: most tokens of such a prompt between two evictions; 0 = a third of the
                cells, at most n_batch.
            pin_system: keep the system turn of a chat whole.
            kv_recall: "ram" or "disk": evicted tokens are archived there. A prompt then attends to
                cells and archive, and at its end the best of all tokens become resident. "ram"
                grows with the chat; without a GPU, or with unified memory (a Mac), it takes the
                memory that the budget saves. None: there is no archive.
            kv_recall_type: type of the archive, "q8_0" or "q4_0"; None: the cache's own, which
                comes back byte for byte.
            kv_recall_limit: bytes of the archive in host memory, an int or as "512MiB"; the oldest
                tokens then go to a file. None: "ram": any number, "disk": 0; of each parked chat.
            recall: when archived tokens are recalled: "turn" (once a prompt has been read) or
                "always" (also where generating finds no cells). `recall()` does it at any time.
            n_ctx: tokens that a conversation may have, rounded up to a multiple of 256; 0 = what
                the model was trained for. With kv_budget the cells do not grow with it; with
                kv_recall the compute buffers, allocated here, do. Beyond the trained length nothing
                is decoded, unless rope_scaling_type, rope_freq_base or rope_freq_scale say how.
            seed: of sampling, and of kv_policy="random".
            flash_attn: on by default, also without kv_budget; llama_cpp's own default is off.

        Raises:
            TypeError: unknown keyword.
            LaqArgumentError: (a ValueError) a value is out of range or two exclude each other.
            LaqModelError: (a ValueError) the file is missing, truncated or not GGUF.
            LaqUnsupportedError: (a RuntimeError and ValueError) this model cannot be evicted.
        """
        check_names(kwargs)
        self._lock = threading.RLock()
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
            value_fit=value_fit,
            probe_size=probe_size,
            chunk_size=chunk_size,
        )
        self.recall_config = RecallConfig(
            kv_recall=kv_recall,
            kv_recall_type=kv_recall_type,
            kv_recall_limit=kv_recall_limit,
            recall=recall,
        )
        self.recall_config.check_policy(kv_policy, evicts=kv_budget is not None)
        self._asked = {
            "kv_budget": kv_budget,
            "kv_staging": check_staging(kv_staging),
            "pin_system": bool(pin_system),
        }
        self.kv_budget: int | None = None
        path = os.fspath(model_path)
        # llama.cpp rounds up by itself, but llama_cpp's arrays keep the number they are given
        n_ctx = round_cells(n_ctx)
        n_cells = n_ctx
        if kv_budget is not None:
            check_compatible(kwargs)
            # wrong values before the file is looked at
            if isinstance(kv_budget, str):
                parse_bytes(kv_budget)
            elif n_ctx > 0:
                self._size(path, n_ctx, kwargs)
        check_file(path)
        if kv_budget is not None:
            n_ctx = n_ctx or round_cells(read_shape(path).length(kwargs.get("kv_overrides")))
            self.kv_budget, n_cells = self._size(path, n_ctx, {**kwargs, "flash_attn": flash_attn})
        kwargs.update(n_ctx=n_cells, seed=seed, flash_attn=flash_attn)
        try:
            self._load(path, kwargs)
            self._n_ctx = min(self._n_ctx, len(self.input_ids))
            if self.kv_budget is not None:
                self._fingerprints = session.fingerprints(path, kwargs)
                self._set_length(n_ctx, kwargs)
                self._attach(self.kv_budget, n_ctx)
        except BaseException:
            self.close()
            raise

    def _size(self, path: str, n_ctx: int, kwargs: dict[str, Any]) -> tuple[int, int]:
        """Budget and cells."""

        def bytes_per_cell() -> int:
            return read_shape(path).bytes_per_cell(
                kwargs.get("type_k"), kwargs.get("type_v"), kwargs.get("flash_attn", True)
            )

        asked = self._asked["kv_budget"], self._asked["kv_staging"]
        size = self.laq_config.cache_size(*asked, n_ctx, bytes_per_cell)
        return size.budget, size.n_cells

    def _set_length(self, n_ctx: int, kwargs: dict[str, Any]) -> None:
        """Make llama_cpp's arrays as long as a conversation may get, whatever the cells."""
        self._n_ctx_logical = n_ctx
        self._n_ctx = min(n_ctx, self._n_positions(kwargs))
        self.input_ids = np.zeros((n_ctx,), dtype=np.intc)
        if self._logits_all:
            self.scores = np.ndarray((self._n_ctx, self._n_vocab), dtype=np.single)

    def _n_positions(self, kwargs: dict[str, Any]) -> int:
        """Positions at which the model works: trained for, or told to stretch to."""
        unset = llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED
        if kwargs.get("rope_freq_base") or kwargs.get("rope_scaling_type", unset) != unset:
            return 2**31 - 1
        n_trained = self._model.n_ctx_train()
        scale = kwargs.get("rope_freq_scale") or 1.0
        return int(n_trained / scale) if 0 < scale < 1 else n_trained

    def n_ctx(self) -> int:
        """Tokens that a conversation may have."""
        return super().n_ctx() if self._n_ctx_logical is None else self._n_ctx_logical

    def _load(self, model_path: str, kwargs: dict[str, Any]) -> None:
        with native_errors(llama_cpp) as lines:
            try:
                super().__init__(model_path, **kwargs)
            except ValueError as error:
                if type(error) is not ValueError or not str(error).startswith("Failed to"):
                    raise
                reason = "; ".join(dict.fromkeys(lines)) or "llama.cpp gave no reason"
                raise LaqModelError(f"{error}: {reason}") from error

    def _attach(self, budget: int, n_ctx: int) -> None:
        params, spans = self.laq_config.to_native(native, budget, n_ctx, self._seed)
        folder = self.recall_config.to_native(native, params)
        address = llama_cpp.ctypes.cast(self._ctx.ctx, llama_cpp.ctypes.c_void_p).value
        assert address is not None
        self._laq = Attachment(native, address, params)
        del spans, folder  # laq_attach has copied them
        # last in, first out: detached before llama_free, whoever closes the context
        self._ctx._exit_stack.callback(self._laq.close)
        self._parked = {}
        self._ctx._exit_stack.callback(self._parked.clear)  # detaching drops what they name

    def _check_room(self, n_tokens: int) -> None:
        if n_tokens <= self._n_ctx:
            return
        if n_tokens > self.n_ctx():
            raise LaqContextFullError(
                f"{_too_many(n_tokens, self.n_ctx())}: shorten the prompt, call reset(), or make "
                "the model with a larger n_ctx"
            )
        raise LaqContextFullError(
            f"{_too_many(n_tokens, self._n_ctx)}, the positions that the model was trained for: it "
            "answers nonsense beyond; shorten the conversation, call reset(), or say with "
            "rope_scaling_type, rope_freq_base or rope_freq_scale how to stretch it"
        )

    @exclusive
    def eval(self, tokens: Sequence[int]) -> None:
        """Decode tokens after the ones already decoded.

        More than one token is taken as a prompt; `generate` knows which tokens are one. With
        kv_budget, what finds no cells makes older tokens be evicted. An answer that is being
        generated ends.

        Raises:
            LaqContextFullError: n_tokens + len(tokens) is above n_ctx, or above what the model
                was trained for; nothing was decoded.
            LaqStateError: n_tokens was set back to where tokens have been evicted.
            LaqNativeError: decoding or the eviction failed, or was aborted.
        """
        self._check_room(self.n_tokens + len(tokens))
        self._end_answer()
        if self._laq is not None:
            self._truncate()
        try:
            if len(tokens) >= (2 if self._n_least is None else self._n_least):
                self._read(tokens)
            else:
                self._decode(tokens)
        except BaseException:
            self._requires_eval = True  # the logits are not those of the last token
            if self._laq is not None and not self._laq.is_closed:
                self.n_tokens = min(self.n_tokens, self.kv_stats().n_tokens)
            raise

    def _read(self, tokens: Sequence[int]) -> None:
        """Decode a prompt, piece by piece."""
        n_total, n_done = len(tokens), 0
        left = np.asarray(tokens, dtype=np.int32)
        if self._laq is not None:
            self._pin(left)
        while n_done < n_total:
            n = self.n_batch if self._laq is None else self._laq.prompt_next(left[n_done:])
            self._decode(tokens[n_done : n_done + n])
            n_done = min(n_done + n, n_total)
            if self.progress is not None:
                self.progress(n_done, n_total)
        if self._laq is not None:
            self._laq.prompt_end()

    def _decode(self, tokens: Sequence[int]) -> None:
        try:
            super().eval(tokens)
        except RuntimeError as error:
            status = str(error).removeprefix("llama_decode returned ")
            if self._laq is None or not status.lstrip("-").isdigit():
                raise
            stats, why = self.kv_stats(), native.last_error() or "nothing can be evicted"
            reason = {
                "1": f"{len(tokens)} tokens were not decoded with {stats.n_resident} of "
                f"{stats.n_cells} cells in use: {why}; raise kv_staging or lower kv_budget",
                "2": "it was aborted by the abort callback",
            }.get(status, "llama.cpp failed; its log says why")
            raise LaqNativeError(f"llama_decode returned {status}: {reason}", 4) from error

    def _pin(self, tokens: npt.NDArray[np.int32]) -> None:
        """Keep the system turn whole, if the conversation that is being read begins with it."""
        assert self._laq is not None
        spans, n = list(self.laq_config.pinned), len(self._pinned_prefix)
        if n:
            begin = np.concatenate([self._input_ids[:n], tokens[: max(0, n - self.n_tokens)]])
            if begin.tolist() == list(self._pinned_prefix):
                spans.append((0, n))
        try:
            self._laq.set_pinned(spans)
        except LaqInvalidError as error:
            raise LaqInvalidError(
                f"the system turn of this chat, which pin_system keeps whole, has {n} tokens: "
                f"raise kv_budget, or make the Llama with pin_system=False ({error})",
                error.status,
            ) from error

    def _truncate(self) -> None:
        """Drop what lies beyond n_tokens; llama_cpp ignores that an evicted cache can refuse it."""
        if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            raise LaqStateError(
                f"n_tokens was set back to {self.n_tokens}, but tokens before position "
                f"{self.kv_stats().n_intact} have been evicted: call reset() and evaluate the "
                "prompt again"
            )

    def _end_answer(self) -> None:
        """The conversation goes on in another way than by the answer that is being generated."""
        if self._n_least is None:
            self._answer = None

    @exclusive
    def reset(self) -> None:
        """Forget all tokens."""
        self._end_answer()
        super().reset()
        if self._laq is not None:
            self._ctx.kv_cache_clear()

    @functools.wraps(llama_cpp.Llama.generate)
    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        tokens = list(tokens)
        self._looks_up = False
        self._check_room(len(tokens))
        generator = super().generate(tokens, *args, **kwargs)
        answer, sent = object(), None
        with self._lock:
            self._answer = answer
            # what follows a cut is a prompt, even if it is one token: an answer is generated again
            n_same = self.longest_token_prefix(self._input_ids, tokens)
            is_cut = kwargs.get("reset", True) and n_same < self.n_tokens
            n_least: float = 1 if is_cut else 2
        while True:
            with self._lock:
                if self._answer is not answer:
                    raise LaqStateError(
                        "the model was used for something else while this answer was generated: "
                        "finish or close a stream before the next call"
                    )
                self._n_least = n_least
                try:
                    token = generator.send(sent)
                except StopIteration:
                    return
                finally:
                    self._n_least = None
            n_least = math.inf  # several tokens are a draft that was sent
            sent = yield token

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        self._looks_up = True
        try:
            yield from super()._create_completion(*args, **kwargs)
        except ValueError as error:
            if type(error) is not ValueError or not str(error).startswith("Requested tokens"):
                raise
            n_prompt = int("".join(filter(str.isdigit, str(error).partition(")")[0])))
            self._check_room(n_prompt)
            raise LaqContextFullError(
                f"{_too_many(n_prompt, self._n_ctx)} with the answer: shorten the prompt or make "
                "the model with a larger n_ctx"
            ) from error
        finally:
            self._looks_up = False

    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        """llama_cpp's, with the system turn pinned (see pin_system)."""
        if self._laq is not None and self._asked["pin_system"]:
            handler = (
                self.chat_handler
                or self._chat_handlers.get(self.chat_format)
                or llama_cpp.llama_chat_format.get_chat_completion_handler(self.chat_format)
            )
            rendered = {name: kwargs[name] for name in RENDERED if name in kwargs}
            self._pinned_prefix = system_prefix(self, handler, messages, **rendered)
        return super().create_chat_completion(messages, *args, **kwargs)

    def close(self) -> None:
        """Free the model, also one whose construction failed. What is called later raises."""
        stack = getattr(self, "_stack", None)
        if stack is not None:
            with self._lock:
                stack.close()
                self._ctx = self._model = self._batch = self.tokenizer_ = Closed()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.update({name: getattr(self.laq_config, name) for name in CONFIG_NAMES})
        state.update({name: getattr(self.recall_config, name) for name in RECALL_NAMES})
        state.update(self._asked)
        state["n_ctx"] = self.n_ctx()
        return state
