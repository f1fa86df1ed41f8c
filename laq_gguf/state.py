"""What a `Llama` has read: looked at, saved and restored, in memory as llama_cpp does it and as a
file."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import session
from ._lib import SEQ_ID, Attachment, load
from ._version import __version__
from .config import SCORED_POLICIES
from .errors import CLOSED, LaqContextFullError, LaqStateError
from .guard import exclusive
from .log import native_errors
from .stats import KvStats

native = load()  # before llama_cpp: it decides which libllama llama_cpp gets

import llama_cpp  # noqa: E402

SESSION_FORMAT = 1


class StateMixin:
    """What `Llama` has of its cache: counters, recall, save_state, load_state and sessions."""

    def _attached(self: Any, call: str) -> Attachment:
        if self._laq is None:
            raise LaqStateError(f"{call} needs a model made with kv_budget=...")
        if self._laq.is_closed:
            raise LaqStateError(CLOSED)
        return self._laq

    def kv_stats(self: Any) -> KvStats:
        """Counters of the KV cache.

        Raises:
            LaqStateError: the model was made without kv_budget, or is closed.
        """
        laq = self._attached("kv_stats()")
        stats: KvStats = laq.stats(self.laq_config.kv_policy in SCORED_POLICIES)
        full = stats.kv_bytes_full // stats.n_ctx * self._n_ctx
        parked = self._parked_stats()
        return replace(stats, kv_bytes_full=full, n_positions=self._n_ctx, **parked)

    def kept_positions(self: Any) -> npt.NDArray[np.int32]:
        """Position of every resident token, ascending: int32 (n_layer, n_head_kv, n_resident).

        Raises:
            LaqStateError: the model was made without kv_budget, or is closed.
        """
        return self._attached("kept_positions()").kept_positions()

    @exclusive
    def recall(self: Any) -> None:
        """Choose from all tokens, archived and resident, by the last ones decoded.

        Raises:
            LaqStateError: the model was made without kv_budget, or is closed.
            LaqNativeError: it was made without kv_recall.
        """
        self._attached("recall()").recall()

    def _sequence(self: Any) -> bytes:
        """Cells of the conversation, with the tables of its evictions and its last queries.

        Raises:
            LaqStateError: llama.cpp could not write it.
        """
        with native_errors(llama_cpp) as lines:
            size = llama_cpp.llama_state_seq_get_size(self._ctx.ctx, SEQ_ID)
            buffer = (ctypes.c_uint8 * size)()
            written = llama_cpp.llama_state_seq_get_data(self._ctx.ctx, buffer, size, SEQ_ID)
        if size == 0 or written != size:
            raise LaqStateError(f"the state could not be saved: {'; '.join(lines)}")
        return bytes(buffer)

    def _restore_sequence(self: Any, data: bytes) -> None:
        """Replace the conversation; if that fails it is back as it was.

        Raises:
            LaqStateError: the data does not fit this model.
        """
        before = self._sequence()
        with native_errors(llama_cpp) as lines:
            done = self._set_sequence(data)
        if not done:
            if not self._set_sequence(before):  # cannot be: it was there a moment ago
                self.reset()
            reason = "; ".join(dict.fromkeys(lines)) or "llama.cpp gave no reason"
            raise LaqStateError(f"the state does not fit this model: {reason}")

    def _set_sequence(self: Any, data: bytes) -> bool:
        source = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        read = llama_cpp.llama_state_seq_set_data(self._ctx.ctx, source, len(data), SEQ_ID)
        return 0 < read == len(data)  # 0 = nothing could be read

    @exclusive
    def save_state(self: Any) -> llama_cpp.LlamaState:
        """Tokens, KV cache and what the eviction knows, for `load_state`.

        Raises:
            LaqStateError: llama.cpp could not write the state.
        """
        if self._laq is None:
            return super().save_state()  # type: ignore[misc]
        data = self._sequence()
        # without logits_all llama_cpp's array of scores holds nothing
        scores = self._scores.copy() if self._logits_all else self.scores[:0].copy()
        return llama_cpp.LlamaState(
            input_ids=self._input_ids.copy(),
            scores=scores,
            n_tokens=self.n_tokens,
            llama_state=data,
            llama_state_size=len(data),
            seed=self._seed,
        )

    @exclusive
    def load_state(self: Any, state: llama_cpp.LlamaState) -> None:
        """Go back to a saved state, of a model made with the same settings.

        Raises:
            LaqContextFullError: the state has more tokens than n_ctx.
            LaqStateError: the state was saved under other settings. In both cases nothing was
                changed.
        """
        try:
            self._load_state(state)
        except (LaqContextFullError, LaqStateError) as error:
            if self._looks_up:
                raise KeyError("the entry of the cache does not fit") from error  # so it is a miss
            raise

    def _load_state(self: Any, state: llama_cpp.LlamaState) -> None:
        self._check_room(state.n_tokens)
        if self._laq is None:
            self._load_plain(state)
            return
        n_scores = state.n_tokens if self._logits_all else 0
        if state.scores.shape != (n_scores, self._n_vocab):
            raise LaqStateError(
                "the state was saved by another model, with another logits_all, or without "
                "kv_budget"
            )
        self._restore_sequence(state.llama_state)
        self.scores[:n_scores] = state.scores
        self._take_tokens(state.input_ids[: state.n_tokens])
        self._seed = state.seed

    def _load_plain(self: Any, state: llama_cpp.LlamaState) -> None:
        """Without kv_budget, as llama_cpp does it; where it fails half-way the model is reset."""
        input_ids = self.input_ids
        if state.scores.shape != self.scores[: state.n_tokens].shape:
            raise LaqStateError(
                "the state does not fit this model: it was saved with kv_budget, by another model, "
                "or with another n_batch or logits_all"
            )
        with native_errors(llama_cpp) as lines:
            try:
                super().load_state(state)  # type: ignore[misc]
            except RuntimeError as error:
                self.input_ids = input_ids
                self.reset()
                self._ctx.kv_cache_clear()
                reason = "; ".join(dict.fromkeys(lines)) or str(error)
                raise LaqStateError(f"the state does not fit this model: {reason}") from error
        # the state's array has its own n_ctx
        input_ids[: state.n_tokens] = state.input_ids[: state.n_tokens]
        self.input_ids = input_ids

    def _take_tokens(self: Any, tokens: Any) -> None:
        self._end_answer()
        self.n_tokens = len(tokens)
        self.input_ids[: self.n_tokens] = tokens
        self._requires_eval = True  # the logits of the last token are not part of a state

    def _session_settings(self: Any) -> dict[str, Any]:
        """What has to be the same where a session is loaded."""
        params = self.context_params
        return {
            **self._fingerprints,
            "llama_cpp_commit": native.build_info()["llama.cpp"],
            "abi_version": int(native.lib.laq_abi_version()),
            "type_k": int(params.type_k),
            "type_v": int(params.type_v),
            "flash_attn": params.flash_attn_type != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
            **{name: getattr(params, name) for name in session.ROPE},
            "window_size": self.laq_config.window_size,
            "snapkv_window": self.laq_config.snapkv_window,
            "lookahead_size": self.laq_config.lookahead_size,
        }

    @exclusive
    def save_session(self: Any, path: str | os.PathLike[str], *, archive: bool = True) -> None:
        """Write the conversation to a file: tokens, cells and the tables of its evictions.

        The file holds no logits: the last token is decoded again when the conversation goes on.
        It carries a fingerprint of the model, the versions and a checksum, and takes the place of
        an older file only when it is complete.

        Args:
            path: the file.
            archive: with kv_recall: whether the file carries the archive. Without it, what only the
                archive holds is lost to the conversation that goes on from the file: kv_stats()
                counts it. Its next prompt attends to the tokens that every head holds in a cell,
                and no others.

        Raises:
            LaqStateError: the model was made without kv_budget, or the file cannot be written.
        """
        self._attached("save_session()")
        header = {
            **self._session_settings(),
            "session_format": SESSION_FORMAT,
            "laq_version": __version__,
            "n_tokens": self.n_tokens,
            "kv_budget": self.kv_budget,
            "kv_policy": self.laq_config.kv_policy,
            "pinned_prefix": self._pinned_prefix,
            "archive": archive and self.recall_config.kv_recall is not None,
        }
        with contextlib.nullcontext() if archive else self._laq.without_archive():
            state = self._sequence()
        session.write_session(path, header, self._input_ids.astype(np.int32), state)

    @exclusive
    def load_session(self: Any, path: str | os.PathLike[str]) -> None:
        """Go on with the conversation of a file from `save_session`.

        Raises:
            LaqStateError: the file cannot be read, is none, is truncated or damaged, or belongs
                to another model or other settings (the message names them).
            LaqContextFullError: it has more tokens than n_ctx. In all cases nothing was changed.
        """
        self._attached("load_session()")
        saved = session.read_session(path)
        session.check_header(saved.header, self._session_settings())
        self._check_room(len(saved.tokens))
        prefix = saved.header.get("pinned_prefix") or []
        if not isinstance(prefix, list) or not all(type(token) is int for token in prefix):
            raise LaqStateError(f"{path} is damaged: pinned_prefix is no list of tokens")
        self._restore_sequence(saved.state)
        self._take_tokens(saved.tokens)
        self._pinned_prefix = prefix
