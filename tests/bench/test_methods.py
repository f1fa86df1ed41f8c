"""Methods by name, budgets of equal bytes, and the commands of `laq-gguf bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import pytest

from laq_gguf import cli
from laq_gguf.bench import commands
from laq_gguf.bench.methods import (
    METHODS,
    allocation,
    base_name,
    bounded_size,
    method_names,
    parse_method,
    share_text,
    shares,
    tokens_of_share,
)
from laq_gguf.bench.provenance import shown_command


def test_a_name_may_end_in_a_type() -> None:
    method = parse_method("laq++@q8_0")
    assert (method.name, method.type, method.evicts, method.bounded) == (
        "laq++@q8_0", "q8_0", True, False
    )  # fmt: skip
    assert method.config.kv_policy == "laq++" and method.config.lookahead == "pseudo"
    # 4 sinks, a window of 8, 32 of the lookahead; a window of 32, as the first stage of the paper
    assert [parse_method(n).least for n in ("streaming", "laq++", "snapkv", "laq")] == [
        12,
        44,
        36,
        36,
    ]
    paper = parse_method("laq@q8_0")
    assert (paper.config.lookahead_size, paper.config.follow_size) == (8, 0)
    assert paper.two_stages and not parse_method("laq++").two_stages
    assert parse_method("full").type == "f16" and not parse_method("full").evicts
    assert method_names("full,laq,full") == ["full", "laq"]
    for name in METHODS:
        assert parse_method(name).config.kv_policy in name or name in (
            "deferred",
            "bounded",
            "recall",
        )


def test_a_name_may_go_on_with_settings() -> None:
    plain, method = parse_method("laq++"), parse_method("laq++@q8_0:window_size=32:pooling=avg")
    assert (method.name, method.type) == ("laq++@q8_0:window_size=32:pooling=avg", "q8_0")
    changed = {"window_size": 32, "pooling": "avg"}
    assert vars(method.config) == {**vars(plain.config), **changed}
    assert vars(plain.config)["window_size"] == 8, "the method without them is as it was"
    assert method.least == plain.least + 24
    # what the method itself has set may be set otherwise
    assert parse_method("laq:follow_size=32").config.follow_size == 32
    bounded = parse_method("bounded:probe_size=96")
    assert bounded.bounded and bounded.config.probe_size == 96
    names = ["laq++", "laq++:n_sink=0"]
    assert method_names(",".join([*names, names[1]])) == names
    assert [base_name(n) for n in (names[1], method.name)] == ["laq++", "laq++@q8_0"]


def test_one_cache_takes_the_settings_of_all_methods() -> None:
    names = ("laq++:lookahead_size=4", "snapkv:snapkv_window=64", "laq++:window_size=16")
    expected = {"lookahead_size": 32, "window_size": 16, "snapkv_window": 64}
    assert allocation(map(parse_method, names)) == expected
    assert allocation([parse_method("laq++:lookahead_size=48")])["lookahead_size"] == 48


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lak", "unknown method 'lak'"),
        ("laq@q9", "unknown K/V type 'q9'"),
        ("lak:n_sink=1", "unknown method 'lak'"),
        ("laq++:sinks=1", "'sinks=1' of .* settings: lookahead_size, window_size, n_sink"),
        ("laq++:n_sink", "is no SETTING=VALUE"),
        ("laq++:", "'' of 'laq..:' is no SETTING=VALUE"),
        ("laq++:kv_policy=laq", "is no SETTING=VALUE; settings: lookahead_size"),
        ("laq++:probe_size=96", "settings: .*, value_fit$"),
        ("laq++:draft=snapkv", "is no SETTING=VALUE"),
        ("bounded:probes=96", "settings: .*, value_fit, probe_size, chunk_size"),
        ("laq++:window_size=all", "window_size of .* is an int, got 'all'"),
        ("laq++:n_sink=1:n_sink=2", "has n_sink twice"),
        ("laq++:window_size=0", "window_size must be from 1"),
        ("laq++:kernel_size=4", "kernel_size must be odd"),
        ("laq++:pooling=mean", "pooling must be one of none, max, avg; got 'mean'"),
        ("full@q8_0:n_sink=1", "never evicts has no settings"),
    ],
)
def test_unknown_names_are_refused(text: str, words: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        method_names(text)


def test_shares_are_fractions() -> None:
    assert shares("1/4,0.125,1/16") == [0.25, 0.125, 0.0625]
    assert [share_text(share) for share in (0.25, 0.0625, 1 / 3)] == ["1/4", "1/16", "1/3"]
    for wrong in ("1", "0", "-1/4", "x", "1/0", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="between 0 and 1"):
            shares(wrong)


def test_equal_bytes_are_more_tokens_in_a_smaller_type() -> None:
    # 30 layers of 3 KV heads of 64, K and V: 2 bytes a value, or 34 and 18 for 32 of them
    values = 30 * 3 * 64 * 2
    f16, q8_0, q4_0 = 2 * values, values * 34 / 32, values * 18 / 32
    assert tokens_of_share(1 / 8, 2000, f16, f16) == 250
    assert tokens_of_share(1 / 8, 2000, f16, q8_0) == int(250 * 32 / 17)
    assert tokens_of_share(1 / 8, 2000, f16, q4_0) == int(250 * 32 / 9)
    for share in (1 / 4, 1 / 16, 1 / 3):
        n = tokens_of_share(share, 2001, f16, q8_0)
        assert n * q8_0 <= share * 2001 * f16 < (n + 1) * q8_0


def test_a_bounded_cache_counts_all_its_cells() -> None:
    config = parse_method("bounded").config
    assert bounded_size(1100, config) == (768, 256), "cells come in steps of 256"
    assert bounded_size(256, config) == (168, 88) and config.min_staging == 88
    assert bounded_size(250, config) == (168, 88) and bounded_size(248, config) is None
    assert sum(bounded_size(507, config)) == 512, "1 % more, not half"
    assert bounded_size(256, config, staging=512) == (256, 512), "the budget of the others"


def test_every_command_is_one_of_the_installed_command(capsys: pytest.CaptureFixture) -> None:
    for name, module in commands.COMMANDS.items():
        with pytest.raises(SystemExit) as done:
            cli.main(["bench", name, "--help"])
        assert done.value.code == 0
        assert (module.__doc__ or "").split(":")[0] in capsys.readouterr().out
    assert cli.main(["bench", "report", "none.json"]) == 2
    assert "laq-gguf bench report: no result file" in capsys.readouterr().err


def test_an_interrupted_command_is_no_failure() -> None:
    def interrupted(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    module = SimpleNamespace(__doc__="X.", add_arguments=lambda parser: None, run=interrupted)
    assert commands.main(["x"], commands={"x": module}) == 130


def test_a_command_is_shown_without_paths_of_this_machine(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data", "/somewhere/data", f"--out={tmp_path / 'r' / 'x.json'}", "--text", "../a b"]
    assert shown_command(["/venv/bin/laq-gguf", "bench", "quality", *words]) == (
        "laq-gguf bench quality --data data --out=r/x.json --text '../a b'"
    )
    assert shown_command(["/x/scripts/bench.py", "chat"]) == "python bench.py chat"
    assert shown_command(["scripts/bench.py", "chat"]) == "python scripts/bench.py chat"
