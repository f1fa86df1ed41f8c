"""A git checkout of llama.cpp with one commit per patch, whatever git's configuration is.

Used by scripts/patch.py.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import series
import upstream
from series import Patch

HEAD_REF = "refs/patches/upstream-head"
DIFF_CONFIG = {
    "core.autocrlf": "false",
    "core.quotePath": "true",
    "diff.algorithm": "myers",
    "diff.context": "3",
    "diff.indentHeuristic": "true",
    "diff.interHunkContext": "0",
    "diff.mnemonicPrefix": "false",
    "diff.noprefix": "false",
    "diff.renames": "true",
    "diff.suppressBlankEmpty": "false",
}
FORMAT_OPTIONS = ("--zero-commit", "--full-index", "--no-signature", "--no-stat", "--keep-subject")
AM_OPTIONS = ("--3way", "--keep-non-patch", "--keep-cr", "--no-gpg-sign")


class PatchError(Exception):
    """The series does not apply, or an edit would be lost."""


def _git_env(folder: Path) -> dict[str, str]:
    # GIT_* of a surrounding git hook would redirect every command to another repository
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    name, mail = series.AUTHOR.rstrip(">").split(" <")
    for role in ("AUTHOR", "COMMITTER"):
        env[f"GIT_{role}_NAME"], env[f"GIT_{role}_EMAIL"] = name, mail
        env[f"GIT_{role}_DATE"] = "2000-01-01T00:00:00Z"
    # `git apply` below the root of another repository does nothing and says nothing
    ceilings = {str(folder.parent.absolute()), str(folder.parent.resolve())}
    env["GIT_CEILING_DIRECTORIES"] = os.pathsep.join(sorted(ceilings))
    env |= {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull, "LC_ALL": "C", "TZ": "UTC"}
    env |= {"GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_COUNT": "1"}
    env |= {"GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
    return env


def git(folder: Path, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run git in a folder, with the same result on every machine.

    Raises:
        PatchError: git is not installed; or it failed and `check` is set.
    """
    try:
        done = subprocess.run(
            ["git", *args],
            cwd=folder,
            env=_git_env(folder),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise
        raise PatchError(
            "git is needed to apply the patches and was not found: install it"
        ) from error
    if check and done.returncode != 0:
        raise PatchError(
            f"git {' '.join(args)} failed in {folder}:\n{done.stdout}{done.stderr}".rstrip()
        )
    return done


def make_checkout(sdist: Path, tree: Path) -> None:
    """Clone the shallow llama.cpp repository of an unpacked sdist, at the commit it carries."""
    commit = upstream.vendored_commit(sdist)
    source = str((sdist / upstream.GIT_MODULE).resolve())
    tree.parent.mkdir(parents=True, exist_ok=True)
    target = str(tree.absolute())
    git(tree.parent, "clone", "--quiet", "--shared", "--no-checkout", source, target)
    for key, value in DIFF_CONFIG.items():
        git(tree, "config", key, value)
    git(tree, "checkout", "--quiet", "-B", "laq", commit)
    git(tree, "update-ref", HEAD_REF, commit)


def apply_commits(patches: list[Patch], folder: Path, tree: Path) -> None:
    """Make one commit per patch in a checkout.

    Raises:
        PatchError: one does not apply; the checkout is left at the commit before it.
    """
    for patch in patches:
        done = git(tree, "am", *AM_OPTIONS, str((folder / patch.name).resolve()), check=False)
        if done.returncode != 0:
            git(tree, "am", "--abort", check=False)
            raise PatchError(f"{patch.name} does not apply:\n{done.stdout}{done.stderr}".rstrip())


def read_commits(tree: Path) -> list[Patch]:
    """The commits of a checkout since upstream's, as patches.

    Raises:
        PatchError: it has uncommitted changes or merges, or two commits have the same subject.
    """
    if git(tree, "status", "--porcelain", "--untracked-files=no").stdout:
        raise PatchError(f"{tree} has uncommitted changes: commit them to the patch they belong to")
    if git(tree, "rev-list", "--merges", f"{HEAD_REF}..HEAD").stdout:
        raise PatchError(f"{tree} has merge commits: rebase it on {HEAD_REF}")
    config = [part for pair in DIFF_CONFIG.items() for part in ("-c", "=".join(pair))]
    with tempfile.TemporaryDirectory() as folder:
        span = f"{HEAD_REF}..HEAD"
        git(tree, *config, "format-patch", *FORMAT_OPTIONS, "--quiet", "-o", folder, span)
        texts = [path.read_bytes().decode("utf-8") for path in sorted(Path(folder).iterdir())]
    patches = [parse_exported(text) for text in texts]
    names = [patch.name for patch in patches]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PatchError(f"two commits would be exported to the same file: {', '.join(twice)}")
    return patches


def parse_exported(text: str) -> Patch:
    """A `git format-patch` file as it is kept in patches/: fixed header, named by its subject."""
    text = series.normalize(text)
    patch = series.parse_patch("export", text)
    return replace(patch, name=f"{series.slug(patch.subject)}.patch")
