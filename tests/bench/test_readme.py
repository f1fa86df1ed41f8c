"""README's numbers are those of the committed results."""

import re
import runpy
from pathlib import Path

from laq_gguf.bench import readme, report
from laq_gguf.config import LaqConfig

ROOT = Path(__file__).resolve().parents[2]
BENCH = runpy.run_path(str(ROOT / "scripts" / "bench.py"))


def test_readme_shows_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert BENCH["measured"](text) == text, "run python scripts/bench.py readme"
    assert "| laq++ | " in text and "KL at 1/8" in text, "the default policy is in the table"


def test_readme_says_which_runs_have_the_lookahead_of_today() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    pattern = r"Runs ([\d, toand]+) have the lookahead of today, (\d+) tokens"
    (said,) = re.findall(pattern, text)
    default = LaqConfig().lookahead_size
    assert int(said[1]) == default
    runs = {
        i
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", said[0])
        for i in range(int(first), int(last or first) + 1)
    }
    for i, name in enumerate(BENCH["README_RESULTS"], 1):
        document = report.read(BENCH["RESULTS"] / f"{name}.json")
        own = document["settings"].get("lookahead_size")
        assert i not in runs or own in (None, default), name
        assert own is None or f"lookahead_size {own}, " in readme.origin(document, i)


def test_the_page_of_results_shows_all_of_them() -> None:
    text = (BENCH["RESULTS"] / "README.md").read_text(encoding="utf-8")
    assert BENCH["all_results"]() == text, "run python scripts/bench.py readme"
    n_commits = len(list(BENCH["RESULTS"].glob("*.json")))
    assert text.count("(sha256 ") == n_commits


def test_methods_of_several_results_stand_in_one_table() -> None:
    one = {"task": "vt", "length": 64, "top1_agreement": 1.0, "kv_bytes_full": 8, "id": "0"}
    quality = [
        {**one, "method": method, "size": size, "share": share, "kl": kl, "score": 0.5,
         "kv_bytes": 8 * share, "counts": "kept cells"}
        for method, size, share, kl in (
            ("full", None, 1.0, 0.0), ("laq++", "1/8", 1 / 8, 0.25), ("laq++", "1/4", 1 / 4, 0.125)
        )
    ]  # fmt: skip
    peers = [{**one, "method": "peer", "share": 1 / 8, "kl": 0.75, "score": 0.0, "kv_bytes": 1}]
    documents = [{"kind": "quality", "results": quality}, {"kind": "peers", "results": peers}]
    assert readme.shares_table(documents).splitlines()[2:] == [
        "| 1 | full (1.00 of the bytes) | 1 | 0.000 | 0.000 | 0.50 | 0.50 |",
        "| 1 | laq++ | 1 | 0.125 | 0.250 | 0.50 | 0.50 |",
        "| 2 | peer | 1 | - | 0.750 | - | 0.00 |",
    ]


def test_reading_with_an_archive_stands_beside_the_whole_cache() -> None:
    one = {"task": "vt", "length": 64, "n_prompt": 1234}
    results = [
        {**one, "id": i, "method": method, "score": score, "kl": kl, "ms_prefill": ms}
        for i in (0, 1)
        for method, score, kl, ms in (
            ("full", 1.0, 0.0, 2000.0 + 2000 * i),
            ("laq++", i / 2, 0.25, None),
            ("recall", 0.5, 0.5, 4000.0),
        )
    ]
    stopped_here = {**results[0], "id": 2, "score": 0.0}
    document = {"kind": "quality", "results": [*results, stopped_here]}
    assert readme.reads_with_archive(document)
    assert not readme.reads_with_archive({"kind": "quality", "results": results[:2]})
    assert readme.reading_table([document], 3).splitlines()[2:] == [
        "| 3 | 1,234 | vt | 2 | 1.00 | 0.25 | 0.50 | 0.2500 | 0.5000 | 3 | 4 |"
    ]
