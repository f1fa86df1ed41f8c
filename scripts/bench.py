"""The benchmarks of `laq-gguf bench` from a checkout, and `readme`.

Exit status 0 whatever is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

from laq_gguf.bench import commands, readme, report

ROOT = Path(__file__).resolve().parent.parent
#: what README shows, in its order
README_RESULTS = (
    "quality-default-smollm2", "quality-niah-smollm2-4k", "quality-niah-smollm2-4k-16",
    "peers-smollm2-2k", "peers-needles-smollm2", "peers-niah-smollm2-4k",
    "quality-bounded-recall-smollm2-2k", "quality-bounded-recall-smollm2-4k",
    "quality-bounded-recall-smollm2-7k",
    "multiturn-archive-smollm2-1-4", "multiturn-recall-smollm2-1-4",
    "speed-smollm2-cpu", "memory-smollm2", "nvidia-h200-875d3360082b",
)  # fmt: skip
HEAD = """# Results

Written by `python scripts/bench.py readme` from the JSON files of this folder, which hold every
row, the settings, the versions and the machine. `laq-gguf bench report FILE` shows one of them.
The commands are those of today, unless words of them are said to be removed.
"""
README, RESULTS = ROOT / "README.md", ROOT / "laq_gguf" / "bench" / "results"


def measured(text: str) -> str:
    """README.md with the tables of README_RESULTS between its marks."""
    section = readme.section([report.read(RESULTS / f"{n}.json") for n in README_RESULTS])
    before, begin, rest = text.partition("<!-- measured -->\n")
    _, end, after = rest.partition("<!-- /measured -->\n")
    if not begin or not end:
        raise ValueError("README.md has no <!-- measured --> ... <!-- /measured -->")
    return f"{before}{begin}{section}\n{end}{after}"


def all_results() -> str:
    """The page of all committed results."""
    documents = [report.read(path) for path in sorted(RESULTS.glob("*.json"))]
    return f"{HEAD}\n{report.results_section(documents)}\n"


def write_readme(args: argparse.Namespace) -> None:
    """Write README's tables, and the page of all results, from the committed ones."""
    README.write_text(measured(README.read_text(encoding="utf-8")), encoding="utf-8")
    (RESULTS / "README.md").write_text(all_results(), encoding="utf-8")


README_COMMAND = SimpleNamespace(
    __doc__=write_readme.__doc__, add_arguments=lambda parser: None, run=write_readme
)


EVERY = {**commands.COMMANDS, "readme": README_COMMAND}


if __name__ == "__main__":
    sys.exit(commands.main(prog="bench.py", commands=EVERY))
