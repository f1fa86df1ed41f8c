"""What an eviction costs on a device: the command, its bars, and scripts/gpu_check.py's reading."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from laq_gguf.bench import device, report, tables
from laq_gguf.bench.answers import COUNTERS

ROOT = Path(__file__).resolve().parents[2]


def rounds(*ms_steps: float, full: float = 10.0, wall: float = 15.0) -> list[dict]:
    evicted = {"reported": 12.0, "wall": wall}
    own = {"first_token_s": 1.5, "ms_full_steps": [full, full], "eviction": evicted}
    return [{"ms_step": ms, **own} for ms in ms_steps]


def results() -> dict[str, dict]:
    return {
        "short": {"rounds": rounds(4.0, 4.0), "device_bytes": 100},
        "whole": {"rounds": rounds(4.0, 4.0), "device_bytes": 900},
        "capped 64": {"rounds": rounds(4.0, 5.0), "device_bytes": 110},
    }


def test_bars() -> None:
    evicted, speed, memory = device.bars(results(), [64])
    # the slower of what was counted and what was seen from outside, in steps of the full cache
    assert evicted["values"] == [1.5, 1.5] and evicted["passed"]
    assert speed["values"] == [1.0, 0.8] and speed["median"] == pytest.approx(0.9)
    assert not speed["passed"], "0.9 is below 0.95"
    assert memory["values"] == [1.1] and not memory["passed"]


def test_a_recall_is_told_in_steps_and_in_bytes() -> None:
    counts = {**dict.fromkeys(COUNTERS, 0.0), "n_recalls": 1, "n_recalled": 5}
    before = {**counts, "kv_bytes": 60, "ring_bytes": 20, "compute_bytes": 20}
    spent = {"ms_recall": 20.0, "ms_reread": 10.0, "ms_lookahead": 15.0, "ms_fit": 5.0}
    after = {**before, **spent, "n_recalls": 3, "n_recalled": 9}
    found = device.recall_of({"ms": 60.0, "before": before, "after": after})
    assert (found["ms"], found["ms_message"], found["n_recalled"]) == (50.0, 60.0, 4)
    grown = {**found, "device_bytes_after": 101}
    again = {"rounds": [{"recall": r, "first_token_s": 4.5} for r in (found, grown)]}
    lines = device.bars({**results(), "recall 64": again}, [64])
    own, one, steps, seconds, added, first_token = lines[-6:]
    assert own["values"] == [2.0, 2.0] and own["passed"]
    assert one["values"] == [0.01, 0.01] and one["passed"], "two took 20 ms"
    assert steps["values"] == [5.0, 5.0] and steps["passed"]
    assert seconds["values"] == [0.05, 0.05] and seconds["passed"]
    assert added["values"] == [0, 1] and not added["passed"]
    assert first_token["values"] == pytest.approx([3.0, 3.0]) and not first_token["passed"]


def gpu_check() -> dict:
    return runpy.run_path(str(ROOT / "scripts" / "gpu_check.py"))


PERF = (
    "  CPY(type_src=f32,type_dst=f32,ne_src=[67108864,1,1,1]):    "
    "100 runs -  2000.00 us/run -   524288 kB/run - \033[1;34m 250.00 GB/s\033[0m\n"
    "  LAQ_SCORE(type_k=q8_0,hs=128,n_head_kv=8,group=4,n_q=16,kv=32768):    "
    "  50 runs -  500.00 us/run -   3.00 GFLOP/run - \033[1;34m  6.00 TFLOPS\033[0m\n"
)


def test_a_score_is_told_in_reads_of_k() -> None:
    check = gpu_check()
    copy, score = check["PERF_LINE"].findall(PERF)
    assert (copy[0], copy[2], copy[3]) == ("CPY", "2000.00", "250.00")
    row = check["_perf_row"](score[1], float(score[2]), 100.0)
    # 32,768 x 8 heads x 4 blocks of 34 bytes; 500 us at 100 GB/s are 50 MB
    assert row["k_bytes"] == 32768 * 8 * 4 * 34
    assert row["reads_of_k"] == pytest.approx(50e6 / row["k_bytes"])
    assert check["_perf_row"](score[1], 1.0, None)["reads_of_k"] is None


def test_the_table_names_the_device_and_what_passed() -> None:
    row = gpu_check()["_perf_row"]("type_k=f16,hs=128,n_head_kv=8,n_q=16,kv=32768", 90.0, 1000.0)
    document = {
        "bars": device.bars(results(), [64]),
        "device": {"name": "X0", "description": "a card"},
        "checks": {
            "ops": {"passed": 7, "run": 8, "not_supported": 2},
            "parity": {"tests": 10, "failures": 1, "errors": 0, "skipped": 3},
            "perf": {"cases": [row]},
        },
    }
    text = tables.device_table(document)
    for part in ("X0: a card.", "7 of 8 pass, 2 have", "6 of 7 pass", "90 us, 1.34 times", "FAIL"):
        assert part in text, text


@pytest.mark.model
def test_command(bench, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "device.json"
    done = bench(
        "device", "--model", model, "--n-prompts", "640,700", "--budget", 160,
        "--kv-staging", 352, "--n-decode", 4, "--repeat", 1, "--threads", 1, "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    found = document["results"]
    assert list(found) == ["short", "whole", "capped 640", "capped 700", "recall 640"]
    assert found["short"]["stats"] is None
    assert found["whole"]["stats"]["n_evictions"] == 1
    for name in ("capped 640", "capped 700"):
        assert found[name]["stats"]["n_cells"] == 512
        assert found[name]["stats"]["devices"] == ["CPU"]
    again = found["recall 640"]["rounds"][0]["recall"]
    assert again["n_recalls"] == 1 and again["n_recalled"] > 0 and again["n_reread"] > 0
    assert again["device_bytes_before"] == again["device_bytes_after"] > 0
    assert found["recall 640"]["stats"]["n_attended"] > 0
    assert len(document["bars"]) == 11
    assert "| bar |" in report.render(out)


@pytest.mark.model
def test_wrong_options_are_refused(bench, model: Path) -> None:
    for options, part in (
        (("--n-prompts", "300", "--budget", 256), "--n-prompts"),
        (("--device", "none of them"), "none of them"),
        (("--model", "missing.gguf"), "missing.gguf"),
    ):
        done = bench("device", "--model", model, *options)
        assert done.returncode == 2 and part in done.stderr, done.stderr
