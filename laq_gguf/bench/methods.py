"""METHODS: the caches that are compared, by name, and how many tokens each may hold.

A name may go on with the type of K and V and with settings of LaqConfig: `laq++@q8_0`,
`laq++:pooling=avg:kernel_size=5`. Methods are compared at equal bytes: a share of what the full f16
cache of the same prompt takes. How many tokens that is follows from the bytes of a cell of the
method's own type, read back from a cache that was allocated.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from laq_gguf.cli import CACHE_TYPES
from laq_gguf.config import CELL_STEP, CONFIG_NAMES, LaqConfig
from laq_gguf.errors import LaqArgumentError

F16 = "f16"
STEP_EXCESS = 0.03
#: settings that act on a prompt read in chunks
BOUNDED_SETTINGS = ("probe_size", "chunk_size")
#: settings that a name may give: a method is its policy and lookahead
SETTINGS = tuple(n for n in CONFIG_NAMES if n not in ("kv_policy", "lookahead", "pinned"))
#: settings that more is allocated for, see Llama.set_eviction
ALLOCATED = ("lookahead_size", "window_size", "snapkv_window")


@dataclass(frozen=True)
class Method:
    """A cache.

    Attributes:
        options: keyword arguments of laq_gguf.Llama, beside the budget.
        bounded: the prompt is read in chunks, and never has more cells than the bytes allow.
            Others read all of it before they evict: their bytes are those of the cells they keep.
        two_stages: SnapKV evicts, the lookahead is decoded from what is left, and recalls from all
            of the prompt.
        name: as it was asked for.
        type: of K and V.
    """

    options: dict[str, Any] = field(default_factory=dict)
    bounded: bool = False
    two_stages: bool = False
    name: str = ""
    type: str = F16

    @property
    def evicts(self) -> bool:
        """Whether it has a budget: the full cache has none."""
        return self.options.get("kv_policy") != "full"

    @property
    def config(self) -> LaqConfig:
        """Its settings of the eviction."""
        return LaqConfig(**{k: v for k, v in self.options.items() if k in CONFIG_NAMES})

    @property
    def least(self) -> int:
        """The smallest budget: tokens that are always kept, also by SnapKV in two stages."""
        least, snapkv = self.config.n_pinned(), replace(self.config, kv_policy="snapkv")
        return max(least, snapkv.n_pinned()) if self.two_stages else least


PSEUDO = {"lookahead": "pseudo"}
METHODS: dict[str, Method] = {
    "full": Method({"kv_policy": "full"}),
    "streaming": Method({"kv_policy": "streaming"}),
    "random": Method({"kv_policy": "random"}),
    "snapkv": Method({"kv_policy": "snapkv"}),
    # the paper's (arXiv 2505.20334): looked ahead from what SnapKV keeps; it follows no copies
    "laq": Method(
        {"kv_policy": "laq", "lookahead_size": 8, "follow_size": 0, **PSEUDO}, two_stages=True
    ),
    "laq++": Method({"kv_policy": "laq++", **PSEUDO}),
    # its first lookahead_size tokens are the full cache's own
    "deferred": Method({"kv_policy": "laq++", "lookahead": "deferred"}),
    "bounded": Method({"kv_policy": "laq++", **PSEUDO}, bounded=True),
    # the same cells, and an archive in host memory
    "recall": Method({"kv_policy": "laq++", **PSEUDO, "kv_recall": "ram"}, bounded=True),
}


def parse_method(name: str) -> Method:
    """The method of a name such as "snapkv", "laq++@q8_0" or "laq++@q8_0:window_size=32".

    Raises:
        ValueError: unknown method, type or setting, a value out of range, or a setting that the
            method does not have.
    """
    first, *words = name.split(":")
    base, _, type_name = first.partition("@")
    known = METHODS.get(base)
    if known is None:
        raise ValueError(f"unknown method {base!r}; there are: {', '.join(METHODS)}")
    if type_name and type_name not in CACHE_TYPES:
        raise ValueError(
            f"unknown K/V type {type_name!r} of {name!r}; there are: {', '.join(CACHE_TYPES)}"
        )
    options = {**known.options, **_settings(name, known, words)}
    method = replace(known, options=options, name=name, type=type_name or F16)
    try:
        _ = method.config  # checks the values
    except LaqArgumentError as error:
        raise ValueError(f"{name!r}: {error}") from None
    return method


def _settings(name: str, method: Method, words: list[str]) -> dict[str, int | float | str]:
    """Settings of words such as "window_size=32".

    Raises:
        ValueError: a word is none, or a setting that the method does not have.
    """
    if not words:
        return {}
    if not method.evicts:
        raise ValueError(f"{name!r}: a cache that never evicts has no settings")
    there_are = [s for s in SETTINGS if method.bounded or s not in BOUNDED_SETTINGS]
    default, found = LaqConfig(), {}
    for word in words:
        setting, equals, text = word.partition("=")
        if not equals or setting not in there_are:
            raise ValueError(
                f"{word!r} of {name!r} is no SETTING=VALUE; settings: {', '.join(there_are)}"
            )
        if setting in found:
            raise ValueError(f"{name!r} has {setting} twice")
        kind = type(getattr(default, setting))
        try:
            found[setting] = kind(text)
        except ValueError:
            kinds = {int: "an int", float: "a number"}
            raise ValueError(f"{setting} of {name!r} is {kinds[kind]}, got {text!r}") from None
    return found


def base_name(name: str) -> str:
    """A method's name without its settings: it has the defaults."""
    return name.partition(":")[0]


def allocation(methods: Iterable[Method]) -> dict[str, int]:
    """Settings of a cache that can take those of any of the methods."""
    configs = [LaqConfig(), *(method.config for method in methods)]
    return {name: max(getattr(config, name) for config in configs) for name in ALLOCATED}


def method_names(text: str) -> list[str]:
    """An argparse type: names of methods with commas between them."""
    try:
        return list(dict.fromkeys(parse_method(name).name for name in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_share(text: str) -> float:
    """A share such as "1/8" or "0.125".

    Raises:
        ValueError: it is none, or not between 0 and 1.
    """
    try:
        share = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        share = 0.0
    if not 0 < share < 1:
        raise ValueError(f"a share is a fraction between 0 and 1 such as 1/8, got {text!r}")
    return share


def shares(text: str) -> list[float]:
    """An argparse type: shares with commas between them."""
    try:
        return list(dict.fromkeys(parse_share(part) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def share_text(share: float) -> str:
    """A share as a fraction: 0.125 is "1/8"."""
    return str(Fraction(share).limit_denominator(1000))


def tokens_of_share(share: float, n_prompt: int, full_cell: float, own_cell: float) -> int:
    """Tokens per layer and KV head that take no more bytes than a share of the full f16 cache.

    Args:
        share: of the bytes that the prompt takes in the full f16 cache.
        n_prompt: tokens of the prompt.
        full_cell: bytes of one cell over all layers, f16.
        own_cell: the same in the method's type.
    """
    return int(share * n_prompt * full_cell / own_cell)


def bounded_size(
    n_tokens: int, config: LaqConfig, staging: int | None = None
) -> tuple[int, int] | None:
    """Budget and staging of a cache that never has more than n_tokens cells; with `staging`, of one
    that has so many cells beyond a budget of n_tokens.

    Cells come in steps of 256: up to STEP_EXCESS more are taken rather than a whole step less. A
    quarter of them, and no less than a prompt in chunks needs, is for what is being read; the rest
    stays. None: not even one step fits, or nothing could stay.
    """
    if staging is not None:
        return n_tokens, staging
    n_cells = int(n_tokens * (1 + STEP_EXCESS)) // CELL_STEP * CELL_STEP
    staging = max(config.min_staging, n_cells // 4)
    budget = n_cells - staging
    return (budget, staging) if n_cells and budget >= config.n_pinned() else None
