"""Tables of quality results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from laq_gguf.bench.markdown import Document, Row, number, ordered, spread, table


def quality_rows(document: Document) -> list[Row]:
    """One row per task, method and budget, in the order they were measured.

    of_full: of what the full cache finds, the share that is found too (None if it finds nothing):
    sum of min(score, full score) / sum of full scores.
    """
    results = document["results"]
    full = {(r["task"], r["id"]): r["score"] for r in results if r["method"] == "full"}
    rows = []
    for task in ordered(r["task"] for r in results):
        for method, budget in ordered((r["method"], r["budget"]) for r in results):
            group = [
                r
                for r in results
                if (r["task"], r["method"], r["budget"]) == (task, method, budget)
            ]
            if group:
                rows.append(
                    {"task": task, "method": method, "budget": budget, **_mean(group, full)}
                )
    return rows


def _mean(group: list[Row], full: dict[tuple[str, str], float]) -> dict[str, Any]:
    found = sum(full[r["task"], r["id"]] for r in group)
    both = sum(min(r["score"], full[r["task"], r["id"]]) for r in group)
    resident = [r["n_resident"] for r in group if "n_resident" in r]
    evicted = [r["n_evictions"] > 0 for r in group if "n_evictions" in r]
    return {
        "n": len(group),
        "score": statistics.fmean(r["score"] for r in group),
        "of_full": both / found if found else None,
        "top1_agreement": statistics.fmean(r["top1_agreement"] for r in group),
        "kl": statistics.fmean(r["kl"] for r in group),
        "n_resident_max": max(resident, default=None),
        "n_evicted": sum(evicted) if evicted else None,
        "first_token_s": [r["ms_prefill"] / 1e3 for r in group if "ms_prefill" in r],
    }


def quality_table(document: Document) -> str:
    """Markdown table of a quality result."""
    return table(
        (
            ("task", lambda r: r["task"]),
            ("method", lambda r: r["method"]),
            ("budget", lambda r: number(r["budget"], "d")),
            ("n", lambda r: str(r["n"])),
            ("found", lambda r: f"{r['score']:.3f}"),
            ("of full's", lambda r: number(r["of_full"], ".3f")),
            ("top-1 = full's", lambda r: f"{r['top1_agreement']:.3f}"),
            ("KL to full (nats)", lambda r: f"{r['kl']:.4f}"),
            ("most cells", lambda r: number(r["n_resident_max"], "d")),
            ("evicted", lambda r: number(r["n_evicted"], "d")),
            ("first token, s", lambda r: spread(r["first_token_s"], ".2f")),
        ),
        quality_rows(document),
    )


def quality_summary(document: Document) -> str:
    """Markdown table of a quality result: one row per method, what it finds of each task."""
    rows = quality_rows(document)
    tasks = ordered(row["task"] for row in rows)
    summary = []
    for method, budget in ordered((row["method"], row["budget"]) for row in rows):
        group = [r for r in rows if (r["method"], r["budget"]) == (method, budget)]
        summary.append(
            {
                "method": method,
                "budget": budget,
                "kl": statistics.fmean(r["kl"] for r in group),
                "top1_agreement": statistics.fmean(r["top1_agreement"] for r in group),
                **{r["task"]: r for r in group},
            }
        )
    n = {row["task"]: row["n"] for row in rows}
    return table(
        (
            ("kv_policy", lambda r: r["method"]),
            ("kv_budget", lambda r: number(r["budget"], "d")),
            *((f"{t} ({n[t]})", _found(t)) for t in tasks),
            ("KL to full, nats", lambda r: f"{r['kl']:.3f}"),
            ("top-1 as full", lambda r: f"{r['top1_agreement']:.2f}"),
        ),
        summary,
    )


def _found(task: str) -> Callable[[Row], str]:
    return lambda row: f"{row[task]['score']:.2f}" if task in row else "-"
