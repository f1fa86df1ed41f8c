"""Several chats on one cache: one of them is in the cells, the others wait outside by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ._lib import load
from .errors import LaqArgumentError, LaqStateError
from .guard import exclusive

native = load()  # before llama_cpp: it decides which libllama llama_cpp gets

import llama_cpp  # noqa: E402


@dataclass(frozen=True)
class ParkedChat:
    """A chat that waits outside of the cells.

    Attributes:
        n_tokens: its tokens.
        n_resident: cells that it takes when it is resumed (per layer and KV head).
        memory_bytes: bytes in host memory: what its cells held, its tokens and logits, and what of
            its archive is not in a file.
        file_bytes: bytes of its archive in its file.
    """

    n_tokens: int
    n_resident: int
    memory_bytes: int
    file_bytes: int


@dataclass(frozen=True, eq=False)
class _Parked:
    """A ParkedChat with what brings it back.

    Attributes:
        handle: `struct laq_parked *`: cells and archive.
        tokens: int32 (n_tokens,).
        scores: float32 (n_tokens, n_vocab) with logits_all, (0, n_vocab) without.
        logits: float32 (n_vocab,) of the last token; None where it has to be decoded again.
        pinned_prefix: the system turn.
    """

    chat: ParkedChat
    handle: Any
    tokens: npt.NDArray[np.intc]
    scores: npt.NDArray[np.single]
    logits: npt.NDArray[np.single] | None
    pinned_prefix: Sequence[int]


class ParkingMixin:
    """park, resume, parked and forget of `Llama`."""

    _parked: dict[str, _Parked]

    @exclusive
    def park(self: Any, name: str) -> None:
        """The chat leaves the cells and waits outside; the next one begins from nothing.

        What the cells hold is copied to host memory. The archive is not copied: it stays where it
        is, and each chat's may have kv_recall_limit bytes in host memory. An eviction that waits
        for its lookahead goes on waiting. A stream of the chat ends with LaqStateError.

        Args:
            name: by which `resume` finds it, not empty.

        Raises:
            LaqArgumentError: the name is no text, empty, or that of a parked chat.
            LaqStateError: the model was made without kv_budget, or is closed; the cache is empty;
                n_tokens was set back to where tokens have been evicted. Nothing was changed.
        """
        laq = self._attached("park()")
        if not isinstance(name, str) or not name:
            raise LaqArgumentError(f"the name of a parked chat is a text, not empty; got {name!r}")
        if name in self._parked:
            raise LaqArgumentError(
                f"a chat is parked as {name!r} already: resume() or forget() it, or take another "
                "name"
            )
        if self.n_tokens == 0:
            raise LaqStateError("the cache is empty: there is nothing to park")
        is_whole = laq.stats(scored=False).n_tokens == self.n_tokens
        self._truncate()
        tokens = self._input_ids.copy()
        scores = self.scores[: self.n_tokens if self._logits_all else 0].copy()
        logits = self._last_logits() if is_whole and not self._requires_eval else None
        copied = logits.copy() if logits is not None else None
        handle = laq.park()
        info = laq.parked_info(handle)
        n_own = tokens.nbytes + scores.nbytes + (copied.nbytes if copied is not None else 0)
        chat = ParkedChat(
            int(info.n_tokens), int(info.n_resident), int(info.bytes) + n_own, int(info.file_bytes)
        )
        self._parked[name] = _Parked(chat, handle, tokens, scores, copied, self._pinned_prefix)
        self._pinned_prefix = ()
        self.reset()

    @exclusive
    def resume(self: Any, name: str) -> None:
        """A parked chat comes back as it was; nothing of it is read again.

        Raises:
            LaqArgumentError: no chat is parked by that name.
            LaqStateError: the model was made without kv_budget, or is closed; another chat is in
                the cache. Nothing was changed.
        """
        laq = self._attached("resume()")
        parked = self._parked_as(name)
        if self.n_tokens > 0:
            raise LaqStateError(
                f"resume({name!r}): a chat of {self.n_tokens} tokens is in the cache: park() it, "
                "or drop it with reset()"
            )
        self.reset()  # a user may have set n_tokens back to 0
        laq.resume(parked.handle)
        del self._parked[name]
        self._take_tokens(parked.tokens)
        self.scores[: len(parked.scores)] = parked.scores
        self._pinned_prefix = parked.pinned_prefix
        logits = self._last_logits() if parked.logits is not None else None
        if logits is not None:
            logits[:] = parked.logits
            self._requires_eval = False

    def parked(self: Any) -> dict[str, ParkedChat]:
        """The parked chats, in the order in which they were parked.

        Raises:
            LaqStateError: the model was made without kv_budget, or is closed.
        """
        self._attached("parked()")
        return {name: parked.chat for name, parked in self._parked.items()}

    @exclusive
    def forget(self: Any, name: str) -> None:
        """Drop a parked chat; its file is gone as well.

        Raises:
            LaqArgumentError: no chat is parked by that name.
            LaqStateError: the model was made without kv_budget, or is closed.
        """
        laq = self._attached("forget()")
        laq.forget(self._parked_as(name).handle)
        del self._parked[name]

    def _parked_as(self: Any, name: str) -> _Parked:
        if name not in self._parked:
            names = ", ".join(map(repr, self._parked)) or "none"
            raise LaqArgumentError(f"no chat is parked as {name!r}; parked: {names}")
        found: _Parked = self._parked[name]
        return found

    def _parked_stats(self: Any) -> dict[str, int]:
        """The fields of KvStats that are sums over parked chats."""
        chats = [parked.chat for parked in self._parked.values()]
        return {
            "n_parked": len(chats),
            "parked_bytes": sum(chat.memory_bytes for chat in chats),
            "parked_file_bytes": sum(chat.file_bytes for chat in chats),
        }

    def _last_logits(self: Any) -> npt.NDArray[np.single] | None:
        """Where the context has the logits of its last output, (n_vocab,); None if nowhere."""
        pointer = llama_cpp.llama_get_logits_ith(self._ctx.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self._n_vocab,)) if pointer else None
