"""Settings of the archive."""

import pytest

from laq_gguf.errors import LaqArgumentError
from laq_gguf.recall import RecallConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_recall": "tape"}, "kv_recall must be one of None, ram, disk"),
        ({"kv_recall": True}, "kv_recall must be one of"),
        ({"kv_recall": "ram", "kv_recall_type": "f64"}, "None, q8_0, q4_0"),
        ({"kv_recall": "ram", "kv_recall_limit": -1}, "kv_recall_limit must be from 0"),
        ({"kv_recall": "ram", "kv_recall_limit": "much"}, "kv_recall_limit='much' is not a size"),
        ({"kv_recall": "ram", "kv_recall_limit": 0.5}, "kv_recall_limit must be an int"),
        ({"recall": "often"}, "recall must be one of never, turn, always"),
        ({"recall_rounds": 17}, "recall_rounds must be from 0 to 16"),
        ({"reread_size": 0}, "reread_size must be from 1 to 1048576"),
        ({"kv_recall_limit": 5}, 'give kv_recall="ram"'),
        ({"kv_recall_type": "q8_0"}, 'give kv_recall="ram"'),
        ({"kv_recall": "ram", "recall_device": "gpu"}, "must be one of auto, cpu, device"),
        ({"kv_recall": "ram", "recall_device": None}, "recall_device must be one of"),
        ({"kv_recall": "ram", "recall_read": "all"}, "must be one of auto, archive, cells, prompt"),
        ({"recall_read": "cells"}, 'recall_read is of the archive.*give kv_recall="ram"'),
        ({"recall_device": "cpu"}, 'recall_device is of the archive.*give kv_recall="ram"'),
    ],
)
def test_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(LaqArgumentError, match=message):
        RecallConfig(**settings)


@pytest.mark.parametrize(
    ("kv_recall", "limit", "n_bytes"),
    [
        ("ram", None, 2**64 - 1),
        ("disk", None, 0),
        ("disk", "1KiB", 1024),
        ("ram", 7, 7),
    ],
)
def test_limit(kv_recall: str, limit: object, n_bytes: int) -> None:
    assert RecallConfig(kv_recall, kv_recall_limit=limit).limit() == n_bytes


def test_policies_that_look_at_nothing_cannot_choose_again() -> None:
    with pytest.raises(LaqArgumentError, match="kv_policy='streaming'"):
        RecallConfig("ram").check_policy("streaming")
    RecallConfig("ram").check_policy("snapkv")
    RecallConfig().check_policy("streaming")


def test_an_archive_needs_a_cache_that_evicts() -> None:
    with pytest.raises(LaqArgumentError, match="give kv_budget"):
        RecallConfig("ram").check_policy("laq++", evicts=False)
    RecallConfig().check_policy("laq++", evicts=False)
