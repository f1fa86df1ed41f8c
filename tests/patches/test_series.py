"""The policy of patches/README.md, rule by rule, and the real series against it."""

import re
from pathlib import Path

import pytest

import patch
import series
import upstream

ROOT = Path(__file__).resolve().parents[2]

HEADER = {
    "Why": "it is missing.",
    "Why-a-patch": "it cannot be elsewhere.",
    "Class": "hook",
    "Upstream": "not submitted",
    "Remove-when": "never",
    "Depends-on": "none",
}


def diff(added: list[str], removed: int = 0, path: str = "src/a.cpp", context: str = " x\n") -> str:
    """A diff of one hunk."""
    lines = [f"+{line}\n" for line in added] + [f"-old {i}\n" for i in range(removed)]
    return (
        f"diff --git a/{path} b/{path}\nindex 1..2 100644\n--- a/{path}\n+++ b/{path}\n"
        f"@@ -1,{removed + 1} +1,{len(added) + 1} @@\n{context}{''.join(lines)}"
    )


def make(
    *hunks: str,
    subject: str = "llama : hook it",
    name: str = "",
    extra: str = "",
    **fields: str,
) -> series.Patch:
    """A patch; a field is left out with an empty text."""
    header = HEADER | {key.replace("_", "-"): value for key, value in fields.items()}
    body = "".join(f"{key}: {value}\n" for key, value in header.items() if value) + extra
    text = f"{series.MAIL_LINE}\nFrom: {series.AUTHOR}\nSubject: {subject}\n\n{body}\n"
    text += "".join(hunks or [diff(["hook(); // [TAG_LAQ]"])])
    return series.parse_patch(name or f"{series.slug(subject)}.patch", text)


def only_problem(*patches: series.Patch) -> str:
    """The one thing that lint finds."""
    (problem,) = series.lint(list(patches))
    return problem


def test_real_series_follows_the_policy() -> None:
    patches = series.read_series(ROOT / "patches")
    assert patches
    assert series.lint(patches) == []


def test_real_table_is_up_to_date() -> None:
    readme = (ROOT / "patches" / "README.md").read_text(encoding="utf-8")
    assert series.with_table(readme, series.read_series(ROOT / "patches")) == readme


def test_pin_is_the_required_release() -> None:
    pin = upstream.read_pin(ROOT / "patches" / "UPSTREAM")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = re.findall(r'"llama-cpp-python(?:\[\w+\])?==([^"]+)"', pyproject)
    assert required and set(required) == {pin.version}
    version = (ROOT / "laq_gguf" / "_version.py").read_text(encoding="utf-8")
    assert f'LLAMA_CPP_PYTHON_VERSION = "{pin.version}"' in version


def test_good_patch_has_no_problem() -> None:
    assert series.lint([make()]) == []


@pytest.mark.parametrize("field", series.FIELDS)
def test_each_field_is_required(field: str) -> None:
    assert f"has no `{field}:`" in only_problem(make(**{field.replace("-", "_"): ""}))


def test_field_may_go_on_in_the_next_line() -> None:
    found = make(Depends_on="none\nRemoves: one line\nthat is replaced").fields
    assert found["Removes"] == "one line that is replaced"


def test_class_must_be_known() -> None:
    assert "'magic'" in only_problem(make(Class="magic"))


def test_depends_on_must_come_earlier() -> None:
    first, second = make(), make(subject="llama : use it", Depends_on="llama-hook-it.patch")
    assert series.lint([first, second]) == []
    assert "not an earlier patch" in only_problem(second, first)


def test_name_follows_the_subject() -> None:
    problem = only_problem(make(subject="ggml-cpu : dispatch LAQ_SCORE", name="0001-x.patch"))
    assert problem.endswith("ggml-cpu-dispatch-laq-score.patch")


@pytest.mark.parametrize("subject", ["hook it", "fixup! llama : hook it", "llama : " + "x" * 70])
def test_subject_has_a_form(subject: str) -> None:
    assert "subject" in only_problem(make(subject=subject))


def test_hunk_budget() -> None:
    lines = ["f(); // [TAG_LAQ]"] * series.MAX_HUNK
    assert series.lint([make(diff(lines))]) == []
    assert f"adds {series.MAX_HUNK + 1} lines" in only_problem(make(diff([*lines, "g();"])))


def test_patch_budget() -> None:
    hunks = [diff(["f(); // [TAG_LAQ]"] * 20, path=f"src/{i}.cpp") for i in range(3)]
    assert series.lint([make(*hunks)]) == []
    more = diff(["f(); // [TAG_LAQ]"])
    assert "adds 61 lines, at most 60" in only_problem(make(*hunks, more))


def test_test_class_has_a_larger_budget_and_needs_no_tag() -> None:
    assert series.lint([make(diff(["f();"] * 150), Class="test")]) == []
    assert any("151" in line for line in series.lint([make(diff(["f();"] * 151), Class="test")]))


def test_series_budget() -> None:
    hunks = [diff(["f(); // [TAG_LAQ]"] * 20, path=f"src/{i}.cpp") for i in range(3)]
    five = [make(*hunks, subject=f"llama : hook {i}") for i in range(5)]
    assert series.lint(five) == []
    assert only_problem(*five, make()).startswith("series: adds 301 lines")


def test_removed_lines_need_a_defence() -> None:
    hunk = diff(["f(); // [TAG_LAQ]"], removed=2)
    assert "removes 2 lines" in only_problem(make(hunk))
    assert series.lint([make(hunk, extra="Removes: they are replaced\n")]) == []


def test_each_hunk_carries_the_tag() -> None:
    bare = diff(["g();"], path="src/b.cpp")
    assert "src/b.cpp:1 carries" in only_problem(make(diff(["f(); // [TAG_LAQ]"]), bare))
    # upstream's own tagged line does not count
    context = " f(); // [TAG_LAQ]\n"
    assert "carries" in only_problem(make(diff(["g();"], context=context)))
    assert series.lint([make(bare, Class="build")]) == []


@pytest.mark.parametrize("line", ["f(); // [TAG_LAQ] ", "f();\t// [TAG_LAQ]\t"])
def test_added_line_ends_in_no_blank(line: str) -> None:
    assert "ends in blanks" in only_problem(make(diff([line])))


def test_only_ascii_is_added() -> None:
    assert "not ASCII" in only_problem(make(diff(["f(); // \u2014 [TAG_LAQ]"])))
    assert "not ASCII" in only_problem(make(Why="it is \u2014 missing"))
    assert (
        series.lint([make(diff(["f(); // [TAG_LAQ]"], context=" // \u2014 upstream's \n"))]) == []
    )


@pytest.mark.parametrize(
    "line", ["new file mode 100644", "deleted file mode 100644", "rename from src/b", "old mode 1"]
)
def test_no_file_comes_or_goes(line: str) -> None:
    hunk = diff(["f(); // [TAG_LAQ]"]).replace("index 1..2 100644", line)
    assert line in only_problem(make(hunk))


def test_public_header_is_frozen() -> None:
    hunk = diff(["int x; // [TAG_LAQ]"], path="include/llama.h")
    assert "ctypes mirrors" in only_problem(make(hunk))


def test_lines_that_look_like_headers_are_counted() -> None:
    # an added line "++ b/y" and a removed line "-- a/y" read like file names
    found = make(diff(["++ b/y", "f(); // [TAG_LAQ]"], removed=1).replace("-old 0", "--- a/y"))
    assert found.paths == ["src/a.cpp"]
    assert (found.n_added, found.n_removed) == (2, 1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("a.patch\na.patch\nb.patch\n", "more than once: a.patch"),
        ("a.patch\nb.patch\nc.patch\n", "not there: c.patch"),
        ("a.patch\n", "does not name: b.patch"),
    ],
)
def test_series_and_folder_are_a_bijection(tmp_path: Path, names: str, message: str) -> None:
    for name in ("a.patch", "b.patch"):
        (tmp_path / name).write_text(make().text)
    (tmp_path / "series").write_text(names)
    with pytest.raises(series.SeriesError, match=message):
        series.read_series(tmp_path)


def test_table_counts() -> None:
    readme = f"top\n{series.TABLE_BEGIN}\nold\n{series.TABLE_END}\nend\n"
    text = series.with_table(readme, [make(diff(["f(); // [TAG_LAQ]"] * 3, removed=1))])
    assert "| `llama-hook-it.patch` | hook | `src/a.cpp` | 3 | 1 | never |" in text
    assert text.startswith("top\n") and text.endswith("\nend\n") and "old" not in text
    with pytest.raises(series.SeriesError, match="needs the lines"):
        series.with_table("no markers", [])


def test_real_series_round_trip() -> None:
    assert patch.check(ROOT) == []


def test_built_tree_differs_only_where_the_series_says() -> None:
    tree, pristine = patch.prepare(ROOT), ROOT / "build" / "pristine"
    names = [path.relative_to(pristine) for path in pristine.rglob("*") if path.is_file()]
    assert len(names) > 1000
    differ = {n.as_posix() for n in names if (tree / n).read_bytes() != (pristine / n).read_bytes()}
    patches = series.read_series(ROOT / "patches")
    assert differ == {path for found in patches for path in found.paths}
    assert sum(path.is_file() for path in tree.rglob("*")) == len(names)
