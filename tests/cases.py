"""The one table of cases, shared by the reference, parity and backend tests.

The full product would be 65,000 cases. Here every (K type, GQA group, head size) appears once, and
the other dimensions are dealt out so that every pair of values of any two dimensions occurs
(test_cases.py proves it). Kernel and threads are looped over inside the test of a case.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from laq_gguf.reference import attention_scores

K_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
BLOCK_TYPES = frozenset({"q8_0", "q4_0", "q4_1", "q5_0", "q5_1"})  # rows of 32-element blocks
V_TYPES = K_TYPES
GROUPS = (1, 3, 4, 8)
HEAD_SIZES = (32, 64, 80, 128, 256)
N_QUERIES = (1, 8, 16, 32)
N_KV = (1, 7, 300, 1025)
MASKS = ("none", "causal", "bias")
SOFTCAPS = (0.0, 3.0)
SINKS = (False, True)
KERNELS = ("fused", "composed")
N_THREADS = (1, 2)

_SEED = 2  # the first that covers every pair


@dataclass(frozen=True)
class ScoreCase:
    """Inputs of the score op."""

    type_k: str
    n_group: int
    d: int
    n_queries: int
    n_kv: int
    mask: str
    softcap: float
    sinks: bool

    @property
    def n_head_kv(self) -> int:
        # one head at group 8 would never show a wrong head stride
        return 2 if self.n_group == 8 else 3

    @property
    def n_head(self) -> int:
        return self.n_group * self.n_head_kv

    @property
    def scale(self) -> float:
        return float(np.float32(self.d**-0.5))

    def __str__(self) -> str:
        extras = [self.mask, f"cap{self.softcap:g}", "sinks" if self.sinks else "nosinks"]
        shape = [f"g{self.n_group}", f"d{self.d}", f"q{self.n_queries}", f"kv{self.n_kv}"]
        return "-".join([self.type_k, *shape, *extras])


def fits(type_k: str, d: int) -> bool:
    """Whether a row of d elements is made of whole blocks."""
    return type_k not in BLOCK_TYPES or d % 32 == 0


def _score_cases() -> tuple[ScoreCase, ...]:
    rng = random.Random(_SEED)
    rest = list(itertools.product(N_QUERIES, N_KV, MASKS, SOFTCAPS, SINKS))
    rng.shuffle(rest)
    deal = itertools.cycle(rest)
    first = itertools.product(K_TYPES, GROUPS, HEAD_SIZES)
    return tuple(ScoreCase(*shape, *next(deal)) for shape in first if fits(shape[0], shape[2]))


SCORE_CASES = _score_cases()


@dataclass(frozen=True)
class ScoreInputs:
    """q (n_head, n_queries, d), k (n_kv, n_head_kv, d), mask (n_queries, n_kv), sinks (n_head,)."""

    q: npt.NDArray[np.float32]
    k: npt.NDArray[np.float32]
    mask: npt.NDArray[np.float32] | None
    sinks: npt.NDArray[np.float32] | None


def score_inputs(case: ScoreCase, seed: int = 0) -> ScoreInputs:
    """Random inputs of a case; k is not yet rounded to type_k. Logits spread by about 1.5."""
    rng = np.random.default_rng([seed, case.d, case.n_kv, case.n_queries, case.n_group])
    gain = np.float32(1.2)
    q = rng.standard_normal((case.n_head, case.n_queries, case.d), dtype=np.float32) * gain
    k = rng.standard_normal((case.n_kv, case.n_head_kv, case.d), dtype=np.float32) * gain
    mask = None
    if case.mask != "none":
        # the last query stands at the last key; every query sees at least the first key
        query = np.maximum(np.arange(case.n_queries) + case.n_kv - case.n_queries, 0)
        visible = np.arange(case.n_kv)[None, :] <= query[:, None]
        # quarters are exact in F16, which some backends want masks in
        bias = rng.integers(-8, 9, visible.shape) / 4 if case.mask == "bias" else 0.0
        mask = np.where(visible, bias, -np.inf).astype(np.float32)
    sinks = rng.standard_normal(case.n_head, dtype=np.float32) * 2 if case.sinks else None
    return ScoreInputs(q, k, mask, sinks)


def expected_scores(
    case: ScoreCase, inputs: ScoreInputs, k: npt.NDArray[np.float32]
) -> npt.NDArray[np.floating]:
    """Numpy's scores (n_head_kv, n_kv); k: the keys as type_k has them."""
    return attention_scores(
        inputs.q, k, scale=case.scale, mask=inputs.mask, softcap=case.softcap, sinks=inputs.sinks
    )


@dataclass(frozen=True)
class EvictCase:
    """A context of a tiny model that is evicted end to end."""

    type_k: str
    type_v: str
    flash_attn: bool
    n_group: int
    n_embd_head: int
    policy: str

    @property
    def n_head_kv(self) -> int:
        return 2

    @property
    def n_head(self) -> int:
        return self.n_group * self.n_head_kv

    def __str__(self) -> str:
        attention = "fa" if self.flash_attn else "nofa"
        shape = f"g{self.n_group}-d{self.n_embd_head}"
        return f"{self.type_k}-{self.type_v}-{attention}-{shape}-{self.policy}"


def _evict_cases() -> tuple[EvictCase, ...]:
    """K types x V types on the diagonal and mixed once, FA on and off where llama.cpp allows (a
    quantized V needs FA), every GQA group; head sizes and policies dealt out."""
    pairs = [(t, t) for t in K_TYPES] + [("f16", v) for v in V_TYPES if v != "f16"]
    pairs += [(k, "f16") for k in K_TYPES if k != "f16"]
    dealt = itertools.cycle(
        itertools.product((64, 128), ("laq++", "laq", "laq++", "snapkv", "random", "streaming"))
    )
    cases = []
    for (type_k, type_v), flash_attn, n_group in itertools.product(pairs, (True, False), GROUPS):
        if type_v in BLOCK_TYPES and not flash_attn:
            continue
        n_embd_head, policy = next(dealt)
        cases.append(EvictCase(type_k, type_v, flash_attn, n_group, n_embd_head, policy))
    return tuple(cases)


EVICT_CASES = _evict_cases()
