"""Counters of an attached KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KvStats:
    """What the KV cache holds and what its evictions cost, read from the native side.

    Attributes:
        n_tokens: logical length: last position + 1.
        n_resident: cells in use (per layer and KV head).
        n_cells: cells allocated.
        n_ctx: positions that a conversation may have.
        n_layer: layers of the KV cache.
        n_head_kv: KV heads of a layer (the largest).
        n_intact: first position from which every head holds every token; 0 = nothing evicted.
        pending: an eviction waits for its lookahead queries.
        kv_bytes: bytes of K and V, read back from the backend's buffers.
        kv_bytes_full: bytes that a cache of n_ctx cells takes.
        ring_bytes: bytes of the ring of captured queries.
        compute_bytes: bytes that graphs compute in, those of evictions included, read back from
            llama.cpp's scheduler.
        n_decoded: tokens decoded since the context was made, probe and pseudo tokens included.
        n_probe: of these, probe tokens: the end of a prompt that is too long for the free cells,
            read ahead to score what is cached, and dropped.
        n_pseudo: of these, pseudo tokens decoded ahead and dropped.
        n_evictions: evictions since the context was made.
        score_kernel: "fused" or "composed": what made the last scores; None if nothing was scored.
        score_reason: why that one: what the device of the keys has. "" if nothing is ever scored.
        compaction: "graph" or "host": what moves K and V at an eviction, their device or the host.
        compact_reason: why that one.
        devices: names of the devices that hold K and V.
        ms_probe: milliseconds spent decoding probe tokens, over all evictions.
        ms_lookahead: the same for pseudo tokens.
        ms_score: the same for the scores.
        ms_select: the same for choosing what stays.
        ms_compact: the same for moving K and V.
        ms_fit: the same for fitting values (`value_fit`).
        archive_bytes: bytes of the archive in host memory (see kv_recall); a row of it is K and V
            of one token in one layer and KV head.
        archive_file_bytes: bytes of the archive in its file.
        n_archived: rows in the archive now.
        n_recalled: rows that came back from it.
        n_recalls: re-selections.
        n_recalls_skipped: those that would hardly have changed anything.
        n_lost: rows that could not be kept or read back, or that a state did not carry.
        n_reread: of n_decoded, tokens that were decoded again: at the end of a prompt after a
            re-selection, or an answer before the next prompt (see `recall_read`).
        n_attended: of n_decoded, tokens decoded in view of the archive as well (`recall_read`).
        ms_recall: milliseconds spent in re-selections: scores, choice, and what comes back.
        ms_reread: milliseconds spent decoding tokens again after them.
        bytes_down: bytes that went to the archive.
        bytes_up: bytes that came back.
        recall_bytes: bytes of the buffers that keys go through where a device scores the archive,
            read back from its backend; allocated at construction.
        recall_scored_on: names of the devices that score the archive.
        recall_reason: why those.
        ms_recall_cpu: milliseconds in which the CPU scored a sample of keys of one KV head, when
            that was chosen at construction; 0 = nothing was measured.
        ms_recall_device: the same on the device (the slowest one), the way there included.
        n_parked: chats that `park()` took out of the cells. All other counters are of the one in
            them, or of all that was decoded.
        parked_bytes: bytes that the parked chats have in host memory, their archives included.
        parked_file_bytes: bytes of their archives in files.
    """

    n_tokens: int
    n_resident: int
    n_cells: int
    n_ctx: int
    n_layer: int
    n_head_kv: int
    n_intact: int
    pending: bool
    kv_bytes: int
    kv_bytes_full: int
    ring_bytes: int
    compute_bytes: int
    n_decoded: int
    n_probe: int
    n_pseudo: int
    n_evictions: int
    score_kernel: str | None
    score_reason: str
    compaction: str
    compact_reason: str
    devices: tuple[str, ...]
    ms_probe: float
    ms_lookahead: float
    ms_score: float
    ms_select: float
    ms_compact: float
    ms_fit: float
    archive_bytes: int
    archive_file_bytes: int
    n_archived: int
    n_recalled: int
    n_recalls: int
    n_recalls_skipped: int
    n_lost: int
    n_reread: int
    n_attended: int
    ms_recall: float
    ms_reread: float
    bytes_down: int
    bytes_up: int
    recall_bytes: int
    recall_scored_on: tuple[str, ...]
    recall_reason: str
    ms_recall_cpu: float
    ms_recall_device: float
    n_parked: int = 0
    parked_bytes: int = 0
    parked_file_bytes: int = 0

    @classmethod
    def from_native(cls, stats: Any, scored: bool, text: Callable[[Any], str]) -> KvStats:
        """Copy a `struct laq_stats`.

        Args:
            stats: the cffi struct.
            scored: whether the policy ranks tokens by attention, so that a kernel ran.
            text: makes a string of a `char *`.
        """
        reasons = ("score_reason", "compact_reason", "recall_reason")
        lists = ("devices", "recall_scored_on")
        own = {"pending", "score_kernel", "compaction", *reasons, *lists}
        of_python = {"n_parked", "parked_bytes", "parked_file_bytes"}
        names = cls.__dataclass_fields__.keys() - own - of_python
        kernel = ("composed", "fused")[stats.score_fused] if scored and stats.n_evictions else None
        return cls(
            **{name: getattr(stats, name) for name in names},
            pending=bool(stats.pending),
            **{name: text(getattr(stats, name)) for name in reasons},
            **{name: tuple(text(getattr(stats, name)).split()) for name in lists},
            score_kernel=kernel,
            compaction=("host", "graph")[stats.compact_graph],
        )
