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
        kv_bytes_full: bytes that a cache of n_positions cells takes: what it would be without
            eviction.
        ring_bytes: bytes of the ring of captured queries.
        compute_bytes: bytes that graphs compute in, those of evictions included, read back from
            llama.cpp's scheduler.
        n_decoded: tokens decoded since the context was made, probe and pseudo tokens included.
        n_probe: of these, probe tokens: the end of a prompt that is too long for the free cells,
            read ahead to score what is cached, and dropped.
        n_pseudo: of these, pseudo tokens decoded ahead and dropped.
        n_evictions: evictions since the context was made.
        score_kernel: "fused" or "composed": what made the last scores; None if nothing was scored.
        compaction: "graph" or "host": what moves K and V at an eviction, their device or the host.
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
        n_recalled: rows that became resident again.
        n_recalls: recalls.
        n_lost: rows that could not be kept or read back, or that a state did not carry.
        n_reread: of n_decoded, tokens of an answer that were read again before the next prompt.
        n_attended: of n_decoded, tokens that attended to cells and archive.
        ms_recall: milliseconds spent in recalls: scores, choice, and rows that become resident.
        ms_reread: milliseconds spent reading answers again.
        bytes_down: bytes that went to the archive.
        bytes_up: bytes that went back to the cells.
        n_parked: chats that `park()` took out of the cells. All other counters are of the one in
            them, or of all that was decoded.
        parked_bytes: bytes that the parked chats have in host memory, their archives included.
        parked_file_bytes: bytes of their archives in files.
        n_positions: positions that can be used: n_ctx, and no more than the model was trained for,
            unless RoPE scaling says otherwise.
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
    compaction: str
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
    n_lost: int
    n_reread: int
    n_attended: int
    ms_recall: float
    ms_reread: float
    bytes_down: int
    bytes_up: int
    n_parked: int = 0
    parked_bytes: int = 0
    parked_file_bytes: int = 0
    n_positions: int = 0

    @classmethod
    def from_native(cls, stats: Any, scored: bool, text: Callable[[Any], str]) -> KvStats:
        """Copy a `struct laq_stats`.

        Args:
            stats: the cffi struct.
            scored: whether the policy ranks tokens by attention, so that a kernel ran.
            text: makes a string of a `char *`.
        """
        own = {"pending", "score_kernel", "compaction", "devices"}
        of_python = {"n_parked", "parked_bytes", "parked_file_bytes", "n_positions"}
        names = cls.__dataclass_fields__.keys() - own - of_python
        kernel = ("composed", "fused")[stats.score_fused] if scored and stats.n_evictions else None
        return cls(
            **{name: getattr(stats, name) for name in names},
            pending=bool(stats.pending),
            devices=tuple(text(stats.devices).split()),
            score_kernel=kernel,
            compaction=("host", "graph")[stats.compact_graph],
        )
