"""Settings: what is refused, and what arrives in struct laq_params."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laq_gguf import LaqError, config
from laq_gguf._lib import Native
from laq_gguf.config import (
    CacheSize,
    LaqConfig,
    check_staging,
    default_staging,
    parse_bytes,
    round_cells,
)
from laq_gguf.errors import LaqArgumentError, LaqModelError

CELL = 1000  # bytes of a cell


def per_cell() -> int:
    return CELL


def never() -> int:
    raise AssertionError("the model file is read for bytes alone")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kv_policy", "h2o", "full, laq, laq\\+\\+, snapkv, streaming, random"),
        ("kv_policy", 2, "kv_policy must be one of"),
        ("lookahead", "position", "deferred, pseudo; got"),
        ("pooling", "min", "none, max, avg"),
        ("lookahead_size", 0, "lookahead_size must be from 1"),
        ("lookahead_size", 2.5, "lookahead_size must be an int"),
        ("lookahead_size", True, "lookahead_size must be an int"),
        ("window_size", 0, "window_size must be from 1"),
        ("n_sink", -1, "n_sink must be from 0"),
        ("n_sink", 2**30 + 1, "n_sink must be from 0 to 1073741824"),
        ("snapkv_window", 0, "snapkv_window must be from 1"),
        ("kernel_size", 4, "kernel_size must be odd"),
        ("follow_size", -1, "follow_size must be from 0 to"),
        ("value_fit", -0.5, "value_fit must be a finite number of at least 0, got -0.5"),
        ("value_fit", float("nan"), "value_fit must be a finite number"),
        ("value_fit", "0.1", "value_fit must be a finite number of at least 0, got '0.1'"),
        ("value_fit", True, "value_fit must be a finite number"),
        ("probe_size", 0, "probe_size must be from 1 to"),
        ("probe_size", 48.0, "probe_size must be an int of at least 1, got 48.0"),
        ("chunk_size", -1, "chunk_size must be from 0 to"),
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


@pytest.mark.parametrize(
    ("settings", "n_pinned"),
    [
        ({}, 4 + 8 + 32),
        ({"lookahead": "pseudo"}, 4 + 8 + 32),
        ({"kv_policy": "laq", "lookahead_size": 3}, 4 + 8 + 3),
        ({"kv_policy": "snapkv"}, 4 + 32),
        ({"kv_policy": "streaming", "n_sink": 0}, 8),
        ({"lookahead": "pseudo", "pinned": [(10, 20)]}, 4 + 8 + 32 + 10),
        ({"lookahead": "pseudo", "pinned": [(2, 10), (6, 12), (6, 7)]}, 12 + 8 + 32),
        ({"lookahead": "pseudo", "pinned": [(0, 3)]}, 4 + 8 + 32),
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
        ("lots", "not a size in bytes"),
        (513, "above n_ctx=512"),
        (0, "must be from 1"),
        (-5, "must be from 1"),
        (0.0, "share of n_ctx"),
        (1.0, "share of n_ctx"),
        (-0.5, "share of n_ctx"),
        (float("nan"), "share of n_ctx"),
        (0.01, "0.01 of n_ctx=512 is 5 tokens, but 44 are always kept"),
        (True, "must be an int"),
        ([1], "must be an int"),
    ],
)
def test_refused_budgets(budget: object, message: str) -> None:
    with pytest.raises(LaqArgumentError, match=message):
        LaqConfig().cache_size(budget, None, 512, never)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("200000000", 200_000_000),
        ("200000000 B", 200_000_000),
        ("1KiB", 1024),
        ("512MiB", 512 * 1024**2),
        ("1.5 GiB", 3 * 1024**3 // 2),
        (" 0.1 GiB ", 1024**3 // 10),
        ("800MB", 800_000_000),
        ("2kB", 2000),
        ("2 kb", 2000),
        ("0.5GB", 500_000_000),
    ],
)
def test_bytes(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    ["", "MiB", "512M", "512 M", "1G", "0.25", "1.5 B", "-1MiB", "1,5GiB", "1e9", "1_000MB",
     "1.MiB", ".5GiB", "5 12MiB", "512MiBs", "٣MiB", "infGB", "nan"],
)  # fmt: skip
def test_texts_that_are_no_bytes(text: str) -> None:
    with pytest.raises(LaqArgumentError, match=r"is not a size in bytes: .* as in \"512MiB\""):
        parse_bytes(text)
    with pytest.raises(LaqArgumentError, match="is not a size in bytes"):
        LaqConfig().cache_size(text, None, 512, never)


@pytest.mark.parametrize("text", ["0", "0MiB", "0.0001kB"])
def test_no_bytes_at_all(text: str) -> None:
    with pytest.raises(LaqArgumentError, match="at least one byte"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("kv_budget", "kv_staging", "n_ctx", "expected"),
    [
        (1024, None, 32768, CacheSize(1024, 2048)),  # the default staging is the budget ...
        (128, None, 32768, CacheSize(128, 768)),  # ... and 512 at least, rounded up
        (0.25, None, 4096, CacheSize(1024, 2048)),
        (1024, 88, 32768, CacheSize(1024, 1280)),
        (1024, 256, 32768, CacheSize(1024, 1280)),
        (1024, 257, 32768, CacheSize(1024, 1536)),
        (1024, None, 1500, CacheSize(1024, 1536)),  # never above n_ctx
        (1024, 10**6, 1500, CacheSize(1024, 1536)),
        (1500, None, 1500, CacheSize(1500, 1536)),
        (1499, 1, 1500, CacheSize(1499, 1536)),  # every prompt fits: no chunk needs room
    ],
)
def test_cells_are_budget_and_staging(
    kv_budget: float, kv_staging: int | None, n_ctx: int, expected: CacheSize
) -> None:
    assert LaqConfig().cache_size(kv_budget, kv_staging, n_ctx, never) == expected


@pytest.mark.parametrize(
    ("settings", "least", "message"),
    [
        ({}, 88, r"88 cells .* probe_size=48 and 8 after them\); .* or lower probe_size"),
        (
            {"kv_policy": "laq", "probe_size": 1, "lookahead_size": 2},
            35,
            "probe_size=1 and 2 after",
        ),
        ({"probe_size": 1}, 64, r"tokens of the prompt, lookahead_size=32\)"),
        (
            {"kv_policy": "snapkv"},
            32,
            r"32 cells .* \(32 tokens of the prompt\); raise kv_staging$",
        ),
        ({"kv_policy": "streaming"}, 32, "32 cells"),
        ({"kv_policy": "random"}, 32, "32 cells"),
    ],
)
def test_least_staging(settings: dict, least: int, message: str) -> None:
    config = LaqConfig(**settings)
    assert config.min_staging == least
    assert config.cache_size(100, least, 4096, never).budget == 100
    for budget in (100, "2MB"):
        with pytest.raises(
            LaqArgumentError, match=rf"kv_staging={least - 1} is too small.*{message}"
        ):
            config.cache_size(budget, least - 1, 4096, per_cell)


def test_default_staging_holds_a_large_probe() -> None:
    config = LaqConfig(probe_size=1000)
    assert config.cache_size(200, None, 32768, never) == CacheSize(200, round_cells(200 + 1040))


@pytest.mark.parametrize("kv_staging", [0, -1, 1.5, True, "512", 2**31])
def test_refused_staging(kv_staging: Any) -> None:
    for budget in (128, "2MB"):
        with pytest.raises(LaqArgumentError, match="kv_staging must be"):
            LaqConfig().cache_size(budget, kv_staging, 512, never)
    with pytest.raises(LaqArgumentError, match="kv_staging must be"):
        check_staging(kv_staging)


def test_staging_without_a_budget_is_checked_alone() -> None:
    assert check_staging(None) is None and check_staging(1) == 1


def test_full_policy_has_all_cells() -> None:
    full = LaqConfig(kv_policy="full")
    assert full.cache_size(1, None, 1000, never) == CacheSize(1, 1024)
    assert full.cache_size(1, 1, 1000, never) == CacheSize(1, 1024)
    assert full.cache_size("1024kB", None, 1000, per_cell) == CacheSize(1000, 1024)
    with pytest.raises(
        LaqArgumentError, match=r'kv_policy="full" holds all of n_ctx=1000.*1024000'
    ):
        full.cache_size("1023.9kB", None, 1000, per_cell)


@pytest.mark.parametrize(
    ("kv_budget", "kv_staging", "expected"),
    [
        ("2048kB", None, CacheSize(1024, 2048)),
        ("2303.999kB", None, CacheSize(1024, 2048)),  # rounded down
        ("2304kB", None, CacheSize(1152, 2304)),
        ("768kB", None, CacheSize(256, 768)),
        ("2048kB", 512, CacheSize(1536, 2048)),
        ("2048kB", 2004, CacheSize(44, 2048)),
        ("8191kB", None, CacheSize(3968, 7936)),
        ("8192kB", None, CacheSize(8000, 8192)),  # all of n_ctx=8000: nothing is evicted
        ("1GiB", None, CacheSize(8000, 8192)),
        ("1GiB", 1, CacheSize(8000, 8192)),
    ],
)
def test_cells_of_bytes(kv_budget: str, kv_staging: int | None, expected: CacheSize) -> None:
    assert LaqConfig().cache_size(kv_budget, kv_staging, 8000, per_cell) == expected


@pytest.mark.parametrize(
    ("kv_budget", "kv_staging", "message"),
    [
        ("999", None, r"is 999 bytes, room for 0 cells of 1000 bytes .* but 768 cells are the "
         r"least \(44 tokens that are always kept and 512 more\): give at least 768000 bytes"),
        ("767.9kB", None, "room for 512 cells .* give at least 768000 bytes; for tokens give an"),
        ("2048kB", 2005, "but 2304 cells are the least .*44 tokens .* and 2005 more"),
    ],
)  # fmt: skip
def test_too_few_bytes(kv_budget: str, kv_staging: int | None, message: str) -> None:
    with pytest.raises(LaqArgumentError, match=message):
        LaqConfig().cache_size(kv_budget, kv_staging, 8000, per_cell)


def test_bytes_of_a_model_without_a_cache() -> None:
    with pytest.raises(LaqModelError, match="has no KV cache"):
        LaqConfig().cache_size("1GiB", None, 512, lambda: 0)


def test_bytes_do_not_excuse_pinned_spans() -> None:
    with pytest.raises(LaqArgumentError, match="beyond n_ctx=512"):
        LaqConfig(pinned=[(500, 513)]).cache_size("1GiB", None, 512, per_cell)
    with pytest.raises(LaqArgumentError, match="but 640 are always kept"):
        LaqConfig(pinned=[(0, 600)]).cache_size(600, None, 8192, never)
    # the pinned cells need their staging beside them
    size = LaqConfig(pinned=[(0, 600)]).cache_size("1280kB", None, 8192, per_cell)
    assert size == CacheSize(640, 1280)


@given(
    n_bytes=st.integers(1, 10**8), bytes_per_cell=st.integers(1, 10**4),
    n_ctx=st.integers(64, 10**5), kv_staging=st.none() | st.integers(88, 5000),
    policy=st.sampled_from(sorted(config.POLICIES)),
)  # fmt: skip
def test_bytes_are_a_cap_and_used_up(
    n_bytes: int, bytes_per_cell: int, n_ctx: int, kv_staging: int | None, policy: str
) -> None:
    settings = LaqConfig(kv_policy=policy)
    try:
        size = settings.cache_size(str(n_bytes), kv_staging, n_ctx, lambda: bytes_per_cell)
    except LaqArgumentError as error:
        # what it says is the least, and enough
        least = int(str(error).split("give at least ")[1].split()[0])
        assert least > n_bytes
        settings.cache_size(str(least), kv_staging, n_ctx, lambda: bytes_per_cell)
        with pytest.raises(LaqArgumentError, match="give at least"):
            settings.cache_size(str(least - 1), kv_staging, n_ctx, lambda: bytes_per_cell)
        return
    assert size.n_cells % 256 == 0 and size.n_cells <= round_cells(n_ctx)
    assert size.n_cells * bytes_per_cell <= n_bytes
    if size.n_cells < round_cells(n_ctx):
        assert (size.n_cells + 256) * bytes_per_cell > n_bytes
        staging = kv_staging or default_staging(size.budget)
        assert size.budget + staging <= size.n_cells
    # the same budget in tokens makes the same cells
    assert policy == "full" or size == settings.cache_size(size.budget, kv_staging, n_ctx, never)


def test_default_staging_may_be_any_rising_function(monkeypatch: pytest.MonkeyPatch) -> None:
    for staging in (lambda b: 300, lambda b: max(300, b // 3), lambda b: 3 * b + 7):
        monkeypatch.setattr(config, "default_staging", staging)
        for n_cells in (512, 1024, 7936):
            size = LaqConfig().cache_size(f"{n_cells}kB", None, 8000, per_cell)
            assert size.n_cells == n_cells
            assert size.budget + staging(size.budget) <= n_cells
            assert size.budget + 1 + staging(size.budget + 1) > n_cells


def test_pinned_span_beyond_the_context_is_refused() -> None:
    with pytest.raises(LaqArgumentError, match="beyond n_ctx=512"):
        LaqConfig(pinned=[(500, 513)]).resolve_budget(128, 512)


def test_every_setting_arrives_in_the_native_struct(native: Native) -> None:
    config = LaqConfig(
        kv_policy="snapkv", lookahead="pseudo", lookahead_size=5, window_size=9, n_sink=2,
        pinned=[(7, 9), (20, 21)], snapkv_window=17, kernel_size=3, pooling="avg",
        follow_size=6, value_fit=0.25, probe_size=33, chunk_size=44,
    )  # fmt: skip
    params, spans = config.to_native(native, budget=99, n_ctx=8000, seed=-1)
    lib = native.lib
    assert params.size == native.ffi.sizeof("struct laq_params")
    assert (params.policy, params.lookahead) == (lib.LAQ_POLICY_SNAPKV, lib.LAQ_LOOKAHEAD_PSEUDO)
    assert params.pooling == lib.LAQ_POOLING_AVG
    assert (params.n_kv_budget, params.n_lookahead, params.n_window) == (99, 5, 9)
    assert (params.n_window_snapkv, params.n_sink, params.n_kernel) == (17, 2, 3)
    assert (params.n_follow, params.value_fit) == (6, 0.25)
    assert (params.n_ctx, params.n_probe, params.n_chunk) == (8000, 33, 44)
    assert params.seed == 0xFFFFFFFF
    assert params.n_pinned == 2
    assert [(params.pinned[i].p0, params.pinned[i].p1) for i in range(2)] == [(7, 9), (20, 21)]
    assert len(spans) == 2


def test_python_defaults_are_the_native_defaults(native: Native) -> None:
    ours, _ = LaqConfig().to_native(native, budget=0, n_ctx=0, seed=0)
    theirs = native.lib.laq_default_params()
    for name, _ in native.ffi.typeof("struct laq_params").fields:
        if name not in ("n_kv_budget", "seed"):
            assert getattr(ours, name) == getattr(theirs, name), name
