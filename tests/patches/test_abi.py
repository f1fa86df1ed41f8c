"""Public structs are as llama_cpp's ctypes mirrors and the cffi binding see them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from laq_gguf._lib import Native

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "native" / "include"
HEADERS = ("laq.h", "laq-test.h")


def header_text() -> str:
    """Both headers of ours, without comments."""
    text = "\n".join((INCLUDE / name).read_text(encoding="utf-8") for name in HEADERS)
    return re.sub(r"//[^\n]*", "", text)


def compile_and_run(source: str, folder: Path, *includes: Path) -> list[str]:
    """The words that a C program prints."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler: set CC")
    (folder / "layout.c").write_text(source)
    flags = [f"-I{path}" for path in includes]
    subprocess.run([compiler, *flags, "layout.c", "-o", "layout"], cwd=folder, check=True)
    return subprocess.run(
        [str(folder / "layout")], capture_output=True, text=True, check=True
    ).stdout.split()


def layout_source(include: str, structs: dict[str, list[str]]) -> str:
    """A program that prints the size of each struct, then the offset of each of its fields."""
    lines = [f"#include <stddef.h>\n#include <stdio.h>\n#include <{include}>\nint main(void) {{"]
    for name, fields in structs.items():
        lines.append(f'    printf("%zu\\n", sizeof(struct {name}));')
        lines += [f'    printf("%zu\\n", offsetof(struct {name}, {field}));' for field in fields]
    return "\n".join([*lines, "    return 0;", "}", ""])


def test_laq_structs_have_the_layout_of_c(native: Native, tmp_path: Path) -> None:
    names = re.findall(r"^struct (laq_\w+) \{", header_text(), re.MULTILINE)
    types = {name: native.ffi.typeof(f"struct {name}") for name in names}
    assert {"laq_params", "laq_stats", "laq_span"} <= set(names)
    structs = {name: [field for field, _ in t.fields] for name, t in types.items()}
    expected = []
    for name, fields in structs.items():
        expected.append(native.ffi.sizeof(types[name]))
        expected += [native.ffi.offsetof(types[name], field) for field in fields]
    got = compile_and_run(layout_source("laq-test.h", structs), tmp_path, INCLUDE)
    assert [int(word) for word in got] == expected


def test_llama_structs_have_the_layout_of_ctypes(native: Native, tmp_path: Path) -> None:
    import llama_cpp.llama_cpp as mirror

    trees = [ROOT / "build" / name for name in ("upstream", "llama.cpp")]
    tree = next((tree for tree in trees if (tree / "include" / "llama.h").exists()), None)
    if tree is None:
        pytest.skip(f"no patched llama.cpp in {trees[0]}: python scripts/patch.py prepare")
    names = ("llama_context_params", "llama_model_params", "llama_batch", "llama_token_data",
             "llama_token_data_array", "llama_chat_message", "llama_logit_bias",
             "llama_model_quantize_params", "llama_perf_context_data")  # fmt: skip
    structs = {name: [f[0] for f in getattr(mirror, name)._fields_] for name in names}
    expected = []
    for name, fields in structs.items():
        struct = getattr(mirror, name)
        expected.append(ctypes.sizeof(struct))
        expected += [getattr(struct, field).offset for field in fields]
    source = layout_source("llama.h", structs)
    got = compile_and_run(source, tmp_path, tree / "include", tree / "ggml" / "include")
    assert [int(word) for word in got] == expected


def test_default_params_are_those_of_the_plain_build(
    native: Native, plain_lib: Path, run_python: Callable
) -> None:
    code = """
import ctypes
import llama_cpp.llama_cpp as l
for params in (l.llama_context_default_params(), l.llama_model_default_params()):
    # all fields, not what lies between them: padding holds whatever was there
    fields = [getattr(type(params), name) for name, *_ in params._fields_]
    print("".join(bytes(params)[f.offset : f.offset + f.size].hex() for f in fields))
"""
    ours, plain = (
        run_python("-c", code, LLAMA_CPP_LIB_PATH=str(folder)).stdout.split()
        for folder in (native.path.parent, plain_lib)
    )
    assert len(ours) == 2 and ours == plain


def test_every_function_of_our_headers_is_exported(native: Native) -> None:
    names = set(re.findall(r"\b(laq_\w+)\s*\(", header_text()))
    assert {"laq_attach", "laq_detach", "laq_prompt_end", "laq_kept_positions"} <= names
    library = ctypes.CDLL(str(native.path))
    assert [name for name in sorted(names) if not hasattr(library, name)] == []


def test_nothing_else_with_our_prefix_is_exported(native: Native) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    done = subprocess.run(
        [nm, "-D", "--defined-only", str(native.path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"nm cannot read the library: {done.stderr.strip()}")
    exported = set(re.findall(r" T (laq_\w+)$", done.stdout, re.MULTILINE))
    declared = set(re.findall(r"\b(laq_\w+)\s*\(", header_text()))
    assert exported <= declared
    assert "laq_attach" in exported


def test_no_public_header_of_llama_cpp_is_patched() -> None:
    for patch in (ROOT / "patches").glob("*.patch"):
        for path in re.findall(r"^\+\+\+ b/(\S+)", patch.read_text("utf-8"), re.MULTILINE):
            assert not path.startswith("include/"), f"{patch.name} changes {path}"


def test_status_codes_are_the_ones_python_maps(native: Native) -> None:
    from laq_gguf.errors import LaqInvalidError, LaqMemoryError, LaqUnsupportedError, native_error

    lib = native.lib
    expected = {
        lib.LAQ_STATUS_INVALID_ARGUMENT: LaqInvalidError,
        lib.LAQ_STATUS_UNSUPPORTED: LaqUnsupportedError,
        lib.LAQ_STATUS_NO_MEMORY: LaqMemoryError,
    }
    for status, kind in expected.items():
        assert type(native_error("f", status, "", "")) is kind


def test_choices_are_the_values_of_the_enums(native: Native) -> None:
    from laq_gguf import config, recall

    enums = {
        "policy": config.POLICIES, "lookahead": config.LOOKAHEADS, "pooling": config.POOLINGS,
        "recall_when": recall.RECALLS,
    }  # fmt: skip
    for enum, choices in enums.items():
        prefix = f"LAQ_{enum.removesuffix('_when').upper()}_"
        values = {
            name.removeprefix(prefix).replace("LAQ_PP", "LAQ++").lower(): value
            for value, name in native.ffi.typeof(f"enum laq_{enum}").elements.items()
        }
        assert values == choices, enum
