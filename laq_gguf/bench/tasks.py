"""TASKS: what is asked, how many tokens an answer may have, and which metric scores it."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laq_gguf.bench import longbench
from laq_gguf.bench.metrics import METRICS
from laq_gguf.bench.needles import needle_prompts, sentences, spread_order

# the chat template and the beginning of the reply take part of a length
N_TEMPLATE = 96
PAIRS_FILE = "kv_retrieval_75"

# the reply's beginning to a question for a value: the lookahead sees the value, not these words
PAIRS_PREFIX = 'The value corresponding to the specified key is "'


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        source: "needles" (generated), "text" (a text that goes on), or read from --data: "ruler",
            "pairs", "longbench".
        max_new_tokens: of an answer; 0 = nothing is answered. longbench has it in its data.
        metric: of METRICS; "" where nothing is answered.
        group: column of the table.
        has_length: the prompts of --lengths; else they have their own.
    """

    source: str
    max_new_tokens: int
    metric: str
    group: str
    has_length: bool = True


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        message: the user's.
        answer_prefix: the words that the reply begins with.
        outputs: what must be found; classes: what could be named.
        is_plain: the message is sent as it is, without the turns of a chat.
        cut: longer prompts lose their middle, down to so many tokens.
        first_line: the answer ends with its first line.
    """

    task: str
    id: str
    message: str
    answer_prefix: str
    outputs: tuple[str, ...]
    depth: float | None = None
    length: int | None = None
    max_new_tokens: int = 0
    classes: tuple[str, ...] = ()
    is_plain: bool = False
    cut: int | None = None
    first_line: bool = False


def _ruler(max_new_tokens: int, group: str, metric: str = "share_found") -> Task:
    return Task("ruler", max_new_tokens, metric, group)


TASKS: dict[str, Task] = {
    "needles": Task("needles", 32, "share_found", "needles"),
    "niah_single_1": _ruler(128, "niah single"),
    "niah_single_2": _ruler(128, "niah single"),
    "niah_single_3": _ruler(128, "niah single"),
    "niah_multikey_1": _ruler(128, "niah multikey"),
    "niah_multikey_2": _ruler(128, "niah multikey"),
    "niah_multikey_3": _ruler(128, "niah multikey"),
    "niah_multiquery": _ruler(128, "niah multi-q/v"),
    "niah_multivalue": _ruler(128, "niah multi-q/v"),
    "vt": _ruler(30, "vt"),
    "cwe": _ruler(120, "cwe, fwe"),
    "fwe": _ruler(50, "cwe, fwe"),
    "qa_1": _ruler(32, "ruler qa", "any_found"),
    "qa_2": _ruler(32, "ruler qa", "any_found"),
    # Lost in the Middle (arXiv 2307.03172): the value of one key of a JSON object
    "kv_retrieval_75": Task("pairs", 40, "share_found", "key-value", has_length=False),
    # of the same pairs, as many as a prompt of --lengths has room for
    "kv_retrieval": Task("pairs", 40, "share_found", "key-value"),
    **{name: Task("longbench", 0, metric, "longbench") for name, metric in longbench.TASKS.items()},
    "perplexity": Task("text", 0, "", "perplexity"),
}


def parse_tasks(text: str) -> list[str]:
    """Names of tasks with commas between them, each with a length of its own if it has one:
    "vt,needles:4096".

    Raises:
        ValueError: unknown task, or a length that is none.
    """
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        base, colon, length = name.partition(":")
        if base not in TASKS:
            raise ValueError(f"unknown task {base!r}; there are: {', '.join(TASKS)}")
        if colon and (not TASKS[base].has_length or not length.isdigit() or int(length) < 1):
            raise ValueError(f"{name!r} is no task with a length, as in needles:4096")
    return names


def task_lengths(name: str, lengths: Sequence[int]) -> tuple[str, list[int]]:
    """A task of `parse_tasks` and the lengths of its prompts."""
    base, colon, length = name.partition(":")
    if colon:
        return base, [int(length)]
    return base, list(lengths) if TASKS[base].has_length else [0]


def score(example: Example, text: str) -> float | None:
    """What an answer is worth, in [0, 1]; None where nothing is answered."""
    task = TASKS[example.task]
    if not task.metric:
        return None
    if example.first_line:
        text = text.lstrip("\n").split("\n")[0]
    context = (example.classes,) if task.metric == "class_score" else ()
    return METRICS[task.metric](text, example.outputs, *context)


def load_examples(
    name: str,
    *,
    data: Path | None,
    length: int,
    limit: int | None,
    n_needles: int,
    count_tokens: Callable[[str], int],
    text: Path | None = None,
) -> list[Example]:
    """The examples of a task that asks.

    Args:
        data: folder with ruler/{length}/{task}.jsonl, ruler/kv_retrieval_75.jsonl and longbench/;
            needed by all tasks but `needles`.
        length: prompt length in tokens; kv_retrieval_75 has its own.
        limit: the first so many examples only (of `needles`: spread over the depths).
        text: a text in which the needles are hidden; None: one made of word lists.

    Raises:
        ValueError: unknown task, no data folder, no file of that length, broken line.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are: {', '.join(TASKS)}")
    task = TASKS[name]
    if task.source == "needles":
        n = n_needles if limit is None else min(limit, n_needles)
        hay = None if text is None else sentences(read_text(text))
        records = needle_prompts(n, length - N_TEMPLATE, count_tokens, hay=hay)
        records = [{**records[i], "index": i} for i in spread_order(n)]
    elif task.source == "pairs":
        records = _read_pairs(name, data)
        if task.has_length:
            n_tokens, n = length - N_TEMPLATE, len(records[:limit])
            records = [pairs_of_length(records, i, n_tokens, count_tokens) for i in range(n)]
        records = [prompt_of_pairs(record) for record in records[:limit]]
    elif task.source == "longbench":
        records = longbench.read_longbench(name, _folder(name, data))[:limit]
    else:
        records = _read_ruler(name, data, length)[:limit]
    of_longbench = task.source == "longbench"
    return [
        Example(
            task=name,
            id=str(record.get("index", i)),
            message=str(record["input"]),
            answer_prefix=str(record["answer_prefix"]),
            outputs=tuple(str(output) for output in record["outputs"]),
            depth=record.get("depth"),
            length=length if task.has_length else None,
            max_new_tokens=record.get("max_new_tokens", task.max_new_tokens),
            classes=tuple(record.get("classes", ())),
            is_plain=name in longbench.PLAIN,
            cut=length if of_longbench else None,
            first_line=name in longbench.ONE_LINE,
        )
        for i, record in enumerate(records)
    ]


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        ValueError: there is none, or it is not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"no text at {path}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not a text in UTF-8: {error.reason}") from error


def long_text(data: Path | None, text: Path | None) -> str:
    """The text whose perplexity is measured: --text, or text/*.raw or *.txt in --data.

    Raises:
        ValueError: there is none.
    """
    if text is not None:
        return read_text(text)
    folder = _folder("perplexity", data) / "text"
    paths = sorted([*folder.glob("*.raw"), *folder.glob("*.txt")])
    if not paths:
        raise ValueError("no text/*.raw or text/*.txt in --data: pass --text FILE")
    return read_text(paths[0])


def _read_ruler(name: str, data: Path | None, length: int) -> list[dict]:
    path = _folder(name, data) / "ruler" / str(length) / f"{name}.jsonl"
    if not path.is_file():
        lengths = sorted(
            int(p.parent.name) for p in _folder(name, data).glob(f"ruler/*/{path.name}")
        )
        raise ValueError(
            f"no ruler/{length}/{path.name} in --data; {name!r} is there with --lengths {lengths}"
        )
    return read_lines(path, {"input", "answer_prefix", "outputs"})


def _read_pairs(name: str, data: Path | None) -> list[dict]:
    path = _folder(name, data) / "ruler" / f"{PAIRS_FILE}.jsonl"
    if not path.is_file():
        raise ValueError(f"no ruler/{path.name} in --data")
    return read_lines(path, {"ordered_kv_records", "key", "value"})


def pairs_of_length(
    records: Sequence[dict], at: int, n_tokens: int, count_tokens: Callable[[str], int]
) -> dict:
    """The record at an index with as many pairs as a prompt of `n_tokens` tokens holds: more come
    from the records after it, and the pair that is asked for stays at its depth.

    Raises:
        ValueError: not even two pairs fit, or all records together do not fill the length.
    """
    key, value = records[at]["key"], records[at]["value"]
    depth = prompt_of_pairs(records[at])["depth"]
    pool = [pair for r in [*records[at:], *records[:at]] for pair in r["ordered_kv_records"]]
    others = [pair for pair in pool if pair[0] != key]

    def record(n_others: int) -> dict:
        i = int(depth * (n_others + 1))
        pairs = [*others[:i], (key, value), *others[i:n_others]]
        return {"ordered_kv_records": pairs, "key": key, "value": value}

    def n_needed(n_others: int) -> int:
        return count_tokens(prompt_of_pairs(record(n_others))["input"])

    n = bisect.bisect_right(range(len(others) + 1), n_tokens, key=n_needed) - 1
    if n < 1:
        raise ValueError(f"two pairs need more than {n_tokens} tokens: raise --lengths")
    if n == len(others):
        raise ValueError(f"{PAIRS_FILE}.jsonl has no {n_tokens} tokens: lower --lengths")
    return record(n)


def prompt_of_pairs(record: dict) -> dict[str, Any]:
    """A record as RULER has them: the value of `key` is asked, out of a JSON object of all pairs.

    Raises:
        ValueError: the pair is not among them.
    """
    pairs, key, value = record["ordered_kv_records"], record["key"], record["value"]
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
        raise ValueError(
            f"task {name!r} reads its examples from a folder, which `bench fetch` makes: "
            "pass --data DIR"
        )
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
