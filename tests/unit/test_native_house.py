"""The house rules of native/: who includes whom, how long things are, how much a struct holds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRC, GGML, INCLUDE = (ROOT / "native" / name for name in ("src", "ggml", "include"))

#: parts of native/src, each of which may include those before it and no other
ORDER = (
    "policy", "seq", "error", "archive", "threads", "rows", "store", "graph-capture", "compute",
    "graph-columns", "graph-score", "graph-move", "graph-fit", "saved", "context", "select",
    "evict", "recall", "trigger", "read", "api", "hooks", "state", "park", "test",
)  # fmt: skip
#: files of a part that has another name
PARTS = {"hooks-graph": "hooks"}
MOST_MEMBERS, MOST_LINES_OF_A_FUNCTION, MOST_LINES_OF_A_FILE, MOST_LINES = 15, 60, 600, 6000
CODE = (".h", ".cpp", ".cu", ".cuh", ".metal")


def files_of(*folders: Path) -> list[Path]:
    found = sorted(p for folder in folders for p in folder.iterdir() if p.suffix in CODE)
    assert found, "there is no source: this test runs in a checkout"
    return found


def bare(text: str) -> str:
    """The text without what is in comments and strings; lines stay where they are."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\''

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n") if match[0].startswith("/") else '""'

    return re.sub(pattern, blank, text, flags=re.DOTALL)


def includes_of(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, flags=re.MULTILINE)


def end_of_block(text: str, start: int) -> int:
    """The place behind the brace that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i + 1
    raise ValueError(f"a brace is not closed: {text[start : start + 80]!r}")


# (a) who includes whom


def part_of(path: Path) -> str:
    name = path.stem.removeprefix("laq-")
    return PARTS.get(name, name)


def wrong_includes(name: str, includes: list[str], anywhere: set[str]) -> list[str]:
    """Includes that the place of a file does not allow; `anywhere`: headers that all may have."""
    place, wrong = ORDER.index(part_of(Path(name))), []
    for header in includes:
        if not header.startswith("laq") or header in anywhere:
            continue
        of_header = ORDER.index(part_of(Path(header)))
        own = name.endswith(".cpp") and of_header == place
        if of_header >= place and not own:
            wrong.append(header)
    return wrong


@pytest.mark.parametrize("path", files_of(SRC), ids=lambda p: p.name)
def test_parts_include_those_before_them_alone(path: Path) -> None:
    assert part_of(path) in ORDER, "a new part: give it a place in ORDER"
    anywhere = {p.name for p in files_of(INCLUDE, GGML)}
    assert wrong_includes(path.name, includes_of(path.read_text("utf-8")), anywhere) == []


def test_a_part_that_looks_down_is_found() -> None:
    assert wrong_includes("laq-seq.h", ["laq.h", "laq-store.h"], {"laq.h"}) == ["laq-store.h"]
    assert wrong_includes("laq-seq.cpp", ["laq-seq.h", "ggml.h", "laq-policy.h"], set()) == []
    assert wrong_includes("laq-seq.h", ["laq-seq.h"], set()) == ["laq-seq.h"]


def test_every_place_is_taken() -> None:
    assert {part_of(path) for path in files_of(SRC)} == set(ORDER)


def test_ops_know_nothing_of_evictions() -> None:
    own = {p.name for p in files_of(GGML)}
    for path in files_of(GGML):
        ours = {i for i in includes_of(path.read_text("utf-8")) if i.startswith("laq")}
        assert ours <= own, f"{path.name} includes {sorted(ours - own)}"


# (b) what a struct holds


def n_declared(statement: str) -> int:
    """Data members that a statement of a struct declares."""
    text = re.sub(r"\b(public|private|protected)\s*:(?!:)", " ", statement).strip()
    if (
        not text
        or re.match(r"(using|typedef|friend|static|template|enum)\b", text)
        or "operator" in text
    ):
        return 0
    while text != (text := re.sub(r"<[^<>]*>", "", text)):
        pass
    text = re.sub(r"=[^,]*", "", text)
    if "(" in text or re.fullmatch(r"(struct|class|union)\s+\w+", text):
        return 0
    return 1 + text.count(",")


def statements_of(body: str) -> Iterator[str]:
    """The statements of a struct, without the bodies of functions and of types."""
    statement, i = "", 0
    while i < len(body):
        if body[i] == "{":
            i = end_of_block(body, i)
            head = re.sub(r"\b(public|private|protected)\s*:(?!:)", " ", statement).strip()
            if re.match(r"(struct|class|union|enum)\b", head):
                statement = "" if body[i:].lstrip()[:1] == ";" else "type "
            elif "(" in re.sub(r"<[^<>]*>", "", re.sub(r"<[^<>]*>", "", head)):
                statement = ""  # a function, which no semicolon ends
        elif body[i] == ";":
            yield statement
            statement, i = "", i + 1
        else:
            statement, i = statement + body[i], i + 1
    yield statement


def members_of(text: str) -> dict[str, int]:
    """Data members of each struct and class that is defined in a file, nested ones included."""
    text, found = bare(text), {}
    for match in re.finditer(r"\b(?:struct|class)\s+(\w+)[^;{}()=]*\{", text):
        body = text[match.end() : end_of_block(text, match.end() - 1) - 1]
        found[match[1]] = sum(map(n_declared, statements_of(body)))
    return found


def test_data_members_are_counted() -> None:
    text = """
    struct outer : base {
        // int commented;
        int a, b = 2;
        std::vector<std::pair<int, char>> c;
        std::function<void(const std::string &)> d;
        float e{ 1.0f }, f[2];
        static constexpr int N = 3;
        enum kind { ONE, TWO };
        kind g = ONE;
        struct inner { int x; double * y; };
        inner h;
        outer(int a) : a(a), b{ 2 } {}
        outer(const outer &) = delete;
        outer & operator=(const outer &) = delete;
        int get() const { return a; }
        void set(int value);
      private:
        std::array<int, N> i;
    };
    struct later;
    """
    assert members_of(text) == {"outer": 9, "inner": 2}


@pytest.mark.parametrize("path", files_of(SRC), ids=lambda p: p.name)
def test_a_struct_holds_few_members(path: Path) -> None:
    members = members_of(path.read_text("utf-8"))
    assert {k: n for k, n in members.items() if n > MOST_MEMBERS} == {}


# (c) how long a function is


def functions_of(text: str) -> dict[str, int]:
    """Lines of each function whose definition begins a line, from its first to its last."""
    text, found, i = bare(text), {}, 0
    text = re.sub(
        r"^\s*#(?:[^\n]*\\\n)*[^\n]*", lambda m: "\n" * m[0].count("\n"), text, flags=re.M
    )
    while match := re.compile(r"^[A-Za-z_\[]", re.MULTILINE).search(text, i):
        start, depth = match.start(), 0
        for end in range(start, len(text)):
            depth += (text[end] in "([") - (text[end] in ")]")
            if depth == 0 and text[end] in ";{":
                break
        head = text[start:end]
        if end + 1 >= len(text) or text[end] == ";" or re.match(r"namespace\b|extern\s*\"\"", head):
            i = end + 1
            continue
        i = end_of_block(text, end)
        no_templates = re.sub(r"\btemplate\s*<.*?>\s*(?=\w)", "", head, flags=re.DOTALL)
        is_type = re.match(r"(struct|class|enum|union|typedef)\b[^(]*$", no_templates)
        if "(" in head and not is_type and not head.rstrip().endswith("="):
            name = re.search(r"([\w:~]+|operator\W+)\s*\(", no_templates)
            found[name[1] if name else head.strip()] = text.count("\n", start, i) + 1
    return found


def test_lines_of_functions_are_counted() -> None:
    text = """
#define BODY(x) \\
    do { \\
    } while (0)
static int table[] = { 1, 2 };
struct s {
    int f() {
        return 1;
    }
};
namespace n {
static int one(int a) { return a; }
template <typename T, int N>
static void four(T & t,
                 const char * text = "{") {
    // }
    t.call([&] { return '}'; });
}
}  // namespace n
int later(int a);
"""
    assert functions_of(text) == {"one": 1, "four": 6}


@pytest.mark.parametrize("path", files_of(SRC, GGML), ids=lambda p: p.name)
def test_functions_are_short(path: Path) -> None:
    lengths = functions_of(path.read_text("utf-8"))
    assert {k: n for k, n in lengths.items() if n > MOST_LINES_OF_A_FUNCTION} == {}


def test_most_functions_are_seen() -> None:
    found = {p.name: functions_of(p.read_text("utf-8")) for p in files_of(SRC)}
    assert "laq_attach" in found["laq-api.cpp"] and "laq_evict" in found["laq-evict.cpp"]
    assert sum(map(len, found.values())) > 200


# (d) how long a file is


@pytest.mark.parametrize("path", files_of(SRC, GGML, INCLUDE), ids=lambda p: p.name)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= MOST_LINES_OF_A_FILE


def test_all_of_it_is_short() -> None:
    lines = {p.name: len(p.read_text("utf-8").splitlines()) for p in files_of(SRC)}
    assert sum(lines.values()) <= MOST_LINES


# (e) who decodes


def test_one_file_decodes() -> None:
    call = re.compile(r"\bllama_decode\s*\(")
    callers = [p.name for p in files_of(SRC) if call.search(bare(p.read_text("utf-8")))]
    assert callers == ["laq-read.cpp"]
