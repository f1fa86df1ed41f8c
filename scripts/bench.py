"""Benchmarks: `bench.py quality | speed | report`. Exit status 0 whatever is measured."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from laq_gguf import LaqError
from laq_gguf.bench import quality, report, speed


def main(argv: list[str] | None = None) -> int:
    """Run one command; 2 if it could not be run."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in (("quality", quality), ("speed", speed)):
        command = commands.add_parser(name, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(function=module.run)
    command = commands.add_parser("report", description=report.__doc__)
    command.add_argument("files", type=Path, nargs="+", help="result files")
    command.set_defaults(function=_report)
    args = parser.parse_args(argv)
    try:
        args.function(args)
    except (ValueError, LaqError, speed.WorkerError) as error:
        print(f"bench.py {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _report(args: argparse.Namespace) -> None:
    print("\n\n".join(report.render(path) for path in args.files))


if __name__ == "__main__":
    sys.exit(main())
