"""scripts/patch.py and scripts/upstream.py on a tiny upstream: nothing lost, nothing half done."""

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import checkout
import patch
import series
import upstream
from checkout import PatchError, git

MARKERS = f"# Patches\n\n{series.TABLE_BEGIN}\n{series.TABLE_END}\n"
ONE = {"src/a.cpp|int line_10 = 10;\n": "int line_10 = 10;\nint one; // [TAG_LAQ]\n"}
# changes what ONE adds
TWO = {"src/a.cpp|int one; // [TAG_LAQ]\n": "int one; // [TAG_LAQ]\nint two; // [TAG_LAQ]\n"}


@pytest.fixture
def two(tiny: Any) -> Any:
    """A series of two overlapping patches, exported."""
    tiny.write_readme(MARKERS)
    patch.dev(tiny.root, tiny.tree)
    tiny.commit("src : add one", ONE)
    tiny.commit("src : add two", TWO, depends="src-add-one.patch")
    patch.export(tiny.root, tiny.tree)
    return tiny


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def source(root: Path) -> str:
    """The patched file of the product."""
    return (root / "build" / "upstream" / "src" / "a.cpp").read_text()


def test_export_names_patches_by_their_subject(two: Any) -> None:
    names = (two.patches / "series").read_text().split()
    assert names == ["src-add-one.patch", "src-add-two.patch"]
    assert patch.check(two.root) == []


def test_prepare_applies_overlapping_patches_again_and_again(two: Any) -> None:
    tree = patch.prepare(two.root)
    assert "int one; // [TAG_LAQ]\nint two; // [TAG_LAQ]\n" in source(two.root)
    (tree / "mark").touch()
    patch.prepare(two.root)
    assert (tree / "mark").exists(), "the same stamp: nothing is done"

    two.commit("src : add three", {"src/b.cpp|int b;": "int b;\nint c; // [TAG_LAQ]"})
    patch.export(two.root, two.tree)
    patch.prepare(two.root)
    assert not (tree / "mark").exists(), "another stamp: a fresh unpack"
    assert "int c;" in (tree / "src" / "b.cpp").read_text()


def test_prepare_inside_another_repository(two: Any) -> None:
    # there `git apply` does nothing and says nothing, unless told where to stop looking
    git(two.root, "init", "--quiet")
    patch.prepare(two.root)
    assert "int two;" in source(two.root)


def test_patch_that_changes_nothing_is_an_error(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkout._git_env

    def no_ceiling(folder: Path) -> dict[str, str]:
        return {k: v for k, v in real(folder).items() if k != "GIT_CEILING_DIRECTORIES"}

    git(two.root, "init", "--quiet")
    monkeypatch.setattr(checkout, "_git_env", no_ceiling)
    with pytest.raises(PatchError, match=r"left src/a\.cpp as is"):
        patch.prepare(two.root)
    assert not (two.root / "build" / "upstream").exists()


def test_file_that_loses_its_patch_gets_a_new_time(two: Any) -> None:
    tree = patch.prepare(two.root)
    changed, untouched = tree / "src" / "a.cpp", tree / "src" / "b.cpp"
    before = changed.stat().st_mtime, untouched.stat().st_mtime
    git(two.tree, "reset", "--quiet", "--hard", "HEAD~1")
    patch.export(two.root, two.tree)
    assert not (two.patches / "src-add-two.patch").exists(), "a dropped commit drops its file"
    patch.prepare(two.root)
    assert "int two;" not in source(two.root)
    assert changed.stat().st_mtime > before[0], "make would think it built"
    assert untouched.stat().st_mtime == before[1], "make would build it again"


def test_prepare_that_fails_leaves_the_tree(two: Any) -> None:
    patch.prepare(two.root)
    file = two.patches / "src-add-two.patch"
    file.write_text(file.read_text().replace(" int line_9 = 9;", " int line_9 = 0;"))
    with pytest.raises(PatchError, match=r"src-add-two\.patch does not apply"):
        patch.prepare(two.root)
    assert "int two;" in source(two.root)


def test_dev_refuses_to_overwrite(two: Any) -> None:
    with pytest.raises(PatchError, match="may hold work"):
        patch.dev(two.root, two.tree)


def test_dev_and_export_are_lossless(two: Any) -> None:
    before = contents(two.patches)
    shutil.rmtree(two.tree)
    patch.dev(two.root, two.tree)
    subjects = git(two.tree, "log", "--format=%s", f"{checkout.HEAD_REF}..").stdout
    assert subjects == "src : add two\nsrc : add one\n"
    patch.export(two.root, two.tree)
    assert contents(two.patches) == before


def test_export_refuses_uncommitted_changes(two: Any) -> None:
    (two.tree / "src" / "b.cpp").write_text("int lost;\n")
    with pytest.raises(PatchError, match="uncommitted changes"):
        patch.export(two.root, two.tree)


def test_author_and_date_do_not_reach_the_patches(two: Any) -> None:
    before = contents(two.patches)
    who = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    git(two.tree, *who, "commit", "--quiet", "--amend", "--no-edit", "--author=S <s@example.org>")
    patch.export(two.root, two.tree)
    assert contents(two.patches) == before


def test_check_hands_back_the_fix(two: Any) -> None:
    file = two.patches / "src-add-one.patch"
    right = file.read_bytes()
    # still applies, but is not what git would write
    file.write_bytes(right.replace(b"index ", b"index 0000000", 1))
    problems = patch.check(two.root)
    fixed = two.root / "build" / "patches-fixed"
    assert len(problems) == 1 and str(fixed) in problems[0]
    assert (fixed / file.name).read_bytes() == right


def test_check_sees_an_old_table(two: Any) -> None:
    two.write_readme(MARKERS)
    assert any("table is out of date" in problem for problem in patch.check(two.root))
    patch.update_table(two.root)
    assert patch.check(two.root) == []


def test_nothing_of_git_s_configuration_is_used(
    two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text("[diff]\n\tnoprefix = true\n\tcontext = 9\n[core]\n\tautocrlf = true\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert patch.check(two.root) == []
    assert "int two;" in (patch.prepare(two.root) / "src" / "a.cpp").read_text()


def test_git_missing(two: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PatchError, match="not found: install it"):
        patch.prepare(two.root)


A_LINES = [f"int line_{i} = {i};\n" for i in range(40)]
MOVED = "".join(["int new_first;\n", *A_LINES])
TAKEN = "".join(A_LINES).replace("= 10;\n", "= 10;\nint one; // [TAG_LAQ]\n")
NEAR = "".join(A_LINES).replace("int line_8 ", "int renamed ")
OTHER = "".join(A_LINES).replace("int line_10 = 10;\n", "int other;\n")


@pytest.mark.parametrize(
    ("text", "results"),
    [
        (MOVED, ["clean", "clean"]),
        (NEAR, ["fuzzy", "clean"]),
        (TAKEN, ["already upstream", "clean"]),
        (OTHER, ["conflict in src/a.cpp", "conflict in src/a.cpp"]),
    ],
    ids=["moved", "near", "taken", "other"],
)
def test_bump(two: Any, capsys: Any, text: str, results: list[str]) -> None:
    before = contents(two.patches)
    new = two.release("2.0", {"src/a.cpp": text, "src/b.cpp": "int b;\n"}, folder="bump")
    fits = not any("conflict" in result for result in results)
    assert patch.bump(two.root, "2.0", dry_run=True) == fits
    names = ["src-add-one.patch", "src-add-two.patch"]
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert [shown[name] for name in names] == results
    assert contents(two.patches) == before, "a dry run writes nothing"

    assert patch.bump(two.root, "2.0", dry_run=False) == fits
    if not fits:
        assert contents(two.patches) == before
        return
    assert upstream.read_pin(two.patches / "UPSTREAM") == new
    kept = [name for name in names if shown[name] != "already upstream"]
    assert (two.patches / "series").read_text().split() == kept


def test_archive_with_another_sha256_is_not_used(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = upstream.read_pin(tiny.patches / "UPSTREAM")
    archive = tiny.root / "build" / "sdist" / "tiny-1.0.tar.gz"
    archive.write_bytes(archive.read_bytes() + b"\0")

    def serve(requirement: str, folder: Path, *options: str) -> None:
        assert requirement == "tiny==1.0"
        (folder / archive.name).write_bytes(b"something else")

    monkeypatch.setattr(upstream, "pip_download", serve)
    with pytest.raises(upstream.UpstreamError, match=f"wants {pin.sha256}"):
        upstream.make_pristine(pin, tiny.root / "build")
    assert not archive.exists() and not (tiny.root / "build" / "pristine").exists()


def test_other_commit_than_the_pin(tiny: Any) -> None:
    path = tiny.patches / "UPSTREAM"
    pin = upstream.read_pin(path)
    path.write_text(path.read_text().replace(pin.commit, "0" * 40))
    with pytest.raises(upstream.UpstreamError, match=f"carries llama.cpp {pin.commit}"):
        upstream.unpack_sdist(upstream.read_pin(path), tiny.root / "build" / "sdist")


def _link(name: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc"
    return member


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tarfile.TarInfo("../out"), "unsafe path"),
        (lambda: tarfile.TarInfo("tiny-1.0/../../out"), "unsafe path"),
        (lambda: tarfile.TarInfo("/out"), "unsafe path"),
        (lambda: _link("tiny-1.0/link"), "no plain file"),
    ],
    ids=["parent", "inside", "absolute", "link"],
)
def test_unsafe_archive(tmp_path: Path, make: Callable[[], tarfile.TarInfo], message: str) -> None:
    archive = tmp_path / "sdist" / "tiny-1.0.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(make(), io.BytesIO())
    pin = upstream.Pin("tiny", "1.0", upstream.sha256_of(archive), "0" * 40)
    with pytest.raises(upstream.UpstreamError, match=message):
        upstream.unpack_sdist(pin, archive.parent)
    assert not (tmp_path / "out").exists() and not (archive.parent / "tiny-1.0").exists()


@pytest.mark.parametrize(
    "text",
    ["", "package = p\nversion = 1\nsha256 = x\n", "package = p\npackage = p\n", "colour = red\n"],
    ids=["empty", "missing", "twice", "unknown"],
)
def test_pin_must_be_complete(tmp_path: Path, text: str) -> None:
    (tmp_path / "UPSTREAM").write_text(text)
    with pytest.raises(upstream.UpstreamError):
        upstream.read_pin(tmp_path / "UPSTREAM")
