#!/usr/bin/env python3
"""Make tests/golden/reference.npz from the numpy reference, and from nothing else.

    python scripts/make_golden.py [--seed N] [--out FILE]

The file holds inputs and outputs, so that its test needs no random numbers. It is written only
here: a change of it is a change of what is correct, and its commit says why.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # the reference of this checkout; its test imports the installed one
    sys.path.insert(0, str(ROOT))

from laq_gguf.reference import (  # noqa: E402
    POLICIES,
    KVCache,
    PolicyParams,
    Tokens,
    attention_scores,
    causal_mask,
    pool_scores,
    random_scores,
)

MAGIC = "LAQ-GOLDEN"
VERSION = 1
SEED = 20334
OUT = ROOT / "tests" / "golden" / "reference.npz"

N_LAYER, N_HEAD, N_HEAD_KV, D = 2, 6, 2, 8
N_PROMPT, N_AHEAD, N_LATER = 96, 8, 24
PARAMS = {"budget": 40, "snapkv_window": 16, "pinned": ((20, 24),), "seed": 5}

Arrays = dict[str, np.ndarray]


def inputs(seed: int) -> Arrays:
    """Random tokens (prompt, lookahead, later ones) as reference.Tokens has them, and sinks."""
    rng = np.random.default_rng(seed)
    n = N_PROMPT + N_AHEAD + N_LATER
    shapes = {
        "in_q": (N_LAYER, n, N_HEAD, D),
        "in_k": (N_LAYER, n, N_HEAD_KV, D),
        "in_sinks": (N_LAYER, N_HEAD),
    }
    arrays = {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    arrays["in_q"] *= np.float32(2)
    return arrays


def _scores(given: Arrays) -> Arrays:
    positions = np.arange(N_PROMPT + N_AHEAD)
    queries = np.arange(N_PROMPT - 8, N_PROMPT + N_AHEAD)
    q = given["in_q"][0, queries].swapaxes(0, 1)
    k = given["in_k"][0, positions]
    settings = {
        "plain": {},
        "masked": {"mask": causal_mask(queries, positions)},
        "softcap": {"softcap": 2.0, "mask": causal_mask(queries, positions)},
        "sinks": {"sinks": given["in_sinks"][0], "mask": causal_mask(queries, positions)},
    }
    out = {
        f"scores_{name}": attention_scores(q, k, scale=D**-0.5, **extra)
        for name, extra in settings.items()
    }
    for pooling in ("max", "avg"):
        for width in (3, 7):
            out[f"pooled_{pooling}{width}"] = pool_scores(out["scores_masked"], width, pooling)
    out["random"] = np.stack(
        [
            random_scores(seed, ikv, head, np.arange(64))
            for seed, ikv, head in [(0, 0, 0), (5, 1, 3), (2**32 - 1, 79, 127)]
        ]
    )
    return out


def _life(given: Arrays, policy: str, lookahead: str) -> Arrays:
    """Positions after the first eviction, and after a second prompt and its eviction."""
    params = PolicyParams(policy=policy, lookahead=lookahead, **PARAMS)
    cache = KVCache(params, n_layer=N_LAYER, n_head=N_HEAD, n_head_kv=N_HEAD_KV, n_embd_head=D)
    tokens = Tokens(given["in_k"], given["in_k"], given["in_q"])
    prompt, rest = tokens[:N_PROMPT], tokens[N_PROMPT:]
    ahead = rest[:N_AHEAD] if lookahead == "pseudo" and params.needs_lookahead else None
    cache.append(prompt)
    cache.prompt_end(ahead)
    name = policy if lookahead == "deferred" else f"{policy}_pseudo"
    if ahead is None:
        cache.append(rest[:N_AHEAD])
        cache.flush()
    out = {f"kept_{name}": cache.positions}
    cache.append(rest[N_AHEAD:])
    cache.prompt_end(ahead)
    cache.flush()
    return {**out, f"kept_again_{name}": cache.positions}


def outputs(given: Arrays) -> Arrays:
    """Everything the golden file pins down, from its inputs."""
    out = _scores(given)
    for policy in POLICIES:
        out |= _life(given, policy, "deferred")
    for policy in ("laq", "laq++"):
        out |= _life(given, policy, "pseudo")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    given = inputs(args.seed)
    header = {
        "magic": np.array(MAGIC),
        "version": np.array(VERSION),
        "seed": np.array(args.seed),
        "command": np.array(f"python scripts/make_golden.py --seed {args.seed}"),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **header, **given, **outputs(given))
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
