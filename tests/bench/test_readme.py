"""README's numbers are those of the committed results."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = runpy.run_path(str(ROOT / "scripts" / "bench.py"))


def test_readme_shows_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert BENCH["measured"](text) == text, "run python scripts/bench.py readme"
    assert "| laq++ | 1/8 |" in text, "the default policy is in the table"


def test_the_page_of_results_shows_all_of_them() -> None:
    text = (BENCH["RESULTS"] / "README.md").read_text(encoding="utf-8")
    assert BENCH["all_results"]() == text, "run python scripts/bench.py readme"
    n_commits = len(list(BENCH["RESULTS"].glob("*.json")))
    assert text.count("(sha256 ") == n_commits
