"""Without kv_budget the patched library computes what the plain build of the same commit does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from laq_gguf._lib import Native

N_DECODE = 64
#: runs in its own process, with llama_cpp alone: argv = model, output, flash_attn, type, n_decode
SCRIPT = """
import sys
import numpy as np
import llama_cpp
model, output, flash_attn, kv_type, n_decode = sys.argv[1:]
llm = llama_cpp.Llama(
    model, n_ctx=512, n_batch=128, n_threads=2, n_threads_batch=2, flash_attn=flash_attn == "1",
    type_k=int(kv_type), type_v=int(kv_type), logits_all=True, verbose=False,
)
prompt = llm.tokenize(("The mill stands where the river meets the road, and the miller "
                       "counts the sacks. " * 12).encode())[:200]
llm.eval(prompt)
for _ in range(int(n_decode)):
    llm.eval([int(llm.scores[llm.n_tokens - 1].argmax())])
np.save(output, llm.scores[: llm.n_tokens])
print(llama_cpp.llama_cpp._lib._name, len(prompt))
"""


def logits(
    run_python: Callable, folder: Path, output: Path, model: Path, flash_attn: bool, kv_type: int
) -> np.ndarray:
    """Logits of every prompt token and of 64 greedy ones, from the library in `folder`."""
    args = (str(model), str(output), str(int(flash_attn)), str(kv_type), str(N_DECODE))
    done = run_python("-c", SCRIPT, *args, LLAMA_CPP_LIB_PATH=str(folder))
    assert done.returncode == 0, done.stderr
    name, n_prompt = done.stdout.split()
    assert Path(name).parent == folder
    scores = np.load(output)
    assert scores.dtype == np.float32 and len(scores) == int(n_prompt) + N_DECODE
    return scores


def assert_identical(
    native: Native, plain_lib: Path, run_python: Callable, tmp_path: Path, model: Path,
    flash_attn: bool, kv_type: int,
) -> None:  # fmt: skip
    ours, plain = (
        logits(run_python, folder, tmp_path / f"{name}.npy", model, flash_attn, kv_type)
        for name, folder in (("ours", native.path.parent), ("plain", plain_lib))
    )
    assert ours.shape == plain.shape
    assert np.ptp(plain) > 1, "logits of a model that computes something"
    differ = np.flatnonzero((ours.view(np.uint32) != plain.view(np.uint32)).any(axis=1))
    assert differ.size == 0, (
        f"{differ.size} of {len(ours)} rows differ, first at token {differ[0]}: "
        f"{ours[differ[0]][:5]} against {plain[differ[0]][:5]}"
    )


CASES = [
    pytest.param(True, 1, id="FA-f16"),
    pytest.param(True, 8, id="FA-q8_0"),
    pytest.param(False, 1, id="noFA-f16"),
]


@pytest.mark.model
@pytest.mark.parametrize(("flash_attn", "kv_type"), CASES)
def test_logits_of_a_real_model_are_bit_identical(
    native: Native, plain_lib: Path, run_python: Callable, tmp_path: Path, smollm2: Path,
    flash_attn: bool, kv_type: int,
) -> None:  # fmt: skip
    assert_identical(native, plain_lib, run_python, tmp_path, smollm2, flash_attn, kv_type)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mpt", "mamba"])
def test_logits_of_other_caches_are_bit_identical(
    native: Native, plain_lib: Path, run_python: Callable, tmp_path: Path,
    tiny_gguf: Callable[..., Path], kind: str,
) -> None:  # fmt: skip
    assert_identical(native, plain_lib, run_python, tmp_path, tiny_gguf(kind), True, 1)
