"""Write the cffi module of laq.h and laq-test.h (out-of-line, ABI mode: no compiler, any Python
version).

    python laq_gguf/_cffi_build.py --header native/include/laq.h native/include/laq-test.h \\
        --output laq_gguf/_laq_cffi.py

The declarations are the text of a header between LAQ_CDEF_BEGIN and LAQ_CDEF_END; nothing is typed
twice. Runs while the package is being built, so it imports nothing of it.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

BEGIN, END = "LAQ_CDEF_BEGIN", "LAQ_CDEF_END"
MODULE = "_laq_cffi"


def cdef_text(header: str) -> str:
    """Return the declarations of a header in the subset of C that cffi reads.

    Args:
        header: its text.

    Raises:
        ValueError: a marker is missing, or a `#define` is not a plain integer.
    """
    parts = re.split(rf"^//\s*(?:{BEGIN}|{END})\s*$", header, flags=re.MULTILINE)
    if len(parts) != 3:
        raise ValueError(
            f"a header must hold the lines // {BEGIN} and // {END} once each, in order"
        )
    text = re.sub(r"/\*.*?\*/", " ", parts[1], flags=re.DOTALL)
    text = re.sub(r"//[^\n]*", "", text).replace("LAQ_API ", "")
    for line in re.findall(r"^\s*#.*$", text, flags=re.MULTILINE):
        if not re.fullmatch(r"\s*#define\s+\w+\s+(?:0[xX][0-9a-fA-F]+|\d+)\s*", line):
            raise ValueError(f"cffi reads no preprocessor line but integer #define: {line}")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def write_module(headers: Sequence[Path], output: Path) -> None:
    """Write the Python module for `headers`, each of which may use what those before it declare, to
    `output`, replacing it only if the text differs."""
    from cffi import FFI

    ffi = FFI()
    for header in headers:
        ffi.cdef(cdef_text(header.read_text(encoding="utf-8")))
    ffi.set_source(MODULE, None)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / f"{MODULE}.py"
        ffi.emit_python_code(str(made))
        text = made.read_text(encoding="utf-8")
    if not output.exists() or output.read_text(encoding="utf-8") != text:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the cffi module of laq.h and laq-test.h.")
    parser.add_argument(
        "--header", type=Path, nargs="+", required=True,
        help="native/include/laq.h native/include/laq-test.h",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help=f"path of {MODULE}.py")
    args = parser.parse_args(argv)
    try:
        write_module(args.header, args.output)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
