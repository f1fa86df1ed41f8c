"""Compile a kernel behind the emulator into a shared library, once for what it is made from."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
OUT = ROOT / "build" / "emulation"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror")


def compiler() -> str:
    """The C++ compiler; skips the test if there is none."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    pytest.skip("needs a C++ compiler (CXX)")


def build(
    sources: Sequence[Path],
    read: Sequence[Path] = (),
    texts: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
) -> ctypes.CDLL:
    """Build and load a library.

    Args:
        sources: C++ files; the emulator's is added.
        read: files that the sources include, other than the emulator's.
        texts: more files to write, by name; the folder that holds them is searched first.
        flags: more options of the compiler.

    Returns:
        The library. It is kept in build/emulation under a digest of everything above.
    """
    sources = [*sources, HERE / "simt.cpp"]
    options = [*FLAGS, f"-I{HERE}", *flags]
    digest = hashlib.sha256("\0".join([compiler(), *options]).encode())
    for path in (*sources, *read, HERE / "simt.h"):
        digest.update(path.read_bytes())
    for name, text in sorted((texts or {}).items()):
        digest.update(f"{name}\0{text}".encode())
    folder = OUT / digest.hexdigest()[:16]
    library = folder / "emulated.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (texts or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        fresh = folder / f"emulated.{os.getpid()}.so"
        command = [*compiler().split(), f"-I{folder}", *options]
        command += [*map(str, sources), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-8000:]}"
        os.replace(fresh, library)
    return ctypes.CDLL(str(library))
