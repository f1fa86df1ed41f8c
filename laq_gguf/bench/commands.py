"""COMMANDS: the benchmarks of `laq-gguf bench`, and how one of them is run.

A command is a module with `add_arguments(parser)` and `run(args)`; the first line of its docstring
is its help. What it measures goes into one JSON file (see results.py), and a table of that file is
made by the function that report.TABLES names for its kind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from laq_gguf.bench import (
    chat,
    device,
    fetch,
    kept,
    memory,
    multiturn,
    peers,
    pictures,
    quality,
    report,
    speed,
    tune,
)
from laq_gguf.bench.worker import WorkerError
from laq_gguf.errors import LaqError

COMMANDS: dict[str, ModuleType] = {
    "quality": quality,
    "multiturn": multiturn,
    "chat": chat,
    "memory": memory,
    "device": device,
    "speed": speed,
    "tune": tune,
    "peers": peers,
    "kept": kept,
    "pictures": pictures,
    "fetch": fetch,
    "report": report,
}

EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 2, 130


def main(
    argv: list[str] | None = None,
    prog: str = "laq-gguf bench",
    commands: Mapping[str, Any] = COMMANDS,
) -> int:
    """Run one command; 0 whatever is measured, 2 if it could not be run, 130 if interrupted."""
    args = build_parser(prog, commands).parse_args(argv)
    try:
        args.function(args)
    except (ValueError, LaqError, WorkerError, chat.CapError) as error:
        print(f"{prog} {args.command}: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def build_parser(prog: str, commands: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog=prog, description="Measure what a KV budget costs.")
    parsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in commands.items():
        text = (module.__doc__ or "").strip()
        command = parsers.add_parser(name, help=text.partition("\n")[0], description=text)
        module.add_arguments(command)
        command.set_defaults(function=module.run)
    return parser
