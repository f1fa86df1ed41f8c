"""Options of the benchmarks: a default is written once, in LaqConfig."""

from __future__ import annotations

import argparse

from laq_gguf.bench import commands
from laq_gguf.config import CONFIG_NAMES, LaqConfig

#: options that are named otherwise than the setting
SETTING_OF = {"policy": "kv_policy"}


def settings_of(parser: argparse.ArgumentParser) -> dict[str, object]:
    """Defaults of the options of a parser that are settings of LaqConfig."""
    options = {SETTING_OF.get(a.dest, a.dest): a.default for a in parser._actions}
    return {name: default for name, default in options.items() if name in CONFIG_NAMES}


def test_defaults_are_those_of_the_settings() -> None:
    default = LaqConfig()
    seen: dict[str, int] = {}
    for name, module in commands.COMMANDS.items():
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        found = settings_of(parser)
        assert found == {setting: getattr(default, setting) for setting in found}, name
        seen[name] = len(found)
    assert seen["speed"] == 3 and seen["chat"] > 3 and seen["tune"] > 3
