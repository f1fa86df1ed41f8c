"""Llama's keywords: refused before any model is opened."""

import inspect
from pathlib import Path

import pytest

from laq_gguf._lib import Native
from laq_gguf.errors import LaqArgumentError, LaqModelError

pytestmark = pytest.mark.usefixtures("native")
MISSING = "no-such-model.gguf"


@pytest.mark.parametrize(
    ("name", "near"),
    [("kv_bugdet", "kv_budget"), ("nctx", "n_ctx"), ("lookahead_sise", "lookahead_size"),
     ("kv_stagging", "kv_staging"), ("prob_size", "probe_size"), ("chunksize", "chunk_size"),
     ("flash_atn", "flash_attn"), ("n_thread", "n_threads")],
)  # fmt: skip
def test_unknown_keyword_names_the_nearest(name: str, near: str) -> None:
    from laq_gguf import Llama

    with pytest.raises(TypeError, match=f"{name!r}; did you mean {near!r}"):
        Llama(MISSING, **{name: 1})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("draft_model", object()), ("embedding", True), ("vocab_only", True), ("pooling_type", 1),
     ("attention_type", 1)],
)  # fmt: skip
def test_settings_that_exclude_a_budget(setting: str, value: object) -> None:
    from laq_gguf import Llama

    with pytest.raises(LaqArgumentError, match=f"{setting}=.* cannot be combined with kv_budget"):
        Llama(MISSING, kv_budget=128, **{setting: value})
    with pytest.raises(LaqModelError, match="Model path does not exist"):
        Llama(MISSING, **{setting: value})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"kv_budget": 19}, "44 are always kept"), ({"kv_budget": 513}, "above n_ctx=512"),
     ({"kv_budget": 128, "kv_policy": "lru"}, "kv_policy must be one of"),
     ({"kv_policy": "lru"}, "kv_policy must be one of"),
     ({"kv_budget": "lots"}, "is not a size in bytes"),
     ({"kv_budget": 128, "kv_staging": 40}, "kv_staging=40 is too small"),
     ({"kv_staging": 0}, "kv_staging must be from 1"),
     ({"probe_size": 0}, "probe_size must be from 1")],
)  # fmt: skip
def test_wrong_values_are_found_before_the_model_is_opened(kwargs: dict, message: str) -> None:
    from laq_gguf import Llama

    with pytest.raises(LaqArgumentError, match=message):
        Llama(MISSING, **kwargs)


def test_model_files(tmp_path: Path) -> None:
    from laq_gguf import Llama

    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    with pytest.raises(LaqModelError, match="is not a GGUF file"):
        Llama(str(text))
    with pytest.raises(LaqModelError, match="Model path does not exist"):
        Llama(str(tmp_path))


def test_signature_takes_all_of_llama_cpp(native: Native) -> None:
    import llama_cpp

    from laq_gguf import Llama

    ours = inspect.signature(Llama.__init__).parameters
    assert ours["flash_attn"].default is True
    assert ours["kv_policy"].default == "laq++"
    assert [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        "self",
        "model_path",
    ]
    stock = inspect.signature(llama_cpp.Llama.__init__).parameters
    assert ours["seed"].default == stock["seed"].default
    assert ours["n_ctx"].default == stock["n_ctx"].default


def test_statuses_become_the_built_in_errors() -> None:
    from laq_gguf.errors import native_error

    expected = {1: ValueError, 2: ValueError, 3: MemoryError, 4: RuntimeError, 5: RuntimeError}
    for status, base in expected.items():
        error = native_error("laq_attach", status, "NAME", "why")
        assert isinstance(error, base) and isinstance(error, RuntimeError)
        assert str(error) == "laq_attach: why" and error.status == status
    assert str(native_error("laq_attach", 5, "NAME", "")) == "laq_attach: NAME"
