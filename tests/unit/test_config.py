"""Settings: what is refused, and what arrives in struct laq_params."""

import pytest

from laq_gguf import LaqError
from laq_gguf._lib import Native
from laq_gguf.config import LaqConfig
from laq_gguf.errors import LaqArgumentError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv_policy", "h2o", "full, laq, laq\\+\\+, snapkv, streaming, random"),
        ("kv_policy", 2, "kv_policy must be one of"),
        ("lookahead", "none", "deferred, pseudo"),
        ("draft", "tiny", "full, snapkv"),
        ("pooling", "min", "none, max, avg"),
        ("score_kernel", "cuda", "auto, fused, composed"),
        ("lookahead_size", 0, "lookahead_size must be from 1"),
        ("lookahead_size", 2.5, "lookahead_size must be an int"),
        ("lookahead_size", True, "lookahead_size must be an int"),
        ("window_size", 0, "window_size must be from 1"),
        ("n_sink", -1, "n_sink must be from 0"),
        ("snapkv_window", 0, "snapkv_window must be from 1"),
        ("kernel_size", 4, "kernel_size must be odd"),
        ("follow_size", -1, "follow_size must be from 0 to"),
        ("kernel_size", 2**31, "kernel_size must be from 1 to 2147483647"),
        ("pinned", [(5, 5)], r"got the entry \(5, 5\)"),
        ("pinned", [(-1, 5)], "pinned must be from 0"),
        ("pinned", [3], "got the entry 3"),
        ("pinned", ["ab"], "got the entry 'ab'"),
        ("pinned", "all", "got 'all'"),
    ],
)
def test_refused_values_name_what_is_possible(name: str, value: object, message: str) -> None:
    with pytest.raises(LaqArgumentError, match=message):
        LaqConfig(**{name: value})


def test_arguments_are_value_errors_too() -> None:
    with pytest.raises(ValueError):
        LaqConfig(pooling="min")
    with pytest.raises(LaqError):
        LaqConfig(pooling="min")


def test_snapkv_draft_needs_pseudo_tokens() -> None:
    with pytest.raises(LaqArgumentError, match='lookahead="pseudo"'):
        LaqConfig(draft="snapkv")
    assert LaqConfig(draft="snapkv", lookahead="pseudo").draft == "snapkv"


@pytest.mark.parametrize(
    ("settings", "n_pinned"),
    [
        ({}, 4 + 8 + 8),
        ({"lookahead": "pseudo"}, 4 + 8),
        ({"kv_policy": "laq", "lookahead_size": 3}, 4 + 8 + 3),
        ({"kv_policy": "snapkv"}, 4 + 32),
        ({"kv_policy": "streaming", "n_sink": 0}, 8),
        ({"lookahead": "pseudo", "pinned": [(10, 20)]}, 4 + 8 + 10),
        ({"lookahead": "pseudo", "pinned": [(2, 10), (6, 12), (6, 7)]}, 12 + 8),
        ({"lookahead": "pseudo", "pinned": [(0, 3)]}, 4 + 8),
    ],
)
def test_pinned_cells_are_a_union(settings: dict, n_pinned: int) -> None:
    config = LaqConfig(**settings)
    assert config.n_pinned() == n_pinned
    assert config.resolve_budget(n_pinned, 512) == n_pinned
    with pytest.raises(LaqArgumentError, match=f"{n_pinned} are always kept"):
        config.resolve_budget(n_pinned - 1, 512)


def test_full_policy_keeps_everything_whatever_the_budget() -> None:
    assert LaqConfig(kv_policy="full").resolve_budget(1, 512) == 1


@pytest.mark.parametrize(("budget", "tokens"), [(512, 512), (0.25, 128), (0.999, 511)])
def test_budget_is_tokens_or_a_share_of_n_ctx(budget: float, tokens: int) -> None:
    assert LaqConfig().resolve_budget(budget, 512) == tokens


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("512MiB", "a budget in bytes is not supported"),
        (513, "above n_ctx=512"),
        (0, "must be from 1"),
        (-5, "must be from 1"),
        (0.0, "share of n_ctx"),
        (1.0, "share of n_ctx"),
        (-0.5, "share of n_ctx"),
        (float("nan"), "share of n_ctx"),
        (0.01, "0.01 of n_ctx=512 is 5 tokens, but 20 are always kept"),
        (True, "must be an int"),
        ([1], "must be an int"),
    ],
)
def test_refused_budgets(budget: object, message: str) -> None:
    with pytest.raises(LaqArgumentError, match=message):
        LaqConfig().resolve_budget(budget, 512)


def test_pinned_span_beyond_the_context_is_refused() -> None:
    with pytest.raises(LaqArgumentError, match="beyond n_ctx=512"):
        LaqConfig(pinned=[(500, 513)]).resolve_budget(128, 512)


def test_every_setting_arrives_in_the_native_struct(native: Native) -> None:
    config = LaqConfig(
        kv_policy="snapkv", lookahead="pseudo", lookahead_size=5, window_size=9, n_sink=2,
        pinned=[(7, 9), (20, 21)], snapkv_window=17, kernel_size=3, pooling="avg",
        follow_size=6, draft="snapkv", score_kernel="composed",
    )  # fmt: skip
    params, spans = config.to_native(native, budget=99, seed=-1)
    lib = native.lib
    assert params.size == native.ffi.sizeof("struct laq_params")
    assert (params.policy, params.lookahead) == (lib.LAQ_POLICY_SNAPKV, lib.LAQ_LOOKAHEAD_PSEUDO)
    assert (params.draft, params.pooling) == (lib.LAQ_DRAFT_SNAPKV, lib.LAQ_POOLING_AVG)
    assert params.score_kernel == lib.LAQ_SCORE_KERNEL_COMPOSED
    assert (params.n_kv_budget, params.n_lookahead, params.n_window) == (99, 5, 9)
    assert (params.n_window_snapkv, params.n_sink, params.n_kernel) == (17, 2, 3)
    assert params.n_follow == 6
    assert params.seed == 0xFFFFFFFF
    assert params.n_pinned == 2
    assert [(params.pinned[i].p0, params.pinned[i].p1) for i in range(2)] == [(7, 9), (20, 21)]
    assert len(spans) == 2


def test_python_defaults_are_the_native_defaults(native: Native) -> None:
    ours, _ = LaqConfig().to_native(native, budget=0, seed=0)
    theirs = native.lib.laq_default_params()
    for name, _ in native.ffi.typeof("struct laq_params").fields:
        if name not in ("n_kv_budget", "seed"):
            assert getattr(ours, name) == getattr(theirs, name), name
