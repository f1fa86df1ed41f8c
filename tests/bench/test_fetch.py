"""Fetching public data: what the Hub gives becomes what the other benchmarks read.

The Hub is played by a module and an archive of the same form; no network is used.
"""

from __future__ import annotations

import io
import json
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from laq_gguf.bench import commands, fetch, longbench
from laq_gguf.bench.multiturn import FILE
from laq_gguf.bench.tasks import load_examples, long_text, read_lines


def ruler_rows() -> list[dict[str, Any]]:
    row = {"context": "Some text. ", "question": "\nWhat?", "answer_prefix": " It is"}
    rows = [{**row, "task": task, "answer": ["1", "2"]} for task in fetch.RULER_TASKS * 3]
    # some sets have lists as text
    return [
        *rows,
        {**row, "task": "vt", "answer": "['A', 'B']"},
        {**row, "task": "new", "answer": []},
    ]


def squad_rows() -> list[dict[str, Any]]:
    return [
        {
            "title": title,
            "context": f"{title} {part} " + "x" * (fetch.N_CHARACTERS // 8),
            "question": f"{title} {part} {i}?",
            "answers": {"text": ["yes", "yes", "no"]},
        }
        for title in ("A", "B")
        for part in range(20 if title == "A" else 3)
        for i in range(2)
    ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The Hub and GitHub; what has been asked of them."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, *config: str, split: str, **options: str) -> list[dict[str, Any]]:
        asked.append((name, *config, split, options))
        if name == "simonjegou/ruler":
            return ruler_rows()
        if name == "rajpurkar/squad":
            return squad_rows()
        assert (name, config) == ("Salesforce/wikitext", ("wikitext-2-raw-v1",))
        return [{"text": ""}, {"text": " = A = \n"}, {"text": " Words . \n"}]

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        asked.append((url,))
        if url == fetch.LONGBENCH_DATA:
            return io.BytesIO(archive())
        is_prompt = url.endswith("dataset2prompt.json")
        table = {task: "{context}|{input}" if is_prompt else 9 for task in longbench.TASKS}
        return io.BytesIO(json.dumps(table).encode())

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def archive() -> bytes:
    record = {"input": "q", "context": "c\u2028d", "answers": ["a"], "all_classes": None}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for task in longbench.TASKS:
            z.writestr(f"data/{task}.jsonl", 3 * (json.dumps(record, ensure_ascii=False) + "\n"))
    return file.getvalue()


def bench_fetch(data: Path, *options: str) -> int:
    return commands.main(["fetch", "--data", str(data), *options])


def examples(name: str, data: Path, length: int = 4096) -> list[Any]:
    return load_examples(name, data=data, length=length, limit=None, n_needles=1, count_tokens=len)


@pytest.mark.usefixtures("hub")
def test_everything_is_read_by_the_other_benchmarks(tmp_path: Path) -> None:
    assert bench_fetch(tmp_path, "--limit", "2") == 0

    for task in fetch.RULER_TASKS:
        for length in (4096, 8192):
            found = examples(task, tmp_path, length)
            assert [e.message for e in found] == ["Some text.\nWhat?"] * 2
            assert found[0].outputs == ("1", "2") and found[0].answer_prefix == " It is"
    for task in longbench.TASKS:
        found = examples(task, tmp_path)
        assert [e.message for e in found] == ["c\u2028d|q"] * 2
        assert found[0].max_new_tokens == 9
    pairs = examples("kv_retrieval_75", tmp_path)
    assert len({e.outputs for e in pairs}) == 2
    assert all(e.message.count(e.outputs[0]) == 1 for e in pairs)
    assert long_text(tmp_path, None) == " = A = \n Words . \n"
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.usefixtures("hub")
def test_a_conversation_asks_about_all_parts_of_its_text(tmp_path: Path) -> None:
    assert bench_fetch(tmp_path, "--names", "multiturn") == 0
    (record,) = read_lines(tmp_path / FILE, {"title", "context", "turns"})  # B is too short
    assert record["title"] == "A"
    assert len(record["turns"]) == fetch.N_TURNS
    parts = [int(turn["question"].split()[1]) for turn in record["turns"]]
    assert parts == sorted(set(parts)) and all(f"A {part} x" in record["context"] for part in parts)
    assert len(record["context"]) <= fetch.N_CHARACTERS
    assert record["turns"][0]["answers"] == ["yes", "no"]


def test_what_is_there_is_neither_fetched_nor_changed(
    tmp_path: Path, hub: list[tuple[Any, ...]]
) -> None:
    assert bench_fetch(tmp_path) == 0
    vt = tmp_path / "ruler" / "4096" / "vt.jsonl"
    vt.write_text("mine")
    hub.clear()
    assert bench_fetch(tmp_path) == 0
    assert hub == []
    (tmp_path / "ruler" / "4096" / "cwe.jsonl").unlink()
    assert bench_fetch(tmp_path, "--names", "ruler") == 0
    assert hub == [("simonjegou/ruler", "test", {"data_dir": "4096"})]
    assert vt.read_text() == "mine"


def test_lists_that_are_text() -> None:
    row = {"context": "c", "question": "q", "answer_prefix": "", "answer": "['A', 'B']"}
    assert fetch.ruler_record(row)["outputs"] == ["A", "B"]


def test_no_network_and_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert bench_fetch(tmp_path, "--names", "ruler") == commands.EXIT_WRONG_INPUT
    assert "pip install 'laq-gguf[data]'" in capsys.readouterr().err

    def fail(*args: Any, **options: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    monkeypatch.setattr(urllib.request, "urlopen", fail)
    for name in ("ruler", "longbench", "multiturn", "text"):
        assert bench_fetch(tmp_path, "--names", name) == commands.EXIT_WRONG_INPUT
        assert "cannot be fetched" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_archive_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch, "download", lambda url: b"{}")
    assert bench_fetch(tmp_path, "--names", "longbench") == commands.EXIT_WRONG_INPUT
    assert "is not what it was" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--limit", "0"), ("--names", "mnist")])
def test_wrong_options(tmp_path: Path, options: tuple[str, str]) -> None:
    try:
        code = bench_fetch(tmp_path, *options)
    except SystemExit as stop:
        code = int(str(stop.code))
    assert code == commands.EXIT_WRONG_INPUT
