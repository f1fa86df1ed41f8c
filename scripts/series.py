"""The patch series as text: read it, check it against the policy, render its table.

Used by scripts/patch.py, which runs git; nothing here does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FIELDS = ("Why", "Why-a-patch", "Class", "Upstream", "Remove-when", "Depends-on")
CLASSES = ("hook", "op", "build", "test", "backport")
AUTHOR = "laq_gguf <laq_gguf@localhost>"
MAIL_LINE = f"From {'0' * 40} Mon Sep 17 00:00:00 2001"
TAG = "[TAG_LAQ]"

MAX_HUNK = 25
MAX_PATCH = 60
MAX_TEST_PATCH = 150
MAX_SERIES = 300
MAX_SUBJECT = 72

TABLE_BEGIN = "<!-- table of patches: scripts/patch.py table --write -->"
TABLE_END = "<!-- end of table -->"

# mirrored by ctypes, or part of the ABI: no patch may touch them
FROZEN = ("include/llama.h",)


class SeriesError(Exception):
    """A patch or the series cannot be read."""


@dataclass(frozen=True)
class Hunk:
    """One hunk: its file, where it begins in the original, and its lines with their first char."""

    path: str
    start: int
    lines: tuple[str, ...]

    @property
    def added(self) -> list[str]:
        """Added lines, without the plus sign."""
        return [line[1:] for line in self.lines if line.startswith("+")]

    @property
    def removed(self) -> list[str]:
        """Removed lines, without the minus sign."""
        return [line[1:] for line in self.lines if line.startswith("-")]


@dataclass(frozen=True)
class Patch:
    """One patch file.

    Attributes:
        name: file name.
        text: the whole file.
        subject: commit subject.
        fields: header fields of the commit message, `Removes` included; continuation lines joined.
        hunks: in the order of the file.
        extended: lines of the diff that create, delete, rename or change the mode of a file.
    """

    name: str
    text: str
    subject: str
    fields: dict[str, str]
    hunks: tuple[Hunk, ...]
    extended: tuple[str, ...]

    @property
    def paths(self) -> list[str]:
        """The files it touches."""
        return list(dict.fromkeys(hunk.path for hunk in self.hunks))

    @property
    def n_added(self) -> int:
        """Number of added lines."""
        return sum(len(hunk.added) for hunk in self.hunks)

    @property
    def n_removed(self) -> int:
        """Number of removed lines."""
        return sum(len(hunk.removed) for hunk in self.hunks)


def slug(subject: str) -> str:
    """File name, without suffix, of the patch with this subject."""
    return re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-")


def normalize(text: str) -> str:
    """Make the mail header of a `git format-patch` file depend on nothing but the subject.

    Raises:
        SeriesError: no subject.
    """
    head, _, body = text.partition("\n\n")
    found = re.search(r"^Subject: (.*(?:\n[ \t].*)*)", head, re.MULTILINE)
    if not found:
        raise SeriesError("a patch without a Subject line")
    subject = " ".join(found.group(1).split())
    return f"{MAIL_LINE}\nFrom: {AUTHOR}\nSubject: {subject}\n\n{body}"


def _read_fields(message: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    key = ""
    for line in message.splitlines():
        found = re.match(r"([A-Z][A-Za-z-]*): *(.*)", line)
        if found and found.group(1) in (*FIELDS, "Removes"):
            key = found.group(1)
            fields[key] = found.group(2).strip()
        elif not line.strip():
            key = ""
        elif key:
            fields[key] = f"{fields[key]} {line.strip()}".strip()
    return fields


def _read_hunks(diff: str) -> Iterator[Hunk | str]:
    """The hunks of a diff and, as text, its lines about creation, deletion, renaming and mode."""
    path, start, lines = "", 0, list[str]()
    left = [0, 0]  # lines of the hunk still to come: of the old file, of the new file
    for line in diff.splitlines():
        if left[0] > 0 or left[1] > 0:
            lines.append(line)
            left[0] -= line[:1] in (" ", "-", "")
            left[1] -= line[:1] in (" ", "+", "")
            if left[0] <= 0 and left[1] <= 0:
                yield Hunk(path, start, tuple(lines))
        elif found := re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@", line):
            start, lines = int(found.group(1)), []
            left = [int(found.group(2) or 1), int(found.group(3) or 1)]
        elif line.startswith("+++ "):
            path = line[4:].removeprefix("b/")
        elif re.match(r"(new file|deleted file|old|new) mode|rename |copy |GIT binary", line):
            yield line


def parse_patch(name: str, text: str) -> Patch:
    """Read a patch file.

    Raises:
        SeriesError: it has no subject or no diff.
    """
    head, _, rest = text.partition("\n\n")
    found = re.search(r"^Subject: (.*)$", head, re.MULTILINE)
    message, separator, diff = rest.partition("diff --git ")
    if not found or not separator:
        raise SeriesError(f"{name}: needs a Subject line and a `diff --git`")
    parts = list(_read_hunks(separator + diff))
    return Patch(
        name=name,
        text=text,
        subject=found.group(1),
        fields=_read_fields(message),
        hunks=tuple(part for part in parts if isinstance(part, Hunk)),
        extended=tuple(part for part in parts if isinstance(part, str)),
    )


def read_series(folder: Path) -> list[Patch]:
    """The patches of a folder in the order of its `series` file.

    Raises:
        SeriesError: `series` and the folder do not name the same files, once each.
    """
    series = folder / "series"
    if not series.exists():
        raise SeriesError(f"{series} is missing: it names the patches in order, one a line")
    names = series.read_text(encoding="utf-8").split()
    present = {path.name for path in folder.glob("*.patch")}
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SeriesError(f"{series} names more than once: {', '.join(twice)}")
    if absent := sorted(set(names) - present):
        raise SeriesError(f"{series} names files that are not there: {', '.join(absent)}")
    if unlisted := sorted(present - set(names)):
        raise SeriesError(f"{series} does not name: {', '.join(unlisted)}")
    return [parse_patch(name, (folder / name).read_bytes().decode("utf-8")) for name in names]


def fingerprint(folder: Path, patches: list[Patch]) -> str:
    """sha256 of UPSTREAM, series and all patches: what a patched tree is made from."""
    digest = hashlib.sha256((folder / "UPSTREAM").read_bytes())
    digest.update((folder / "series").read_bytes())
    for patch in patches:
        digest.update(patch.text.encode())
    return digest.hexdigest()


def _lint_header(patch: Patch, earlier: list[str]) -> Iterator[str]:
    for field in FIELDS:
        if not patch.fields.get(field):
            yield f"the commit message has no `{field}:`"
    kind = patch.fields.get("Class", "")
    if kind and kind not in CLASSES:
        yield f"Class is {kind!r}; known: {', '.join(CLASSES)}"
    depends = patch.fields.get("Depends-on", "none")
    for name in [] if depends == "none" else re.split(r"[,\s]+", depends):
        if name not in earlier:
            yield f"Depends-on names {name!r}, which is not an earlier patch of the series"
    if patch.name != f"{slug(patch.subject)}.patch":
        yield f"the file name should follow the subject: {slug(patch.subject)}.patch"
    if len(patch.subject) > MAX_SUBJECT:
        yield f"the subject has {len(patch.subject)} characters, at most {MAX_SUBJECT} are allowed"
    if " : " not in patch.subject or patch.subject.startswith(("fixup!", "squash!")):
        yield "the subject should read `<module> : <title>`"


def _lint_text(patch: Patch) -> Iterator[str]:
    for number, line in enumerate(patch.text.splitlines(), 1):
        in_tree = line.startswith((" ", "-"))  # upstream's own lines are as they are
        if not line.isascii() and not in_tree:
            yield f"line {number} is not ASCII: {line!r}"
        if line != line.rstrip() and not in_tree:
            yield f"line {number} ends in blanks"
    if "\r" in patch.text:
        yield "has carriage returns"


def _lint_diff(patch: Patch) -> Iterator[str]:
    kind = patch.fields.get("Class")
    for line in patch.extended:
        yield f"adds, deletes, renames or changes the mode of a file: {line}"
    for path in patch.paths:
        if path in FROZEN:
            yield f"touches {path}, which ctypes mirrors"
    for hunk in patch.hunks:
        where = f"{hunk.path}:{hunk.start}"
        if len(hunk.added) > (MAX_TEST_PATCH if kind == "test" else MAX_HUNK):
            yield f"the hunk at {where} adds {len(hunk.added)} lines, at most {MAX_HUNK} may be"
        if kind not in ("build", "test") and not any(TAG in line for line in hunk.added):
            yield f"no added line of the hunk at {where} carries {TAG}"
    most = MAX_TEST_PATCH if kind == "test" else MAX_PATCH
    if patch.n_added > most:
        yield f"adds {patch.n_added} lines, at most {most} are allowed"
    if patch.n_removed and not patch.fields.get("Removes"):
        yield f"removes {patch.n_removed} lines and the message has no `Removes:` that defends it"


def lint(patches: list[Patch]) -> list[str]:
    """What the series does against the policy of patches/README.md; empty if nothing."""
    problems: list[str] = []
    for index, patch in enumerate(patches):
        earlier = [other.name for other in patches[:index]]
        for rule in (_lint_header(patch, earlier), _lint_text(patch), _lint_diff(patch)):
            problems += [f"{patch.name}: {problem}" for problem in rule]
    total = sum(patch.n_added for patch in patches)
    if total > MAX_SERIES:
        problems.append(f"series: adds {total} lines, at most {MAX_SERIES} are allowed")
    return problems


def table(patches: list[Patch]) -> str:
    """Markdown table of the series, with what it adds and removes."""
    rows = ["| patch | class | files | added | removed | goes away when |"]
    rows.append("| --- | --- | --- | ---: | ---: | --- |")
    for patch in patches:
        files = ", ".join(f"`{path}`" for path in patch.paths)
        kind, remove_when = patch.fields.get("Class", ""), patch.fields.get("Remove-when", "")
        counts = f"{patch.n_added} | {patch.n_removed}"
        rows.append(f"| `{patch.name}` | {kind} | {files} | {counts} | {remove_when} |")
    added, removed = sum(p.n_added for p in patches), sum(p.n_removed for p in patches)
    rows.append(f"| {len(patches)} patches | | | {added} | {removed} | |")
    return "\n".join(rows) + "\n"


def with_table(readme: str, patches: list[Patch]) -> str:
    """The text of patches/README.md with its table brought up to date.

    Raises:
        SeriesError: the markers of the table are missing.
    """
    head, begin, rest = readme.partition(TABLE_BEGIN)
    _, end, tail = rest.partition(TABLE_END)
    if not begin or not end:
        raise SeriesError(f"patches/README.md needs the lines {TABLE_BEGIN} and {TABLE_END}")
    return f"{head}{begin}\n\n{table(patches)}\n{end}{tail}"
