"""README's numbers are those of the committed results."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_readme_shows_the_committed_results() -> None:
    bench = runpy.run_path(str(ROOT / "scripts" / "bench.py"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert bench["measured"](text) == text, "run python scripts/bench.py readme"
    assert text.count("| laq++ | 128 |") == 1, "the default policy is in the table"
