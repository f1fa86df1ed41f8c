"""Result files that grow row by row, so that a run can be stopped and gone on with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from laq_gguf.bench.options import settings
from laq_gguf.bench.provenance import provenance, write_json
from laq_gguf.bench.report import read

# of the head: what must be the same for rows to stand in one file
FIXED = ("kind", "model", "settings", "versions")
# what may differ from one run to the next, and is noted
RUN = ("date", "commit", "command", "machine")


class ResultFile:
    """The document of a run and its rows, each with a key of its own.

    Attributes:
        document: head, notes and results; add to it freely.
        n_found: rows that an earlier run had measured.
    """

    def __init__(
        self, kind: str, args: argparse.Namespace, key: Sequence[str], notes: Sequence[str] = ()
    ) -> None:
        """Begin a file, or go on with the one at `args.out`.

        Args:
            kind: of result, see report.TABLES.
            args: with model, out and overwrite beside the settings.
            key: fields that tell rows apart.
            notes: sentences about how it is measured.

        Raises:
            ValueError: the file holds something else, or was measured with other settings.
        """
        self._path, self._key = args.out, tuple(key)
        head = provenance(kind, args.model, settings(args))
        self.document: dict[str, Any] = {**head, "notes": list(notes), "results": []}
        if self._path and self._path.exists() and not args.overwrite:
            self.document = self._go_on(read(self._path), head)
        self._rows = {self._name(row): row for row in self.document["results"]}
        self.n_found = len(self._rows)

    def _go_on(self, document: dict[str, Any], head: dict[str, Any]) -> dict[str, Any]:
        for part in FIXED:
            if document[part] != head[part]:
                raise ValueError(
                    f"{self._path} was measured with other {difference(document, head, part)}: "
                    "give another --out, the same options, or --overwrite"
                )
        runs = [document, *document.get("continued", [])]
        run = {name: head[name] for name in RUN}
        if run["commit"] != runs[-1]["commit"] or run["machine"] != runs[-1]["machine"]:
            document.setdefault("continued", []).append(run)
        return document

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row of that key, or None where it is still to be measured."""
        return self._rows.get(self._name(key))

    def add(self, *rows: dict[str, Any]) -> None:
        """Add rows and write the file: all of them are in it, or none."""
        for row in rows:
            self._rows[self._name(row)] = row
        self.document["results"].extend(rows)
        self.write()

    def note(self, text: str) -> None:
        """Add a note that is not there yet."""
        if text not in self.document["notes"]:
            self.document["notes"].append(text)

    def write(self) -> None:
        """Write the file, if there is to be one."""
        if self._path:
            write_json(self._path, self.document)

    def _name(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[field] for field in self._key)


def difference(old: dict[str, Any], new: dict[str, Any], part: str) -> str:
    """Where two heads differ in a part, in words."""
    if not isinstance(old[part], dict):
        return f"{part} ({old[part]!r}, now {new[part]!r})"
    names = sorted(
        name
        for name in old[part].keys() | new[part].keys()
        if old[part].get(name) != new[part].get(name)
    )
    words = (f"{n}: {old[part].get(n)!r}, now {new[part].get(n)!r}" for n in names)
    return f"{part} ({'; '.join(words)})"
