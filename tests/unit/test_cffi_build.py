"""The binding is made from the text of laq.h and laq-test.h."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import laq_gguf
from laq_gguf._cffi_build import cdef_text

ROOT = Path(__file__).resolve().parents[2]
HEADERS = [ROOT / "native" / "include" / name for name in ("laq.h", "laq-test.h")]
SCRIPT = Path(laq_gguf.__file__).parent / "_cffi_build.py"


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_header_text_keeps_every_declaration(header: Path) -> None:
    text = header.read_text(encoding="utf-8")
    cdef = cdef_text(text)
    assert "//" not in cdef and "extern" not in cdef and "#include" not in cdef
    is_product = header.name == "laq.h"
    assert ("#define LAQ_ABI_VERSION " in cdef) == is_product
    for name in re.findall(r"^(?:enum|struct) (laq_\w+) \{", text, re.MULTILINE):
        assert re.search(rf"\b{name} \{{", cdef), name


def test_made_module_stands_alone(run_python: Callable, tmp_path: Path) -> None:
    made = tmp_path / "out" / "_laq_cffi.py"
    headers = [str(path) for path in HEADERS]
    done = run_python("-I", str(SCRIPT), "--header", *headers, "--output", str(made))
    assert done.returncode == 0, done.stderr
    code = (
        f"import sys; sys.path.insert(0, {str(made.parent)!r}); from _laq_cffi import ffi;"
        "print(ffi.sizeof('struct laq_span'), ffi.typeof('struct laq_params').fields[0][0],"
        "ffi.sizeof('struct laq_chunk'))"
    )
    assert run_python("-I", "-c", code).stdout.split() == ["8", "size", "12"]
    before = made.stat().st_mtime_ns
    run_python(str(SCRIPT), "--header", *headers, "--output", str(made))
    assert made.stat().st_mtime_ns == before, "an unchanged module must not trigger a rebuild"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int f(void);\n", "must hold the lines"),
        ("// LAQ_CDEF_BEGIN\n#ifdef X\n#endif\n// LAQ_CDEF_END\n", "no preprocessor line"),
        ("// LAQ_CDEF_BEGIN\n#define F(x) x\n// LAQ_CDEF_END\n", "no preprocessor line"),
    ],
)
def test_header_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cdef_text(text)


def test_missing_header_is_one_line(run_python: Callable, tmp_path: Path) -> None:
    out = str(tmp_path / "x.py")
    done = run_python(str(SCRIPT), "--header", str(tmp_path / "no.h"), "--output", out)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "no.h" in done.stderr
