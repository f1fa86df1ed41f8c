"""What a kept result shows: a table, and a page that stands by itself; nothing is measured here."""

from __future__ import annotations

import html
from itertools import pairwise
from typing import Any

import numpy as np

from laq_gguf.bench.markdown import count, table

# shares of heads at which the table counts tokens
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)


def kept_table(document: dict[str, Any]) -> str:
    """Markdown of a kept result: how many tokens how many heads keep."""
    shares = np.array(document["n_kept"]) / document["n_heads"]
    rows = [("in no head", int((shares == 0).sum()))]
    for low, high in pairwise(LEVELS):
        between = (shares > 0) & (shares >= low) & (shares < high)
        least = f"{low:.0%} of the heads or more" if low else "one head or more"
        rows.append((f"in {least}, in less than {high:.0%}", int(between.sum())))
    rows.append(("in every head", int((shares == 1).sum())))
    n = len(shares)
    return table(
        (
            ("kept", lambda r: r[0]),
            ("tokens", lambda r: str(r[1])),
            ("of the prompt", lambda r: f"{r[1] / n:.3f}"),
        ),
        rows,
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.6 ui-monospace, monospace; margin: 2rem auto; max-width: 60rem;
  padding: 0 1rem; background: #fff; color: #111; }}
p.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
span.key {{ padding: 0 .6em; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{summary}</p>
<p>{key}</p>
<p class="text">{text}</p>
<p>{source}</p>
</body>
</html>
"""


def kept_page(document: dict[str, Any]) -> str:
    """A page of its own: the prompt, each token the darker the more heads keep it."""
    n_heads, kept, spans, at = document["n_heads"], document["n_kept"], [], 0
    for text, n in document["pieces"]:
        n_kept = max(kept[at : at + n])
        where = f"{at}" if n == 1 else f"{at} to {at + n - 1}"
        spans.append(_span(text, n_kept / n_heads, f"position {where}: {n_kept} of {n_heads}"))
        at += n
    s, settings_ = document["stats"], document["settings"]
    summary = (
        f"{settings_['policy']}, kv_budget {settings_['budget']}: {count(len(kept), 'token')} of "
        f"the prompt, of which every head keeps {s['n_resident']}. A token is the darker, the more "
        f"of the {n_heads} heads (over all layers) keep it; white: none does."
    )
    key = "".join(
        f'<span class="key" style="{_style(share)}">{share:.0%}</span>'
        for share in (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    )
    source = f"{document['model']['file']}, {document['date'][:10]}: {document['command']}"
    return PAGE.format(
        title="Tokens that the KV cache keeps",
        summary=html.escape(summary),
        key=key,
        text="".join(spans),
        source=html.escape(source),
    )


def _span(text: str, share: float, hint: str) -> str:
    escaped = html.escape(text)
    if share == 0:
        return escaped
    return f'<span style="{_style(share)}" title="{html.escape(hint)}">{escaped}</span>'


def _style(share: float) -> str:
    """Orange, by its share; the square root lets few heads be seen."""
    colour = "#fff" if share > 0.8 else "#111"
    return f"background:rgba(190,70,0,{share**0.5:.3f});color:{colour}"
