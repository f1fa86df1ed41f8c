"""TASKS: what is asked, how many tokens an answer may have, and which metric scores it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from laq_gguf.bench.needles import needle_prompts

# the reply's beginning to a question for a value: as many tokens as the lookahead or more
PAIRS_PREFIX = 'The value corresponding to the specified key is "'


@dataclass(frozen=True)
class Task:
    """A task: `source` is "ruler" or "pairs" (read from --data), or "needles" (generated)."""

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
    # Lost in the Middle (arXiv 2307.03172): the value of one key of a JSON object
    "kv_retrieval_75": Task("pairs", 40, "share_found"),
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
        data: folder with ruler/{length}/{task}.jsonl and ruler/kv_retrieval_75.jsonl; needed by
            all tasks but `needles`.
        length: prompt length in tokens; kv_retrieval_75 has its own.
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
    elif TASKS[name].source == "pairs":
        records = _read_pairs(name, data)[:limit]
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
    path = _folder(name, data) / "ruler" / str(length) / f"{name}.jsonl"
    if not path.is_file():
        lengths = sorted(
            int(p.parent.name) for p in _folder(name, data).glob(f"ruler/*/{path.name}")
        )
        raise ValueError(
            f"no ruler/{length}/{path.name} in --data; {name!r} is there with --length {lengths}"
        )
    return read_lines(path, {"input", "answer_prefix", "outputs"})


def _read_pairs(name: str, data: Path | None) -> list[dict]:
    path = _folder(name, data) / "ruler" / f"{name}.jsonl"
    if not path.is_file():
        raise ValueError(f"no ruler/{path.name} in --data")
    records = read_lines(path, {"ordered_kv_records", "key", "value"})
    return [pairs_prompt(r["ordered_kv_records"], r["key"], r["value"]) for r in records]


def pairs_prompt(pairs: Sequence[tuple[str, str]], key: str, value: str) -> dict[str, object]:
    """A record as RULER has them: the value of `key` is asked, out of a JSON object of all pairs.

    Raises:
        ValueError: the pair is not among them.
    """
    keys = [k for k, _ in pairs]
    if key not in keys or pairs[keys.index(key)][1] != value:
        raise ValueError(f"the pair of the key {key!r} is not among ordered_kv_records")
    lines = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs)
    return {
        "input": (
            "Extract the value corresponding to the specified key in the JSON object below.\n\n"
            f'{{{lines}}}\n\nKey: "{key}"\nCorresponding value:'
        ),
        "answer_prefix": PAIRS_PREFIX,
        "outputs": [value],
        "depth": round((keys.index(key) + 0.5) / len(keys), 4),
    }


def _folder(name: str, data: Path | None) -> Path:
    if data is None:
        raise ValueError(f"task {name!r} reads its examples from a folder: pass --data DIR")
    return data


def read_lines(path: Path, needed: set[str]) -> list[dict]:
    """The records of a file of JSON lines.

    Raises:
        ValueError: a record lacks one of the `needed` fields.
    """
    records = []
    # not splitlines(): texts may hold other ends of lines than the files have
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            record = json.loads(line)
            missing = ", ".join(sorted(needed - record.keys()))
            if missing:
                raise ValueError(f"{path.name}:{number}: fields missing: {missing}")
            records.append(record)
    return records
