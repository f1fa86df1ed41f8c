"""Fetch: public data by name, into the folder that --data names, where there is network.

Examples are written as the other benchmarks read them; a file that is there already stays.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import random
import sys
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from laq_gguf.bench import longbench
from laq_gguf.bench.multiturn import FILE as MULTITURN
from laq_gguf.bench.options import integers, names
from laq_gguf.bench.provenance import write_whole
from laq_gguf.bench.tasks import TASKS

# LongBench keeps the prompts and lengths of its tasks beside its code
LONGBENCH_TABLES = (
    "https://raw.githubusercontent.com/THUDM/LongBench/"
    "f6227eb7a25cacbd96310aea2c59af003f8d8925/config/"
)
LONGBENCH_DATA = "https://huggingface.co/datasets/THUDM/LongBench/resolve/main/data.zip"
RULER_TASKS = [name for name, task in TASKS.items() if task.source == "ruler"]

N_PAIRS = 75  # as Lost in the Middle (arXiv 2307.03172) has them
# a text of about 3,000 tokens, with questions to all of its parts
N_CHARACTERS, N_TURNS = 12_500, 6

Rows = Iterable[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench fetch`."""
    parser.add_argument("--data", type=Path, required=True, help="the folder")
    parser.add_argument(
        "--names", type=names(SETS), default=list(SETS), help=f"of {', '.join(SETS)}"
    )
    parser.add_argument("--lengths", type=integers, default=[4096, 8192],
                        help="of RULER's prompts: 4096, 8192 or 16384")  # fmt: skip
    parser.add_argument("--limit", type=int, default=40, help="examples of a task, at most")


def run(args: argparse.Namespace) -> list[Path]:
    """Write what is missing in `args.data`; return the files written.

    Raises:
        ValueError: a set that cannot be fetched, or the package datasets is not there.
    """
    if args.limit < 1:
        raise ValueError(f"--limit is at least 1, got {args.limit}")
    written = []
    for name in args.names:
        for path, text in SETS[name](args):
            path.parent.mkdir(parents=True, exist_ok=True)
            # what is there is never fetched again: it has to be whole
            write_whole(path, text)
            written.append(path)
            print(path.relative_to(args.data).as_posix(), file=sys.stderr)
    return written


def missing(args: argparse.Namespace, *parts: str) -> Path | None:
    """The path of a file that is to be written; None where there is one."""
    path = args.data.joinpath(*parts)
    return None if path.exists() else path


def lines(records: Rows) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


#
# sources
#


def load(repository: str, *config: str, split: str, **options: str) -> Rows:
    """The rows of a data set of the Hugging Face Hub.

    Raises:
        ValueError: the package datasets is not there, or the Hub or the set cannot be reached.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("fetching needs datasets: pip install 'laq-gguf[data]'") from error
    try:
        return datasets.load_dataset(repository, *config, split=split, **options)
    except Exception as error:  # datasets lets through what its many parts raise
        raise ValueError(f"{repository} cannot be fetched from the Hub: {error}") from error


def download(url: str) -> bytes:
    """What is at an address.

    Raises:
        ValueError: it cannot be reached.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return bytes(answer.read())
    except (urllib.error.URLError, TimeoutError) as error:
        raise ValueError(f"{url} cannot be fetched: {error}") from error


#
# sets: each yields the files that are missing, and their texts
#


def ruler(args: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """RULER (arXiv 2404.06654) as the authors of kvpress made it, with Llama 3.1's tokenizer."""
    for length in args.lengths:
        paths = {task: missing(args, "ruler", str(length), f"{task}.jsonl") for task in RULER_TASKS}
        if not any(paths.values()):
            continue
        records: dict[str, list[dict[str, Any]]] = {task: [] for task in RULER_TASKS}
        for row in load("simonjegou/ruler", split="test", data_dir=str(length)):
            of_task = records.get(row["task"])
            if of_task is not None and len(of_task) < args.limit:
                of_task.append({"index": len(of_task), **ruler_record(row)})
        for task, path in paths.items():
            if path and records[task]:
                yield path, lines(records[task])


def ruler_record(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the set, in which context and question are one text cut in two."""
    outputs = row["answer"]
    if isinstance(outputs, str):
        outputs = ast.literal_eval(outputs)
    return {
        "input": f"{row['context'].rstrip()}\n{row['question'].strip()}",
        "answer_prefix": row["answer_prefix"],
        "outputs": [str(output) for output in outputs],
    }


def long_bench(args: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """LongBench (arXiv 2308.14508): its English tasks, with its own prompts and lengths."""
    for name in ("dataset2prompt.json", "dataset2maxlen.json"):
        if path := missing(args, "longbench", name):
            yield path, download(LONGBENCH_TABLES + name).decode("utf-8")
    paths = {name: missing(args, "longbench", f"{name}.jsonl") for name in longbench.TASKS}
    if not any(paths.values()):
        return
    try:
        archive = zipfile.ZipFile(io.BytesIO(download(LONGBENCH_DATA)))
        for name, path in paths.items():
            if path:
                records = archive.read(f"data/{name}.jsonl").decode("utf-8").split("\n")
                yield path, "".join(record + "\n" for record in records[: args.limit] if record)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{LONGBENCH_DATA} is not what it was: {error}") from error


def kv_retrieval(args: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """Key-value retrieval: pairs of UUIDs, of which one is asked for; made here."""
    if path := missing(args, "ruler", "kv_retrieval_75.jsonl"):
        generator = random.Random(0)
        yield path, lines(pairs_record(generator) for _ in range(args.limit))


def pairs_record(generator: random.Random) -> dict[str, Any]:
    """Pairs of UUIDs, and one of them."""

    def word() -> str:
        return str(uuid.UUID(int=generator.getrandbits(128), version=4))

    pairs = [[word(), word()] for _ in range(N_PAIRS)]
    key, value = generator.choice(pairs)
    return {"ordered_kv_records": pairs, "key": key, "value": value}


def multiturn(args: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """SQuAD's articles (arXiv 1606.05250) with questions about all parts of each."""
    if path := missing(args, *MULTITURN.parts):
        rows = load("rajpurkar/squad", split="validation")
        yield path, lines(conversations(rows)[: args.limit])


def conversations(rows: Rows) -> list[dict[str, Any]]:
    """The first N_CHARACTERS of each article, with N_TURNS questions spread over its paragraphs.

    Args:
        rows: questions, those of an article and of a paragraph together.
    """
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(row)
    records = []
    for title, paragraphs in articles.items():
        chosen, n = [], 0
        for paragraph in paragraphs:
            if n + len(paragraph) > N_CHARACTERS:
                break
            chosen.append(paragraph)
            n += len(paragraph) + 2
        if len(chosen) < N_TURNS:
            continue
        asked = [paragraphs[chosen[i * len(chosen) // N_TURNS]][0] for i in range(N_TURNS)]
        turns = [
            {"question": row["question"], "answers": list(dict.fromkeys(row["answers"]["text"]))}
            for row in asked
        ]
        records.append({"title": title, "context": "\n\n".join(chosen), "turns": turns})
    return records


def wikitext(args: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """WikiText-2 (arXiv 1609.07843), its test part as one text."""
    if path := missing(args, "text", "wiki.test.raw"):
        rows = load("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        yield path, "".join(row["text"] for row in rows)


SETS: dict[str, Callable[[argparse.Namespace], Iterator[tuple[Path, str]]]] = {
    "ruler": ruler,
    "longbench": long_bench,
    "kv_retrieval": kv_retrieval,
    "multiturn": multiturn,
    "text": wikitext,
}
