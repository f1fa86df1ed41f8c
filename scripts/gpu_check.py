"""Build for the device at hand and check there what can only be checked there.

    python3 scripts/gpu_check.py --backend cuda             all steps, on the machine with the GPU
    python3 scripts/gpu_check.py --backend cpu --quick      the same steps anywhere, in minutes

    pack     what a machine without network needs, into build/gpu_check/pack: sources and wheels
    build    libllama with the backend, and test-backend-ops
    ops      the score op against the CPU's: test-backend-ops test
    perf     its speed, beside the device's own bandwidth: test-backend-ops perf
    parity   tests of scores, evictions and sequences, with all layers on the device
    bench    evictions and decoding with a random model of 8B's shape: laq_gguf/bench/device.py
    report   all of it as laq_gguf/bench/results/DEVICE-COMMIT.json

Each step leaves what it found in build/gpu_check, so that they can be run one at a time, where a
command's time is limited: `gpu_check.py build ops perf`, then `gpu_check.py parity` and so on. A
machine without network needs build/gpu_check/pack (under 64 MiB), made with `pack --python 3.12`
where there is one; with `--built` as well, what `build` compiled here for that machine
(--cmake-args=-DCMAKE_CUDA_ARCHITECTURES=90) goes along in place of the sources.

Standard library only: it starts with nothing installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import sysconfig
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dev
import patch
from dev import DevError, run

ROOT = dev.ROOT
FOLDER = dev.BUILD / "gpu_check"
PACK, NATIVE, VENV = FOLDER / "pack", FOLDER / "native", FOLDER / "venv"
PACK_SOURCES, PACK_BUILT = PACK / "sources.tar.xz", PACK / "built.tar.xz"
SOURCES = ("ggml", "src", "include", "cmake", "vendor", "CMakeLists.txt", "LICENSE",
           "tests/test-backend-ops.cpp")  # fmt: skip
BUILT = ("bin", "tests/test-backend-ops", "_laq_cffi.py")
RESULTS = ROOT / "laq_gguf" / "bench" / "results"
BACKENDS = {"cuda": "CUDA", "vulkan": "Vulkan", "metal": "MTL", "cpu": "CPU"}
TESTS = ("tests/parity", "tests/integration/test_attend.py", "tests/integration/test_eviction.py",
         "tests/integration/test_recall.py", "tests/integration/test_sequences.py",
         "tests/integration/test_state.py", "tests/integration/test_values.py")  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64",
             "linux_x86_64")  # fmt: skip
#: an op of `perf`, its parameters, microseconds a run and GB/s
PERF_LINE = re.compile(
    r"^ *(\w+)\((.*)\): .*?([\d.]+) us/run.*?([\d.]+) (?:GB/s|\wFLOPS)", re.MULTILINE
)
#: the large copy among the cases of tests/backend
COPY = r"ne_src=\[67108864,1,1,1\]"
GIB = 2**30  # what test-backend-ops calls a GB


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--backend", choices=BACKENDS, default="cuda")
    parser.add_argument("--python", help="pack: version of the other machine's Python")
    parser.add_argument("--built", action="store_true", help="pack: libraries, not sources")
    parser.add_argument("--cmake-args", default="", help="build: more definitions, =-DNAME=VALUE")
    parser.add_argument("--quick", action="store_true",
                        help="few of the speeds, and a small model in short contexts")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    return parser


def main() -> int:
    """Run the steps asked for; 1 if one failed."""
    parser = build_parser()
    args = parser.parse_args()
    unknown = [step for step in args.steps if step not in STEPS]
    if unknown:
        parser.error(f"no step {unknown[0]!r}; there are: {', '.join(STEPS)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        for step in args.steps or [step for step in STEPS if step != "pack"]:
            start = time.monotonic()
            STEPS[step](args)
            print(f"gpu_check.py {step}: done in {time.monotonic() - start:.0f} s", flush=True)
    except (DevError, OSError) as error:
        print(f"gpu_check.py: {error}", file=sys.stderr)
        return 1
    return 0


def pack(args: argparse.Namespace) -> None:
    """The patched sources, or what `build` made of them, and the wheels of what the other steps
    import."""
    wheels = PACK / "wheels"
    shutil.rmtree(PACK, ignore_errors=True)
    wheels.mkdir(parents=True)
    tree, names, target = NATIVE, BUILT, PACK_BUILT
    if not args.built:
        tree, names, target = patch.prepare(ROOT), SOURCES, PACK_SOURCES
    with tarfile.open(target, "w:xz") as archive:
        for name in names:
            archive.add(tree / name, name)
    binding = f"{dev.pin('package')}=={dev.pin('version')}"
    dev.ensure_venv()
    pip = (dev.PYTHON, "-m", "pip")
    run(*pip, "wheel", "--quiet", "--no-deps", "-w", wheels, binding,
        env=dev.venv_env(**dev.BINDING_ONLY))  # fmt: skip
    target = [f"--python-version={args.python}"] if args.python else []
    target += [f"--platform={platform}" for platform in PLATFORMS] if args.python else []
    run(*pip, "download", "--quiet", "--only-binary=:all:", *target, "-d", wheels,
        "--find-links", wheels, *_requirements())  # fmt: skip
    size = sum(path.stat().st_size for path in PACK.rglob("*") if path.is_file())
    print(f"{PACK.relative_to(ROOT)}: {size / 2**20:.1f} MiB")


def _requirements() -> list[str]:
    """What the tests and the benchmark import."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lines = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL).group(1)
    wanted = re.findall(r'^ *"(.+)",$', lines, re.MULTILINE) + dev.requirements("test")
    return wanted


def build(args: argparse.Namespace) -> None:
    """Compile, going on where a run before it stopped, or unpack what was compiled elsewhere."""
    python = VENV / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", VENV, env=dict(os.environ))
    offline = ["--no-index", "--find-links", PACK / "wheels"] if PACK.is_dir() else []
    run(python, "-m", "pip", "install", "--quiet", *offline, *_requirements(), env=_env())
    if PACK_BUILT.exists():
        with tarfile.open(PACK_BUILT) as archive:
            archive.extractall(NATIVE)
    else:
        _compile(args, python)
    shutil.copy(NATIVE / "_laq_cffi.py", ROOT / "laq_gguf" / "_laq_cffi.py")


def _compile(args: argparse.Namespace, python: Path) -> None:
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            raise DevError(f"no {tool}: install it (the pack leaves it out, for its size)")
    tree = FOLDER / "sources"
    if PACK.is_dir() and not (tree / "include").is_dir():
        with tarfile.open(PACK_SOURCES) as archive:
            archive.extractall(tree)
    if not PACK.is_dir():
        tree = patch.prepare(ROOT)
    defines = ["CMAKE_BUILD_TYPE=Release", f"LAQ_UPSTREAM_DIR={tree}", "LAQ_MTMD=OFF",
               "LAQ_BUILD_OPS=ON", f"Python3_EXECUTABLE={python}"]  # fmt: skip
    defines += [] if args.backend == "cpu" else [f"GGML_{args.backend.upper()}=ON"]
    defines += cublas_of_package(python) if args.backend == "cuda" else []
    defines += dev.launchers()
    words = [*(f"-D{define}" for define in defines), *shlex.split(args.cmake_args)]
    run("cmake", "-S", ROOT / "native", "-B", NATIVE, "-G", "Ninja", *words, env=_env())
    run("cmake", "--build", NATIVE, env=_env())


def cublas_of_package(python: Path) -> list[str]:
    """Definitions for the cuBLAS of the package nvidia-cublas, where the toolkit has none.

    Raises:
        DevError: there is no compiler, or neither has it.
    """
    if shutil.which("nvcc") is None:
        raise DevError("no nvcc: install the CUDA toolkit, or use another --backend")
    toolkit = Path(shutil.which("nvcc")).resolve().parent.parent
    if list(toolkit.glob("**/cublas_v2.h")):
        return []
    venv = python.parent.parent.glob("lib/python*/site-packages")
    packages = [Path(sysconfig.get_paths()["purelib"]), *venv]
    for header in [h for folder in packages for h in folder.glob("nvidia/**/cublas_v2.h")]:
        library = next((header.parent.parent / "lib").glob("libcublas.so*"), None)
        if library:
            headers = _headers_alone(header.parent)
            return [f"CUDA_cublas_LIBRARY={library}", f"CMAKE_CUDA_FLAGS=-I{headers}"]
    raise DevError(f"no cuBLAS in {toolkit}: pip install nvidia-cublas")


def _headers_alone(folder: Path) -> Path:
    """cuBLAS's headers in a folder of their own: NVIDIA's packages share one, and another
    version's cuda_runtime.h must not come before the toolkit's."""
    alone = dev.BUILD / "cublas"
    alone.mkdir(parents=True, exist_ok=True)
    for header in folder.glob("cublas*.h"):
        shutil.copy(header, alone)
    return alone


def _env(**extra: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "LAQ_LIB_PATH": str(NATIVE / "bin"), **dev.PASSIVE}
    if PACK_BUILT.exists():  # the paths in it are the other machine's
        packages = Path(sysconfig.get_paths()["purelib"]).glob("nvidia/**/lib")
        folders = [str(NATIVE / "bin"), *map(str, packages), os.environ.get("LD_LIBRARY_PATH", "")]
        own["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    return dev.venv_env(VENV, **own, **extra)


def _output(*command: str | Path, may_fail: bool = False, **env: str) -> str:
    """stdout of a command, the end of which is shown."""
    text = dev.capture(*command, env=_env(**env), may_fail=may_fail)
    print(text[-4000:], flush=True)
    return text


def device(args: argparse.Namespace) -> dict[str, Any]:
    """The first device of the backend, as ggml names and describes it.

    Raises:
        DevError: the library finds none.
    """
    code = (
        "import json; from laq_gguf import _lib; "
        "print(json.dumps([d._asdict() for d in _lib.devices(_lib.library_dir())]))"
    )
    found = json.loads(_output(VENV / "bin" / "python", "-c", code).splitlines()[-1])
    for entry in found:
        if entry["name"].startswith(BACKENDS[args.backend]):
            return entry
    names = ", ".join(entry["name"] for entry in found)
    raise DevError(f"no {args.backend} device; ggml finds {names}")


def _save(name: str, value: Any) -> None:
    (FOLDER / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def ops(args: argparse.Namespace) -> None:
    """Every case of the op; a device without the kernel has 0 of 0."""
    text = _output(NATIVE / "tests" / "test-backend-ops", "test", "-o", "LAQ_SCORE",
                   "-b", device(args)["name"], may_fail=True)  # fmt: skip
    found = re.findall(r"(\d+)/(\d+) tests passed", text)
    if not found:
        raise DevError("test-backend-ops ended without a count")
    passed, total = map(int, found[-1])
    unsupported = len(re.findall(r"LAQ_SCORE\(.*not supported", text))
    _save("ops", {"passed": passed, "run": total, "not_supported": unsupported})
    if passed != total:
        raise DevError(f"{total - passed} of {total} cases of the op failed")


def perf(args: argparse.Namespace) -> None:
    """Time of the op for each case, in reads of K at the bandwidth of a large copy."""
    name = device(args)["name"]
    command = (NATIVE / "tests" / "test-backend-ops", "perf", "-b", name)
    copies = PERF_LINE.findall(_output(*command, "-o", "CPY", "-p", COPY))
    only = ("-p", "type_k=(f16|q8_0).*kv=32768") if args.quick else ()
    cases = PERF_LINE.findall(_output(*command, "-o", "LAQ_SCORE", *only))
    bandwidth = max((float(copy[3]) * GIB / 1e9 for copy in copies), default=None)
    rows = [_perf_row(params, float(us), bandwidth) for _, params, us, _ in cases]
    _save("perf", {"copy_gb_per_s": bandwidth, "cases": rows})


#: bytes of a block, elements in it
BLOCKS = {"f32": (4, 1), "f16": (2, 1), "bf16": (2, 1), "q8_0": (34, 32), "q4_0": (18, 32),
          "q4_1": (20, 32), "q5_0": (22, 32), "q5_1": (24, 32)}  # fmt: skip


def _perf_row(params: str, us: float, bandwidth: float | None) -> dict[str, Any]:
    values = dict(re.findall(r"(\w+)=([\w.]+)", params))
    size, n = BLOCKS[values["type_k"]]
    k_bytes = int(values["kv"]) * int(values["n_head_kv"]) * int(values["hs"]) // n * size
    reads = us * 1e-6 * bandwidth * 1e9 / k_bytes if bandwidth else None
    return {**values, "us": us, "k_bytes": k_bytes, "reads_of_k": reads}


def parity(args: argparse.Namespace) -> None:
    """The tests that take their device from LAQ_TEST_DEVICE."""
    report = FOLDER / "parity.xml"
    report.unlink(missing_ok=True)
    chosen = TESTS[:1] if args.quick else TESTS
    words = [VENV / "bin" / "pytest", *chosen, "-q", f"--junitxml={report}", *dev.PARALLEL]
    _output(*words, may_fail=True, LAQ_TEST_DEVICE=device(args)["name"])
    if not report.exists():
        raise DevError("pytest ended without a report")
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
    bad = [f"{case.get('classname')}::{case.get('name')}" for case in suite
           if case.find("failure") is not None or case.find("error") is not None]  # fmt: skip
    _save("parity", {**counts, "failed": bad})
    if bad or counts["tests"] == counts["skipped"]:
        raise DevError(f"{len(bad)} of {counts['tests']} tests failed")


def bench(args: argparse.Namespace) -> None:
    """A random model of a large shape, and what evictions cost there."""
    shape = "small" if args.quick else "8b"
    model = FOLDER / f"random-{shape}.gguf"
    python = VENV / "bin" / "python"
    if not model.exists():
        _output(python, ROOT / "scripts" / "make_tiny_gguf.py", model, "--shape", shape)
    words = [python, ROOT / "scripts" / "bench.py", "device", "--model", model]
    words += ["--device", device(args)["name"], "--out", FOLDER / "bench.json"]
    if args.quick:
        words += ["--n-prompts", "2048,4096", "--budget", "256", "--kv-staging", "512"]
    _output(*words)


def report(args: argparse.Namespace) -> None:
    """One result file of what the steps left."""
    document = json.loads((FOLDER / "bench.json").read_text(encoding="utf-8"))
    found = device(args)
    document["device"] = {**found, "backend": args.backend, "quick": args.quick}
    document["checks"] = {}
    for name in ("ops", "perf", "parity"):
        path = FOLDER / f"{name}.json"
        document["checks"][name] = (
            json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        )
    # paths of the machine say nothing to a reader
    document["command"] = document["command"].replace(f"{ROOT}{os.sep}", "")
    label = found["description"] if args.backend != "cpu" else "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    commit = (document["commit"] or "unknown")[:12]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{slug}-{commit}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(path)


STEPS: dict[str, Callable[[argparse.Namespace], None]] = {
    "pack": pack, "build": build, "ops": ops, "perf": perf, "parity": parity, "bench": bench,
    "report": report,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
