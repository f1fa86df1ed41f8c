"""Benchmarks: quality, multiturn, chat, memory, speed, device; and `report`, `readme`.

Exit status 0 whatever is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from laq_gguf import LaqError
from laq_gguf.bench import chat, device, memory, multiturn, quality, report, speed
from laq_gguf.bench.worker import WorkerError

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "quality": quality,
    "multiturn": multiturn,
    "chat": chat,
    "memory": memory,
    "device": device,
    "speed": speed,
}
README, RESULTS = ROOT / "README.md", ROOT / "laq_gguf" / "bench" / "results"


def main(argv: list[str] | None = None) -> int:
    """Run one command; 2 if it could not be run."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(function=module.run)
    command = commands.add_parser("report", description=report.__doc__)
    command.add_argument("files", type=Path, nargs="+", help="result files")
    command.set_defaults(function=_report)
    command = commands.add_parser("readme", description="Write README's tables from the results.")
    command.set_defaults(function=_readme)
    args = parser.parse_args(argv)
    try:
        args.function(args)
    except (ValueError, LaqError, WorkerError, chat.CapError) as error:
        print(f"bench.py {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _report(args: argparse.Namespace) -> None:
    print("\n\n".join(report.render(path) for path in args.files))


def measured(text: str) -> str:
    """README.md with the tables of the committed results between its marks."""
    files = sorted(RESULTS.glob("*.json"))
    section = report.readme_section([report.read(path) for path in files])
    before, begin, rest = text.partition("<!-- measured -->\n")
    _, end, after = rest.partition("<!-- /measured -->\n")
    if not begin or not end:
        raise ValueError("README.md has no <!-- measured --> ... <!-- /measured -->")
    return f"{before}{begin}{section}\n{end}{after}"


def _readme(args: argparse.Namespace) -> None:
    README.write_text(measured(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
