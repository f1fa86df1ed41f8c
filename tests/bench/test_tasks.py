"""Tasks: the generated needles, and examples read in RULER's form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laq_gguf.bench.metrics import METRICS
from laq_gguf.bench.needles import needle_prompts, sentences, spread_order
from laq_gguf.bench.prompts import text_prompts
from laq_gguf.bench.tasks import (
    TASKS,
    load_examples,
    long_text,
    parse_tasks,
    prompt_of_pairs,
    task_lengths,
)


def count_words(text: str) -> int:
    return len(text.split())


def test_needles_are_the_same_every_time_and_differ_from_each_other() -> None:
    prompts = needle_prompts(6, 700, count_words)
    assert prompts == needle_prompts(6, 700, count_words)
    assert len({p["input"] for p in prompts}) == 6
    assert prompts != needle_prompts(6, 700, count_words, seed=2)


def test_needles_lie_at_their_depth_and_fill_the_length() -> None:
    for prompt in needle_prompts(10, 900, count_words):
        text, needle = prompt["input"], f"{prompt['answer_prefix']} {prompt['outputs'][0]}."
        assert text.count(needle) == 1
        assert text.count(prompt["outputs"][0]) == 1
        assert 860 < count_words(text) <= 900
        assert abs(text.index(needle) / len(text) - prompt["depth"]) < 0.05
    assert [p["depth"] for p in needle_prompts(4, 900, count_words)] == [0.125, 0.375, 0.625, 0.875]


def test_needles_refuse_a_length_without_room() -> None:
    with pytest.raises(ValueError, match="raise --lengths"):
        needle_prompts(1, 20, count_words)


def test_every_task_has_a_metric() -> None:
    assert {task.metric for task in TASKS.values()} <= METRICS.keys() | {""}


def write_ruler(folder: Path, records: list[dict]) -> None:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "vt.jsonl").write_text(lines, encoding="utf-8")


def load(name: str, data: Path | None, length: int = 2048, limit: int | None = None) -> list:
    return load_examples(
        name, data=data, length=length, limit=limit, n_needles=4, count_tokens=count_words
    )


def test_ruler_examples(tmp_path: Path) -> None:
    record = {"index": 7, "input": "VAR A = 1", "answer_prefix": " they are:", "outputs": ["A", 1]}
    write_ruler(tmp_path / "ruler" / "2048", [record, record | {"index": 8}])
    first, second = load("vt", tmp_path)
    assert (first.id, second.id) == ("7", "8")
    assert (first.message, first.answer_prefix) == ("VAR A = 1", " they are:")
    assert first.outputs == ("A", "1")
    assert load("vt", tmp_path, limit=1) == [first]


def test_ruler_errors_say_what_to_change(tmp_path: Path) -> None:
    write_ruler(tmp_path / "ruler" / "4096", [{"input": "x", "outputs": ["y"]}])
    with pytest.raises(ValueError, match="pass --data"):
        load("vt", None)
    with pytest.raises(ValueError, match=r"--lengths \[4096\]"):
        load("vt", tmp_path)
    with pytest.raises(ValueError, match=r"vt\.jsonl:1: fields missing: answer_prefix"):
        load("vt", tmp_path, length=4096)
    with pytest.raises(ValueError, match="unknown task 'niah'"):
        load("niah", tmp_path)


def test_kv_retrieval_asks_for_one_value_of_a_json_object(tmp_path: Path) -> None:
    pairs = [["a1", "v1"], ["b2", "v2"], ["c3", "v3"], ["d4", "v4"]]
    folder = tmp_path / "ruler"
    folder.mkdir()
    path = folder / "kv_retrieval_75.jsonl"
    lines = [{"ordered_kv_records": pairs, "key": k, "value": v} for k, v in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    examples = load("kv_retrieval_75", tmp_path, length=1)
    assert [e.outputs for e in examples] == [("v1",), ("v2",), ("v3",), ("v4",)]
    assert [e.depth for e in examples] == [0.125, 0.375, 0.625, 0.875]
    message = examples[2].message
    assert json.loads(message[message.index("{") : message.index("}") + 1]) == dict(pairs)
    assert message.endswith('Key: "c3"\nCorresponding value:')
    assert load("kv_retrieval_75", tmp_path, limit=2) == examples[:2]


def test_kv_retrieval_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass --data"):
        load("kv_retrieval_75", None)
    with pytest.raises(ValueError, match=r"no ruler/kv_retrieval_75\.jsonl"):
        load("kv_retrieval_75", tmp_path)
    for key, value in (("z", "v1"), ("a1", "v2")):
        with pytest.raises(ValueError, match="is not among ordered_kv_records"):
            prompt_of_pairs(
                {"ordered_kv_records": [("a1", "v1"), ("b2", "v2")], "key": key, "value": value}
            )


def test_kv_retrieval_of_a_length_has_as_many_pairs_as_fit(tmp_path: Path) -> None:
    folder = tmp_path / "ruler"
    folder.mkdir()
    records = [
        {
            "ordered_kv_records": [[f"key{i}{j}", f"value{i}{j}"] for j in range(4)],
            "key": f"key{i}{i}",
            "value": f"value{i}{i}",
        }
        for i in range(4)
    ]
    path = folder / "kv_retrieval_75.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    # 17 words around the pairs, and two for each
    assert count_words(str(prompt_of_pairs(records[0])["input"])) == 17 + 4 * 2

    for n in (2, 3, 9, 15):
        examples = load("kv_retrieval", tmp_path, length=96 + 17 + 2 * n + 1)
        for i, example in enumerate(examples):
            text = example.message
            pairs = json.loads(text[text.index("{") : text.index("}") + 1])
            assert len(pairs) == n
            assert pairs[f"key{i}{i}"] == example.outputs[0] == f"value{i}{i}"
            at = list(pairs).index(f"key{i}{i}")
            assert abs((at + 0.5) / n - (i + 0.5) / 4) <= 0.5 / n + 1e-4
            assert example.length == 96 + 17 + 2 * n + 1
        assert len({example.message for example in examples}) == 4

    with pytest.raises(ValueError, match="two pairs need more than 20 tokens: raise --lengths"):
        load("kv_retrieval", tmp_path, length=96 + 20)
    with pytest.raises(ValueError, match="has no 49 tokens: lower --lengths"):
        load("kv_retrieval", tmp_path, length=96 + 49)


def test_tasks_may_have_lengths_of_their_own() -> None:
    assert parse_tasks("vt,needles:4096,vt") == ["vt", "needles:4096"]
    assert task_lengths("vt", [512, 1024]) == ("vt", [512, 1024])
    assert task_lengths("needles:4096", [512]) == ("needles", [4096])
    assert task_lengths("kv_retrieval_75", [512, 1024]) == ("kv_retrieval_75", [0])
    for wrong in ("vt:", "vt:x", "vt:0", "kv_retrieval_75:512"):
        with pytest.raises(ValueError, match="no task with a length"):
            parse_tasks(wrong)
    with pytest.raises(ValueError, match="unknown task 'vx'"):
        parse_tasks("vt,vx")


def test_the_first_needles_are_spread_over_the_depths() -> None:
    for n in range(1, 20):
        assert sorted(spread_order(n)) == list(range(n))
    assert spread_order(8)[:4] == [4, 0, 6, 2]
    examples = load("needles", None, length=1000)
    assert [e.depth for e in examples] == [0.625, 0.125, 0.875, 0.375]
    assert [e.id for e in examples] == ["2", "0", "3", "1"]


def test_needles_in_a_text_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"This is sentence\nnumber {i}. " for i in range(400)))
    assert sentences(path.read_text())[:2] == [
        "This is sentence number 0.", "This is sentence number 1."
    ]  # fmt: skip

    def needles(length: int) -> list:
        return load_examples(
            "needles", data=None, length=length, limit=None, n_needles=3,
            count_tokens=count_words, text=path,
        )  # fmt: skip

    examples = needles(700)
    begins = {example.message.split("number ")[1].split(".")[0] for example in examples}
    assert len(begins) == 3, "each prompt begins elsewhere"
    for example in examples:
        assert 590 < count_words(example.message) <= 604
        assert example.message.count(f"{example.answer_prefix} {example.outputs[0]}.") == 1
    with pytest.raises(ValueError, match="--text has no 2904 tokens"):
        needles(3000)
    with pytest.raises(ValueError, match="no text at"):
        load_examples(
            "needles", data=None, length=700, limit=None, n_needles=3,
            count_tokens=count_words, text=tmp_path / "none.txt",
        )  # fmt: skip


class Letters:
    """A tokenizer that knows letters; 0 begins a text."""

    def tokenize(self, text: str, *, add_bos: bool = False) -> list[int]:
        return [*([0] if add_bos else []), *map(ord, text)]


def test_pieces_of_a_text_are_spread_and_go_on(tmp_path: Path) -> None:
    text = "".join(chr(33 + i) for i in range(50))
    first, second, third = text_prompts(Letters(), text, 10, 4, 3)
    assert first.tokens == [0, *map(ord, text[:10])]
    assert first.path == tuple(map(ord, text[10:14]))
    assert second.tokens[1] == ord(text[18]) and third.path[-1] == ord(text[-1])
    assert len({p.digest for p in (first, second, third)}) == 3
    assert len(text_prompts(Letters(), text, 20, 4, 9)) == 2, "as many as do not overlap"
    with pytest.raises(ValueError, match="the text has 50 tokens, 51 are needed"):
        text_prompts(Letters(), text, 47, 4, 1)
    folder = tmp_path / "text"
    folder.mkdir()
    with pytest.raises(ValueError, match="pass --text FILE"):
        long_text(tmp_path, None)
    (folder / "a.raw").write_text("from the data")
    (tmp_path / "b.txt").write_text("of the user")
    assert long_text(tmp_path, None) == "from the data"
    assert long_text(tmp_path, tmp_path / "b.txt") == "of the user"
