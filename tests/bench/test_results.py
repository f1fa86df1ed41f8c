"""Result files that are gone on with, and replies that are kept for later runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from laq_gguf.bench.answers import Reply
from laq_gguf.bench.references import References
from laq_gguf.bench.results import RUN, ResultFile


def arguments(folder: Path, **changes: object) -> argparse.Namespace:
    model = folder / "m.gguf"
    model.write_bytes(b"a model")
    settings = {"model": model, "out": folder / "r.json", "overwrite": False, "budgets": [64, 128]}
    return argparse.Namespace(**{**settings, "limit": None, **changes})


def result_file(args: argparse.Namespace) -> ResultFile:
    return ResultFile("quality", args, ("id", "budget"), ["a note"])


def test_rows_that_are_there_are_found(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    first = result_file(args)
    assert first.n_found == 0 and not args.out.exists()
    first.add({"id": "0", "budget": 64, "score": 0.5}, {"id": "0", "budget": None, "score": 1.0})
    again = result_file(args)
    assert again.n_found == 2 and again.find(id="0", budget=64)["score"] == 0.5
    assert again.find(id="0", budget=128) is None
    again.add({"id": "0", "budget": 128, "score": 0.25})
    again.note("a note")
    document = json.loads(args.out.read_text(encoding="utf-8"))
    assert [row["score"] for row in document["results"]] == [0.5, 1.0, 0.25]
    assert document["notes"] == ["a note"] and "continued" not in document


def test_other_settings_are_an_error_that_names_them(tmp_path: Path) -> None:
    result_file(arguments(tmp_path)).add({"id": "0", "budget": 64})
    with pytest.raises(ValueError, match=r"settings \(limit: None, now 3\).*--overwrite"):
        result_file(arguments(tmp_path, limit=3))
    assert result_file(arguments(tmp_path, limit=3, overwrite=True)).n_found == 0
    args = arguments(tmp_path)
    args.model.write_bytes(b"another model")
    with pytest.raises(ValueError, match=r"other model \(bytes: 7, now 13; sha256: "):
        result_file(args)
    with pytest.raises(ValueError, match=r"other kind \('quality', now 'memory'\)"):
        ResultFile("memory", arguments(tmp_path), ("id",))


def test_a_run_elsewhere_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result_file(arguments(tmp_path)).add({"id": "0", "budget": 64})
    monkeypatch.setattr("laq_gguf.bench.provenance.cpu_name", lambda: "another cpu")
    for _ in range(2):
        file = result_file(arguments(tmp_path))
        assert [run.keys() for run in file.document["continued"]] == [set(RUN)]
        assert file.document["continued"][0]["machine"]["cpu"] == "another cpu"
        file.write()


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    result_file(arguments(tmp_path, out=None)).add({"id": "0", "budget": 64})
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


REPLY = Reply([3, 1, 2], np.arange(8, dtype=np.float32).reshape(2, 4), {"ms_prefill": 1.5})


def test_a_reply_is_found_by_all_it_depends_on(tmp_path: Path) -> None:
    def references(sha256: str = "ab" * 32, library: str = "laq_gguf-1") -> References:
        return References(tmp_path / "made" / "here", sha256, library)

    references().save([[5, 6], [7]], 16, 40, REPLY, text="hm", seconds=2.0)
    reply, facts = references().load([[5, 6], [7]], 16, 40)
    assert (reply.tokens, reply.cost) == (REPLY.tokens, REPLY.cost)
    assert reply.logits.dtype == np.float32
    np.testing.assert_array_equal(reply.logits, REPLY.logits)
    assert facts == {"text": "hm", "seconds": 2.0}
    for other in (
        references(sha256="cd" * 32).load([[5, 6], [7]], 16, 40),
        references(library="llama_cpp-1").load([[5, 6], [7]], 16, 40),
        references().load([[5, 6, 7], []], 16, 40),
        references().load([[5, 6], [8]], 16, 40),
        references().load([[5, 6], [7]], 8, 40),
        references().load([[5, 6], [7]], 16, 41),
    ):
        assert other is None


def test_a_damaged_reply_is_an_error(tmp_path: Path) -> None:
    references = References(tmp_path, "ab" * 32, "laq_gguf-1")
    references.save([[5]], 16, 40, REPLY)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"npz in --references is damaged: remove it"):
        references.load([[5]], 16, 40)
