"""Table of a peers result; nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from laq_gguf.bench.markdown import Document, Row, mean_of, ordered, table
from laq_gguf.bench.methods import share_text


def peers_rows(document: Document) -> list[Row]:
    """One row per share and method, larger shares first; scores are means of the tasks' means."""
    results = document["results"]
    tasks = ordered(r["task"] for r in results)
    pairs = ordered((r["share"], r["method"]) for r in results)
    rows = []
    for share, method in sorted(pairs, key=lambda pair: -pair[0]):
        group = [r for r in results if (r["share"], r["method"]) == (share, method)]
        scores = {t: mean_of([r for r in group if r["task"] == t], "score") for t in tasks}
        there = [score for score in scores.values() if score is not None]
        rows.append(
            {
                "share": share,
                "method": method,
                "n": len(group),
                "scores": scores,
                "mean": statistics.fmean(there),
                "kl": mean_of(group, "kl"),
                "top1_agreement": mean_of(group, "top1_agreement"),
                "kv_share": sum(r["kv_bytes"] for r in group)
                / sum(r["kv_bytes_full"] for r in group),
            }
        )
    return rows


def peers_table(document: Document) -> str:
    """Markdown table of a peers result."""
    rows = peers_rows(document)
    tasks = list(rows[0]["scores"]) if rows else []

    def score(task: str) -> Callable[[Any], str]:
        return lambda r: "-" if r["scores"][task] is None else f"{r['scores'][task]:.2f}"

    return table(
        (
            ("share", lambda r: share_text(r["share"])),
            ("bytes / full's", lambda r: f"{r['kv_share']:.4f}"),
            ("method", lambda r: r["method"]),
            ("n", lambda r: str(r["n"])),
            *((task, score(task)) for task in tasks),
            ("mean", lambda r: f"{r['mean']:.3f}"),
            ("KL to full, nats", lambda r: f"{r['kl']:.4f}"),
            ("top-1 as full", lambda r: f"{r['top1_agreement']:.3f}"),
        ),
        rows,
    )
