"""Every command that is committed can be given today, or says which of its words are gone."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dev
import gpu_check
import wheel
from laq_gguf import cli
from laq_gguf.bench import commands
from laq_gguf.bench.markdown import command_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "laq_gguf" / "bench" / "results").glob("*.json"))
BENCH = runpy.run_path(str(ROOT / "scripts" / "bench.py"))
PARSERS = {
    "laq-gguf": cli.build_parser(),
    "laq-gguf bench": commands.build_parser("laq-gguf bench", commands.COMMANDS),
    "scripts/bench.py": commands.build_parser("bench.py", BENCH["EVERY"]),
    "scripts/dev.py": dev.build_parser(),
    "scripts/gpu_check.py": gpu_check.build_parser(),
    "scripts/wheel.py": wheel.build_parser(),
}


def runs(path: Path) -> Iterator[dict[str, Any]]:
    """The run of a result file, and those that went on with it."""
    document = json.loads(path.read_text(encoding="utf-8"))
    yield document
    yield from document.get("continued", [])


def parse(command: str) -> argparse.Namespace:
    """A command line by the parser of its program."""
    program, *words = shlex.split(command, comments=True)
    if program.startswith("python"):
        program, *words = words
    elif words[:1] == ["bench"]:
        program, *words = "laq-gguf bench", *words[1:]
    return PARSERS[program].parse_args(words)


def without(command: str, removed: list[str]) -> str:
    """A command without an option and its value, or without an entry of a list."""
    words = shlex.split(command)
    for gone in removed:
        if gone.startswith("--"):
            i = words.index(gone)
            del words[i : i + 2]
        else:
            lists = [i for i, word in enumerate(words) if gone in word.split(",")]
            assert lists, f"{gone} is no word of the command"
            for i in lists:
                words[i] = ",".join(part for part in words[i].split(",") if part != gone)
    return shlex.join(words)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_commands_of_results(path: Path) -> None:
    for run in runs(path):
        removed = run.get("removed", [])
        parse(without(run["command"], removed))
        assert re.fullmatch("[0-9a-f]{40}(-dirty)?", run["commit"])
        if removed:
            with pytest.raises(SystemExit):
                parse(run["command"])


def test_a_page_says_what_is_removed() -> None:
    run = {"command": "laq-gguf bench quality --old 1", "removed": ["--old"]}
    assert command_of(run).endswith("(of the commit named here; removed since: `--old`)")
    assert command_of({"command": "laq-gguf doctor"}) == "`laq-gguf doctor`"
    page = (RESULTS[0].parent / "README.md").read_text(encoding="utf-8")
    assert page.count("removed since") == sum("removed" in next(runs(path)) for path in RESULTS)


def shown_commands(text: str) -> list[str]:
    """Command lines of a page: of its blocks of sh and, where they call a script, of its text."""
    before, _, rest = text.partition("<!-- measured -->")  # the commands of results
    text = before + rest.partition("<!-- /measured -->")[2]
    lines = [
        line.strip()
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += re.findall(r"`(python3? scripts/[^`]+)`", text)
    return [line for line in lines if re.match(r"laq-gguf |python3? scripts/", line)]


def test_commands_of_readme() -> None:
    found = shown_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) >= 10
    for command in found:
        parse(command)
