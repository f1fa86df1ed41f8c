"""The one command of a developer.

    python3 scripts/dev.py demo            answer from a long document out of a small cache
    python3 scripts/dev.py build           the package in .venv; the unpatched llama.cpp
    python3 scripts/dev.py test [ARG...]   all tests; with arguments, pytest gets those
    python3 scripts/dev.py lint            ruff, clang-format, the patch series
    python3 scripts/dev.py fix             format what lint looks at
    python3 scripts/dev.py ci              lint, build, test, property tests with sanitizers

Each makes what it needs: .venv, build/, the model (see scripts/get_model.py), and makes nothing
twice. Needs Python, a C++ compiler, git and the package registry; ccache is used if it is there.
CMAKE_ARGS is passed on, e.g. CMAKE_ARGS="-DGGML_CUDA=ON".

Standard library only: it starts with nothing installed.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
#: not `python -m pytest`: the tests must see the installed package, not the folder
PYTEST = BIN / ("pytest.exe" if os.name == "nt" else "pytest")
BUILT_FROM = ("laq_gguf", "native", "patches", "tests/native", "pyproject.toml")
MIN_CMAKE = (3, 21)
#: llama-cpp-python without its own llama.cpp: ours takes its place
BINDING_ONLY = {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}

#: tests run side by side, in one process per core; idle OpenMP threads must not spin beside them
PARALLEL = ("-n", "auto", "--maxprocesses", "4", "--dist", "worksteal")
PASSIVE = {"OMP_WAIT_POLICY": "passive"}

SANITIZERS = "address,undefined"
OPTIMIZE, CHECKED = "-O2", "-D_GLIBCXX_ASSERTIONS"

DEMO_BUDGET, DEMO_ANSWER, DEMO_CELLS = 224, 24, 256
DEMO_MIN_TOKENS = 3000
DEMO_CHARACTERS = 13_500
DEMO_DOCS = ("CONTRIBUTING.md", "SECURITY.md")
DEMO_FACT = "The annual meeting of the contributors takes place in Lisbon."
DEMO_QUESTION = "In which city does the annual meeting of the contributors take place?"
DEMO_WORD = "Lisbon"


class DevError(Exception):
    """A step failed; the message is all there is to say."""


def shown(words: list[str]) -> str:
    """A command as it would be typed, cut short if it is long."""
    text = shlex.join(words).replace(f"{ROOT}{os.sep}", "")
    return text if len(text) <= 300 else f"{text[:300]} ..."


def run(*command: str | Path, env: dict[str, str] | None = None) -> None:
    """Show and run a command in the root of the repository.

    Raises:
        DevError: its exit code is not 0.
    """
    words = [str(word) for word in command]
    print(f"+ {shown(words)}", flush=True)
    done = subprocess.run(words, cwd=ROOT, env=env or venv_env())
    if done.returncode != 0:
        raise DevError(f"exit code {done.returncode}: {shown(words)}")


def capture(*command: str | Path, env: dict[str, str] | None = None, may_fail: bool = False) -> str:
    """What a command prints to stdout; its stderr is shown.

    Raises:
        DevError: its exit code is not 0, and it may not fail.
    """
    words = [str(word) for word in command]
    print(f"+ {shown(words)}", flush=True)
    done = subprocess.run(words, cwd=ROOT, env=env or venv_env(), stdout=subprocess.PIPE, text=True)
    if done.returncode != 0 and not may_fail:
        raise DevError(f"exit code {done.returncode}: {shown(words)}\n{done.stdout}".rstrip())
    return done.stdout


def venv_env(venv: Path = VENV, **extra: str) -> dict[str, str]:
    """The environment with a venv first on the path, and no other Python's settings."""
    env = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONHOME", "PYTHONPATH")
    }
    env["PATH"] = os.pathsep.join([str(venv / BIN.name), env.get("PATH", "")])
    env["VIRTUAL_ENV"] = str(venv)
    return env | extra


def requirements(key: str) -> list[str]:
    """A list of strings in pyproject.toml (Python 3.10 has no parser for it)."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(rf"^{key} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
    if not found:
        raise DevError(f"pyproject.toml has no list `{key}`")
    return ast.literal_eval(found.group(1))


def pin(key: str) -> str:
    """A value of patches/UPSTREAM."""
    text = (ROOT / "patches" / "UPSTREAM").read_text(encoding="utf-8")
    return re.search(rf"^{key} = (.+)$", text, re.MULTILINE).group(1)


def once(name: str, state: str) -> Stamp:
    """A step of the set-up of .venv, done again only if `state` differs from last time."""
    return Stamp(VENV / f"laq-{name}.stamp", hashlib.sha256(state.encode()).hexdigest())


class Stamp:
    """Whether a step was done, in a file."""

    def __init__(self, path: Path, value: str) -> None:
        """`value` says what the step depends on."""
        self._path, self._value = path, value

    @property
    def fresh(self) -> bool:
        """The step was done with this value."""
        return self._path.exists() and self._path.read_text(encoding="utf-8") == self._value

    def write(self) -> None:
        """The step is done."""
        self._path.write_text(self._value, encoding="utf-8")


def cmake_is_new_enough() -> bool:
    """Whether a cmake from before .venv can be used."""
    found = shutil.which("cmake")
    text = (
        subprocess.run([found, "--version"], capture_output=True, text=True).stdout if found else ""
    )
    version = re.search(r"version (\d+)\.(\d+)", text)
    return bool(version) and tuple(map(int, version.groups())) >= MIN_CMAKE


def ensure_venv() -> None:
    """Make .venv with the tools that build, test and format."""
    if not PYTHON.exists():
        try:
            run(sys.executable, "-m", "venv", VENV, env=dict(os.environ))
        except DevError as error:
            raise DevError(f"{error}\nPython's venv is needed (Debian: python3-venv)") from error
    wanted = requirements("requires") + requirements("dev")
    wanted += [] if cmake_is_new_enough() else [f"cmake>={MIN_CMAKE[0]}.{MIN_CMAKE[1]}"]
    wanted += [] if shutil.which("ninja") else ["ninja"]
    stamp = once("tools", repr(wanted))
    if not stamp.fresh:
        run(PYTHON, "-m", "pip", "install", "--quiet", "--upgrade", *wanted)
        stamp.write()


def ensure_binding() -> None:
    """Install llama-cpp-python without compiling anything."""
    requirement = f"{pin('package')}=={pin('version')}"
    stamp = once("binding", requirement)
    if not stamp.fresh:
        run(PYTHON, "-m", "pip", "install", "--quiet", requirement, env=venv_env(**BINDING_ONLY))
        stamp.write()


def digest_of(*names: str) -> str:
    """sha256 over files and folders below the root, names and contents."""
    digest = hashlib.sha256()
    for name in names:
        paths = sorted((ROOT / name).rglob("*")) if (ROOT / name).is_dir() else [ROOT / name]
        for path in paths:
            if path.is_file() and path.suffix not in (".pyc", ".so") and path.stem != "_laq_cffi":
                digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
                digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def launchers() -> list[str]:
    """CMake definitions that put ccache in front of the compilers, if it is there."""
    ccache = shutil.which("ccache")
    return [f"CMAKE_{lang}_COMPILER_LAUNCHER={ccache}" for lang in ("C", "CXX")] if ccache else []


def build_package() -> None:
    """`pip install .` into .venv, in a build folder that is kept, if a source has changed."""
    ensure_venv()
    ensure_binding()
    stamp = once("package", digest_of(*BUILT_FROM) + os.environ.get("CMAKE_ARGS", ""))
    if stamp.fresh:
        return
    env = venv_env(
        SKBUILD_BUILD_DIR=str(BUILD / "laq"),
        SKBUILD_CMAKE_DEFINE=";".join(["LAQ_BUILD_TESTS=ON", "LAQ_MTMD=ON", *launchers()]),
    )
    run(PYTHON, "-m", "pip", "install", "--no-build-isolation", f"{ROOT}[test]", env=env)
    stamp.write()


def build_tree(name: str, *defines: str, target: str = "all") -> Path:
    """Build native/ in build/`name` with CMake definitions; the folder of its libraries."""
    ensure_venv()
    folder = BUILD / name
    cache = folder / "CMakeCache.txt"
    home = f"CMAKE_HOME_DIRECTORY:INTERNAL={(ROOT / 'native').as_posix()}\n"
    if cache.exists() and home not in cache.read_text(encoding="utf-8"):
        shutil.rmtree(folder)
    defines = ("CMAKE_BUILD_TYPE=Release", "LAQ_MTMD=OFF", *defines, *launchers())
    options = [f"-D{define}" for define in defines] + [f"-DPython3_EXECUTABLE={PYTHON}"]
    options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    run("cmake", "-S", ROOT / "native", "-B", folder, "-G", "Ninja", *options)
    run("cmake", "--build", folder, "--target", target)
    return folder / "bin"


def build_plain() -> Path:
    """Build the unpatched llama.cpp with the same options; the folder of its libraries."""
    return build_tree("plain", "LAQ_PLAIN=ON")


def get_model() -> Path:
    """The path of the small model."""
    return Path(capture(PYTHON, ROOT / "scripts" / "get_model.py", "smollm2").split("\n")[0])


def build() -> None:
    """Make everything that the tests need, but for the model."""
    build_package()
    build_plain()


def test(arguments: list[str]) -> None:
    """Run the C++ and the Python tests.

    Args:
        arguments: for pytest; with any, only pytest runs and the floor is not looked at.

    Raises:
        DevError: a test failed, or fewer were executed than tests/floor.txt says.
    """
    build_package()
    paths = {"LAQ_PLAIN_LIB": str(build_plain()), "LAQ_MODEL_SMOLLM2": str(get_model())}
    env = venv_env(**paths, **PASSIVE)
    if not arguments:
        run("ctest", "--test-dir", BUILD / "laq", "--output-on-failure", "--no-tests=error")
    floor = (ROOT / "tests" / "floor.txt").read_text(encoding="utf-8").strip()
    run(PYTEST, *(arguments or ["tests", "--min-executed", floor, *PARALLEL]), env=env)


def test_sanitized() -> None:
    """Run the property tests again, on a build that notices errors of memory and arithmetic.

    Raises:
        DevError: a test failed; with what the sanitizers reported.
    """
    cache = (BUILD / "laq" / "CMakeCache.txt").read_text(encoding="utf-8")
    if sys.platform != "linux" or "LAQ_HAVE_SANITIZERS:INTERNAL=1" not in cache:
        print("skipped: the property tests with sanitizers, which take Linux and a compiler's own")
        return
    # llama.cpp's own asserts and checked vectors as well: our sources use its tables
    flags = [f"CMAKE_C_FLAGS_RELEASE={OPTIMIZE}", f"CMAKE_CXX_FLAGS_RELEASE={OPTIMIZE} {CHECKED}"]
    folder = build_tree("sanitized", f"LAQ_SANITIZE={SANITIZERS}", *flags, target="llama")
    # python is not instrumented: the runtime, and the library whose exceptions it follows, go first
    needed = re.findall(
        r"^\s*(\S+) => (/\S+)", capture("ldd", folder / "libllama.so"), re.MULTILINE
    )
    runtime = [path for name, path in needed if "asan" in name]
    if not runtime:
        print("skipped: the property tests with sanitizers, whose runtime clang links statically")
        return
    runtime += [path for name, path in needed if name.startswith("libstdc++")]
    # the report goes to a file: pytest and llama_cpp redirect stderr
    report = folder.parent / "report"
    for old in report.parent.glob("report.*"):
        old.unlink()
    env = venv_env(
        LD_PRELOAD=":".join(runtime),
        LAQ_LIB_PATH=str(folder),
        ASAN_OPTIONS=f"detect_leaks=0:detect_stack_use_after_return=1:handle_abort=1:log_path={report}",
        UBSAN_OPTIONS=f"print_stacktrace=1:log_path={report}",
    )
    try:
        run(PYTEST, "tests/property", "-p", "no:faulthandler", *PARALLEL, env=env)
    except DevError as error:
        found = [path.read_text(errors="replace") for path in report.parent.glob("report.*")]
        raise DevError("\n".join([str(error), *found])) from error


def native_sources() -> list[Path]:
    """The C++ files that clang-format looks after."""
    tests = ("backend", "cuda", "emulation", "native")
    folders = [ROOT / "native", *(ROOT / "tests" / name for name in tests)]
    found = [path for folder in folders for path in folder.rglob("*")]
    return sorted(path for path in found if path.suffix in (".h", ".cpp", ".cu", ".cuh"))


def lint() -> None:
    """Check the form of everything, then the patch series."""
    ensure_venv()
    run(BIN / "ruff", "format", "--check", ROOT)
    run(BIN / "ruff", "check", ROOT)
    run(BIN / "clang-format", "--dry-run", "-Werror", *native_sources())
    run(PYTHON, ROOT / "scripts" / "patch.py", "check")


def fix() -> None:
    """Format everything, and renew the table of patches."""
    ensure_venv()
    run(BIN / "ruff", "check", "--fix", ROOT)
    run(BIN / "ruff", "format", ROOT)
    run(BIN / "clang-format", "-i", *native_sources())
    run(PYTHON, ROOT / "scripts" / "patch.py", "table", "--write")


def demo_document() -> Path:
    """Write the document of the demo: two pages of llama.cpp's with a fact in the middle."""
    run(PYTHON, ROOT / "scripts" / "upstream.py")
    pages = [(BUILD / "pristine" / name).read_text(encoding="utf-8") for name in DEMO_DOCS]
    paragraphs: list[str] = []
    for paragraph in "\n\n".join(pages).split("\n\n"):
        if sum(map(len, paragraphs)) < DEMO_CHARACTERS:
            paragraphs.append(paragraph)
    paragraphs.insert(len(paragraphs) // 2, DEMO_FACT)
    path = BUILD / "demo.txt"
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
    return path


def demo() -> None:
    """Ask for a fact deep in a document, with room for few of its tokens.

    Raises:
        DevError: the answer is wrong, the document short, or the cache larger than it should be.
    """
    build_package()
    model, document = get_model(), demo_document()
    command = [BIN / "laq-gguf", "generate", "--model", model, "--file", document, "--json"]
    command += ["--prompt", DEMO_QUESTION, "--n-ctx", "8192", "--max-tokens", str(DEMO_ANSWER)]
    command += ["--kv-budget", str(DEMO_BUDGET), "--lookahead", "pseudo"]
    result = json.loads(capture(*command))
    text, stats, n_prompt = result["text"].strip(), result["stats"], result["prompt_tokens"]
    taken, full = stats["kv_bytes"] / 2**20, stats["kv_bytes_full"] / 2**20
    print(f"\ndocument and question  {n_prompt} tokens")
    print(f"question               {DEMO_QUESTION}")
    print(f"answer                 {text}")
    print(f"tokens in the cache    n_resident = {stats['n_resident']} of {stats['n_tokens']}")
    print(f"memory of the cache    kv_bytes = {stats['kv_bytes']} ({taken:.1f} MiB)")
    print(f"without eviction       kv_bytes_full = {stats['kv_bytes_full']} ({full:.1f} MiB)")
    if DEMO_WORD not in text:
        raise DevError(f"the answer should name {DEMO_WORD}")
    if n_prompt < DEMO_MIN_TOKENS:
        raise DevError(f"the document should have at least {DEMO_MIN_TOKENS} tokens")
    if stats["n_resident"] > DEMO_CELLS or stats["kv_bytes"] >= stats["kv_bytes_full"]:
        raise DevError(f"the cache should hold at most {DEMO_CELLS} tokens and take less memory")


def ci() -> None:
    """What has to pass before a change lands."""
    lint()
    build()
    test([])
    test_sanitized()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description="The one command of a developer.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="answer from a long document out of a small cache")
    commands.add_parser("build", help="the package in .venv, and the unpatched llama.cpp")
    sub = commands.add_parser("test", help="all tests")
    sub.add_argument("arguments", nargs=argparse.REMAINDER, help="for pytest")
    commands.add_parser("lint", help="ruff, clang-format, the patch series")
    commands.add_parser("fix", help="format what lint looks at")
    commands.add_parser("ci", help="lint, build, test, property tests with sanitizers")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    steps = {"demo": demo, "build": build, "lint": lint, "fix": fix, "ci": ci}
    begin = time.monotonic()
    try:
        if args.command == "test":
            test(args.arguments)
        else:
            steps[args.command]()
    except (DevError, OSError) as error:
        print(f"\ndev.py {args.command}: {error}", file=sys.stderr)
        return 1
    print(f"\ndev.py {args.command}: done in {time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
