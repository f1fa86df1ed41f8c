"""Device: evictions and recalls beside decoding on one device, for any model and long contexts.

Random tokens are read: nothing here depends on what they say. Each configuration is a process of
its own, so that the memory of the device can be read before and after it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import closing
from typing import Any

import numpy as np

from laq_gguf.bench.answers import added
from laq_gguf.bench.options import add_common, check_model, integers, llama_options, settings
from laq_gguf.bench.provenance import provenance, write_json
from laq_gguf.bench.speed import N_WARM_UP, bar, eviction, eviction_ms, ratios
from laq_gguf.bench.worker import Worker, WorkerError
from laq_gguf.config import LaqConfig, round_cells

LOOKAHEAD_SIZE = LaqConfig.lookahead_size
N_MESSAGE = 32  # tokens of the message that recalls
NOTES = [
    "decode steps of the full cache: those between the prompt and its eviction, when the whole "
    "prompt fits the cells (one sequence, FlashAttention on)",
    f"recalls (kv_recall, lookahead pseudo): those of a turn whose message has {N_MESSAGE} tokens: "
    "scores, choice, rows that come back; all that such a turn does beside reading the message: "
    "the answer that is read again and the pseudo tokens as well",
    "memory: what the device had free before the model was loaded less what it has free at the "
    "end; on the CPU that is the machine's, which other processes change",
]
FIRST_TOKEN, N_TOKENS = 260, 120  # ordinary tokens of every model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench device`."""
    add_common(parser)
    parser.add_argument("--device", default="CPU", help="as laq-gguf doctor names it: CUDA0")
    parser.add_argument(
        "--n-prompts", type=integers, default=[32768, 131072],
        help="prompt lengths; the whole of the first one fits the cells once",
    )  # fmt: skip
    parser.add_argument("--budget", type=int, default=2048, help="kv_budget")
    parser.add_argument("--kv-staging", type=int, default=2048, help="cells beyond the budget")
    parser.add_argument("--n-decode", type=int, default=64, help="tokens decoded in a round")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out` after each configuration, print the bars; return the document.

    Raises:
        ValueError: options or files that cannot be used.
        WorkerError: a configuration that does not run.
    """
    check_model(args)
    n_settle = LOOKAHEAD_SIZE + 1 + N_WARM_UP
    n_cells = round_cells(args.budget + args.kv_staging)
    n_short = args.budget - n_settle - args.n_decode - N_WARM_UP
    if args.repeat < 1 or args.n_decode < 1 or n_short < 1 or min(args.n_prompts) <= n_cells:
        raise ValueError(
            f"--budget must exceed {n_settle + args.n_decode + N_WARM_UP}, --n-prompts {n_cells} "
            "(--budget + --kv-staging), --repeat and --n-decode 0"
        )
    document = provenance("device", args.model, settings(args))
    document.update(notes=NOTES, results={})
    first = args.n_prompts[0]
    whole = {"kv_budget": args.budget, "kv_staging": first + n_settle}
    capped = {"kv_budget": args.budget, "kv_staging": args.kv_staging}
    plan = [("short", n_short, n_cells, {}), ("whole", first, first + n_cells, whole)]
    plan += [(f"capped {n}", n, n + n_cells, capped) for n in args.n_prompts]
    recall = {**capped, "lookahead": "pseudo", "kv_recall": "ram"}
    plan.append((f"recall {first}", first, first + n_cells, recall))
    for name, n_prompt, n_ctx, options in plan:
        print(f"{args.device}: {name}, {n_prompt} tokens", file=sys.stderr)
        document["results"][name] = _measure(args, n_prompt, n_ctx, n_settle, options)
        if args.out:
            write_json(args.out, document)
    document["bars"] = bars(document["results"], args.n_prompts)
    if args.out:
        write_json(args.out, document)
    for line in document["bars"]:
        print(f"{line['name']}: {line['median']:.3f} ({line['wanted']})")
    return document


def _measure(
    args: argparse.Namespace, n_prompt: int, n_ctx: int, n_settle: int, options: dict[str, Any]
) -> dict[str, Any]:
    """One process: times of the prompt, its eviction and the steps after it, ms, and memory."""
    rng = np.random.default_rng(0)
    tokens = (FIRST_TOKEN + rng.integers(0, N_TOKENS, n_prompt)).tolist()
    options = {**llama_options(args, round_cells(n_ctx)), **options}
    options["n_gpu_layers"] = 0 if args.device == "CPU" else -1
    with closing(Worker(None)) as worker:
        free = worker("device_free", name=args.device)
        model = str(args.model.resolve())
        worker("open", library="laq_gguf", model=model, options=options)
        rounds = []
        for _ in range(args.repeat):
            read = worker("prefill", tokens=tokens, n_settle=n_settle)
            n = N_WARM_UP + args.n_decode
            steps = worker("generate", n=n)
            rounds.append(_round(read, steps))
            if "kv_recall" in options:
                message = (FIRST_TOKEN + rng.integers(0, N_TOKENS, N_MESSAGE)).tolist()
                rounds[-1]["recall"] = recall_of(worker("turn", tokens=message))
        stats = steps["stats"]
        used = free - worker("device_free", name=args.device)
    if stats and args.device not in stats["devices"]:
        raise WorkerError(f"K and V are on {', '.join(stats['devices'])}, not on {args.device}")
    return {"n_prompt": n_prompt, "device_bytes": used, "rounds": rounds, "stats": stats}


def _round(read: dict[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
    result = {
        "first_token_s": read["ms_first_token"] / 1e3,
        "ms_full_steps": read["ms_settle"][1:LOOKAHEAD_SIZE],
        "ms_step": statistics.fmean(steps["ms_steps"][N_WARM_UP:]),
    }
    if read["stats"]:
        result["eviction"] = eviction(read["stats_before"], read["stats"], read["ms_settle"])
    return result


def recall_of(turn: dict[str, Any]) -> dict[str, Any]:
    """What a message's recalls took, `ms_recall`; with what was read again and the pseudo tokens,
    `ms`; rows that came back; and the bytes on the device, before and after."""
    before, after = turn["before"], turn["after"]
    parts = added(before, after)
    held = ("kv_bytes", "ring_bytes", "compute_bytes")
    return {
        "ms": sum(ms for name, ms in parts.items() if name.startswith("ms_")),
        "ms_message": turn["ms"],
        **parts,
        "device_bytes_before": sum(before[n] for n in held),
        "device_bytes_after": sum(after[n] for n in held),
    }


def recall_bars(rounds: list[dict[str, Any]], full: list[float], n: int) -> list[dict[str, Any]]:
    """The bars of a turn's recall after n tokens; full: a decode step of the full cache, ms."""
    found = [r["recall"] for r in rounds]
    grown = [r["device_bytes_after"] - r["device_bytes_before"] for r in found]
    return [
        bar(
            f"recalls of a turn after {n} tokens, in decode steps of the full cache",
            ratios([r["ms_recall"] for r in found], full), "< 10", lambda x: x < 10,
        ),
        bar(
            f"one recall after {n} tokens, s",
            [r["ms_recall"] / 1e3 / max(1, r["n_recalls"]) for r in found],
            "< 0.5", lambda x: x < 0.5,
        ),
        bar(
            "all that the turn does after its message, in decode steps of the full cache",
            ratios([r["ms"] for r in found], full), "< 10", lambda x: x < 10,
        ),
        bar(
            "all that the turn does after its message, s",
            [r["ms"] / 1e3 for r in found], "< 0.5", lambda x: x < 0.5,
        ),
        bar("bytes on the device that it added", grown, "<= 0", lambda x: x <= 0),
    ]  # fmt: skip


def bars(results: dict[str, Any], n_prompts: list[int]) -> list[dict[str, Any]]:
    """What is claimed of a device, the values of every round, and whether their median keeps it."""
    whole = results["whole"]["rounds"]
    evicting = [eviction_ms(r["eviction"]) for r in whole]
    full = [statistics.median(r["ms_full_steps"]) for r in whole]
    short = [r["ms_step"] for r in results["short"]["rounds"]]
    lines = [
        bar(
            f"eviction of {n_prompts[0]} tokens, in decode steps of the full cache",
            ratios(evicting, full), "< 2", lambda x: x < 2,
        )
    ]  # fmt: skip
    for n in n_prompts:
        capped = results[f"capped {n}"]
        steps = [r["ms_step"] for r in capped["rounds"]]
        lines.append(
            bar(
                f"decode speed after {n} tokens / a short context's", ratios(short, steps),
                ">= 0.95", lambda x: x >= 0.95,
            )
        )  # fmt: skip
        lines.append(
            bar(
                f"device memory after {n} tokens / stock's of as many cells",
                [capped["device_bytes"] / max(results["short"]["device_bytes"], 1)],
                "<= 1.05", lambda x: x <= 1.05,
            )
        )  # fmt: skip
    again = results.get(f"recall {n_prompts[0]}")
    if again:
        lines += recall_bars(again["rounds"], full, n_prompts[0])
        first, of_whole = ([r["first_token_s"] for r in own] for own in (again["rounds"], whole))
        lines.append(
            bar(
                f"time to first token, {n_prompts[0]} tokens read with an archive, their lookahead "
                "and recall / whole cache's",
                ratios(first, of_whole), "<= 2", lambda x: x <= 2,
            )
        )  # fmt: skip
    return lines
