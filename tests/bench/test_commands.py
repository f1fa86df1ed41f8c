"""Each benchmark command runs on two samples, and its result has the declared fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laq_gguf.bench.needles import essay
from laq_gguf.bench.speed import N_WARM_UP

HEAD = {"schema", "kind", "command", "settings", "date", "commit", "model", "versions", "machine"}
# several threads that wait for each other stall where other processes run
ONE_THREAD = ("--threads", 1)
pytestmark = pytest.mark.model


def write_multiturn(folder: Path) -> None:
    (folder / "multiturn").mkdir()
    turns = [
        {"question": "What is the secret number?", "answers": ["4821"]},
        {"question": "Say it once more.", "answers": ["4821", "the number"]},
        {"question": "What is the text about?", "answers": ["nothing"]},
    ]
    records = [
        {"title": f"T{i}", "context": f"{essay(8, i)} The number is 4821. {essay(12, i + 9)}",
         "turns": turns}
        for i in (1, 2)
    ]  # fmt: skip
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "multiturn" / "squad_multiturn.jsonl").write_text(lines, encoding="utf-8")


def test_multiturn(bench, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "multiturn.json"
    write_multiturn(tmp_path)
    command = (
        "multiturn", "--model", model, "--data", tmp_path, "--max-new-tokens", 12, "--out", out,
        "--references", tmp_path / "references", *ONE_THREAD,
        "--methods", "full,laq++-deferred,laq++-pseudo,laq++-recall,laq++-from-full,snapkv",
    )  # fmt: skip
    done = bench(*command)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document.keys() >= HEAD
    results = document["results"]
    assert len(results) == 2 * 6 * 3
    for row in results:
        assert 0 <= row["em"] <= row["f1"] <= 1 and 0 < row["n_compared"] <= 12
        assert (row["turn"] == 1) == (row["n_new"] > row["n_context"])
        if row["method"] == "full":
            assert (row["kl"], row["top1_agreement"], row["budget"]) == (0.0, 1.0, None)
            continue
        assert row["budget"] == row["n_context"] // 4
        if row["method"] == "laq++-from-full":
            assert row["n_evictions"] == 1 and row["n_resident"] < row["budget"] + 12
            continue
        assert row["n_again"] == row["n_reread"] and row["n_evictions"] >= 1
        n_ahead = row["n_pseudo"] + row["n_reread"]
        assert row["n_decoded"] == row["n_new"] + row["n_compared"] - 1 + n_ahead
        assert (row["n_recalls"] > 0) <= (row["method"] == "laq++-recall" and row["turn"] > 1)
        assert row["n_resident"] < row["budget"] + 12
        if row["method"] == "laq++-deferred" and row["turn"] == 1:
            assert row["kl"] < 1e-3 or row["n_compared"] > 8, "as long as nothing is evicted"
    rendered = bench("report", out)
    assert rendered.returncode == 0 and done.stdout.strip() in rendered.stdout

    # all rows of the second text, and of one method of the first, are missing
    kept = [r for r in results if r["index"] == 0 and r["method"] != "snapkv"]
    out.write_text(json.dumps({**document, "results": kept}), encoding="utf-8")
    again = bench(*command)
    assert again.returncode == 0, again.stderr
    resumed = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert resumed[: len(kept)] == kept

    def values(rows: list[dict]) -> dict:
        key = ("index", "method", "turn")
        return {tuple(r[k] for k in key): (r["kl"], r["text"]) for r in rows[6:]}

    evicting = [r for r in results if r["method"] != "full"]
    assert values(evicting) == values([r for r in resumed if r["method"] != "full"])


def test_multiturn_in_few_cells(bench, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "multiturn.json"
    write_multiturn(tmp_path)
    done = bench(
        "multiturn", "--model", model, "--data", tmp_path, "--max-new-tokens", 12, "--out", out,
        "--limit", 1, "--turns", 2, "--methods", "laq++-pseudo", "--kv-staging", 100,
        *ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [(r["method"], r["turn"]) for r in results] == [
        ("full", 1), ("full", 2), ("laq++-pseudo", 1), ("laq++-pseudo", 2)
    ]  # fmt: skip
    first = results[2]
    assert first["n_cells"] == 256 < first["n_new"] and first["n_probe"] > 0
    assert first["n_again"] == 0


def test_chat(bench, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "chat.json"
    done = bench(
        "chat", "--model", model, "--turns", 5, "--max-tokens", 12, "--budget", 128,
        "--kv-staging", 100, "--out", out, *ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document.keys() >= HEAD
    turns = document["results"]
    assert [(t["chat"], t["turn"]) for t in turns] == [(1, i + 1) for i in range(5)]
    for turn in turns:
        assert 0 < turn["n_reply"] <= 12 and turn["n_resident_max"] <= turn["n_cells"] == 256
        assert turn["n_looks"] >= turn["n_steps"] + 2
        assert turn["system_kept"] and turn["n_system"] > 30
    assert turns[-1]["n_prompt"] > 150 and turns[-1]["n_evictions"] > 0
    rendered = bench("report", out)
    assert rendered.returncode == 0 and done.stdout.strip() in rendered.stdout


def test_chats_until_enough_is_generated(bench, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "chat.json"
    done = bench(
        "chat", "--model", model, "--tokens", 60, "--max-tokens", 12, "--budget", 96,
        "--n-ctx", 256, "--out", out, *ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    turns = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert sum(t["n_reply"] for t in turns) == 60
    assert max(t["n_tokens"] for t in turns) <= 256


def test_memory(bench, model: Path, plain_lib: Path, tmp_path: Path) -> None:
    out = tmp_path / "memory.json"
    done = bench(
        "memory", "--model", model, "--plain-lib", plain_lib, "--n-ctx", "512,4096",
        "--budget", 128, "--kv-staging", 128, "--types", "q8_0", "--n-decode", 8, "--out", out,
        *ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document.keys() >= HEAD
    small, large, stock = document["results"]
    assert [r["library"] for r in document["results"]] == ["laq_gguf", "laq_gguf", "llama_cpp"]
    assert small["kv_bytes"] == large["kv_bytes"] and small["compute_bytes"] > 0
    assert abs(stock["kv_bytes"] - small["kv_bytes"]) < 0.01 * 2**20, "logged in hundredths"
    assert small["n_prompt"] == 384 > small["n_cells"] == stock["n_cells"] == 256
    assert stock["n_prompt"] + stock["n_decode"] == 256
    for row in document["results"]:
        assert row["peak_bytes"] >= row["peak_loaded_bytes"] > row["kv_bytes"]
    assert bench("report", out).returncode == 0


def test_speed(bench, model: Path, plain_lib: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "speed.json", tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a long text. " for i in range(200)), encoding="utf-8")
    done = bench(
        "speed", "--model", model, "--plain-lib", plain_lib, "--text", text, "--n-ctx-tokens", 300,
        "--n-short-tokens", 64, "--budget", 64, "--kv-staging", 128, "--repeat", 2,
        "--n-decode", 4, "--segments", 2, "--out", out,
        *ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document.keys() >= HEAD
    ours, ours_off, *stock = document["configurations"]
    assert ours["system"]["patched"] and ours_off["system"]["patched"]
    assert not any(c["system"]["patched"] for c in stock)
    assert [c["n_prompt"] for c in document["configurations"]] == [300, 300, 300, 300, 64, 64]
    for c in document["configurations"]:
        assert [len(steps) - N_WARM_UP for steps in c["ms_steps"]] == [2] * 4
        assert len(c["decode_tokens_per_s"]) == 4
    for name in ("first_token_s", "first_token_paired_s"):
        assert len(ours[name]) == len(stock[0][name]) == 2
    assert len(ours["evictions"]) == 2 and ours["kv_bytes"] < ours["stats"]["kv_bytes_full"]
    assert [len(bar["values"]) for bar in document["bars"]] == [4, 4, 4, 4, 2, 2]
    assert bench("report", out).returncode == 0


def test_speed_of_the_first_token_alone(
    bench, model: Path, plain_lib: Path, tmp_path: Path
) -> None:
    out, text = tmp_path / "speed.json", tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a long text. " for i in range(100)), encoding="utf-8")
    done = bench(
        "speed", "--model", model, "--plain-lib", plain_lib, "--text", text, "--n-ctx-tokens", 200,
        "--n-short-tokens", 64, "--budget", 64, "--kv-staging", 128, "--repeat", 3,
        "--first-token-only", "--out", out,
        *ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert [len(c["first_token_paired_s"]) for c in document["configurations"]] == [3, 3]
    assert [len(bar["values"]) for bar in document["bars"]] == [3]
    assert bench("report", out).returncode == 0


def test_errors_are_one_line_and_status_2(bench, model: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("speed", "--model", model, "--plain-lib", tmp_path / "none"), "pass --plain-lib"),
        (("memory", "--model", model, "--plain-lib", tmp_path / "none"), "pass --plain-lib"),
        (("memory", "--model", model, "--plain-lib", tmp_path, "--n-ctx", 1024), "at least 1600"),
        (("multiturn", "--model", model, "--data", tmp_path), "no multiturn/squad_multiturn.jsonl"),
        (("chat", "--model", model, "--turns", 0), "at least 1"),
        (("speed", "--model", model, "--n-decode", 3), "--segments is from 1 to --n-decode"),
        (("report", model.parent / "none.json"), "no result file"),
    ):
        done = bench(*arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr and "Traceback" not in done.stderr
