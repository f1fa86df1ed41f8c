"""nvcc compiles every instance of the score kernels: no warning, nothing spilled. No GPU is needed.

env: LAQ_CUDA_ARCHS  what to compile for, by spaces, as in CMAKE_CUDA_ARCHITECTURES: "75 90" if not
                     set, "all" for everything in ARCHS. An architecture takes half a minute.
env: LAQ_NVCC        path of nvcc; default: the one on the path, or that of CUDA_PATH
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "native" / "ggml"

#: as ggml-cuda is compiled
FLAGS = ("-std=c++17", "-O3", "-use_fast_math", "-extended-lambda")
WARNINGS = (
    "-Wall", "-Wextra", "-Wcast-qual", "-Wno-unused-function", "-Wmissing-declarations",
    "-Wmissing-noreturn", "-Wno-array-bounds", "-Wextra-semi",
)  # fmt: skip

#: how types are read (7 on the tensor cores, 2 without), row tiles, passes; mask and merge
N_KERNELS = (7 + 2) * 3 * 2 + 2

# "75-virtual" is what a driver makes of the PTX for sm_75 on a later GPU
ARCHS = {
    **{sm: f"arch=compute_{sm},code=sm_{sm}" for sm in ("75", "80", "86", "89", "90", "120")},
    "75-virtual": "arch=compute_75,code=sm_90",
    "80-virtual": "arch=compute_80,code=sm_90",
}
CHOSEN = os.environ.get("LAQ_CUDA_ARCHS", "75 90")


@dataclass(frozen=True)
class Kernel:
    """What the assembler says of a kernel."""

    name: str
    registers: int
    stack: int
    stores: int
    loads: int


def kernels(report: str) -> list[Kernel]:
    """The kernels in the output of ptxas -v."""
    found = re.findall(
        r"Compiling entry function '(\S+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers",
        report,
        re.DOTALL,
    )
    return [
        Kernel(name, int(registers), int(stack), int(stores), int(loads))
        for name, stack, stores, loads, registers in found
    ]


@pytest.fixture(scope="module")
def nvcc() -> str:
    folder = os.environ.get("CUDA_PATH")
    path = os.environ.get("LAQ_NVCC") or shutil.which("nvcc")
    path = path or (shutil.which("nvcc", path=str(Path(folder, "bin"))) if folder else None)
    if not path:
        pytest.skip("needs nvcc: LAQ_NVCC, CUDA_PATH or the path")
    return path


@pytest.mark.parametrize("arch", ARCHS if CHOSEN == "all" else CHOSEN.split())
def test_kernels_compile(nvcc, tmp_path, arch) -> None:
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    code = ARCHS[arch].rpartition("=")[2]
    if code not in known:
        pytest.skip(f"this nvcc does not know {code}")
    command = [
        nvcc, *FLAGS, "-gencode", ARCHS[arch], "-Xptxas", "-v", "-Werror", "all-warnings",
        "-Xcompiler", ",".join(WARNINGS), f"-I{KERNELS}",
        "-c", str(HERE / "kernels.cu"), "-o", str(tmp_path / "kernels.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(command)}\n{report[-8000:]}"
    assert "warning" not in report.lower(), report
    found = kernels(report)
    assert len({kernel.name for kernel in found}) == N_KERNELS, report
    spilled = [k for k in found if k.stack or k.stores or k.loads]
    assert not spilled, spilled
