"""LongBench's prompts and metrics against examples worked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laq_gguf.bench.longbench import (
    METRICS,
    TASKS,
    class_score,
    code_similarity,
    count_score,
    filled,
    middle_cut,
    paragraph_score,
    rouge_l,
)
from laq_gguf.bench.tasks import Example, load_examples, score


def words(text: str) -> int:
    return len(text.split())


def write(folder: Path, name: str, records: list[dict], n_most: int = 7) -> None:
    folder = folder / "longbench"
    folder.mkdir(exist_ok=True)
    prompts = {"trec": "{context}\n{input}", "lcc": "Code {x}:\n{context}", "qasper": "{input}?"}
    (folder / "dataset2prompt.json").write_text(json.dumps(prompts), encoding="utf-8")
    lengths = dict.fromkeys(prompts, n_most)
    (folder / "dataset2maxlen.json").write_text(json.dumps(lengths), encoding="utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def load(name: str, data: Path, limit: int | None = None) -> list[Example]:
    return load_examples(name, data=data, length=100, limit=limit, n_needles=1, count_tokens=words)


RECORD = {
    "_id": "a1",
    "input": "Question: {who}",
    "context": "Some {context} text",
    "answers": ["City", "Town"],
    "all_classes": ["City", "Town", "Color"],
}


def test_an_example_has_its_own_prompt_length_and_classes(tmp_path: Path) -> None:
    write(tmp_path, "trec_style_1900", [RECORD, {**RECORD, "_id": "a2", "all_classes": None}])
    first, second = load("trec", tmp_path)
    assert first.message == "Some {context} text\nQuestion: {who}", "braces of a text stay"
    assert (first.id, first.max_new_tokens, first.cut) == ("a1", 7, 100)
    assert first.outputs == ("City", "Town") and first.classes == ("City", "Town", "Color")
    assert first.is_plain and first.first_line and second.classes == ()
    assert load("trec", tmp_path, limit=1) == [first]
    write(tmp_path, "qasper", [RECORD])
    (other,) = load("qasper", tmp_path)
    assert not other.is_plain and not other.first_line


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no longbench/lcc\.jsonl in --data"):
        load("lcc", tmp_path)
    write(tmp_path, "musique", [RECORD])
    with pytest.raises(ValueError, match=r"dataset2prompt\.json has no 'musique'"):
        load("musique", tmp_path)
    write(tmp_path, "lcc", [{"input": "x"}])
    with pytest.raises(ValueError, match="fields missing: all_classes, answers, context"):
        load("lcc", tmp_path)


def test_a_prompt_is_filled_once() -> None:
    record = {"context": "{input}", "input": "q"}
    assert filled("A {context} B {input} C {other}", record) == "A {input} B q C {other}"


def test_a_long_prompt_loses_its_middle() -> None:
    def encode(text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(tokens: list[int]) -> str:
        return " " + " ".join(map(str, tokens))

    text = " ".join(map(str, range(20)))
    assert middle_cut(text, 20, encode, decode) == text
    assert middle_cut(text, 7, encode, decode).split() == ["0", "1", "2", "17", "18", "19"]


def test_class_score_by_hand() -> None:
    classes = ["Other location", "location", "City", "Cit"]
    assert class_score("It is a City.", ["City"], classes) == 1.0, "Cit is a part of City"
    assert class_score("City or Other location", ["City"], classes) == pytest.approx(1 / 3)
    assert class_score("Other location", ["Other location"], classes) == 1.0
    assert class_score("a country", ["City"], classes) == 0.0
    assert class_score("a country", ["City"], []) == 0.0


def test_count_and_paragraph_scores_by_hand() -> None:
    assert count_score("There are 3 of 3, or 4", ["3"]) == pytest.approx(2 / 3)
    assert count_score("none", ["3"]) == 0.0
    assert count_score("13", ["3"]) == 0.0, "numbers, not digits"
    assert paragraph_score("Paragraph 12, not 11", ["Paragraph 12"]) == 0.5


def test_rouge_l_by_hand() -> None:
    pytest.importorskip("rouge")
    # the longest common subsequence "the cat on the mat" has 5 of 6 words on both sides
    assert rouge_l("the cat sat on the mat", ["the cat is on the mat"]) < 5 / 6 + 1e-6
    assert rouge_l("a b c d", ["a b c d"]) == pytest.approx(1.0, abs=1e-6)
    # 2 of 4 words of the text, 2 of 2 of the output: F = 2 * 1/2 * 1 / (1/2 + 1)
    assert rouge_l("a x b y", ["a b", "z"]) == pytest.approx(2 / 3, abs=1e-6)
    assert rouge_l("", ["a b"]) == 0.0


def test_code_similarity_by_hand() -> None:
    pytest.importorskip("rapidfuzz")
    # 2 * 4 equal characters of 5 + 4
    assert code_similarity("\n# a comment\n```\nabcde\nmore", ["abcd"]) == pytest.approx(8 / 9)
    assert code_similarity("x = 1\ny = 2", ["x = 1"]) == 1.0
    assert code_similarity("# only a comment", ["x"]) == 0.0


def test_an_answer_is_scored_as_its_task_says() -> None:
    trec = Example("trec", "0", "", "", ("City",), classes=("City", "Color"), first_line=True)
    assert score(trec, "\nCity\nColor") == 1.0
    qasper = Example("qasper", "0", "", "", ("the 5 points", "none"))
    # "the" does not count: 2 of 3 words and 2 of 2
    assert score(qasper, "5 points more") == pytest.approx(0.8)
    assert score(Example("perplexity", "0", "", "", ()), "") is None


def test_every_task_has_a_metric() -> None:
    assert set(TASKS.values()) <= {*METRICS, "squad_f1"}
