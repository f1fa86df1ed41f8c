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
    plan_chunk,
    pool_scores,
    random_scores,
)

MAGIC = "LAQ-GOLDEN"
VERSION = 1
SEED = 20334
OUT = ROOT / "tests" / "golden" / "reference.npz"

N_LAYER, N_HEAD, N_HEAD_KV, D = 2, 6, 2, 8
N_PROMPT, N_AHEAD, N_LATER = 96, 8, 24
PARAMS = {"budget": 40, "lookahead_size": 8, "snapkv_window": 16, "pinned": ((20, 24),), "seed": 5}
CAP = {"n_cells": 80, "n_batch": 24}
N_PLANS = 400
#: Columns of in_plans, one situation a row, with the ranges [low, high) that they are drawn from.
PLAN_COLUMNS = {
    "policy": (0, len(POLICIES)),  # index into POLICIES
    "budget": (1, 200),
    "lookahead_size": (1, 40),
    "probe_size": (1, 64),
    "chunk_size": (0, 64),
    "n_cells": (64, 512),
    "n_used": (0, 100),  # so many less than n_cells
    "n_resident": (0, 96),  # so many less than n_used
    "n_left": (0, 256),
    "n_batch": (1, 128),
}

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
    plans = np.stack([rng.integers(*r, N_PLANS) for r in PLAN_COLUMNS.values()], axis=1)
    column = {name: i for i, name in enumerate(PLAN_COLUMNS)}
    for name, whole in (("n_used", "n_cells"), ("n_resident", "n_used")):
        less = plans[:, column[name]]
        plans[:, column[name]] = np.maximum(plans[:, column[whole]] - less, 0)
    plans[::2, column["chunk_size"]] = 0
    return {**arrays, "in_plans": plans.astype(np.int32)}


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


def _bounded(given: Arrays, policy: str) -> Arrays:
    """Positions after a prompt that is read in chunks, and after tokens that overflow the cells."""
    params = PolicyParams(policy=policy, probe_size=12, chunk_size=16, **PARAMS)
    shape = {"n_layer": N_LAYER, "n_head": N_HEAD, "n_head_kv": N_HEAD_KV, "n_embd_head": D}
    cache = KVCache(params, **shape, **CAP)
    tokens = Tokens(given["in_k"], given["in_k"], given["in_q"])
    n_left = n_prompt = N_PROMPT + N_AHEAD
    while n_left:
        chunk = cache.plan(n_left)
        probe = None
        if params.needs_lookahead:
            # the later tokens stand in for the pseudo ones
            probe = tokens[n_prompt - chunk.n_probe : n_prompt + params.lookahead_size]
        cache.make_room(chunk.n_evict, probe, chunk.n_probe)
        cache.append(tokens[cache.n_tokens : cache.n_tokens + chunk.n_tokens])
        n_left -= chunk.n_tokens
    out = {f"kept_bounded_{policy}": cache.positions}
    for i in range(n_prompt, n_prompt + N_LATER):
        cache.append(tokens[i : i + 1])
    return {**out, f"kept_overflow_{policy}": cache.positions}


def _plans(given: Arrays) -> Arrays:
    """n_tokens, n_evict, n_probe of each situation."""
    rows = []
    for values in given["in_plans"].tolist():
        row = dict(zip(PLAN_COLUMNS, values, strict=True))
        names = ("budget", "lookahead_size", "probe_size", "chunk_size")
        params = PolicyParams(policy=POLICIES[row.pop("policy")], **{n: row.pop(n) for n in names})
        chunk = plan_chunk(params, **row)
        rows.append((chunk.n_tokens, chunk.n_evict, chunk.n_probe))
    return {"plans": np.array(rows, np.int32)}


def outputs(given: Arrays) -> Arrays:
    """Everything the golden file pins down, from its inputs."""
    out = _scores(given)
    for policy in POLICIES:
        out |= _life(given, policy, "deferred")
    for policy in ("laq", "laq++"):
        out |= _life(given, policy, "pseudo")
    for policy in POLICIES:
        if policy != "full":
            out |= _bounded(given, policy)
    out |= _plans(given)
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
