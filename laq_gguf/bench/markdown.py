"""Markdown: tables and the numbers in them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Document = dict[str, Any]
Row = dict[str, Any]


def table(columns: Sequence[tuple[str, Callable[[Any], str]]], rows: Sequence[Any]) -> str:
    """A table: a title and what it shows of a row for each column."""
    lines = [[title for title, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command_of(document: Document) -> str:
    """The command that a result was made with, and what of it is `removed`: words that the commands
    of today do not take."""
    removed = ", ".join(f"`{word}`" for word in document.get("removed", ()))
    told = f" (of the commit named here; removed since: {removed})" if removed else ""
    return f"`{document['command']}`{told}"


def mean_of(rows: Sequence[Row], name: str) -> float | None:
    """Mean of a field over the rows that have it; None where none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float], spec: str) -> str:
    """Median (least to most)."""
    if not values:
        return "-"
    middle = format(statistics.median(values), spec)
    if len(values) == 1:
        return middle
    return f"{middle} ({min(values):{spec}} to {max(values):{spec}})"


def count(n: int, noun: str) -> str:
    """A number and its noun."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def number(value: float | None, spec: str) -> str:
    """A formatted number, or - where there is none."""
    return "-" if value is None else format(value, spec)


def ordered(values: Iterable[Any]) -> list[Any]:
    """Values that differ, in the order of their first occurrence."""
    return list(dict.fromkeys(values))
