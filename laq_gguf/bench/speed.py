"""Speed: laq_gguf against the plain library, alternating within one run.

Each configuration is a worker process that keeps its model loaded; one worker works at a time. A
round reads the prompts and decodes in segments; each segment goes through all workers, in the
opposite order of the one before, so that all see the same machine. A ratio is that of one segment,
and a bar looks at the median over all segments: a disturbance spoils the segment that it falls in.

The times to first token are compared by themselves: a worker is a few per cent faster or slower
than the next for as long as it lives, more than the difference looked for. In every round both
sides start anew and read the same prompt at the same time, with half of the threads each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laq_gguf.bench import tasks
from laq_gguf.bench.options import add_common, add_lookahead, add_policy, check_model, integers
from laq_gguf.bench.provenance import provenance, write_json
from laq_gguf.bench.tables import speed_table
from laq_gguf.bench.worker import Worker, WorkerError
from laq_gguf.config import LaqConfig, round_cells

# steps not counted: after a prompt (beyond the lookahead and the eviction), and in each segment
N_WARM_UP = 4

# most that the first token may take, as a share of stock's time: where the prompt fits the cells,
# and where it is read in chunks, which attend to fewer of them
WHOLE_LIMIT, CHUNKED_LIMIT = 1.02, 0.8

OURS, OURS_OFF = "ours", "ours, FA off"
LONG_ON, LONG_OFF = "stock, FA on", "stock, FA off"
SHORT_ON, SHORT_OFF = "stock, short, FA on", "stock, short, FA off"


@dataclass
class Configuration:
    """A library with its settings, the prompt it reads, and what was measured of it."""

    name: str
    library: str
    flash_attn: bool
    tokens: list[int] = field(default_factory=list)
    system: dict[str, Any] = field(default_factory=dict)
    ms_first_token: list[float] = field(default_factory=list)
    ms_first_token_paired: list[float] = field(default_factory=list)
    ms_settle: list[list[float]] = field(default_factory=list)
    ms_steps: list[list[float]] = field(default_factory=list)
    evictions: list[dict[str, float]] = field(default_factory=list)
    stats: dict[str, Any] | None = None

    def ms_per_step(self) -> list[float]:
        """Mean step of every segment after its warm-up, ms."""
        return [statistics.fmean(steps[N_WARM_UP:]) for steps in self.ms_steps]

    def to_json(self) -> dict[str, Any]:
        """Everything measured, and the few numbers that a table shows."""
        return {
            "name": self.name,
            "library": self.library,
            "flash_attn": self.flash_attn,
            "n_prompt": len(self.tokens),
            "system": self.system,
            "decode_tokens_per_s": [1e3 / ms for ms in self.ms_per_step()],
            "first_token_s": [ms / 1e3 for ms in self.ms_first_token],
            "kv_bytes": self.stats["kv_bytes"] if self.stats else None,
            "first_token_paired_s": [ms / 1e3 for ms in self.ms_first_token_paired],
            "ms_settle": self.ms_settle,
            "ms_steps": self.ms_steps,
            "evictions": self.evictions,
            "stats": self.stats,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench speed`."""
    add_common(parser)
    parser.add_argument("--plain-lib", type=Path, default=Path("build/plain/bin"),
                        help="folder of the unpatched libraries")  # fmt: skip
    parser.add_argument(
        "--text", type=Path, help="prompt text; default: the docs of build/pristine"
    )
    parser.add_argument("--n-ctx-tokens", type=int, default=7500, help="tokens of the long prompt")
    parser.add_argument("--n-short-tokens", type=int, default=512, help="of the short prompt")
    parser.add_argument("--budget", type=int, default=512, help="kv_budget")
    parser.add_argument("--kv-staging", type=int, default=0,
                        help="cells beyond the budget; 0 = the whole prompt fits")  # fmt: skip
    add_policy(parser)
    add_lookahead(parser)
    parser.add_argument("--lookahead-size", type=int, default=LaqConfig().lookahead_size)
    parser.add_argument("--repeat", type=int, default=5, help="rounds")
    parser.add_argument("--first-token-only", action="store_true",
                        help="only the time to first token, against stock with FA on")  # fmt: skip
    parser.add_argument("--n-decode", type=int, default=64, help="tokens decoded in a round")
    parser.add_argument("--segments", type=int, default=4, help="parts that they are decoded in")
    parser.add_argument("--contexts", type=integers,
                        help="prompt lengths: a sweep over them and --budgets")  # fmt: skip
    parser.add_argument("--budgets", type=integers, help="of the sweep; default: --budget")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out`, print the tables; return the document.

    With --contexts: see sweep.py.

    Raises:
        ValueError: options or files that cannot be used.
        WorkerError: a configuration that does not run.
    """
    if args.repeat < 1 or args.n_decode < 1:
        raise ValueError("--repeat and --n-decode are at least 1")
    check_model(args)
    if args.contexts:
        from laq_gguf.bench import sweep  # it is built of this module

        return sweep.run(args)
    if not 1 <= args.segments <= args.n_decode:
        raise ValueError("--segments is from 1 to --n-decode")
    check_plain_lib(args)
    text = read_text(args.text)
    document = provenance(
        "speed", args.model, {k: v for k, v in vars(args).items() if isinstance(v, str | int)}
    )
    # a busy machine spoils the comparison: the load stands in the result
    document["load"] = [system_load()]
    document["text"] = args.text.name if args.text else "build/pristine **/*.md"
    configurations = [
        Configuration(OURS, "laq_gguf", True),
        Configuration(OURS_OFF, "laq_gguf", False),
        Configuration(LONG_ON, "llama_cpp", True),
        Configuration(LONG_OFF, "llama_cpp", False),
        Configuration(SHORT_ON, "llama_cpp", True),
        Configuration(SHORT_OFF, "llama_cpp", False),
    ]
    pair = [c for c in configurations if c.name in (OURS, LONG_ON)]
    for i in range(args.repeat):
        _progress(f"round {i + 1}/{args.repeat}: first token, both at once")
        with _workers(args, pair, text, max(1, args.threads // 2)) as workers:
            _measure_pair(args, pair if i % 2 == 0 else pair[::-1], workers)
    if args.first_token_only:
        configurations = pair
    else:
        with _workers(args, configurations, text, args.threads) as workers:
            _measure(args, {c.name: c for c in configurations}, workers)
    document["load"].append(system_load())
    document["configurations"] = [c.to_json() for c in configurations]
    limit = CHUNKED_LIMIT if args.kv_staging else WHOLE_LIMIT
    document["bars"] = bars({c.name: c for c in configurations}, limit)
    if args.out:
        write_json(args.out, document)
    print(speed_table(document))
    return document


@contextmanager
def _workers(
    args: argparse.Namespace, configurations: Sequence[Configuration], text: str, n_threads: int
) -> Iterator[dict[str, Worker]]:
    """A worker for each configuration, by name, its model loaded and warmed up."""
    workers: dict[str, Worker] = {}
    try:
        for c in configurations:
            lib = args.plain_lib.resolve() if c.library == "llama_cpp" else None
            workers[c.name] = Worker(lib)
            _open(args, c, workers[c.name], text, n_threads)
            workers[c.name](
                "prefill", tokens=c.tokens[: args.n_short_tokens], n_settle=_n_settle(args)
            )
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def _open(
    args: argparse.Namespace, c: Configuration, worker: Worker, text: str, n_threads: int
) -> None:
    short = c.name in (SHORT_ON, SHORT_OFF)
    n_prompt = args.n_short_tokens if short else args.n_ctx_tokens
    n_ctx = n_prompt + _n_settle(args) + N_WARM_UP + args.n_decode + args.lookahead_size
    options = {
        "n_ctx": round_cells(n_ctx),
        "n_threads": n_threads,
        "n_threads_batch": n_threads,
        "flash_attn": c.flash_attn,
    }
    if c.library == "laq_gguf":
        options.update(
            kv_budget=args.budget,
            kv_staging=args.kv_staging or options["n_ctx"],
            kv_policy=args.policy,
            lookahead=args.lookahead,
            lookahead_size=args.lookahead_size,
        )
    model = str(args.model.resolve())
    c.system = worker("open", library=c.library, model=model, options=options)
    if c.system["patched"] != (c.library == "laq_gguf"):
        raise ValueError(f"{c.name}: loaded a {_kind(c.system)} library; check --plain-lib")
    c.tokens = worker("tokenize", text=text, n=n_prompt)


def _kind(system: dict[str, Any]) -> str:
    return "patched" if system["patched"] else "plain"


def _n_settle(args: argparse.Namespace) -> int:
    """Steps not counted: the lookahead, the step that evicts, and the warm-up."""
    return args.lookahead_size + 1 + N_WARM_UP


def _measure_pair(
    args: argparse.Namespace, pair: Sequence[Configuration], workers: dict[str, Worker]
) -> None:
    """The time to the first token of all of them, at the same time."""
    for c in pair:
        workers[c.name].send("prefill", tokens=c.tokens, n_settle=0)
    for c in pair:
        answer = workers[c.name].receive("prefill")
        c.ms_first_token_paired.append(answer["ms_first_token"])


def _measure(
    args: argparse.Namespace,
    configurations: dict[str, Configuration],
    workers: dict[str, Worker],
) -> None:
    n_settle = _n_settle(args)
    # these are read once: only their decoding is repeated
    for name in configurations:
        if name not in (OURS, LONG_ON):
            _prefill(configurations[name], workers[name], n_settle)
    for i in range(args.repeat):
        # the order within the pair changes, so that a drift of the machine favours neither
        for name in (OURS, LONG_ON) if i % 2 == 0 else (LONG_ON, OURS):
            _progress(f"round {i + 1}/{args.repeat}: first token, {name}")
            _prefill(configurations[name], workers[name], n_settle)
        _progress(f"round {i + 1}/{args.repeat}: decode, all by turns")
        for k in range(args.segments):
            is_even = (i * args.segments + k) % 2 == 0
            for name in configurations if is_even else reversed(configurations):
                c = configurations[name]
                n_past, n = len(c.tokens) + n_settle, N_WARM_UP + args.n_decode // args.segments
                answer = workers[name]("decode", n_past=n_past, n=n)
                c.ms_steps.append(answer["ms_steps"])
                c.stats = answer["stats"]


def _prefill(c: Configuration, worker: Worker, n_settle: int) -> None:
    answer = worker("prefill", tokens=c.tokens, n_settle=n_settle)
    c.ms_first_token.append(answer["ms_first_token"])
    c.ms_settle.append(answer["ms_settle"])
    before, after = answer["stats_before"], answer["stats"]
    if after is None:
        return
    if after["n_evictions"] == 0:
        raise WorkerError(f"{c.name}: nothing was evicted: lower --budget")
    c.evictions.append(eviction(before, after, answer["ms_settle"]))


def eviction(
    before: dict[str, Any], after: dict[str, Any], ms_settle: list[float]
) -> dict[str, float]:
    """What the eviction of one prompt took, ms.

    reported: what the library counted, without decoding ahead. wall: the slowest step after the
    prompt less an ordinary one, which sees all that the counters may miss; only if the eviction
    came after the first token.
    """
    times = {k: after[k] - before[k] for k in after if k.startswith("ms_")}
    reported = sum(ms for k, ms in times.items() if k != "ms_lookahead")
    result = {**times, "reported": reported}
    if after["n_evictions"] > before["n_evictions"]:
        result["wall"] = max(ms_settle) - statistics.median(ms_settle[-N_WARM_UP:])
    return result


def eviction_ms(times: dict[str, float]) -> float:
    """The larger of what the library counted and what was seen from outside, see `eviction`."""
    return max(times["reported"], times.get("wall", 0.0))


def bars(
    configurations: dict[str, Configuration], limit: float = WHOLE_LIMIT
) -> list[dict[str, Any]]:
    """What is claimed, the values, and whether their median keeps it.

    Decoding has a value for every segment, the first token and the eviction for every round.

    Args:
        limit: of the time to first token, as a share of stock's.
    """
    c = configurations
    first_token = bar(
        "time to first token / stock's (FA on), both at once",
        ratios(c[OURS].ms_first_token_paired, c[LONG_ON].ms_first_token_paired),
        f"<= {limit}", lambda x: x <= limit,
    )  # fmt: skip
    if LONG_OFF not in c:
        return [first_token]
    ms = {name: c[name].ms_per_step() for name in c}
    full = [min(pair) for pair in zip(ms[LONG_ON], ms[LONG_OFF], strict=True)]
    evicting = [eviction_ms(e) for e in c[OURS].evictions]
    n = len(full) // len(evicting)
    full_of_round = [statistics.median(full[i * n : (i + 1) * n]) for i in range(len(evicting))]
    return [
        bar(
            "decode speed / stock's on the short prompt, both FA on",
            ratios(ms[SHORT_ON], ms[OURS]), ">= 0.9", lambda x: x >= 0.9,
        ),
        bar(
            "the same, both FA off",
            ratios(ms[SHORT_OFF], ms[OURS_OFF]), ">= 0.9", lambda x: x >= 0.9,
        ),
        bar(
            "decode speed / stock's on the long prompt (faster of FA on, off)",
            ratios(full, ms[OURS]), ">= 2", lambda x: x >= 2,
        ),
        bar(
            "the same, ours with FA off",
            ratios(full, ms[OURS_OFF]), ">= 2", lambda x: x >= 2,
        ),
        first_token,
        bar(
            "eviction, in decode steps of the full cache (faster of FA on, off)",
            ratios(evicting, full_of_round), "< 4", lambda x: x < 4,
        ),
    ]  # fmt: skip


def bar(name: str, values: list[float], wanted: str, passes: Any) -> dict[str, Any]:
    """A claim, its values, and whether their median keeps it."""
    median = statistics.median(values)
    return {
        "name": name,
        "values": values,
        "median": median,
        "wanted": wanted,
        "passed": bool(passes(median)),
    }


def ratios(numerators: list[float], denominators: list[float]) -> list[float]:
    """The quotients, one by one."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def check_plain_lib(args: argparse.Namespace) -> None:
    """Refuse a --plain-lib that is no folder.

    Raises:
        ValueError: there is none.
    """
    if not args.plain_lib.is_dir():
        raise ValueError(f"no unpatched libraries at {args.plain_lib}: pass --plain-lib DIR")


def read_text(path: Path | None) -> str:
    """The prompt text: a file, or the markdown files of the pristine llama.cpp tree, sorted.

    Raises:
        ValueError: neither is there.
    """
    if path is not None:
        return tasks.read_text(path)
    root = Path("build/pristine")
    files = sorted(root.rglob("*.md"))
    if not files:
        raise ValueError("no docs in build/pristine: pass --text FILE")
    return "\n\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files)


def system_load() -> float | None:
    """Processes that ran or waited, mean over the last minute; None where it is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _progress(text: str) -> None:
    print(text, file=sys.stderr)
