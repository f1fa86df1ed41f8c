"""What importing does, in which order it may happen, and who may import whom."""

import ast
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import laq_gguf
from laq_gguf._lib import Native
from laq_gguf._version import LLAMA_CPP_PYTHON_VERSION, __version__

PACKAGE = Path(laq_gguf.__file__).parent
ROOT = Path(__file__).resolve().parents[2]


def _imports(path: Path) -> Iterator[str]:
    """Modules that a file imports anywhere, relative ones as `.name`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from (
                [dots + node.module] if node.module else [dots + a.name for a in node.names]
            )


def test_importing_the_package_loads_no_native_code(run_python: Callable) -> None:
    code = "import laq_gguf, sys; print(sorted({'llama_cpp', '_cffi_backend'} & set(sys.modules)))"
    done = run_python("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_llama_cpp_after_laq_gguf_loads_our_library(native: Native, run_python: Callable) -> None:
    code = "import laq_gguf, llama_cpp.llama_cpp as l; print(l._lib._name); laq_gguf.Llama"
    done = run_python("-c", code, LLAMA_CPP_LIB_PATH="")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(native.path)


def test_llama_cpp_first_with_another_library_is_a_clear_error(
    native: Native, run_python: Callable, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(native.path.parent, other, ignore=lambda d, names: {
        name for name in names if ".so" not in name and ".dylib" not in name
        and ".dll" not in name and (Path(d) / name).is_file()
    })  # fmt: skip
    code = (
        "import llama_cpp\n"
        "import laq_gguf\n"
        "try:\n"
        "    laq_gguf.Llama\n"
        "except ImportError as error:\n"
        "    print(type(error).__name__, isinstance(error, laq_gguf.LaqError), error)\n"
    )
    done = run_python("-c", code, LLAMA_CPP_LIB_PATH=str(other))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LaqLibraryError True llama_cpp was imported before laq_gguf")
    assert str(other) in done.stdout and str(native.path) in done.stdout


def test_missing_library_says_what_to_do(run_python: Callable, tmp_path: Path) -> None:
    done = run_python("-c", "import laq_gguf; laq_gguf.Llama", LAQ_LIB_PATH=str(tmp_path))
    assert done.returncode == 1
    assert f"no libllama in {tmp_path}: install the package" in done.stderr


def test_plain_library_is_refused(plain_lib: Path, run_python: Callable) -> None:
    done = run_python("-c", "import laq_gguf; laq_gguf.Llama", LAQ_LIB_PATH=str(plain_lib))
    assert done.returncode == 1
    assert "is a plain llama.cpp without the functions of laq.h" in done.stderr


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Lama'"):
        laq_gguf.Lama  # noqa: B018


def test_reference_needs_numpy_only() -> None:
    allowed = {"numpy", "__future__", *sys.stdlib_module_names}
    for path in (PACKAGE / "reference").glob("*.py"):
        for name in _imports(path):
            # one dot: a sibling; two would leave the package
            assert re.match(r"\.\w", name) or name.split(".")[0] in allowed, f"{path}: {name}"


def test_only_the_two_upper_layers_know_llama_cpp() -> None:
    below = (
        "__init__", "_version", "_cffi_build", "chat", "config", "errors", "gguf_meta", "session",
        "stats",
    )  # fmt: skip
    for name in below:
        for imported in _imports(PACKAGE / f"{name}.py"):
            assert imported.split(".")[0] != "llama_cpp", f"{name}.py imports {imported}"


def test_binding_generator_is_standalone() -> None:
    names = set(_imports(PACKAGE / "_cffi_build.py"))
    assert not any(name.startswith((".", "laq_gguf")) for name in names)


def test_pin_is_the_one_of_the_patches() -> None:
    pin = (ROOT / "patches" / "UPSTREAM").read_text(encoding="utf-8")
    assert re.search(rf"\b{re.escape(LLAMA_CPP_PYTHON_VERSION)}\b", pin), pin


def test_version_is_a_release_number() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.?(dev|rc)\d+)?", __version__)
    assert laq_gguf.__version__ == __version__
