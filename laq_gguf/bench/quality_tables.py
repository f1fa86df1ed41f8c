"""Tables of quality results: of methods at equal bytes, and of budgets in tokens task by task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from laq_gguf.bench.markdown import Document, Row, mean_of, number, ordered, spread, table
from laq_gguf.bench.methods import base_name
from laq_gguf.bench.tasks import TASKS


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
    if has_sizes(document):
        return size_table(document)
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
    if has_sizes(document):
        return size_table(document)
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


def has_sizes(document: Document) -> bool:
    """Whether the methods were given sizes, in bytes or tokens, or one budget for all tasks."""
    return any("size" in row for row in document["results"])


def size_rows(document: Document) -> list[Row]:
    """One row per method and size, the larger shares first.

    groups: mean score of each group of tasks; mean: of the groups, None where one is missing.
    ppl: exp of the mean negative log-likelihood. of_full: share of the full f16 cache's bytes.
    """
    results = document["results"]
    names = ordered(TASKS[r["task"]].group for r in results if r["score"] is not None)
    rows = []
    for method, size in ordered((r["method"], r["size"]) for r in results):
        own = [r for r in results if (r["method"], r["size"]) == (method, size)]
        groups = {
            name: mean_of([r for r in own if TASKS[r["task"]].group == name], "score")
            for name in names
        }
        scores = [score for score in groups.values() if score is not None]
        nll = mean_of(own, "nll")
        rows.append(
            {
                "method": method,
                "size": size,
                "n": len(own),
                "groups": groups,
                "mean": statistics.fmean(scores) if scores and len(scores) == len(names) else None,
                "ppl": None if nll is None else math.exp(nll),
                "of_full": statistics.fmean(r["kv_bytes"] / r["kv_bytes_full"] for r in own),
                "counts": own[0]["counts"],
                **{name: mean_of(own, name) for name in MEANS},
            }
        )
    shares = {id(row): _share_asked(row, results) for row in rows}
    return sorted(rows, key=lambda row: -shares[id(row)])


MEANS = ("kl", "top1_agreement", "attention_mass", "kv_bytes", "n_kept")


def _share_asked(row: Row, results: list[Row]) -> float:
    """What rows are ordered by: the share that was asked for, else the one that came of it."""
    key = (row["method"], row["size"])
    asked = next(r["share"] for r in results if (r["method"], r["size"]) == key)
    return row["of_full"] if asked is None else asked


def size_table(document: Document) -> str:
    """Markdown table of methods at equal bytes: one row per method and size."""
    rows = size_rows(document)
    n = {
        name: len({(r["task"], r["length"], r["id"]) for r in document["results"]
                   if TASKS[r["task"]].group == name})
        for name in (rows[0]["groups"] if rows else ())
    }  # fmt: skip

    def of_group(name: str) -> Callable[[Row], str]:
        return lambda row: number(row["groups"][name], ".2f")

    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("method", lambda r: r["method"]),
        ("size", lambda r: _size(r)),
        ("tokens", lambda r: number(r["n_kept"], ".0f")),
        ("KV, MiB", lambda r: number(r["kv_bytes"] / 2**20, ".2f")),
        ("n", lambda r: str(r["n"])),
        *((f"{name} ({n[name]})", of_group(name)) for name in n),
        ("mean", lambda r: number(r["mean"], ".3f")),
    ]
    if any(row["ppl"] is not None for row in rows):
        columns.append(("perplexity", lambda r: number(r["ppl"], ".2f")))
    columns += [
        ("KL to full, nats", lambda r: number(r["kl"], ".4f")),
        ("top-1 as full", lambda r: number(r["top1_agreement"], ".3f")),
        ("attention held", lambda r: number(r["attention_mass"], ".3f")),
    ]
    return table(columns, rows)


def half_rows(document: Document) -> list[Row]:
    """One row per method and size, in the order of `size_rows`: both halves of the examples.

    halves: of the examples of even and of odd index in each task: n, kl (mean), and beside the
    method without settings (None for that one itself), over the examples that both have: ratio
    (of the mean KL divergences), n_both, n_lower (examples where its own is lower).

    Raises:
        ValueError: the methods were given no sizes.
    """
    if not has_sizes(document):
        raise ValueError("--halves needs a result of methods with sizes: quality --shares")
    results = document["results"]
    by_name = {(_example(r), r["method"], r["size"]): r for r in results}
    half_of = {}
    for task in ordered((r["task"], r["length"]) for r in results):
        own = ordered(_example(r) for r in results if (r["task"], r["length"]) == task)
        half_of.update({example: i % 2 for i, example in enumerate(own)})
    rows = []
    for method, size in ((row["method"], row["size"]) for row in size_rows(document)):
        own = [r for r in results if (r["method"], r["size"]) == (method, size)]
        halves = []
        for half in (0, 1):
            group = [r for r in own if half_of[_example(r)] == half]
            base = [by_name.get((_example(r), base_name(method), size)) for r in group]
            pairs = [(r, b) for r, b in zip(group, base, strict=True) if b is not None and r != b]
            halves.append({"n": len(group), "kl": mean_of(group, "kl"), **_beside(pairs)})
        rows.append({"method": method, "size": size, "halves": halves})
    return rows


def _example(row: Row) -> tuple[str, int, str]:
    return row["task"], row["length"], row["id"]


def _beside(pairs: list[tuple[Row, Row]]) -> dict[str, Any]:
    base = sum(b["kl"] for _, b in pairs)
    return {
        "ratio": sum(r["kl"] for r, _ in pairs) / base if base else None,
        "n_both": len(pairs),
        "n_lower": sum(r["kl"] < b["kl"] for r, b in pairs),
    }


def halves_table(document: Document) -> str:
    """Markdown table of both halves of the examples: what wins on one, does it on the other.

    Raises:
        ValueError: the methods were given no sizes.
    """

    def columns(half: int, name: str) -> list[tuple[str, Callable[[Row], str]]]:
        def lower(row: Row) -> str:
            own = row["halves"][half]
            return f"{own['n_lower']} of {own['n_both']}" if own["n_both"] else "-"

        return [
            (f"n, {name}", lambda r: str(r["halves"][half]["n"])),
            ("KL to full, nats", lambda r: number(r["halves"][half]["kl"], ".4f")),
            ("of the defaults'", lambda r: number(r["halves"][half]["ratio"], ".3f")),
            ("lower in", lower),
        ]

    return table(
        [
            ("method", lambda r: r["method"]),
            ("size", lambda r: r["size"] or "-"),
            *columns(0, "even"),
            *columns(1, "odd"),
        ],
        half_rows(document),
    )


def _size(row: Row) -> str:
    text = f"{row['of_full']:.2f}" if row["size"] is None else row["size"]
    return f"{text}, all cells" if row["counts"] == "all cells" else text
