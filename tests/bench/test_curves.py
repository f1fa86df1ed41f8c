"""Sweeps, memory curves and tune: arithmetic worked by hand, and short runs of each command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from laq_gguf.bench import report, sweep, tune
from laq_gguf.bench.curve_tables import curve_figures, curve_table, sweep_table, tune_table

ONE_THREAD = ("--threads", 1)


def runner(budget: int | None, first: list[float], step: list[float]) -> sweep.Runner:
    result = sweep.Runner(1000, budget, worker=None)  # type: ignore[arg-type]
    result.ms_first_token, result.ms_step = first, step
    if budget is not None:
        result.stats = {"n_cells": 1280, "kv_bytes": 2**21}
    return result


def test_a_ratio_is_that_of_one_round() -> None:
    stock = runner(None, [1000.0, 2000.0], [20.0, 40.0])
    ours = runner(128, [1100.0, 1900.0], [10.0, 10.0])
    row = ours.to_json(stock)
    assert row["first_token_ratio"] == pytest.approx([1.1, 0.95])
    assert row["decode_ratio"] == pytest.approx([2.0, 4.0])
    assert row["prefill_tokens_per_s"] == pytest.approx([1e6 / 1100, 1e6 / 1900])
    assert row["decode_tokens_per_s"] == [100.0, 100.0]
    plain = stock.to_json(stock)
    assert plain["kv_bytes"] is None and "decode_ratio" not in plain


def test_parts_of_an_eviction_are_what_the_counters_rose_by() -> None:
    before = {"n_evictions": 2, **{f"ms_{part}": 1.0 for part in sweep.PARTS}}
    after = {"n_evictions": 5, **{f"ms_{part}": 1.0 + i for i, part in enumerate(sweep.PARTS)}}
    parts = sweep.eviction_parts(before, after)
    assert parts == {
        "probe": 0.0, "lookahead": 1.0, "score": 2.0, "select": 3.0, "compact": 4.0, "n": 3
    }  # fmt: skip


def test_sweep_table() -> None:
    stock, ours = runner(None, [1e3, 2e3], [20.0, 40.0]), runner(128, [1100.0, 1900.0], [10.0] * 2)
    parts = dict.fromkeys(sweep.PARTS, 2.5)
    ours.evictions = [{**parts, "n": 1}, {**parts, "score": 4.5, "n": 1}]
    rows = [stock.to_json(stock), ours.to_json(stock)]
    table = sweep_table({"results": rows, "load": [1.0, None]})
    assert "| 1,000 | stock | 1.50 (1.00 to 2.00) | - |" in table
    assert "| 1.025 (0.950 to 1.100) |" in table and "| 3.00 (2.00 to 4.00) | 2.0 |" in table
    assert table.count("| 3.5 (2.5 to 4.5) |") == 1 and "Load of the machine: 1.00." in table


def memory_row(library: str, context: int, kv: int, peak: int) -> dict:
    row = {"library": library, "type": "f16", "context": context, "n_cells": 256}
    return {**row, "kv_bytes": kv * 2**20, "peak_bytes": peak * 2**20}


CURVE = {
    "settings": {"device": "CPU"},
    "results": [
        memory_row("laq_gguf", 1000, 6, 200), memory_row("llama_cpp", 1000, 24, 220),
        memory_row("laq_gguf", 4000, 6, 202), memory_row("llama_cpp", 4000, 96, 300),
    ],
}  # fmt: skip


def test_memory_curve() -> None:
    figures = curve_figures(CURVE)
    assert figures["laq_gguf"] == {"kv": 1.0, "peak": 1.01, "kv_spread": 1.0}
    assert figures["llama_cpp"]["kv"] == 4.0
    table = curve_table(CURVE)
    assert "| f16 | 4,000 | 256 | 6.00 | 202.0 | 96.00 | 300.0 |" in table
    assert "ours: KV x 1.000, peak RSS x 1.010; stock: KV x 4.000, peak RSS x 1.364." in table


@pytest.mark.parametrize("needed", [16, 17, 32, 100, 990, 1000])
def test_bisection_finds_the_smallest_budget(needed: int) -> None:
    asked: list[int] = []

    def keeps(budget: int) -> bool:
        asked.append(budget)
        return budget >= needed

    found = tune.smallest(keeps, 16, 1000, 16)
    assert found == (-(-needed // 16) * 16 if needed <= 992 else None)
    assert len(asked) <= 6 and len(set(asked)) == len(asked)
    assert all(16 <= budget < 1000 and budget % 16 == 0 for budget in asked)


def test_bisection_never_asks_below_the_smallest_allowed() -> None:
    asked: list[int] = []
    assert tune.smallest(lambda b: asked.append(b) is None, 21, 200, 16) == 32
    assert min(asked) == 32
    assert tune.smallest(lambda b: True, 100, 50, 16) is None


def test_tune_table_names_the_keyword() -> None:
    def row(budget: int, top1: float) -> dict:
        row = {"budget": budget, "top1_agreement": top1, "kl": 0.1, "n_compared": 63}
        return {**row, "kv_bytes": budget * 2**13}

    rows = [row(128, 0.96), row(64, 0.9)]
    document = {"settings": {"target": 0.95}, "n_prompts": [256], "results": rows}
    table = tune_table({**document, "kv_budget": 128})
    below = "| 64 | 0.250 | 0.50 | 0.900 | 0.1000 | 63 | below |"
    assert table.index(below) < table.index("| 128 |")
    assert "`kv_budget=128`, or `--kv-budget 128`" in table
    assert "lower --target" in tune_table({**document, "kv_budget": None})


def test_what_is_compared_begins_after_the_eviction() -> None:
    full = np.log(np.array([[0.5, 0.5], [0.75, 0.25], [0.25, 0.75]], dtype=np.float32))
    own = np.log(np.array([[0.1, 0.9], [0.75, 0.25], [0.75, 0.25]], dtype=np.float32))
    row = tune.compare([full, full[:2]], [own, own[:2]], 64)
    # rows 1 and 2 of the first piece, row 1 of the second
    assert (row["n_compared"], row["top1_agreement"]) == (3, pytest.approx(2 / 3))
    assert row["kl"] == pytest.approx(0.5 * np.log(3) / 3)
    # a path of one token has nothing else
    assert tune.compare([full[:1]], [own[:1]], 64)["n_compared"] == 1


@pytest.mark.model
def test_sweep(bench, model: Path, plain_lib: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "sweep.json", tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a long text. " for i in range(120)), encoding="utf-8")
    command = (
        "speed", "--model", model, "--plain-lib", plain_lib, "--text", text, "--repeat", 2,
        "--n-decode", 3, "--lookahead", "pseudo", "--out", out, *ONE_THREAD,
    )  # fmt: skip
    done = bench(*command, "--contexts", "100,160", "--budgets", 48)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    rows = document["results"]
    assert [(r["context"], r["budget"]) for r in rows] == [
        (100, None), (100, 48), (160, None), (160, 48)
    ]  # fmt: skip
    for stock, ours in (rows[:2], rows[2:]):
        assert ours["system"]["patched"] and not stock["system"]["patched"]
        assert len(ours["decode_ratio"]) == len(ours["first_token_ratio"]) == 2
        for parts in ours["evictions"]:
            assert parts["n"] == 1 and min(parts["lookahead"], parts["score"]) > 0
    assert len(document["load"]) == 3
    assert report.render(out).startswith(done.stdout.strip())
    refused = bench(*command, "--contexts", "48,300", "--budgets", 48)
    assert refused.returncode == 2 and "--contexts are above every --budgets" in refused.stderr


@pytest.mark.model
def test_memory_over_context(bench, model: Path, plain_lib: Path, tmp_path: Path) -> None:
    out = tmp_path / "curve.json"
    done = bench(
        "memory", "--model", model, "--plain-lib", plain_lib, "--contexts", "300,600",
        "--budget", 128, "--kv-staging", 128, "--types", "f16", "--n-decode", 4, "--out", out,
        *ONE_THREAD,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    ours, stock = ([r for r in document["results"] if r["library"] == library]
                   for library in ("laq_gguf", "llama_cpp"))  # fmt: skip
    assert [r["context"] for r in ours] == [r["context"] for r in stock] == [300, 600]
    assert ours[0]["kv_bytes"] == ours[1]["kv_bytes"] and ours[1]["n_cells"] == 256
    assert ours[1]["n_evictions"] > ours[0]["n_evictions"] > 0
    # 512 and 768 cells, logged in hundredths of a MiB
    assert stock[1]["kv_bytes"] / stock[0]["kv_bytes"] == pytest.approx(1.5, rel=1e-3)
    assert all(r["peak_bytes"] > r["kv_bytes"] for r in document["results"])
    assert report.render(out).startswith(done.stdout.strip())


@pytest.mark.model
@pytest.mark.parametrize(
    ("question", "staging"), [(None, 0), ("Which line is the last one?", 0), (None, 136)]
)
def test_tune(bench, model: Path, tmp_path: Path, question: str | None, staging: int) -> None:
    out, text = tmp_path / "tune.json", tmp_path / "text.txt"
    lines = (f"Line {i}: the {i}th house has {i * i % 97} windows.\n" for i in range(60))
    text.write_text("".join(lines), encoding="utf-8")
    done = bench(
        "tune", "--model", model, "--text", text, "--length", 120, "--pieces", 2, "--step", 48,
        "--n-compare", 16, "--target", 0.8, "--out", out, *ONE_THREAD, "--kv-staging", staging,
        *(["--prompt", question] if question else []),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    tried = {r["budget"]: r["top1_agreement"] for r in document["results"]}
    assert tried and all(budget % 48 == 0 for budget in tried)
    if not question:
        # begin-of-text has no tokens of its own in this model's prompts
        assert all(r["n_compared"] == 2 * 15 for r in document["results"])
        assert set(document["n_prompts"]) <= {120, 121}
    best = document["kv_budget"]
    if best is not None:
        assert tried[best] >= 0.8 and f"kv_budget={best}" in done.stdout
        assert all(value < 0.8 for budget, value in tried.items() if budget < best)


@pytest.mark.model
def test_tune_refuses(bench, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Too short.", encoding="utf-8")
    for arguments, words in (
        (["--text", text], "give a longer one, or lower --length"),
        (["--text", tmp_path / "none.txt"], "no text at"),
        (["--text", text, "--target", 1.5], "--target is above 0 and at most 1"),
    ):
        done = bench("tune", "--model", model, *arguments)
        assert done.returncode == 2 and words in done.stderr, done.stderr
