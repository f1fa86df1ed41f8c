"""Each benchmark command runs on two samples, and its result has the declared fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laq_gguf.bench.provenance import SCHEMA
from laq_gguf.bench.speed import N_WARM_UP

HEAD = {"schema", "kind", "command", "settings", "date", "commit", "model", "versions", "machine"}
RESULT = {
    "task", "id", "depth", "method", "budget", "n_prompt", "n_lead", "outputs", "text", "score",
    "top1_agreement", "kl", "kl_max", "n_compared", "seconds",
}  # fmt: skip
STATS = {"n_resident", "n_cells", "kv_bytes", "kv_bytes_full", "n_evictions"}
# several threads that wait for each other stall where other processes run
ONE_THREAD = ("--threads", 1)
pytestmark = pytest.mark.model


@pytest.mark.parametrize("lookahead", ["pseudo", "deferred"])
def test_quality(bench, model: Path, tmp_path: Path, lookahead: str) -> None:
    out = tmp_path / "quality.json"
    done = bench(
        "quality", "--model", model, "--length", 400, "--n-needles", 2, "--budgets", 48,
        "--methods", "full,laq++", "--lookahead", lookahead, "--out", out,
        *ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document.keys() >= HEAD and document["schema"] == SCHEMA
    assert any(lookahead in note for note in document["notes"])
    results = document["results"]
    assert [r["method"] for r in results] == ["full"] * 2 + ["laq++"] * 2
    for result in results:
        assert result.keys() >= RESULT
        assert 0 < result["n_compared"] <= 16
        assert (result["n_lead"] > 0) == (lookahead == "deferred")
        assert (result.keys() >= STATS) == (result["method"] != "full")
    for full in results[:2]:
        assert (full["kl"], full["top1_agreement"]) == (0.0, 1.0)
    assert all(r["n_evictions"] == 1 for r in results[2:])
    assert all(r["n_resident"] < r["n_prompt"] / 2 and r["kl"] > 0 for r in results[2:])
    rendered = bench("report", out)
    assert rendered.returncode == 0 and done.stdout.strip() in rendered.stdout


def test_quality_without_eviction(bench, model: Path, tmp_path: Path) -> None:
    """llama_cpp.Llama itself answers the same questions, with the full cache."""
    out = tmp_path / "quality.json"
    done = bench(
        "quality", "--library", "llama_cpp", "--methods", "full", "--model", model,
        "--length", 400, "--n-needles", 2, "--out", out, *ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert [r["score"] for r in results] == [1.0, 1.0]


def test_speed(bench, model: Path, plain_lib: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "speed.json", tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a long text. " for i in range(200)), encoding="utf-8")
    done = bench(
        "speed", "--model", model, "--plain-lib", plain_lib, "--text", text, "--n-ctx-tokens", 300,
        "--n-short-tokens", 64, "--budget", 64, "--kv-staging", 128, "--repeat", 2,
        "--n-decode", 4, "--out", out,
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
        assert [len(steps) - N_WARM_UP for steps in c["ms_steps"]] == [4, 4]
        assert len(c["decode_tokens_per_s"]) == 2
    for name in ("first_token_s", "first_token_paired_s"):
        assert len(ours[name]) == len(stock[0][name]) == 2
    assert len(ours["evictions"]) == 2 and ours["kv_bytes"] < ours["stats"]["kv_bytes_full"]
    assert [len(bar["values"]) for bar in document["bars"]] == [2] * 6
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
        (("quality", "--model", tmp_path / "none.gguf"), "no model at"),
        (("quality", "--model", model, "--tasks", "vt"), "pass --data"),
        (("quality", "--model", model, "--library", "llama_cpp"), "pass --methods full"),
        (("speed", "--model", model, "--plain-lib", tmp_path / "none"), "pass --plain-lib"),
        (("report", model.parent / "none.json"), "no result file"),
    ):
        done = bench(*arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr and "Traceback" not in done.stderr
