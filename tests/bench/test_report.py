"""Tables from result files, and the bars of the speed benchmark, with numbers worked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from laq_gguf.bench import quality_tables, report, speed
from laq_gguf.bench.provenance import SCHEMA


def quality_document() -> dict:
    def result(method: str, budget: int | None, id: str, score: float, **extra) -> dict:
        row = {"task": "needles", "method": method, "budget": budget, "id": id, "score": score}
        return {**row, "top1_agreement": 0.5, "kl": 0.25, **extra}

    stats = {"n_resident": 130, "n_evictions": 1, "ms_prefill": 1500.0}
    return {
        "schema": SCHEMA,
        "kind": "quality",
        "command": "python scripts/bench.py quality",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc",
        "model": {"file": "m.gguf", "bytes": 1, "sha256": "0" * 64},
        "versions": {"python": "3.12", "numpy": None},
        "machine": {"cpu": "a cpu", "cores": 2, "cores_usable": 2, "system": "Linux"},
        "notes": ["a note"],
        "results": [
            result("full", None, "0", 1.0),
            result("full", None, "1", 0.0),
            result("full", None, "2", 1.0),
            result("laq++", 128, "0", 1.0, **stats),
            result("laq++", 128, "1", 1.0, **stats),
            result("laq++", 128, "2", 0.5, **stats),
        ],
    }


def test_share_of_what_the_full_cache_finds() -> None:
    full, laq = quality_tables.quality_rows(quality_document())
    assert (full["score"], full["of_full"], full["n_evicted"]) == (pytest.approx(2 / 3), 1.0, None)
    # the answer that only laq++ found does not make up for the half it lost
    assert (laq["score"], laq["of_full"], laq["n"]) == (pytest.approx(2.5 / 3), 0.75, 3)
    assert (laq["n_resident_max"], laq["n_evicted"], laq["kl"]) == (130, 3, 0.25)


def test_render_reads_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps(quality_document()), encoding="utf-8")
    text = report.render(path)
    assert "| needles | laq++ | 128 | 3 | 0.833 | 0.750 | 0.500 | 0.2500 | 130 | 3 | 1.50 (" in text
    for part in ("a note", "a cpu, 2 cores", "commit abc, 2026-01-02", "sha256 000000000000"):
        assert part in text


def test_render_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text(json.dumps({**quality_document(), "schema": SCHEMA + 1}), encoding="utf-8")
    with pytest.raises(ValueError, match="no result of schema"):
        report.render(path)
    path.write_text(json.dumps({**quality_document(), "kind": "chat"}), encoding="utf-8")
    with pytest.raises(ValueError, match="--halves is for results of quality"):
        report.render(path, halves=True)


def configurations(ours: float, long: tuple[float, float], short: float, ttft: float) -> dict:
    times = {
        speed.OURS: ours,
        speed.OURS_OFF: 2 * ours,
        speed.LONG_ON: long[0],
        speed.LONG_OFF: long[1],
        speed.SHORT_ON: short,
        speed.SHORT_OFF: 2 * short,
    }
    result = {}
    for name, ms in times.items():
        c = speed.Configuration(name, "laq_gguf" if name == speed.OURS else "llama_cpp", True)
        warm_up = [1e6] * speed.N_WARM_UP
        c.ms_steps = [[*warm_up, ms, ms], [*warm_up, 0.5 * ms, 1.5 * ms], [*warm_up, ms, ms]]
        c.ms_first_token_paired = [100.0 * (ttft if name == speed.OURS else 1)] * 3
        if name == speed.OURS:
            c.evictions = [{"reported": 80.0, "wall": 100.0}] * 3
        result[name] = c
    return result


def test_bars_pass() -> None:
    bars = speed.bars(configurations(ours=10, long=(50, 40), short=9.5, ttft=1.01))
    assert [bar["median"] for bar in bars] == pytest.approx([0.95, 0.95, 4.0, 2.0, 1.01, 2.5])
    assert all(bar["passed"] for bar in bars)
    assert all(len(bar["values"]) == 3 for bar in bars)


def test_bars_fail() -> None:
    good = {"ours": 10, "long": (50, 40), "short": 9.5, "ttft": 1.01}
    cases = (
        ({"short": 8.9}, {0, 1}),
        ({"long": (50, 39.9)}, {3}),
        ({"long": (50, 19.9)}, {2, 3, 5}),
        ({"ttft": 1.03}, {4}),
        ({"long": (24.9, 99)}, {3, 5}),
    )
    for change, failing in cases:
        bars = speed.bars(configurations(**{**good, **change}))
        assert {i for i, bar in enumerate(bars) if not bar["passed"]} == failing, change


def test_a_bar_is_the_median_of_segments() -> None:
    """A process beside it that disturbs one segment of a round does not decide."""
    quiet = configurations(ours=10, long=(50, 40), short=9.5, ttft=1.01)
    for c in quiet.values():
        c.ms_steps = c.ms_steps * 2  # three rounds of two segments
    disturbed = quiet[speed.OURS].ms_steps
    disturbed[1] = [*[1e6] * speed.N_WARM_UP, 10, 500]
    quiet[speed.LONG_OFF].ms_steps[4] = [*[1e6] * speed.N_WARM_UP, 900, 900]
    bars = speed.bars(quiet)
    assert [bar["median"] for bar in bars] == pytest.approx([0.95, 0.95, 4.0, 2.0, 1.01, 2.5])
    assert [len(bar["values"]) for bar in bars] == [6, 6, 6, 6, 3, 3]
    # an eviction is compared with the decoding of its own round, here with (40 + 50) / 2
    assert bars[-1]["values"] == pytest.approx([2.5, 2.5, 100 / 45])


def test_an_eviction_takes_what_the_wall_clock_saw() -> None:
    before = {"n_evictions": 1, "ms_lookahead": 5.0, "ms_score": 1.0, "ms_compact": 2.0}
    after = {"n_evictions": 2, "ms_lookahead": 9.0, "ms_score": 4.0, "ms_compact": 7.0}
    steps = [30.0] * 8 + [50.0] + [10.0] * speed.N_WARM_UP
    assert speed.eviction(before, after, steps) == {
        "ms_lookahead": 4.0,
        "ms_score": 3.0,
        "ms_compact": 5.0,
        "reported": 8.0,
        "wall": 40.0,
    }


def test_the_first_token_alone_has_one_bar() -> None:
    both = configurations(ours=10, long=(50, 40), short=9.5, ttft=1.01)
    bars = speed.bars({name: both[name] for name in (speed.OURS, speed.LONG_ON)})
    assert [(bar["median"], bar["passed"]) for bar in bars] == [(pytest.approx(1.01), True)]
