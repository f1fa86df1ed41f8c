"""What README and the docstrings promise of memory, numbers and devices."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from laq_gguf.config import LaqConfig
from laq_gguf.errors import LaqArgumentError

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def row(start: str) -> str:
    """The one row of README's tables whose first cell begins so."""
    (found,) = [line for line in README.splitlines() if line.startswith(f"| {start}")]
    return found


def docstring() -> str:
    """That of Llama.__init__, in one line."""
    from laq_gguf import Llama

    return " ".join((inspect.getdoc(Llama.__init__) or "").split())


def test_the_least_budget() -> None:
    least = LaqConfig().n_pinned()
    assert f"a `kv_budget` below these {least} raises" in row("`lookahead_size`")
    assert LaqConfig().resolve_budget(least, 1024) == least
    with pytest.raises(LaqArgumentError, match=f"{least} are always kept"):
        LaqConfig().resolve_budget(least - 1, 1024)


def test_without_a_budget_flash_attention_is_on(native: Any) -> None:
    from laq_gguf import Llama

    assert inspect.signature(Llama.__init__).parameters["flash_attn"].default is True
    assert "`llama_cpp.Llama(path, flash_attn=True)`" in row("`kv_budget`")
    assert "flash_attn: on by default, also without kv_budget" in docstring()
    import llama_cpp

    stock = inspect.signature(llama_cpp.Llama.__init__).parameters
    assert stock["flash_attn"].default is False


def test_what_grows(native: Any) -> None:
    assert "takes no memory" not in README + docstring()
    assert "Its memory is allocated once" not in README
    assert "the compute buffers do" in row("`n_ctx`")
    assert "with kv_recall the compute buffers" in docstring()
    assert "grows with the chat" in row("`n_ctx`") and "grows with the chat" in docstring()


@pytest.mark.parametrize("device", ["RTX", "Apple"])
def test_devices_that_have_not_run_it_are_named(device: str) -> None:
    rows = [line for line in README.splitlines() if line.startswith("|") and device in line]
    assert rows and all(re.search("not yet (run )?on any", line) for line in rows)


def test_an_archive_in_host_memory_saves_a_gpus(native: Any) -> None:
    where = row('`kv_recall="ram"` |')
    assert "machine without" in where and "unified memory" in where
    assert "without a GPU, or with unified memory (a Mac)" in docstring()
