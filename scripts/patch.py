"""Work on the patch series in patches/; the policy is in patches/README.md.

    prepare       make build/upstream: the pinned llama.cpp, fresh, with the series applied
    dev           make build/llama.cpp: a git checkout with one commit per patch, to edit
    export        write the commits of the checkout back to patches/
    check         lint, apply to the pristine tree, export again and compare byte by byte
    table         show the table of patches (--write: update patches/README.md)
    bump VERSION  try the series on another llama-cpp-python release

Needs Python's standard library, pip and git; no git identity, and nothing of git's configuration
is used. `prepare` runs while the package is being built.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import series
import upstream
from checkout import AM_OPTIONS, PatchError, apply_commits, git, make_checkout, read_commits
from series import Patch, SeriesError
from upstream import Pin, UpstreamError


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def apply_patches(patches: list[Patch], folder: Path, tree: Path) -> None:
    """Apply patches to a plain tree, which must match them exactly.

    Args:
        patches: in order.
        folder: where their files are.
        tree: upstream's files; on an error it is left half patched.

    Raises:
        PatchError: one does not apply, or git changed nothing.
    """
    for patch in patches:
        before = {path: _digest(tree / path) for path in patch.paths}
        file = str((folder / patch.name).resolve())
        done = git(tree, "apply", "--whitespace=nowarn", file, check=False)
        if done.returncode != 0:
            raise PatchError(f"{patch.name} does not apply:\n{done.stderr.rstrip()}")
        if same := [path for path in patch.paths if _digest(tree / path) == before[path]]:
            raise PatchError(f"{patch.name}: git reported success and left {', '.join(same)} as is")


def _settle_times(fresh: Path, old: Path) -> None:
    """Give files equal to those of the old tree their times, all others the present time.

    A file that loses its patch must not get an old time back: make would think it built.
    """
    now = time.time()
    for folder, _, names in os.walk(fresh):
        for name in names:
            path = Path(folder, name)
            before = old / path.relative_to(fresh)
            kept = before.exists() and before.read_bytes() == path.read_bytes()
            stamp = before.stat().st_mtime if kept else now
            os.utime(path, (stamp, stamp))


def prepare(root: Path) -> Path:
    """Make build/upstream, the patched tree, unless its stamp fits the series.

    Raises:
        UpstreamError, SeriesError, PatchError: the tree of before is left as it was.
    """
    folder, tree = root / "patches", root / "build" / "upstream"
    patches = series.read_series(folder)
    stamp = series.fingerprint(folder, patches)
    if upstream.read_stamp(tree) == stamp:
        return tree
    pin = upstream.read_pin(folder / "UPSTREAM")
    sdist = upstream.unpack_sdist(pin, root / "build" / "sdist")
    fresh = tree.with_name("upstream.new")
    upstream.remove_tree(fresh)
    upstream.copy_vendor(sdist, fresh)
    apply_patches(patches, folder, fresh)
    _settle_times(fresh, tree)
    upstream.clear_stamp(tree)
    upstream.remove_tree(tree)
    os.replace(fresh, tree)
    upstream.write_stamp(tree, stamp)
    return tree


def dev(root: Path, tree: Path) -> None:
    """Make the checkout to edit the patches in.

    Raises:
        PatchError: the folder is there already (it may hold work); or the series does not apply.
    """
    if tree.exists():
        raise PatchError(
            f"{tree} is there already and may hold work: `patch.py export` what you need, delete it"
        )
    folder = root / "patches"
    patches = series.read_series(folder) if (folder / "series").exists() else []
    pin = upstream.read_pin(folder / "UPSTREAM")
    make_checkout(upstream.unpack_sdist(pin, root / "build" / "sdist"), tree)
    apply_commits(patches, folder, tree)


def write_series(patches: list[Patch], folder: Path) -> None:
    """Write patches and their `series` file; patches that are no longer there are deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.patch"):
        path.unlink()
    for patch in patches:
        (folder / patch.name).write_bytes(patch.text.encode())
    (folder / "series").write_bytes("".join(f"{patch.name}\n" for patch in patches).encode())


def update_table(root: Path) -> None:
    """Bring the table in patches/README.md up to date."""
    folder = root / "patches"
    readme = folder / "README.md"
    text = series.with_table(readme.read_text(encoding="utf-8"), series.read_series(folder))
    readme.write_text(text, encoding="utf-8")


def export(root: Path, tree: Path) -> None:
    """Write the commits of the checkout to patches/, and the table of patches.

    Raises:
        PatchError: the checkout is missing, or see `read_commits`.
    """
    if not tree.is_dir():
        raise PatchError(f"{tree} is missing: `patch.py dev` makes it")
    write_series(read_commits(tree), root / "patches")
    update_table(root)


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """A temporary folder in build/."""
    build = root / "build"
    build.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="patch-", dir=build) as folder:
        yield Path(folder)


def apply_to_pristine(patches: list[Patch], folder: Path, pristine: Path, tree: Path) -> None:
    """Apply the series to a copy of the files it touches.

    Raises:
        PatchError: it does not apply.
    """
    for path in dict.fromkeys(path for patch in patches for path in patch.paths):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        if (pristine / path).exists():
            shutil.copy2(pristine / path, tree / path)
    apply_patches(patches, folder, tree)


def round_trip(root: Path, pin: Pin, patches: list[Patch]) -> list[str]:
    """Commit the series to a new checkout, export it again, compare.

    Returns:
        What differs; then build/patches-fixed/ holds the series as it should be.

    Raises:
        PatchError: it does not apply.
    """
    folder, fixed = root / "patches", root / "build" / "patches-fixed"
    sdist = upstream.unpack_sdist(pin, root / "build" / "sdist")
    with scratch(root) as temporary:
        make_checkout(sdist, temporary / "llama.cpp")
        apply_commits(patches, folder, temporary / "llama.cpp")
        exported = read_commits(temporary / "llama.cpp")
    upstream.remove_tree(fixed)
    write_series(exported, fixed)
    names = [*[patch.name for patch in exported], "series"]
    differ = [name for name in names if _digest(folder / name) != _digest(fixed / name)]
    if not differ:
        upstream.remove_tree(fixed)
    return [f"{name}: exported again, it differs; {fixed} has it right" for name in differ]


def check(root: Path) -> list[str]:
    """Everything that can be said of the series without building it.

    Returns:
        The problems; empty if there are none.

    Raises:
        UpstreamError, SeriesError, PatchError: it cannot be read or applied.
    """
    folder = root / "patches"
    patches = series.read_series(folder)
    problems = series.lint(patches)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    if series.with_table(readme, patches) != readme:
        problems.append("README.md: its table is out of date; `patch.py table --write` renews it")
    pin = upstream.read_pin(folder / "UPSTREAM")
    pristine = upstream.make_pristine(pin, root / "build")
    with scratch(root) as temporary:
        apply_to_pristine(patches, folder, pristine, temporary)
    return problems + round_trip(root, pin, patches)


def _try_patch(patch: Patch, folder: Path, tree: Path) -> str:
    """Commit one patch to a checkout; a conflict changes nothing.

    Returns:
        How it went.
    """
    file = str((folder / patch.name).resolve())
    clean = git(tree, "apply", "--check", file, check=False).returncode == 0
    if not clean and git(tree, "apply", "--check", "--reverse", file, check=False).returncode == 0:
        return "already upstream"
    head = git(tree, "rev-parse", "HEAD").stdout
    done = git(tree, "am", *AM_OPTIONS, file, check=False)
    if done.returncode != 0:
        files = git(tree, "diff", "--name-only", "--diff-filter=U", check=False).stdout.split()
        git(tree, "am", "--abort", check=False)
        return f"conflict in {', '.join(files) or 'a file that is gone'}"
    # with --3way git drops a patch whose changes are all there
    unchanged = git(tree, "rev-parse", "HEAD").stdout == head
    return "already upstream" if unchanged else "clean" if clean else "fuzzy"


def bump(root: Path, version: str, dry_run: bool) -> bool:
    """Try the series on another release and print how each patch fares.

    Args:
        root: folder with patches/.
        version: of llama-cpp-python.
        dry_run: only report. Otherwise patches/ and UPSTREAM are rewritten if no patch conflicts.

    Returns:
        Whether every patch applies or is upstream already.

    Raises:
        UpstreamError: one of the two releases cannot be had.
    """
    folder, build = root / "patches", root / "build"
    patches, old = series.read_series(folder), upstream.read_pin(folder / "UPSTREAM")
    old_sdist = upstream.unpack_sdist(old, build / "sdist")
    sdist = upstream.unpack_sdist(Pin(old.package, version, "", ""), build / "bump")
    commit = upstream.vendored_commit(sdist)
    digest = upstream.sha256_of(build / "bump" / f"{sdist.name}.tar.gz")
    new = Pin(old.package, version, digest, commit)
    print(f"{old.version} (llama.cpp {old.commit[:9]}) -> {version} (llama.cpp {commit[:9]})")
    with scratch(root) as temporary:
        tree = temporary / "llama.cpp"
        make_checkout(sdist, tree)
        # the blobs that the patches were made from, for the three-way merge
        objects = (old_sdist / upstream.GIT_MODULE / "objects").resolve().as_posix()
        with (tree / ".git/objects/info/alternates").open("a", encoding="utf-8") as file:
            file.write(objects + "\n")
        results = {patch.name: _try_patch(patch, folder, tree) for patch in patches}
        width = max((len(name) for name in results), default=0)
        for name, result in results.items():
            print(f"  {name:{width}}  {result}")
        fits = not any(result.startswith("conflict") for result in results.values())
        if fits and not dry_run:
            write_series(read_commits(tree), folder)
            (folder / "UPSTREAM").write_text(new.text(), encoding="utf-8")
            update_table(root)
            print(f"patches/ and UPSTREAM are for {version} now; build and test before committing")
        elif not fits:
            print("patches/ is unchanged: resolve the conflicts in `patch.py dev`, then `export`")
    return fits


def _print_check(root: Path) -> int:
    problems = check(root)
    print(series.table(series.read_series(root / "patches")), end="")
    for problem in problems:
        print(f"patches: {problem}", file=sys.stderr)
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Work on the patch series in patches/.")
    parser.add_argument("--root", type=Path, default=upstream.ROOT, help="folder with patches/")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare", help="make build/upstream, the patched tree")
    for name, text in (("dev", "make a checkout to edit"), ("export", "write it to patches/")):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("--tree", type=Path, help="the checkout, default build/llama.cpp")
    commands.add_parser("check", help="lint, apply, export again, compare")
    sub = commands.add_parser("table", help="the table of patches")
    sub.add_argument("--write", action="store_true", help="update patches/README.md")
    sub = commands.add_parser("bump", help="try another llama-cpp-python release")
    sub.add_argument("version")
    sub.add_argument("--dry-run", action="store_true", help="report, change nothing")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (PatchError, SeriesError, UpstreamError, tarfile.TarError, OSError) as error:
        print(f"patch.py {args.command}: {error}", file=sys.stderr)
        return 1


def _run(args: argparse.Namespace) -> int:
    root: Path = args.root
    if args.command == "prepare":
        print(prepare(root))
    elif args.command == "dev":
        dev(root, args.tree or root / "build" / "llama.cpp")
    elif args.command == "export":
        export(root, args.tree or root / "build" / "llama.cpp")
    elif args.command == "check":
        return _print_check(root)
    elif args.command == "table" and args.write:
        update_table(root)
    elif args.command == "table":
        print(series.table(series.read_series(root / "patches")), end="")
    else:
        return 0 if bump(root, args.version, args.dry_run) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
