"""LongBench (arXiv 2308.14508): its English tasks with their own prompts, lengths and metrics.

Read from a folder longbench/ with dataset2prompt.json, dataset2maxlen.json and one file of JSON
lines a task. `{task}_style*.jsonl` holds examples made in the style of a task.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

FIELDS = {"input", "context", "answers", "all_classes"}
# these are prompts of examples or code to be continued: LongBench sends them without a chat's turns
PLAIN = frozenset({"trec", "triviaqa", "samsum", "lcc", "repobench-p"})
# answers end with their first line
ONE_LINE = frozenset({"trec", "triviaqa", "samsum"})


def read_longbench(name: str, data: Path) -> list[dict[str, Any]]:
    """The records of a task, in the form that tasks.py makes examples of.

    Raises:
        ValueError: no such file, or one of the two tables lacks the task.
    """
    from laq_gguf.bench.tasks import read_lines

    folder = data / "longbench"
    paths = [folder / f"{name}.jsonl", *sorted(folder.glob(f"{name}_style*.jsonl"))]
    path = next((p for p in paths if p.is_file()), None)
    if path is None:
        raise ValueError(f"no longbench/{name}.jsonl in --data")
    prompt = str(_setting(folder / "dataset2prompt.json", name))
    n_most = _setting(folder / "dataset2maxlen.json", name)
    return [
        {
            "index": record.get("_id", i),
            "input": filled(prompt, record),
            "answer_prefix": "",
            "outputs": record["answers"],
            "classes": record["all_classes"] or (),
            "max_new_tokens": int(n_most),
        }
        for i, record in enumerate(read_lines(path, FIELDS))
    ]


def _setting(path: Path, name: str) -> Any:
    if not path.is_file():
        raise ValueError(f"no longbench/{path.name} in --data")
    table = json.loads(path.read_text(encoding="utf-8"))
    if name not in table:
        raise ValueError(f"longbench/{path.name} has no {name!r}")
    return table[name]


def filled(prompt: str, record: dict[str, Any]) -> str:
    """A prompt with its {context} and {input}; other braces stay as they are."""
    return re.sub(r"\{(context|input)\}", lambda m: str(record[m[1]]), prompt)


def middle_cut(text: str, n_most: int, encode: Callable[[str], list[int]],
               decode: Callable[[list[int]], str]) -> str:  # fmt: skip
    """A text of at most about `n_most` tokens: its first and its last half of them."""
    tokens = encode(text)
    if len(tokens) <= n_most:
        return text
    half = n_most // 2
    return decode(tokens[:half]) + decode(tokens[-half:])


#
# metrics, each the best over the outputs
#


def rouge_l(text: str, outputs: Sequence[str]) -> float:
    """F of ROUGE-L, by the package rouge as LongBench uses it."""
    try:
        from rouge import Rouge
    except ImportError as error:
        raise ValueError(
            "ROUGE-L needs the package rouge: pip install 'laq-gguf[bench]'"
        ) from error
    scorer = Rouge(metrics=["rouge-l"])

    def score(output: str) -> float:
        try:
            return float(scorer.get_scores([text], [output], avg=True)["rouge-l"]["f"])
        except (ValueError, RecursionError):  # one of them has no words, or too many
            return 0.0

    return max(map(score, outputs))


def class_score(text: str, outputs: Sequence[str], classes: Sequence[str]) -> float:
    """1 / the classes named in the text if the right one is among them, else 0.

    A class whose name is a part of the right one's does not count as named.
    """

    def score(output: str) -> float:
        named = [c for c in classes if c in text and not (c in output and c != output)]
        return 1 / len(named) if output in named else 0.0

    return max(map(score, outputs))


def code_similarity(text: str, outputs: Sequence[str]) -> float:
    """Edit similarity of the first line that is neither a comment nor a fence."""
    try:
        from rapidfuzz import fuzz
    except ImportError as error:
        raise ValueError(
            "edit similarity needs the package rapidfuzz: pip install 'laq-gguf[bench]'"
        ) from error
    lines = text.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(mark in x for mark in ("`", "#", "//"))), "")
    return max(fuzz.ratio(line, output) / 100 for output in outputs)


def count_score(text: str, outputs: Sequence[str]) -> float:
    """Share of the numbers in the text that are the right one."""
    numbers = re.findall(r"\d+", text)
    return max(numbers.count(output) / len(numbers) if numbers else 0.0 for output in outputs)


def paragraph_score(text: str, outputs: Sequence[str]) -> float:
    """As count_score, where the output is "Paragraph N"."""
    return count_score(text, [re.findall(r"Paragraph (\d+)", output)[0] for output in outputs])


TASKS = {
    "narrativeqa": "squad_f1",
    "qasper": "squad_f1",
    "multifieldqa_en": "squad_f1",
    "hotpotqa": "squad_f1",
    "2wikimqa": "squad_f1",
    "musique": "squad_f1",
    "gov_report": "rouge_l",
    "qmsum": "rouge_l",
    "multi_news": "rouge_l",
    "trec": "class_score",
    "triviaqa": "squad_f1",
    "samsum": "rouge_l",
    "passage_count": "count_score",
    "passage_retrieval_en": "paragraph_score",
    "lcc": "code_similarity",
    "repobench-p": "code_similarity",
}
METRICS: dict[str, Callable[..., float]] = {
    "rouge_l": rouge_l,
    "class_score": class_score,
    "code_similarity": code_similarity,
    "count_score": count_score,
    "paragraph_score": paragraph_score,
}
