"""`bench quality` on two samples: what its rows say, that it stops and goes on, what it refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import ClassVar

import pytest

from laq_gguf.bench import reading
from laq_gguf.bench.answers import COUNTERS
from laq_gguf.bench.methods import base_name
from laq_gguf.bench.provenance import SCHEMA
from laq_gguf.bench.quality import _Clock
from laq_gguf.bench.quality_rows import KEY

ROW = {
    *KEY, "share", "type", "budget", "kv_bytes", "kv_bytes_full", "counts", "depth", "prompt",
    "n_prompt",
    "outputs", "text", "score", "top1_agreement", "kl", "kl_max", "n_compared", "attention_mass",
    "n_kept", "seconds", *COUNTERS,
}  # fmt: skip
METHODS = "full,full@q8_0,laq++,laq,deferred:lookahead_size=8,bounded,streaming,laq++@q8_0"
SETTINGS = (
    "laq++:lookahead_size=5", "laq++:window_size=48", "laq++:n_sink=0:kernel_size=1",
    "snapkv:snapkv_window=80", "laq++@q8_0:pooling=avg", "laq++:lookahead_size=48",
)  # fmt: skip

COMMAND = (
    "--lengths", 1500, "--n-needles", 2, "--methods", METHODS, "--shares", "1/4,1/8",
    "--n-compare", 12, "--max-new-tokens", 16, "--threads", 1,
)  # fmt: skip
CELL = 2 * 2 * 64 * 2 * 2  # bytes of a cell of the tiny model: layers, heads, d, K and V, f16


@pytest.fixture(scope="module")
def measured(bench, tiny: Path, tmp_path_factory) -> tuple[dict, str, Path]:
    """A result, what was printed, and its file."""
    out = tmp_path_factory.mktemp("quality") / "quality.json"
    done = bench("quality", "--model", tiny, *COMMAND, "--out", out)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8")), done.stdout, out


def test_rows_of_equal_bytes(measured: tuple) -> None:
    document, _, _ = measured
    assert document["schema"] == SCHEMA and document["settings"]["shares"] == [0.25, 0.125]
    assert str(Path.home()) not in document["command"]
    rows = document["results"]
    assert all(row.keys() >= ROW for row in rows)
    # cells come in steps of 256: bounded finds none in 1/8 of 1500 tokens
    assert len(rows) == 2 * (2 + 5 * 2 + 1)
    assert any("bounded has no row at the smallest sizes" in note for note in document["notes"])
    for row in rows:
        assert row["kv_bytes_full"] == row["n_prompt"] * CELL
        if row["size"] is None:
            assert (row["n_evictions"], row["budget"]) == (0, None)
            assert row["n_kept"] == row["n_prompt"]
            assert row["attention_mass"] == pytest.approx(1.0)
            continue
        excess = 1.03 if row["method"] == "bounded" else 1
        assert row["kv_bytes"] <= excess * row["share"] * row["kv_bytes_full"]
        assert 0 < row["attention_mass"] < 1 and row["n_evictions"] >= 1
    for row in (r for r in rows if r["size"] is not None):
        name, _, kind = row["method"].partition("@")
        base = base_name(name)
        if base == "bounded":
            assert row["counts"] == "all cells" and row["n_probe"] > 0
            assert row["kv_bytes"] == 256 * CELL and row["budget"] <= row["n_kept"] <= 256
            continue
        in_tokens = row["share"] * row["n_prompt"] * (32 / 17 if kind else 1)
        n_generated = 8 if base == "deferred" else 0
        assert row["budget"] == int(in_tokens) == row["n_kept"] + n_generated
        # those of two stages are decoded as an answer is
        most = 32 if base == "laq++" else 0
        assert row["n_pseudo"] == most or 0 < row["n_pseudo"] < most
        assert row["n_recalls"] == (base == "laq")


def test_the_full_cache_is_what_others_are_compared_with(measured: tuple) -> None:
    rows = measured[0]["results"]
    for full in (r for r in rows if r["method"] == "full"):
        assert (full["kl"], full["top1_agreement"]) == (0.0, 1.0)
    for q8_0 in (r for r in rows if r["method"] == "full@q8_0"):
        assert 0 < q8_0["kl"] < 0.05
        assert q8_0["kv_bytes"] / q8_0["kv_bytes_full"] == pytest.approx(17 / 32)
    evicted = [r for r in rows if r["size"] is not None]
    assert all(r["kl"] > 0 and r["kl_max"] >= r["kl"] for r in evicted)


def test_settings_in_a_name_are_those_of_its_rows(bench, tiny: Path, tmp_path: Path) -> None:
    """More lookahead and window than the defaults have: allocated for all methods of the run."""
    out = tmp_path / "quality.json"
    done = bench(
        "quality", "--model", tiny, "--lengths", 1000, "--n-needles", 3, "--shares", "1/4",
        "--methods", ",".join(["full", "laq++", *SETTINGS]), "--n-compare", 8,
        "--max-new-tokens", 4, "--threads", 1, "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert len(rows) == 3 * (2 + len(SETTINGS))
    of = {(r["id"], r["method"]): r for r in rows}
    for i in {r["id"] for r in rows}:
        plain = of[i, "laq++"]
        assert of[i, SETTINGS[0]]["n_pseudo"] == 5 < plain["n_pseudo"] <= 32
        # the same tokens, and more of them where the reply does not end before
        n_more = of[i, SETTINGS[-1]]["n_pseudo"] - plain["n_pseudo"]
        assert 0 <= n_more <= 16 and (plain["n_pseudo"] == 32 or n_more == 0)
        for name in SETTINGS[:4]:
            row = of[i, name]
            assert (row["kv_bytes"], row["n_kept"]) == (plain["kv_bytes"], plain["n_kept"])
            assert row["kl"] != plain["kl"], f"{name} changes what is kept"
    halves = bench("report", out, "--halves")
    assert halves.returncode == 0, halves.stderr
    assert "| laq++ | 1/4 | 2 | " in halves.stdout and " of 2 | 1 | " in halves.stdout


@pytest.mark.model
def test_the_default_finds_what_the_newest_tokens_do_not(
    bench, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "quality.json"
    done = bench(
        "quality", "--model", model, "--lengths", 400, "--n-needles", 1, "--shares", "1/5",
        "--methods", "full,laq++,laq++@q8_0,streaming", "--n-compare", 12, "--threads", 1,
        "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text(encoding="utf-8"))["results"]
    full, laq, streaming, q8_0 = rows
    assert (full["score"], laq["score"], q8_0["score"], streaming["score"]) == (1, 1, 1, 0)
    assert laq["kl"] < streaming["kl"] / 10
    assert q8_0["attention_mass"] > laq["attention_mass"] > streaming["attention_mass"]


def test_the_table_is_of_the_file_alone(bench, measured: tuple) -> None:
    _, printed, out = measured
    rendered = bench("report", out)
    assert rendered.returncode == 0 and printed.strip() in rendered.stdout


def test_a_stopped_run_goes_on(bench, tiny: Path, measured: tuple, tmp_path: Path) -> None:
    document, out = measured[0], tmp_path / "quality.json"
    kept = [r for r in document["results"] if (r["id"], r["method"]) != ("0", "streaming")]
    assert len(kept) == len(document["results"]) - 2
    out.write_text(json.dumps({**document, "results": kept}), encoding="utf-8")
    command = ("quality", "--model", tiny, *COMMAND, "--out", out)
    done = bench(*command)
    assert done.returncode == 0, done.stderr
    again = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert again[: len(kept)] == kept and len(again) == len(document["results"])

    def values(rows: list[dict]) -> dict:
        return {tuple(r[k] for k in KEY): (r["kl"], r["text"], r["n_kept"]) for r in rows}

    assert values(again) == values(document["results"])
    other = bench(*command, "--limit", 1)
    assert other.returncode == 2 and "limit: None, now 1" in other.stderr


def test_no_time_is_no_row(bench, tiny: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "q.json", tmp_path / "t.txt"
    text.write_text("".join(f"Line {i} of a text that goes on and on. " for i in range(200)))
    command = (
        "quality", "--model", tiny, "--lengths", 300, "--limit", 2, "--text", text,
        "--tasks", "perplexity", "--methods", "full,snapkv", "--budgets", "80", "--n-compare", 9,
        "--threads", 1, "--out", out,
    )  # fmt: skip
    done = bench(*command, "--minutes", -1)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["results"] == [] and "after 0 of 2 rounds" in document["notes"][-1]
    assert bench(*command).returncode == 0
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["settings"]["text"]["file"] == "t.txt"
    assert not any("stopped" in note for note in document["notes"])
    full, snapkv = document["results"][:2]
    assert (full["score"], full["text"], full["n_compared"]) == (None, "", 9)
    assert (snapkv["size"], snapkv["share"], snapkv["n_kept"]) == ("80", None, 80)
    assert 0 < full["nll"] < snapkv["nll"] + 1 and snapkv["kl"] > 0
    assert "| perplexity |" in bench("report", out).stdout


def test_a_clock_asks_whether_so_many_tokens_fit() -> None:
    clock = _Clock(1.0)
    assert clock.has_time(10**9), "nothing is known yet"
    clock.measured(100, seconds=1.0)
    clock.measured(100, seconds=2.0)
    clock.measured(100, seconds=0.5)
    # 1.25 times the slowest, 0.025 s a token, in 60 s
    assert clock.has_time(2300) and not clock.has_time(2401)
    forever = _Clock(None)
    forever.measured(1, 1e9)
    assert forever.has_time(10**9)


class Opened:
    """Stands in for a reader: says which are open."""

    alive: ClassVar[list[str]] = []
    bytes_per_cell = 8.0

    def __init__(self, args: object, n_ctx: int, type_name: str, methods: object) -> None:
        self.name = type_name
        self.alive.append(type_name)

    def close(self) -> None:
        self.alive.remove(self.name)


def test_a_large_model_is_loaded_once_at_a_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "Reader", Opened)
    model = tmp_path / "m.gguf"
    model.write_bytes(bytes(100))
    args = argparse.Namespace(model=model, methods=["full"])
    for most, alive in ((100, ["f16", "q8_0"]), (99, ["q8_0"])):
        monkeypatch.setattr(reading.Readers, "ONE_AT_A_TIME", most)
        readers = reading.Readers(args, 256)
        assert readers.whole("f16") is readers.whole("f16")
        readers.whole("q8_0")
        assert Opened.alive == alive
        assert readers.bytes_per_cell("f16") == 8.0 and Opened.alive == alive, "known already"
        readers.close()
        assert Opened.alive == []


def test_errors_are_one_line_and_status_2(bench, tiny: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("--model", tmp_path / "none.gguf"), "no model at"),
        (("--model", tiny, "--tasks", "vt"), "pass --data"),
        (("--model", tiny, "--tasks", "vx"), "unknown task 'vx'"),
        (("--model", tiny, "--methods", "laq@q9"), "unknown K/V type 'q9'"),
        (("--model", tiny, "--shares", "2"), "between 0 and 1"),
        (("--model", tiny, "--shares", "1/2", "--budgets", 99), "give one of them"),
        (("--model", tiny, "--bounded-staging", 256), "--bounded-staging goes with --budgets"),
        (("--model", tiny, "--n-compare", 0), "--n-compare is at least 1"),
        (("--model", tiny, "--tasks", "perplexity"), "pass --data"),
    ):
        done = bench("quality", *arguments)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr and "Traceback" not in done.stderr
