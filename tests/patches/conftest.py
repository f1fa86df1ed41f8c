"""A tiny upstream, packed like the real sdist, to try scripts/patch.py on."""

import tarfile
from pathlib import Path

import pytest

from checkout import git
from upstream import GIT_MODULE, VENDOR, Pin, sha256_of

LINES = [f"int line_{i} = {i};\n" for i in range(40)]
MESSAGE = """{subject}

Why: the test needs a change.
Why-a-patch: it is about patches.
Class: hook
Upstream: not submitted
Remove-when: the test is gone
Depends-on: {depends}
"""


class TinyUpstream:
    """A project folder with patches/ and build/, and releases of an upstream of four files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.patches = root / "patches"
        self.tree = root / "build" / "llama.cpp"
        self.patches.mkdir(parents=True)
        self.write_readme("<!-- no table -->")

    def write_readme(self, text: str) -> None:
        (self.patches / "README.md").write_text(text)

    def release(self, version: str, sources: dict[str, str], folder: str = "sdist") -> Pin:
        """Pack a release into build/`folder` and return its pin."""
        stage = self.root.parent / f"stage-{version}"
        package = stage / f"tiny-{version}"
        vendor, module = package / VENDOR, package / GIT_MODULE
        files = {"CMakeLists.txt": "project(tiny)\n", "include/llama.h": "int api;\n"} | sources
        for name, text in files.items():
            (vendor / name).parent.mkdir(parents=True, exist_ok=True)
            (vendor / name).write_text(text)
        git(vendor, "init", "--quiet")
        git(vendor, "add", "--all")
        git(vendor, "commit", "--quiet", "--message", f"release {version}")
        git(vendor, "checkout", "--quiet", "--detach")
        module.parent.mkdir(parents=True)
        (vendor / ".git").rename(module)
        (vendor / ".git").write_text("gitdir: elsewhere\n")
        archive = self.root / "build" / folder / f"tiny-{version}.tar.gz"
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(package, arcname=package.name)
        commit = (module / "HEAD").read_text().strip()
        return Pin("tiny", version, sha256_of(archive), commit)

    def commit(self, subject: str, edits: dict[str, str], depends: str = "none") -> None:
        """Replace text in files of the checkout (key: `path|old`) and commit."""
        for key, new in edits.items():
            name, _, old = key.partition("|")
            text = (self.tree / name).read_text()
            assert old in text
            (self.tree / name).write_text(text.replace(old, new, 1))
        message = MESSAGE.format(subject=subject, depends=depends)
        git(self.tree, "commit", "--quiet", "--all", "--message", message)


@pytest.fixture
def tiny(tmp_path: Path) -> TinyUpstream:
    """Release 1.0 is pinned; there is no series yet."""
    made = TinyUpstream(tmp_path / "project")
    pin = made.release("1.0", {"src/a.cpp": "".join(LINES), "src/b.cpp": "int b;\n"})
    (made.patches / "UPSTREAM").write_text(pin.text())
    return made
