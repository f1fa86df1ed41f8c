"""Tables of what was measured over contexts or budgets; nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from laq_gguf.bench.markdown import Document, Row, number, spread, table


def sweep_table(document: Document) -> str:
    """Markdown table of a sweep: speeds, their ratios to stock, and what evictions took."""

    def part(name: str) -> Callable[[Row], str]:
        return lambda r: spread([e[name] for e in r.get("evictions", [])], ".1f")

    measured = table(
        (
            ("context", lambda r: f"{r['context']:,}"),
            ("kv_budget", lambda r: "stock" if r["budget"] is None else str(r["budget"])),
            ("first token, s", lambda r: spread(r["first_token_s"], ".2f")),
            ("/ stock's", lambda r: spread(r.get("first_token_ratio", []), ".3f")),
            ("prefill, tokens/s", lambda r: spread(r["prefill_tokens_per_s"], ".0f")),
            ("decode, tokens/s", lambda r: spread(r["decode_tokens_per_s"], ".1f")),
            ("/ stock's", lambda r: spread(r.get("decode_ratio", []), ".2f")),
            ("KV, MiB", lambda r: number(_mib(r["kv_bytes"]), ".1f")),
            *((f"{name}, ms", part(name)) for name in
              ("probe", "lookahead", "score", "select", "compact")),
        ),
        document["results"],
    )  # fmt: skip
    load = [value for value in document["load"] if value is not None]
    most = f" Load of the machine: {spread(load, '.2f')}." if load else ""
    return f"{measured}\n\nMedian (least to most) over rounds; ratios within a round.{most}"


def _mib(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 2**20


def curve_figures(document: Document) -> dict[str, dict[str, float]]:
    """By library: how much more of each is taken at the longest context than at the shortest.

    kv: bytes of K and V; peak: the most memory of the process, or what the device gave.
    """
    figures = {}
    for library in dict.fromkeys(r["library"] for r in document["results"]):
        rows = [r for r in document["results"] if r["library"] == library]
        first = min(rows, key=lambda r: r["context"])
        last = max(rows, key=lambda r: r["context"])
        figures[library] = {
            "kv": last["kv_bytes"] / first["kv_bytes"],
            "peak": last["peak_bytes"] / max(first["peak_bytes"], 1),
            "kv_spread": max(r["kv_bytes"] for r in rows) / min(r["kv_bytes"] for r in rows),
        }
    return figures


def curve_table(document: Document) -> str:
    """Markdown of a memory curve: a row for each context, then how much each side grows."""

    def mib(library: str, name: str, spec: str) -> Callable[[Any], str]:
        return lambda pair: number(_mib(pair.get(library, {}).get(name)), spec)

    by_context: dict[tuple[str, int], dict[str, Row]] = {}
    for row in document["results"]:
        by_context.setdefault((row["type"], row["context"]), {})[row["library"]] = row
    peak = "device" if document["settings"]["device"] != "CPU" else "peak RSS"
    lines = table(
        (
            ("K and V", lambda p: _any(p)["type"]),
            ("context", lambda p: f"{_any(p)['context']:,}"),
            ("ours: cells", lambda p: number(p.get("laq_gguf", {}).get("n_cells"), ",d")),
            ("ours: KV, MiB", mib("laq_gguf", "kv_bytes", ",.2f")),
            (f"ours: {peak}, MiB", mib("laq_gguf", "peak_bytes", ",.1f")),
            ("stock: KV, MiB", mib("llama_cpp", "kv_bytes", ",.2f")),
            (f"stock: {peak}, MiB", mib("llama_cpp", "peak_bytes", ",.1f")),
        ),
        list(by_context.values()),
    )
    contexts = sorted({r["context"] for r in document["results"]})
    growth = [
        f"{'stock' if library == 'llama_cpp' else 'ours'}: KV x {f['kv']:.3f}, {peak} x "
        f"{f['peak']:.3f}"
        for library, f in curve_figures(document).items()
    ]
    summary = f"From {contexts[0]:,} to {contexts[-1]:,} tokens: {'; '.join(growth)}."
    return f"{lines}\n\n{summary}"


def _any(pair: dict[str, Row]) -> Row:
    return next(iter(pair.values()))


def tune_table(document: dict[str, Any]) -> str:
    """Markdown of a tune result: every budget that was tried, and which to pass."""
    target, n = document["settings"]["target"], max(document["n_prompts"])
    rows = sorted(document["results"], key=lambda r: r["budget"])
    lines = table(
        (
            ("kv_budget", lambda r: str(r["budget"])),
            ("of the prompt", lambda r: f"{r['budget'] / n:.3f}"),
            ("KV of it, MiB", lambda r: number(_mib(r["kv_bytes"]), ".2f")),
            ("top-1 = full's", lambda r: f"{r['top1_agreement']:.3f}"),
            ("KL to full (nats)", lambda r: f"{r['kl']:.4f}"),
            ("tokens compared", lambda r: str(r["n_compared"])),
            ("", lambda r: "keeps it" if r["top1_agreement"] >= target else "below"),
        ),
        rows,
    )
    budget = document.get("kv_budget")
    if budget is None:
        chosen = (
            f"No budget below the {n} tokens of the prompt keeps {target} of the full cache's "
            "tokens: leave kv_budget out, or lower --target."
        )
    else:
        chosen = (
            f"{target} of the full cache's tokens for prompts of {n} tokens: "
            f"`kv_budget={budget}`, or `--kv-budget {budget}`."
        )
    return f"{lines}\n\n{chosen}"
