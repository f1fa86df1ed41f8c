"""Markdown tables of what results hold; nothing is measured here."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from laq_gguf.bench.markdown import Document, Row, count, mean_of, number, ordered, spread, table


def speed_table(document: Document) -> str:
    """Markdown tables of a speed result: the measurements, then the bars."""
    measured = table(
        (
            ("configuration", lambda r: r["name"]),
            ("prompt", lambda r: str(r["n_prompt"])),
            ("decode, tokens/s", lambda r: spread(r["decode_tokens_per_s"], ".1f")),
            (
                "first token, s",
                lambda r: spread(r["first_token_s"] or r["first_token_paired_s"], ".2f"),
            ),
            ("KV bytes", lambda r: number(r["kv_bytes"], ",d")),
        ),
        document["configurations"],
    )
    load = " and ".join(number(value, ".2f") for value in document["load"])
    return (
        f"{measured}\n\n{bars_table(document)}\n\nMedian (least to most) over the segments and "
        "rounds in which the configurations take turns; ratios within one. Load of the machine "
        f"before and after: {load}."
    )


def bars_table(document: Document) -> str:
    """Markdown table of what is claimed and what was measured of it."""
    return table(
        (
            ("bar", lambda r: r["name"]),
            ("measured", lambda r: spread(r["values"], ".3f")),
            ("wanted", lambda r: r["wanted"]),
            ("", lambda r: "pass" if r["passed"] else "FAIL"),
        ),
        document["bars"],
    )


def device_table(document: Document) -> str:
    """Markdown of a device's result: the bars, then what scripts/gpu_check.py found there."""
    device, checks = document.get("device"), document.get("checks") or {}
    lines = [bars_table(document)]
    if device:
        lines.append(f"{device['name']}: {device['description']}.")
    if ops := checks.get("ops"):
        lines.append(
            f"Cases of the score op: {ops['passed']} of {ops['run']} pass, {ops['not_supported']} "
            "have no kernel there."
        )
    if parity := checks.get("parity"):
        bad = parity["failures"] + parity["errors"]
        done = parity["tests"] - parity["skipped"]
        lines.append(f"Tests on the device: {done - bad} of {done} pass.")
    for case in (checks.get("perf") or {}).get("cases", []):
        if case["kv"] == "32768" and case["hs"] == "128" and case["n_q"] == "16":
            reads = number(case["reads_of_k"], ".2f")
            lines.append(
                f"Scores of 32,768 {case['type_k']} keys, 8 heads of 128, 16 queries: "
                f"{case['us']:.0f} us, {reads} times a read of K at the speed of a copy."
            )
    return "\n\n".join(lines)


def multiturn_rows(document: Document) -> list[Row]:
    """For each method a row for each turn, means over the contexts, then one over all (turn None).

    again: tokens that had been decoded in an earlier turn and were decoded once more, in all.
    """
    results = document["results"]
    rows = []
    for method in ordered(r["method"] for r in results):
        own = [r for r in results if r["method"] == method]
        for turn in [*sorted({r["turn"] for r in own}), None]:
            group = [r for r in own if turn in (None, r["turn"])]
            decoded = [r for r in group if "n_decoded" in r]
            rows.append(
                {
                    "method": method,
                    "turn": turn,
                    "n": len(group),
                    **{name: statistics.fmean(r[name] for r in group) for name in FIDELITY},
                    "n_new": statistics.fmean(r["n_new"] for r in group),
                    "n_decoded": mean_of(decoded, "n_decoded"),
                    "again": sum(r["n_again"] for r in decoded) if decoded else None,
                    "n_resident": mean_of(decoded, "n_resident"),
                }
            )
    return rows


FIDELITY = ("f1", "em", "kl", "top1_agreement")


def multiturn_table(document: Document) -> str:
    """Markdown table of a multiturn result: each turn of each method."""
    return table(
        (
            ("method", lambda r: r["method"]),
            ("turn", lambda r: "mean" if r["turn"] is None else str(r["turn"])),
            ("n", lambda r: str(r["n"])),
            ("F1", lambda r: f"{r['f1']:.3f}"),
            ("EM", lambda r: f"{r['em']:.3f}"),
            ("KL to full (nats)", lambda r: f"{r['kl']:.4f}"),
            ("top-1 = full's", lambda r: f"{r['top1_agreement']:.3f}"),
            ("new tokens", lambda r: f"{r['n_new']:.0f}"),
            ("decoded", lambda r: number(r["n_decoded"], ".0f")),
            ("decoded again", lambda r: number(r["again"], "d")),
            ("cells after it", lambda r: number(r["n_resident"], ".0f")),
        ),
        multiturn_rows(document),
    )


def multiturn_summary(document: Document) -> str:
    """Markdown table of a multiturn result: one row per method."""
    rows = multiturn_rows(document)
    turns = sorted({r["turn"] for r in rows if r["turn"] is not None})
    summary = []
    for mean in (r for r in rows if r["turn"] is None):
        own = {r["turn"]: r for r in rows if r["method"] == mean["method"]}
        later = [r for turn, r in own.items() if turn not in (None, 1)]
        summary.append({**mean, "own": own, "later": mean_of(later, "n_decoded")})

    def kl(turn: int) -> Callable[[Row], str]:
        return lambda r: f"{r['own'][turn]['kl']:.3f}" if turn in r["own"] else "-"

    return table(
        (
            ("method", lambda r: r["method"]),
            ("F1", lambda r: f"{r['f1']:.3f}"),
            ("EM", lambda r: f"{r['em']:.3f}"),
            *((f"KL, turn {turn}", kl(turn)) for turn in turns),
            ("KL, mean", lambda r: f"{r['kl']:.3f}"),
            ("top-1 as full", lambda r: f"{r['top1_agreement']:.2f}"),
            ("decoded in a later turn", lambda r: number(r["later"], ".0f")),
        ),
        summary,
    )


def chat_figures(document: Document) -> Row:
    """What a chat result comes to.

    first, last: tokens/s of decoding in the first and the last quarter of the turns.
    again: tokens of earlier turns that a turn decoded once more.
    """
    turns = document["results"]
    if not turns:
        raise ValueError("a chat without turns has no figures")
    quarter = max(1, len(turns) // 4)
    again = [t["n_again"] for t in turns]
    return {
        "n_chats": len({t["chat"] for t in turns}),
        "n_turns": len(turns),
        "n_generated": sum(t["n_reply"] for t in turns),
        "n_decoded": sum(t["n_decoded"] for t in turns),
        "n_evictions": sum(t["n_evictions"] for t in turns),
        "n_cells": max(t["n_cells"] for t in turns),
        "n_resident_max": max(t["n_resident_max"] for t in turns),
        "longest": max(t["n_tokens"] for t in turns),
        "first": _speed(turns[:quarter]),
        "last": _speed(turns[-quarter:]),
        "again_mean": statistics.fmean(again),
        "again_max": max(again),
        "n_again": sum(n > 0 for n in again),
        "n_system_kept": sum(t["system_kept"] for t in turns),
    }


def _speed(turns: list[Row]) -> float | None:
    seconds = sum(t["decode_s"] for t in turns)
    return sum(t["n_steps"] for t in turns) / seconds if seconds else None


def chat_summary(document: Document) -> str:
    """Markdown table of a chat result: what all turns come to."""
    f = chat_figures(document)
    return table(
        (("chat", lambda r: r[0]), ("measured", lambda r: r[1])),
        [
            ("turns", f"{f['n_turns']} in {count(f['n_chats'], 'chat')}"),
            ("tokens of the longest chat", f"{f['longest']:,}"),
            ("tokens generated", f"{f['n_generated']:,}"),
            ("most cells in use, of those allocated", f"{f['n_resident_max']} of {f['n_cells']}"),
            ("evictions", str(f["n_evictions"])),
            ("decoding, first quarter of the turns", f"{number(f['first'], '.1f')} tokens/s"),
            ("decoding, last quarter", f"{number(f['last'], '.1f')} tokens/s"),
            (
                "tokens decoded again in a turn",
                f"{f['again_mean']:.1f} (at most {f['again_max']}; none in "
                f"{f['n_turns'] - f['n_again']} of {f['n_turns']} turns)",
            ),
            ("turns after which every head holds the system turn",
             f"{f['n_system_kept']} of {f['n_turns']}"),
        ],
    )  # fmt: skip


def chat_table(document: Document) -> str:
    """Markdown tables of a chat result: the summary, then every turn."""
    turns = table(
        (
            ("chat", lambda r: str(r["chat"])),
            ("turn", lambda r: str(r["turn"])),
            ("prompt", lambda r: str(r["n_prompt"])),
            ("reply", lambda r: str(r["n_reply"])),
            ("decoded", lambda r: str(r["n_decoded"])),
            ("again", lambda r: str(r["n_again"])),
            ("most cells", lambda r: str(r["n_resident_max"])),
            ("evictions", lambda r: str(r["n_evictions"])),
            ("s", lambda r: f"{r['seconds']:.2f}"),
            ("tokens/s", lambda r: number(_speed([r]), ".1f")),
            ("system turn", lambda r: "whole" if r["system_kept"] else "LOST"),
        ),
        document["results"],
    )
    return f"{chat_summary(document)}\n\n{turns}"


def memory_rows(document: Document) -> list[Row]:
    """The rows of a memory result, beside the stock context of the same cells and types.

    held: bytes of K, V, captured queries and graphs.
    """
    results = document["results"]
    stock = {(r["type"], r["n_cells"]): r for r in results if r["library"] == "llama_cpp"}
    rows = []
    for r in results:
        beside = stock.get((r["type"], r["n_cells"]))
        rows.append(
            {
                **r,
                "held": _held(r),
                "held_ratio": _held(r) / _held(beside) if beside else None,
                "peak_ratio": r["peak_bytes"] / beside["peak_bytes"] if beside else None,
            }
        )
    return rows


def _held(row: Row) -> int:
    return row["kv_bytes"] + row["ring_bytes"] + row["compute_bytes"]


def memory_table(document: Document) -> str:
    """Markdown table of a memory result."""

    def mib(name: str, spec: str = ",.1f") -> Callable[[Row], str]:
        return lambda r: format(r[name] / 2**20, spec) if name in r else "-"

    return table(
        (
            ("", lambda r: "stock" if r["library"] == "llama_cpp" else "ours"),
            ("K and V", lambda r: r["type"]),
            ("n_ctx", lambda r: f"{r['n_ctx']:,}"),
            ("cells", lambda r: f"{r['n_cells']:,}"),
            ("prompt", lambda r: f"{r['n_prompt']:,}"),
            ("KV without eviction, MiB", mib("kv_bytes_full")),
            ("KV, MiB", mib("kv_bytes", ".2f")),
            ("KV + queries + graphs, MiB", mib("held")),
            ("/ stock's", lambda r: number(r["held_ratio"], ".3f")),
            ("peak RSS, MiB", mib("peak_bytes")),
            ("/ stock's", lambda r: number(r["peak_ratio"], ".3f")),
        ),
        memory_rows(document),
    )
