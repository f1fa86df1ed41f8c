"""What a result needs beside it to be repeated: command, model, commit, versions, machine, date."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

SCHEMA = 1
PACKAGES = ("laq-gguf", "llama-cpp-python", "numpy", "rouge", "rapidfuzz")


def provenance(kind: str, model: Path, settings: dict[str, object]) -> dict[str, object]:
    """The head of a result file. `settings`: every option, JSON values only."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "command": shown_command(sys.argv),
        "settings": settings,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "model": {"file": model.name, "bytes": model.stat().st_size, "sha256": sha256(model)},
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "cores_usable": usable_cores(),
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


def shown_command(argv: list[str]) -> str:
    """A command line without what only this machine knows: paths within the current folder are
    relative to it, others are shown by their names.
    """
    program = "laq-gguf" if Path(argv[0]).stem == "laq-gguf" else f"python {shown_path(argv[0])}"
    words = []
    for word in argv[1:]:
        flag, equals, value = word.partition("=")
        known = equals and flag.startswith("--")
        words.append(f"{flag}={shown_path(value)}" if known else shown_path(word))
    return f"{program} {shlex.join(words)}"


def shown_path(word: str) -> str:
    """A word of a command; an absolute path as `shown_command` says."""
    path = Path(word)
    if not path.is_absolute():
        return word
    path, here = Path(os.path.normpath(path)), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def write_json(path: Path, document: dict[str, object]) -> None:
    """Write a result file in one step: an interrupted run leaves the last complete one."""
    write_whole(path, json.dumps(document, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one step: there is never a part of it at `path`."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(path)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's own name, or what Python knows of it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    if sys.platform == "darwin":
        return _output(["sysctl", "-n", "machdep.cpu.brand_string"]) or platform.machine()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _commit() -> str | None:
    """Commit of the source tree the command was run in, with "-dirty" if it differs from it."""
    return _output(["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
