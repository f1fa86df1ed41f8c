"""TASKS: what is asked, how many tokens an answer may have, and which metric scores it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from laq_gguf.bench.needles import needle_prompts


@dataclass(frozen=True)
class Task:
    """A task: `source` is "ruler" (read from --data) or "needles" (generated)."""

    source: str
    max_new_tokens: int
    metric: str


@dataclass(frozen=True)
class Example:
    """One question: the user's message, the words the reply begins with, what must be found."""

    task: str
    id: str
    message: str
    answer_prefix: str
    outputs: tuple[str, ...]
    depth: float | None = None


TASKS: dict[str, Task] = {
    "needles": Task("needles", 32, "share_found"),
    "niah_single_1": Task("ruler", 128, "share_found"),
    "niah_single_2": Task("ruler", 128, "share_found"),
    "niah_single_3": Task("ruler", 128, "share_found"),
    "niah_multikey_1": Task("ruler", 128, "share_found"),
    "niah_multikey_2": Task("ruler", 128, "share_found"),
    "niah_multikey_3": Task("ruler", 128, "share_found"),
    "niah_multiquery": Task("ruler", 128, "share_found"),
    "niah_multivalue": Task("ruler", 128, "share_found"),
    "vt": Task("ruler", 30, "share_found"),
    "cwe": Task("ruler", 120, "share_found"),
    "fwe": Task("ruler", 50, "share_found"),
    "qa_1": Task("ruler", 32, "any_found"),
    "qa_2": Task("ruler", 32, "any_found"),
}


def load_examples(
    name: str,
    *,
    data: Path | None,
    length: int,
    limit: int | None,
    n_needles: int,
    count_tokens: Callable[[str], int],
) -> list[Example]:
    """The examples of a task.

    Args:
        data: folder with ruler/{length}/{task}.jsonl; needed by the tasks of RULER.
        length: prompt length in tokens.
        limit: the first so many examples only (of `needles`: spread over the depths).

    Raises:
        ValueError: unknown task, no data folder, no file of that length, broken line.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are: {', '.join(TASKS)}")
    if TASKS[name].source == "needles":
        n = n_needles if limit is None else min(limit, n_needles)
        # the chat template and the beginning of the reply take part of the length
        records = needle_prompts(n, length - 96, count_tokens)
    else:
        records = _read_ruler(name, data, length)[:limit]
    return [
        Example(
            task=name,
            id=str(record.get("index", i)),
            message=str(record["input"]),
            answer_prefix=str(record["answer_prefix"]),
            outputs=tuple(str(output) for output in record["outputs"]),
            depth=record.get("depth"),
        )
        for i, record in enumerate(records)
    ]


def _read_ruler(name: str, data: Path | None, length: int) -> list[dict]:
    if data is None:
        raise ValueError(f"task {name!r} reads its examples from a folder: pass --data DIR")
    path = data / "ruler" / str(length) / f"{name}.jsonl"
    if not path.is_file():
        lengths = sorted(int(p.parent.name) for p in data.glob(f"ruler/*/{name}.jsonl"))
        raise ValueError(
            f"no {path.relative_to(data)} in --data; {name!r} is there with --length {lengths}"
        )
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        record = json.loads(line)
        missing = {"input", "answer_prefix", "outputs"} - record.keys()
        if missing:
            raise ValueError(f"{path.name}:{number}: fields missing: {', '.join(sorted(missing))}")
        records.append(record)
    return records
