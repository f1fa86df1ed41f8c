"""The measured part of README.md: few tables of several results; nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from laq_gguf.bench.curve_tables import curve_table
from laq_gguf.bench.markdown import (
    Document,
    Row,
    command_of,
    mean_of,
    number,
    ordered,
    table,
)
from laq_gguf.bench.methods import share_text
from laq_gguf.bench.peers_table import peers_rows
from laq_gguf.bench.quality_tables import size_rows
from laq_gguf.bench.tables import bars_table, multiturn_summary
from laq_gguf.bench.tasks import TASKS

#: kinds whose rows stand in the first table, and how they are made
AT_EQUAL_BYTES: Mapping[str, Callable[[Document], list[Row]]] = {
    "quality": size_rows,
    "peers": peers_rows,
}
ONE_EACH: Mapping[str, Callable[[Document], str]] = {
    "multiturn": multiturn_summary,
    "speed": bars_table,
    "device": bars_table,
    "memory_curve": curve_table,
}


def section(documents: Sequence[Document]) -> str:
    """The tables of the documents, and where each comes from.

    Raises:
        KeyError: a document of a kind that README does not show.
    """
    reading = [d for d in documents if reads_with_archive(d)]
    rest = [d for d in documents if not reads_with_archive(d)]
    at_bytes = [d for d in rest if d["kind"] in AT_EQUAL_BYTES]
    others = [d for d in rest if d["kind"] not in AT_EQUAL_BYTES]
    parts = [shares_table(at_bytes), *(ONE_EACH[d["kind"]](d) for d in others)]
    if reading:
        parts.insert(1, reading_table(reading, len(at_bytes) + 1))
    origins = (origin(d, i + 1) for i, d in enumerate((*at_bytes, *reading, *others)))
    parts.append("\n".join(origins))
    return "\n\n".join(parts)


def shares_table(documents: Sequence[Document]) -> str:
    """One row for each method of quality and peers results, with its figures at each share; run:
    which of the documents, from 1."""
    rows: list[Row] = []
    for i, document in enumerate(documents):
        found = AT_EQUAL_BYTES[document["kind"]](document)
        for method in ordered(r["method"] for r in found):
            own = {_size(r): r for r in found if r["method"] == method}
            # transformers' full cache is there to show that both run the same model
            if document["kind"] == "peers" and "1" in own:
                continue
            n = max(r["n"] for r in own.values())
            rows.append({"run": i + 1, "method": method, "n": n, "own": own})
    sizes = sorted(
        ordered(size for row in rows for size in row["own"] if "/" in size),
        key=lambda size: int(size.partition("/")[2]),
    )

    def cell(size: str, name: str, spec: str) -> Callable[[Row], str]:
        def show(row: Row) -> str:
            own = row["own"]
            return number(own.get(size, own.get(_only_size(row), {})).get(name), spec)

        return show

    return table(
        (
            ("run", lambda r: str(r["run"])),
            ("method", _name),
            ("n", lambda r: str(r["n"])),
            *((f"KL at {size}", cell(size, "kl", ".3f")) for size in sizes),
            *((f"score at {size}", cell(size, "mean", ".2f")) for size in sizes),
        ),
        rows,
    )


def reads_with_archive(document: Document) -> bool:
    """Whether it is of prompts that do not fit the cells and are read with an archive."""
    return document["kind"] == "quality" and any(
        row["method"] == "recall" for row in document["results"]
    )


def reading_table(documents: Sequence[Document], first_run: int) -> str:
    """One row for each group of tasks and result: an archive beside laq++ of a whole cache, over
    the examples that were read with one. Means, but for the seconds, which are medians."""
    rows: list[Row] = []
    for run, document in enumerate(documents, first_run):
        read = {(r["task"], r["id"]) for r in document["results"] if r["method"] == "recall"}
        results = [r for r in document["results"] if (r["task"], r["id"]) in read]
        for group in ordered(TASKS[r["task"]].group for r in results):
            own = [r for r in results if TASKS[r["task"]].group == group]
            of = {m: [r for r in own if r["method"] == m] for m in ("full", "laq++", "recall")}
            rows.append({"run": run, "group": group, **of})

    def mean(method: str, name: str, spec: str) -> Callable[[Row], str]:
        return lambda row: number(mean_of(row[method], name), spec)

    def seconds(method: str) -> Callable[[Row], str]:
        return lambda row: f"{statistics.median(r['ms_prefill'] for r in row[method]) / 1e3:.0f}"

    return table(
        (
            ("run", lambda r: str(r["run"])),
            ("tokens", mean("recall", "n_prompt", ",.0f")),
            ("task", lambda r: r["group"]),
            ("n", lambda r: str(len(r["recall"]))),
            ("found: full", mean("full", "score", ".2f")),
            ("laq++ of the whole cache", mean("laq++", "score", ".2f")),
            ("with an archive", mean("recall", "score", ".2f")),
            ("KL: laq++", mean("laq++", "kl", ".4f")),
            ("with an archive", mean("recall", "kl", ".4f")),
            ("read, s: full", seconds("full")),
            ("with an archive", seconds("recall")),
        ),
        rows,
    )


def _size(row: Row) -> str:
    if "size" not in row:
        return share_text(row["share"])
    return f"{row['of_full']:.2f}" if row["size"] is None else str(row["size"])


def _only_size(row: Row) -> str | None:
    """Of a cache that never evicts: what share of the bytes it takes."""
    sizes = list(row["own"])
    return sizes[0] if len(sizes) == 1 and "/" not in sizes[0] else None


def _name(row: Row) -> str:
    size = _only_size(row)
    return f"{row['method']} ({size} of the bytes)" if size else row["method"]


def origin(document: Document, number_of_run: int) -> str:
    """The command of a document, its lookahead where all of it has one, and what it ran on, as one
    item of a list."""
    model, device = document["model"], document.get("device")
    lookahead = document["settings"].get("lookahead_size")
    return (
        f"{number_of_run}. {command_of(document)}: "
        f"{f'lookahead_size {lookahead}, ' if lookahead else ''}{model['file']} (sha256 "
        f"{model['sha256'][:12]}), commit {document['commit'][:12]}, {document['date'][:10]}, "
        f"{document['machine']['cpu']}, {document['machine']['cores_usable']} cores"
        f"{', ' + device['description'] if device else ''}"
    )
