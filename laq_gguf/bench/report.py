"""Result files as markdown: nothing is measured here, and nothing is read but the JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from laq_gguf.bench import curve_tables, kept_page, peers_table, quality_tables, tables
from laq_gguf.bench.markdown import Document, command_of
from laq_gguf.bench.provenance import SCHEMA

Table = Callable[[Document], str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench report`."""
    parser.add_argument("files", type=Path, nargs="+", help="result files")
    parser.add_argument(
        "--halves", action="store_true",
        help="quality: KL divergence over the examples of even and of odd index in each task",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Print the tables of result files.

    Raises:
        ValueError: a file is none, or has no halves to show.
    """
    print("\n\n".join(render(path, halves=args.halves) for path in args.files))


def render(path: Path, halves: bool = False) -> str:
    """Markdown of a result file; halves: its examples in two parts.

    Raises:
        ValueError: not a result file, one of another schema, or one without halves.
    """
    document = read(path)
    if halves and document["kind"] != "quality":
        raise ValueError(f"--halves is for results of quality: {path.name} is of another kind")
    shown = quality_tables.halves_table if halves else TABLES[document["kind"]]
    return f"{shown(document)}\n\n{provenance_lines(document)}"


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
    model = document["model"]
    packages = {**document["versions"], **document.get("peers", {})}
    versions = ", ".join(f"{k} {v}" for k, v in packages.items() if v)
    lines = [
        command_of(document),
        f"{model['file']} (sha256 {model['sha256'][:12]}), commit {document['commit']}, "
        f"{document['date'][:10]}",
        f"{_machine(document)}; {versions}",
        *(
            f"continued: commit {run['commit']}, {run['date'][:10]}, {_machine(run)}"
            for run in document.get("continued", [])
        ),
        *document.get("notes", []),
    ]
    return "\n".join(f"- {line}" for line in lines)


def _machine(run: Document) -> str:
    machine = run["machine"]
    return f"{machine['cpu']}, {machine['cores_usable']} cores, {machine['system']}"


def results_section(documents: Sequence[Document]) -> str:
    """The tables of all results, for the folder that they lie in."""
    return "\n\n".join(
        f"{SUMMARIES.get(d['kind'], TABLES[d['kind']])(d)}\n\n{provenance_lines(d)}"
        for d in documents
    )


TABLES: dict[str, Table] = {
    "quality": quality_tables.quality_table,
    "multiturn": tables.multiturn_table,
    "chat": tables.chat_table,
    "memory": tables.memory_table,
    "speed": tables.speed_table,
    "device": tables.device_table,
    "peers": peers_table.peers_table,
    "sweep": curve_tables.sweep_table,
    "memory_curve": curve_tables.curve_table,
    "tune": curve_tables.tune_table,
    "kept": kept_page.kept_table,
}
# shorter ones
SUMMARIES: dict[str, Table] = {
    "quality": quality_tables.quality_summary,
    "multiturn": tables.multiturn_summary,
    "chat": tables.chat_summary,
}
