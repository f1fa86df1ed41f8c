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
EMULATOR = (HERE / "simt.cpp", HERE / "simt.h")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", f"-I{HERE}")


def compiler() -> str:
    """The C++ compiler; skips the test if there is none."""
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    pytest.skip("needs a C++ compiler (CXX)")


def digest(*parts: str | Path) -> str:
    """Of texts, and of what files hold."""
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part.encode()
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()[:16]


def compile_to(path: Path, *arguments: str | Path) -> Path:
    """Run the compiler unless its output is there; other processes may do the same."""
    if not path.exists():
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        command = [*compiler().split(), *FLAGS, *map(str, arguments), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-8000:]}"
        os.replace(fresh, path)
    return path


def build(
    sources: Sequence[Path],
    fixed: Sequence[Path] = (),
    read: Sequence[Path] = (),
    texts: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
) -> ctypes.CDLL:
    """Build and load a library.

    Args:
        sources: C++ files, relative ones from `texts`; the emulator's is added.
        fixed: C++ files that include none of the texts: they are compiled once for all texts.
        read: files that the sources include, other than the emulator's.
        texts: more files, by name; the folder that holds them is searched first.
        flags: more options of the compiler.

    Returns:
        The library. It is kept in build/emulation under a digest of everything above.
    """
    texts = dict(sorted((texts or {}).items()))
    common = (compiler(), *FLAGS, *EMULATOR)
    files = [path for path in (*sources, *fixed, *read) if path.is_absolute()]
    folder = OUT / digest(*common, *flags, *map(str, sources), *files, *texts, *texts.values())
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        fresh = folder / f"{name}.{os.getpid()}"
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, folder / name)
    objects = []
    for path in (EMULATOR[0], *fixed):
        name = f"{path.stem}-{digest(*common, *flags, path, *read)}.o"
        objects.append(compile_to(OUT / name, "-c", *flags, path))
    made = [folder / path for path in sources]
    library = folder / "emulated.so"
    compile_to(library, "-shared", f"-I{folder}", *flags, *made, *objects)
    return ctypes.CDLL(str(library))
