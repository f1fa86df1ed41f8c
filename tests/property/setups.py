"""Caches that the property tests drive: every policy and lookahead, roomy and tight."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cases
from laq_gguf.reference import PolicyParams
from parity.rows import ggml_type
from tolerances import RING_NMSE, logits_nmse

N_CTX = 1024
SEED = 11
SHAPE = {"n_layer": 2, "n_head": 4, "n_head_kv": 2, "n_embd_head": 32, "n_embd": 32, "n_ff": 32}


# Where a setup does not say otherwise: V stays as it was, and budgets hold more than a lookahead.
RULES = {"value_fit": 0, "lookahead_size": 8}


@dataclass(frozen=True)
class Setup:
    """A Llama and the PolicyParams of its model.

    Attributes:
        name: of the test.
        policy: of both.
        budget, staging: cells; 256 is the least there can be.
        cache_type: of K and V.
        rules: settings that both have, under one name.
        context: settings of the Llama alone.
        compaction: what moves K and V.
        archive: settings of the Llama for the archive, which the model needs one of.
        on_device: the cells are treated as those of a device.
    """

    name: str
    policy: str
    budget: int = 96
    staging: int = 160
    cache_type: str = "f16"
    rules: dict[str, Any] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)
    compaction: str = "host"
    archive: dict[str, Any] = field(default_factory=dict)
    on_device: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def params(self) -> PolicyParams:
        rules = {**RULES, **self.rules}
        return PolicyParams(self.budget, policy=self.policy, seed=SEED, **rules)

    @property
    def recall(self) -> str | None:
        """When both recall from an archive."""
        return self.archive["recall"] if self.archive else None

    @property
    def tolerance(self) -> float | None:
        """NMSE of keys, logits and scores; None: K is rotated and stored in blocks."""
        if self.cache_type in cases.BLOCK_TYPES:
            return None
        flash_attn = self.context.get("flash_attn", True)
        # 10: the worst of 100,000 tokens, 1.1e-5 with FlashAttention and 8e-11 with F32 without it
        return max(10 * logits_nmse(self.cache_type, self.cache_type, flash_attn), RING_NMSE)

    def open(self, path: Path, **changes: Any) -> Any:
        """The Llama; `changes` override its settings."""
        from laq_gguf import Llama

        settings = {
            "kv_budget": self.budget,
            "kv_staging": self.staging,
            "kv_policy": self.policy,
            "type_k": ggml_type(self.cache_type),
            "type_v": ggml_type(self.cache_type),
            "n_ctx": N_CTX,
            "n_batch": 64,
            # one thread: many small graphs on a busy machine mostly wait at barriers
            "n_threads": 1,
            "n_threads_batch": 1,
            "seed": SEED,
            "verbose": False,
        }
        return Llama(
            str(path),
            **{
                **settings,
                **RULES,
                **self.rules,
                **self.context,
                **self.archive,
                **changes,
            },
        )


NO_FA = {"flash_attn": False}
PSEUDO = {"lookahead": "pseudo"}
FITTED = {"value_fit": 0.01}

SETUPS = (
    Setup("laq++", "laq++", compaction="graph"),
    Setup("laq++ fitted", "laq++", cache_type="f32", rules=FITTED, context=NO_FA),
    Setup(
        "laq++ fitted pseudo",
        "laq++",
        rules={**FITTED, "lookahead": "pseudo", "pinned": ((40, 50),)},
        compaction="graph",
    ),
    Setup("laq++ pseudo, f32", "laq++", cache_type="f32", rules=PSEUDO, context=NO_FA),
    Setup(
        "laq, chunks of 32",
        "laq",
        rules={"chunk_size": 32, "probe_size": 20},
        context=NO_FA,
        compaction="graph",
    ),
    # a probe looks ahead less far than the end of the prompt
    Setup("laq++ pseudo, far ahead", "laq++", rules={**PSEUDO, "lookahead_size": 24}),
    Setup("laq++, far ahead", "laq++", rules={"lookahead_size": 24, "probe_size": 8}),
    Setup("snapkv", "snapkv", cache_type="f32", context=NO_FA),
    Setup("streaming, q8_0", "streaming", cache_type="q8_0"),
    Setup("random, pinned", "random", rules={"pinned": ((40, 50), (300, 310))}, context=NO_FA),
    # nothing but the window and the lookahead stays
    Setup("least budget", "laq++", 16, 240, rules={"n_sink": 0, "probe_size": 16}),
    Setup("least budget, streaming", "streaming", 8, 248, rules={"n_sink": 0}),
    Setup("least staging", "laq++", 168, 88),
    Setup(
        "other sizes",
        "laq++",
        200,
        300,
        cache_type="f32",
        rules={
            **PSEUDO,
            "lookahead_size": 5,
            "window_size": 3,
            "snapkv_window": 11,
            "kernel_size": 3,
            "pooling": "avg",
            "follow_size": 0,
        },
        context={"n_batch": 48, "n_ubatch": 20, "flash_attn": False},
        compaction="graph",
    ),
    Setup("archive", "laq++", compaction="graph", archive={"kv_recall": "ram", "recall": "turn"}),
    Setup(
        "archive, fitted",
        "laq++",
        cache_type="f32",
        rules=FITTED,
        context=NO_FA,
        archive={"kv_recall": "ram", "recall": "turn"},
    ),
    Setup(
        "archive on disk, fitted, pinned",
        "laq++",
        rules={**FITTED, "pinned": ((40, 50),)},
        compaction="graph",
        archive={"kv_recall": "disk", "recall": "always"},
    ),
    Setup(
        "archive, pseudo, fitted, pinned",
        "laq++",
        rules={**FITTED, **PSEUDO, "pinned": ((40, 50),)},
        compaction="graph",
        archive={"kv_recall": "ram", "recall": "always"},
    ),
    Setup(
        "archive on disk, pseudo, f32",
        "laq++",
        cache_type="f32",
        rules=PSEUDO,
        context=NO_FA,
        archive={"kv_recall": "disk", "recall": "always"},
    ),
    Setup(
        "archive, snapkv, q8_0, part on disk",
        "snapkv",
        cache_type="q8_0",
        archive={"kv_recall": "ram", "kv_recall_limit": "128KiB", "recall": "always"},
    ),
    Setup(
        "archive, laq, part on disk",
        "laq",
        cache_type="f32",
        context=NO_FA,
        archive={"kv_recall": "ram", "kv_recall_limit": "64KiB", "recall": "turn"},
    ),
    Setup(
        "archive of a device",
        "laq++",
        archive={"kv_recall": "ram", "recall": "turn"},
        on_device=True,
    ),
    Setup(
        "archive of a device, fitted, pseudo",
        "laq++",
        cache_type="f32",
        rules={**FITTED, **PSEUDO},
        context=NO_FA,
        archive={"kv_recall": "ram", "recall": "always"},
        on_device=True,
    ),
    Setup(
        "archive of a device, pseudo, part on disk",
        "laq",
        rules=PSEUDO,
        context=NO_FA,
        archive={"kv_recall": "ram", "kv_recall_limit": "64KiB", "recall": "turn"},
        on_device=True,
    ),
    Setup("full", "full", context={"n_ctx": 512}),
)
