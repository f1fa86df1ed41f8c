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
        ({"recall": "often"}, "recall must be one of turn, always"),
        ({"recall": "never"}, "recall must be one of turn, always"),
        ({"kv_recall_limit": 5}, 'give kv_recall="ram"'),
        ({"kv_recall_type": "q8_0"}, 'give kv_recall="ram"'),
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


def test_policies_without_scores_cannot_recall() -> None:
    with pytest.raises(LaqArgumentError, match="kv_policy='streaming'"):
        RecallConfig("ram").check_policy("streaming")
    RecallConfig("ram").check_policy("snapkv")
    RecallConfig().check_policy("streaming")


def test_an_archive_needs_a_cache_that_evicts() -> None:
    with pytest.raises(LaqArgumentError, match="give kv_budget"):
        RecallConfig("ram").check_policy("laq++", evicts=False)
    RecallConfig().check_policy("laq++", evicts=False)
