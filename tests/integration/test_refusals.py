"""Models and files that cannot work: a clear error, nothing leaked."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.decoding import greedy, open_llama, tokens_of
from laq_gguf import LaqError
from laq_gguf.errors import LaqModelError, LaqUnsupportedError


@pytest.mark.parametrize(
    ("kind", "name"),
    [("bert", "encoder"), ("mamba", "recurrent"), ("mpt", "ALiBi"), ("gemma3", "sliding")],
)
def test_models_that_cannot_be_evicted_are_named(
    tiny_gguf: Callable[..., Path], kind: str, name: str
) -> None:
    with pytest.raises(LaqUnsupportedError, match=f"(?i){name}") as error:
        open_llama(tiny_gguf(kind), kv_budget=64)
    assert isinstance(error.value, RuntimeError) and isinstance(error.value, ValueError)


@pytest.mark.parametrize("kind", ["mamba", "mpt", "gemma3"])
def test_the_same_models_work_without_a_budget(tiny_gguf: Callable[..., Path], kind: str) -> None:
    llm = open_llama(tiny_gguf(kind))
    assert len(greedy(llm, tokens_of(30), 4)) == 4


def test_truncated_file(tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    whole = tiny_gguf("llama").read_bytes()
    for n_bytes in (4, 1000, len(whole) - 1000):
        path = tmp_path / f"{n_bytes}.gguf"
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(LaqModelError, match=r"(?i)failed to read|corrupted or incomplete"):
            open_llama(path, kv_budget=64)


def test_setting_that_llama_cpp_refuses_says_why(tiny_gguf: Callable[..., Path]) -> None:
    with pytest.raises(LaqModelError, match=r"(?i)quantized V cache"):
        open_llama(tiny_gguf("llama"), type_v=8, flash_attn=False)


def test_budget_above_the_context_of_the_model(tiny_gguf: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="above n_ctx=2048"):
        open_llama(tiny_gguf("llama"), n_ctx=0, kv_budget=2049)


def test_refused_models_leak_no_memory(tiny_gguf: Callable[..., Path]) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("reads the memory of a process from /proc")

    def resident_mib() -> float:
        line = next(text for text in status.read_text().splitlines() if text.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    def refuse() -> Exception:
        with pytest.raises(LaqError) as error:
            open_llama(tiny_gguf("mpt"), kv_budget=64, n_ctx=32768)
        return error.value

    errors = [refuse()]  # tracebacks are kept: freeing may not wait for them
    gc.collect()
    before = resident_mib()
    errors += [refuse() for _ in range(6)]
    assert resident_mib() - before < 40, "one context takes 32 MiB and more"
    assert len(errors) == 7


def test_closing_in_any_order(tiny_gguf: Callable[..., Path], run_python: Callable) -> None:
    code = f"""
import gc
from laq_gguf import Llama, LaqError
def make():
    llm = Llama({str(tiny_gguf("llama"))!r}, kv_budget=64, n_ctx=512, verbose=False)
    llm.eval(list(range(260, 370)))
    return llm
a = make(); a.close(); a.close()
try:
    a.kv_stats()
except LaqError as error:
    print(error)
b = make(); b._ctx.close(); b.close()
c = make(); c._model.close(); c.close()
d = make(); d.itself = d; del d; gc.collect()
e = make(); tokens = e.generate(list(range(260, 370)) + [300]); next(tokens); e.close(); del tokens
f = make()
"""
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the model is closed: make a new Llama"
    assert done.stderr == ""
