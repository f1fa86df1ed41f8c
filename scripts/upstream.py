"""Get the pinned llama-cpp-python sdist from the package registry, verify it, and unpack it.

    python3 scripts/upstream.py            make build/sdist and build/pristine

patches/UPSTREAM names the release, the sha256 of its sdist and the llama.cpp commit inside it.
What this makes (nothing is made again while its stamp fits the pin):

    build/sdist/llama_cpp_python-X.tar.gz  the verified archive
    build/sdist/llama_cpp_python-X/        unpacked, llama.cpp's shallow git in .git/modules
    build/pristine/                        the llama.cpp tree in it, unpatched

Python's standard library and pip only: this runs while the package is being built.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
VENDOR = Path("vendor/llama.cpp")
GIT_MODULE = Path(".git/modules/vendor/llama.cpp")
PIN_KEYS = ("package", "version", "sha256", "commit")


class UpstreamError(Exception):
    """The pinned sources cannot be had, or are not what patches/UPSTREAM says."""


@dataclass(frozen=True)
class Pin:
    """What patches/UPSTREAM names.

    Attributes:
        package: name on the package registry.
        version: release of it.
        sha256: of the sdist, hexadecimal; empty accepts any (only for trying another release).
        commit: the llama.cpp commit that the sdist carries.
    """

    package: str
    version: str
    sha256: str
    commit: str

    @property
    def stem(self) -> str:
        """Name of the folder in the sdist."""
        return f"{self.package.replace('-', '_')}-{self.version}"

    def text(self) -> str:
        """The text of patches/UPSTREAM."""
        return "".join(f"{key} = {getattr(self, key)}\n" for key in PIN_KEYS)


def read_pin(path: Path) -> Pin:
    """Read patches/UPSTREAM.

    Raises:
        UpstreamError: a key is missing, unknown or given twice.
    """
    values: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or key not in PIN_KEYS or key in values:
            raise UpstreamError(f"{path}:{number}: expected one `key = value` each of {PIN_KEYS}")
        values[key] = value
    missing = [key for key in PIN_KEYS if not values.get(key)]
    if missing:
        raise UpstreamError(f"{path}: no value for {', '.join(missing)}")
    return Pin(**values)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def pip_download(requirement: str, folder: Path, *options: str) -> None:
    """Run `pip download --no-deps` with this Python.

    Raises:
        UpstreamError: pip is missing, or could not get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
    command += [*options, requirement]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise UpstreamError(
            f"pip could not download {requirement} (exit code {done.returncode}); the command was\n"
            f"  {' '.join(command)}\n{done.stdout[-4000:]}"
        )


def fetch_sdist(pin: Pin, folder: Path) -> Path:
    """Download the sdist into `folder` unless it is there, and verify it.

    Returns:
        The path of the archive.

    Raises:
        UpstreamError: it cannot be downloaded, or its sha256 is not the pinned one.
    """
    archive = folder / f"{pin.stem}.tar.gz"
    if archive.exists() and pin.sha256 and sha256_of(archive) != pin.sha256:
        archive.unlink()
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            requirement = f"{pin.package}=={pin.version}"
            pip_download(requirement, Path(temporary), "--no-binary", ":all:")
            found = sorted(Path(temporary).glob("*.tar.gz"))
            if len(found) != 1:
                names = ", ".join(path.name for path in Path(temporary).iterdir())
                raise UpstreamError(f"expected one .tar.gz for {requirement}, pip gave: {names}")
            digest = sha256_of(found[0])
            if pin.sha256 and digest != pin.sha256:
                raise UpstreamError(
                    f"{found[0].name} has sha256 {digest}, patches/UPSTREAM wants {pin.sha256}: "
                    "the registry serves another file than the pinned one"
                )
            os.replace(found[0], archive)
    return archive


def _extract(archive: Path, target: Path) -> None:
    """Unpack plain files and folders below `target`; everything else in an archive is refused."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or "\\" in member.name:
                raise UpstreamError(f"{archive.name}: unsafe path {member.name!r}")
            path = target / name
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            source = tar.extractfile(member) if member.isfile() else None
            if source is None:
                raise UpstreamError(f"{archive.name}: {member.name!r} is no plain file or folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            with source, path.open("wb") as file:
                shutil.copyfileobj(source, file)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)
            os.utime(path, (member.mtime, member.mtime))


def remove_tree(path: Path) -> None:
    """Delete a folder if it is there."""
    if path.exists():
        shutil.rmtree(path)


def read_stamp(tree: Path) -> str:
    """What was written by `write_stamp` for this tree; empty if nothing, or if the tree is gone."""
    stamp = tree.with_name(tree.name + ".stamp")
    return stamp.read_text(encoding="utf-8").strip() if tree.is_dir() and stamp.exists() else ""


def write_stamp(tree: Path, value: str) -> None:
    """Say beside a finished tree what it was made from."""
    tree.with_name(tree.name + ".stamp").write_text(value + "\n", encoding="utf-8")


def clear_stamp(tree: Path) -> None:
    """Forget what a tree was made from, before it is changed."""
    tree.with_name(tree.name + ".stamp").unlink(missing_ok=True)


def unpack_sdist(pin: Pin, folder: Path) -> Path:
    """Unpack the verified sdist into `folder`.

    Returns:
        The unpacked folder; it holds vendor/llama.cpp and .git.

    Raises:
        UpstreamError: see `fetch_sdist`; or it carries another llama.cpp commit than the pin.
    """
    tree = folder / pin.stem
    if pin.sha256 and read_stamp(tree) == pin.sha256:
        return tree
    archive = fetch_sdist(pin, folder)
    clear_stamp(tree)
    remove_tree(tree)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        _extract(archive, Path(temporary))
        if not (Path(temporary) / pin.stem / VENDOR / "CMakeLists.txt").exists():
            raise UpstreamError(f"{archive.name} has no {pin.stem}/{VENDOR.as_posix()}")
        os.replace(Path(temporary) / pin.stem, tree)
    commit = vendored_commit(tree)
    if pin.commit and commit != pin.commit:
        raise UpstreamError(
            f"{archive.name} carries llama.cpp {commit}, patches/UPSTREAM says {pin.commit}"
        )
    write_stamp(tree, pin.sha256 or sha256_of(archive))
    return tree


def vendored_commit(sdist: Path) -> str:
    """The llama.cpp commit that an unpacked sdist carries.

    Raises:
        UpstreamError: it has no git of llama.cpp, or its HEAD is a branch.
    """
    head = sdist / GIT_MODULE / "HEAD"
    commit = head.read_text(encoding="utf-8").strip() if head.exists() else ""
    if len(commit) != 40:
        raise UpstreamError(f"{head} does not name a commit: the sdist is laid out differently")
    return commit


def copy_vendor(sdist: Path, target: Path) -> None:
    """Copy the llama.cpp tree of an unpacked sdist, times included, to a folder not yet there."""
    # its .git is a file that points into the sdist
    shutil.copytree(sdist / VENDOR, target, ignore=shutil.ignore_patterns(".git"))


def make_pristine(pin: Pin, build: Path) -> Path:
    """Make build/pristine, the unpatched llama.cpp tree.

    Raises:
        UpstreamError: see `unpack_sdist`.
    """
    tree = build / "pristine"
    if read_stamp(tree) == pin.sha256:
        return tree
    sdist = unpack_sdist(pin, build / "sdist")
    clear_stamp(tree)
    remove_tree(tree)
    copy_vendor(sdist, tree)
    write_stamp(tree, pin.sha256)
    return tree


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Get and unpack the pinned llama.cpp sources.")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with patches/ and build/")
    args = parser.parse_args(argv)
    build = args.root / "build"
    try:
        pin = read_pin(args.root / "patches" / "UPSTREAM")
        print(unpack_sdist(pin, build / "sdist"))
        print(make_pristine(pin, build))
    except (UpstreamError, OSError, tarfile.TarError) as error:
        print(f"upstream.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
