"""The command line: flags, and errors in one line with exit code 2."""

import inspect
from pathlib import Path

import pytest

from laq_gguf import _lib, cli
from laq_gguf.config import LaqConfig

GENERATE = ["generate", "--model", "m.gguf", "--prompt", "q"]


def test_defaults_are_those_of_the_python_class() -> None:
    args = cli.build_parser().parse_args(GENERATE)
    defaults = LaqConfig()
    for name in ("kv_policy", "lookahead", "lookahead_size", "window_size", "n_sink"):
        assert getattr(args, name) == getattr(defaults, name)
    assert args.kv_budget is None and args.temperature == 0.0 and args.n_ctx == 0


@pytest.mark.parametrize(("text", "value"), [("256", 256), ("0.25", 0.25), ("512MiB", "512MiB")])
def test_budget(text: str, value: float) -> None:
    args = cli.build_parser().parse_args([*GENERATE, "--kv-budget", text])
    assert args.kv_budget == value and type(args.kv_budget) is type(value)


def test_flags_are_the_python_names(native: _lib.Native) -> None:
    from laq_gguf import Llama

    known = set(inspect.signature(Llama.__init__).parameters)
    own = {"model", "prompt", "file", "json", "raw", "verbose", "threads", "no_flash_attn", "run",
           "max_tokens", "temperature", "type_k", "type_v", "n_gpu_layers"}  # fmt: skip
    assert set(vars(cli.build_parser().parse_args(GENERATE))) - own <= known


@pytest.mark.parametrize(
    "wrong",
    [["--kv-budget", "big"], ["--kv-policy", "lru"], ["--lookahead", "no"], ["--type-k", "q9"],
     ["--max-tokens", "many"], ["--kv-bugdet", "1"]],
)  # fmt: skip
def test_wrong_flags_exit_with_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main([*GENERATE, *wrong])
    assert error.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_nothing_asked_exits_with_2() -> None:
    with pytest.raises(SystemExit) as error:
        cli.main([])
    assert error.value.code == 2


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_unreadable_document(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    if kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    assert cli.main([*GENERATE, "--file", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("laq-gguf: error: --file: ") and len(err.splitlines()) == 1


def test_missing_library_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LAQ_LIB_PATH", str(tmp_path))
    _lib.load.cache_clear()
    try:
        assert cli.main(["doctor"]) == 1
    finally:
        _lib.load.cache_clear()
    assert "no libllama in" in capsys.readouterr().err
