"""Result files as markdown: nothing is measured here, and nothing is read but the JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from laq_gguf.bench.provenance import SCHEMA

Document = dict[str, Any]


def render(path: Path) -> str:
    """Markdown of a result file.

    Raises:
        ValueError: not a result file, or one of another schema.
    """
    document = read(path)
    return f"{TABLES[document['kind']](document)}\n\n{provenance_lines(document)}"


def read(path: Path) -> Document:
    """A result file.

    Raises:
        ValueError: not a result file, or one of another schema.
    """
    if not path.is_file():
        raise ValueError(f"no result file at {path}")
    document = json.loads(path.read_text(encoding="utf-8"))
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in TABLES or document.get("schema") != SCHEMA:
        raise ValueError(
            f"{path.name} is no result of schema {SCHEMA} (kinds: {', '.join(TABLES)})"
        )
    return document


def provenance_lines(document: Document) -> str:
    """What was measured, on what: a few lines that stand below a table."""
    machine, model = document["machine"], document["model"]
    versions = ", ".join(f"{k} {v}" for k, v in document["versions"].items() if v)
    lines = [
        f"`{document['command']}`",
        f"{model['file']} (sha256 {model['sha256'][:12]}), commit {document['commit']}, "
        f"{document['date'][:10]}",
        f"{machine['cpu']}, {machine['cores_usable']} cores, {machine['system']}; {versions}",
        *document.get("notes", []),
    ]
    return "\n".join(f"- {line}" for line in lines)


def quality_rows(document: Document) -> list[dict[str, Any]]:
    """One row per task, method and budget, in the order they were measured.

    of_full: of what the full cache finds, the share that is found too (None if it finds nothing):
    sum of min(score, full score) / sum of full scores.
    """
    results = document["results"]
    full = {(r["task"], r["id"]): r["score"] for r in results if r["method"] == "full"}
    rows = []
    for task in _ordered(r["task"] for r in results):
        for method, budget in _ordered((r["method"], r["budget"]) for r in results):
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


def _mean(group: list[dict[str, Any]], full: dict[tuple[str, str], float]) -> dict[str, Any]:
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
    }


def quality_table(document: Document) -> str:
    """Markdown table of a quality result."""
    return _table(
        (
            ("task", lambda r: r["task"]),
            ("method", lambda r: r["method"]),
            ("budget", lambda r: "-" if r["budget"] is None else str(r["budget"])),
            ("n", lambda r: str(r["n"])),
            ("found", lambda r: f"{r['score']:.3f}"),
            ("of full's", lambda r: _number(r["of_full"], ".3f")),
            ("top-1 = full's", lambda r: f"{r['top1_agreement']:.3f}"),
            ("KL to full (nats)", lambda r: f"{r['kl']:.4f}"),
            ("most cells", lambda r: _number(r["n_resident_max"], "d")),
            ("evicted", lambda r: _number(r["n_evicted"], "d")),
        ),
        quality_rows(document),
    )


def quality_summary(document: Document) -> str:
    """Markdown table of a quality result: one row per method, what it finds of each task."""
    rows = quality_rows(document)
    tasks = _ordered(row["task"] for row in rows)
    summary = []
    for method, budget in _ordered((row["method"], row["budget"]) for row in rows):
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
    return _table(
        (
            ("kv_policy", lambda r: r["method"]),
            ("kv_budget", lambda r: "-" if r["budget"] is None else str(r["budget"])),
            *((f"{t} ({n[t]})", _found(t)) for t in tasks),
            ("KL to full, nats", lambda r: f"{r['kl']:.3f}"),
            ("top-1 as full", lambda r: f"{r['top1_agreement']:.2f}"),
        ),
        summary,
    )


def _found(task: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row[task]['score']:.2f}"


def readme_section(documents: Sequence[Document]) -> str:
    """The measured part of README.md, from result files alone."""
    parts = [
        f"{quality_summary(d) if d['kind'] == 'quality' else TABLES[d['kind']](d)}\n\n"
        f"{provenance_lines(d)}"
        for d in documents
    ]
    return "\n\n".join(parts)


def speed_table(document: Document) -> str:
    """Markdown tables of a speed result: the measurements, then the bars."""
    measured = _table(
        (
            ("configuration", lambda r: r["name"]),
            ("prompt", lambda r: str(r["n_prompt"])),
            ("decode, tokens/s", lambda r: _spread(r["decode_tokens_per_s"], ".1f")),
            ("first token, s", lambda r: _spread(r["first_token_s"], ".2f")),
            ("KV bytes", lambda r: _number(r["kv_bytes"], ",d")),
        ),
        document["configurations"],
    )
    bars = _table(
        (
            ("bar", lambda r: r["name"]),
            ("measured", lambda r: _spread(r["values"], ".3f")),
            ("wanted", lambda r: r["wanted"]),
            ("", lambda r: "pass" if r["passed"] else "FAIL"),
        ),
        document["bars"],
    )
    load = " and ".join(_number(value, ".2f") for value in document["load"])
    return (
        f"{measured}\n\n{bars}\n\nMedian (least to most) over rounds; ratios within a round. "
        f"Load of the machine before and after: {load}."
    )


def _table(
    columns: Sequence[tuple[str, Callable[[dict[str, Any]], str]]], rows: list[dict[str, Any]]
) -> str:
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: Sequence[float], spec: str) -> str:
    if not values:
        return "-"
    middle = format(statistics.median(values), spec)
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):{spec}} to {max(values):{spec}})"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _ordered(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


TABLES: dict[str, Callable[[Document], str]] = {"quality": quality_table, "speed": speed_table}
