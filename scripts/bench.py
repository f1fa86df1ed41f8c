"""The benchmarks of `laq-gguf bench` from a checkout, and `readme`.

Exit status 0 whatever is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

from laq_gguf.bench import commands, report

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "laq_gguf" / "bench" / "results"


def measured(text: str) -> str:
    """README.md with the tables of the committed results between its marks."""
    files = sorted(RESULTS.glob("*.json"))
    section = report.readme_section([report.read(path) for path in files])
    before, begin, rest = text.partition("<!-- measured -->\n")
    _, end, after = rest.partition("<!-- /measured -->\n")
    if not begin or not end:
        raise ValueError("README.md has no <!-- measured --> ... <!-- /measured -->")
    return f"{before}{begin}{section}\n{end}{after}"


def write_readme(args: argparse.Namespace) -> None:
    """Write README's tables from the committed results."""
    README.write_text(measured(README.read_text(encoding="utf-8")), encoding="utf-8")


README_COMMAND = SimpleNamespace(
    __doc__=write_readme.__doc__, add_arguments=lambda parser: None, run=write_readme
)


if __name__ == "__main__":
    every = {**commands.COMMANDS, "readme": README_COMMAND}
    sys.exit(commands.main(prog="bench.py", commands=every))
