"""`laq-gguf` as a user runs it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.needles import make_needle

MODULE = ("-m", "laq_gguf")


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "essay.txt"
    path.write_text(make_needle(0, 300).document, encoding="utf-8")
    return path


@pytest.mark.model
def test_generate_as_json(smollm2: Path, document: Path, run_python: Callable) -> None:
    done = run_python(
        *MODULE, "generate", "--model", str(smollm2), "--file", str(document), "--kv-budget",
        "128", "--kv-staging", "100", "--lookahead", "pseudo", "--prompt",
        make_needle(0, 300).question.strip(),
        "--max-tokens", "12", "--n-ctx", "1024", "--json", "--raw",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) == {"text", "prompt_tokens", "stats"}
    assert make_needle(0, 300).answer in result["text"]
    stats = result["stats"]
    assert stats["n_resident"] <= 128 + 12 and stats["n_evictions"] >= 2
    assert stats["n_cells"] == 256 and stats["n_probe"] > 0, "the prompt is longer than the cells"
    assert result["prompt_tokens"] > 300 and stats["n_tokens"] >= result["prompt_tokens"]
    assert stats["kv_bytes"] * 4 == stats["kv_bytes_full"]
    assert "reading" in done.stderr and "tokens/s" in done.stderr, "the progress bar"
    assert "llama_" not in done.stderr, "llama.cpp's log is off"


@pytest.mark.model
def test_generate_with_the_chat_template(
    smollm2: Path, document: Path, run_python: Callable
) -> None:
    common = (
        *MODULE, "generate", "--model", str(smollm2), "--file", str(document), "--prompt",
        "What is the essay about?", "--max-tokens", "10", "--n-ctx", "1024",
    )  # fmt: skip
    done = run_python(
        *common,
        "--kv-budget",
        "0.125",
        "--kv-staging",
        "128",
        "--type-k",
        "q8_0",
        "--type-v",
        "q8_0",
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 10
    last = done.stderr.splitlines()[-1]
    assert last.startswith("KV cache: ") and last.endswith("for n_ctx=1024")
    assert "of 256 cells" in last and "instead of 11.95 MiB"[:12] in last
    raw = run_python(*common, "--raw", "--kv-budget", "8MiB")
    assert raw.stdout != done.stdout
    kept = run_python(*common, "--json")
    assert json.loads(kept.stdout)["stats"] is None


def test_a_saving_is_of_positions_that_can_be_used(
    tiny_gguf: Callable[..., Path], run_python: Callable
) -> None:
    done = run_python(
        *MODULE, "generate", "--model", str(tiny_gguf("llama", n_ctx_train=512)), "--prompt",
        "why?", "--max-tokens", "2", "--n-ctx", "4096", "--kv-budget", "64", "--kv-staging", "192",
        "--raw",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.endswith("for the 512 positions of n_ctx=4096 that the model can use")


def test_wrong_input_is_one_line_and_exit_code_2(
    tiny_gguf: Callable[..., Path], document: Path, run_python: Callable, tmp_path: Path
) -> None:
    model = str(tiny_gguf("llama"))
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(Path(model).read_bytes()[:100_000])
    text = ["--file", str(document)]
    cases = {
        "Model path does not exist": ["--model", "no.gguf"],
        "is not a GGUF file": ["--model", str(document)],
        "Failed to load model": ["--model", str(truncated)],
        "cannot be read": ["--model", model, "--file", "no.txt"],
        "exceed context window of 256": ["--model", model, *text, "--n-ctx", "256"],
        "are always kept": ["--model", model, *text, "--kv-budget", "5", "--n-ctx", "1024"],
        "above n_ctx=256": ["--model", model, *text, "--kv-budget", "500", "--n-ctx", "256"],
        "quantized V cache": ["--model", model, *text, "--type-v", "q8_0", "--no-flash-attn"],
    }
    for message, flags in cases.items():
        done = run_python(*MODULE, "generate", "--prompt", "why?", *flags)
        assert done.returncode == 2, (message, done.stderr)
        assert done.stderr.startswith("laq-gguf: error: ") and message in done.stderr
        assert len(done.stderr.splitlines()) == 1 and done.stdout == "", (message, done.stderr)


def test_doctor(native: object, run_python: Callable) -> None:
    done = run_python(*MODULE, "doctor")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["libllama"].endswith(str(native.path))
    assert {"laq-gguf", "python", "llama_cpp", "version", "backends", "device"} <= set(lines)
    assert "CPU" in done.stdout
    types = "f32 f16 q4_0 q4_1 q5_0 q5_1 q8_0 bf16"
    assert f"  score kernel    fused for {types} keys" in done.stdout.splitlines()


def test_verbose_shows_the_log(
    tiny_gguf: Callable[..., Path], document: Path, run_python: Callable
) -> None:
    done = run_python(
        *MODULE, "generate", "--model", str(tiny_gguf("llama")), "--prompt", "why?", "--verbose",
        "--max-tokens", "2", "--n-ctx", "512", "--raw",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "llama_context" in done.stderr
