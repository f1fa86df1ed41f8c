"""Pictures from result files alone, and the page of the tokens that stay."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

import numpy as np
import pytest

from laq_gguf.bench import kept, pictures
from laq_gguf.bench.kept_page import kept_page, kept_table
from laq_gguf.bench.provenance import SCHEMA

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG\r\n\x1a\n"


def row(method: str, size: dict, score: float | None, **extra: object) -> dict:
    return {
        "task": "needles", "id": "0", "method": method, "score": score, "kl": 0.5, "depth": 0.25,
        "length": 1000, "n_prompt": 1000, "top1_agreement": 0.5, **size, **extra,
    }  # fmt: skip


def document(kind: str, results: list[dict], **extra: object) -> dict:
    return {"schema": SCHEMA, "kind": kind, "settings": {}, "results": results, **extra}


QUALITY = document(
    "quality",
    [
        row("full", {"budget": None}, 1.0, kl=0.0),
        row("full", {"budget": None}, 0.5, kl=0.0, depth=0.75),
        row("laq++", {"budget": 125}, 1.0, kl=0.1),
        row("laq++", {"budget": 125}, 0.0, kl=0.3, depth=0.75),
        row("laq++", {"budget": 250}, 1.0, kl=0.05),
        row("other", {"share": 0.25, "kv_bytes": 24, "kv_bytes_full": 100}, 0.5),
        row("new", {"share": None, "size": "64", "kv_bytes": 8, "kv_bytes_full": 100}, 0.5),
        # nothing is answered
        row(
            "new",
            {"share": None, "size": "64", "kv_bytes": 8, "kv_bytes_full": 100},
            None,
            task="perplexity",
            kl=1.5,
        ),
    ],
)

PEERS = document(
    "peers",
    [
        row("full", {"share": 1.0, "kv_bytes": 100, "kv_bytes_full": 100}, 1.0, kl=0.002),
        row("kvpress-tova", {"share": 0.25, "kv_bytes": 24, "kv_bytes_full": 100}, 0.5),
    ],
)


def test_means_over_bytes() -> None:
    lines = pictures.over_bytes(QUALITY, "kl")
    assert lines["laq++"] == [(0.125, pytest.approx(0.2)), (0.25, 0.05)]
    # what was allocated, not what was asked for
    assert lines["other"] == [(0.24, 0.5)] and lines["full"] == [(1.0, 0.0)]
    assert lines["new"] == [(0.08, 1.0)]
    assert pictures.over_bytes(QUALITY, "score")["new"] == [(0.08, 0.5)]
    assert pictures.kv_share({"method": "laq++"}) is None


def test_needles_by_length_and_depth() -> None:
    grids = pictures.needle_grids(QUALITY)
    assert list(grids) == ["full", "laq++ 125", "laq++ 250", "other 1/4", "new 64"]
    assert grids["laq++ 125"] == {(1000, 0.25): 1.0, (1000, 0.75): 0.0}


def written(folder: Path, name: str, content: dict) -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_a_kind_without_pictures_is_refused(bench, tmp_path: Path) -> None:
    path = ROOT / "laq_gguf" / "bench" / "results" / "multiturn-smollm2.json"
    done = bench("pictures", path, "--out", tmp_path)
    assert done.returncode == 2 and "of the kind multiturn, which has no picture" in done.stderr
    done = bench("pictures", tmp_path / "none.json", "--out", tmp_path)
    assert done.returncode == 2 and "no result file" in done.stderr


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install 'laq-gguf\[bench\]'"):
        pictures.pyplot()


def test_pictures_of_every_kind(bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[bench]'")
    times = {"decode_tokens_per_s": [50.0, 60.0], "first_token_s": [1.0, 2.0]}
    sweep = document(
        "sweep", [{"context": n, "budget": b, **times} for n in (1024, 2048) for b in (None, 128)]
    )
    curve = document(
        "memory_curve",
        [
            {"context": n, "library": side, "type": "f16", "kv_bytes": n, "peak_bytes": 2 * n}
            for n in (1024, 4096)
            for side in ("laq_gguf", "llama_cpp")
        ],
    )
    files = [
        written(tmp_path, "q.json", QUALITY),
        written(tmp_path, "p.json", PEERS),
        written(tmp_path, "s.json", sweep),
        written(tmp_path, "m.json", curve),
        written(tmp_path, "k.json", kept_document()),
        # as measured, with needles at many depths
        ROOT / "laq_gguf" / "bench" / "results" / "quality-smollm2-2k.json",
    ]
    done = bench("pictures", *files, "--out", tmp_path / "made")
    assert done.returncode == 0, done.stderr
    made = [Path(line) for line in done.stdout.splitlines()]
    assert [path.name for path in made] == [
        "q-score-over-bytes.png", "q-kl-over-bytes.png", "q-needles.png",
        "p-score-over-bytes.png", "p-kl-over-bytes.png", "p-needles.png",
        "s-decode-over-context.png", "s-first-token-over-context.png",
        "m-kv-over-context.png", "m-peak-over-context.png",
        "k.html",
        "quality-smollm2-2k-score-over-bytes.png", "quality-smollm2-2k-kl-over-bytes.png",
        "quality-smollm2-2k-needles.png",
        "compared-score-over-bytes.png", "compared-kl-over-bytes.png",
    ]  # fmt: skip
    for path in made:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(PNG) and path.stat().st_size > 5000


def kept_document() -> dict:
    return document(
        "kept",
        [],
        pieces=[["<b>", 1], [" & é", 2], [" end", 1]],
        n_kept=[0, 3, 6, 1],
        n_heads=6,
        stats={"n_tokens": 4, "n_resident": 2, "n_cells": 256, "kv_bytes": 10},
        settings={"policy": "laq++", "budget": 2},
        model={"file": "m.gguf"},
        date="2026-01-02T03:04:05+00:00",
        command="laq-gguf bench kept --prompt '<script>'",
    )


class Spans(html.parser.HTMLParser):
    """What a page shows of its text, by hint."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.shown: dict[str | None, str] = {}
        self._hint: str | None = None
        self._in_text = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self._in_text = self._in_text or values.get("class") == "text"
        self._hint = values.get("title") if self._in_text else None

    def handle_endtag(self, tag: str) -> None:
        self._hint = None
        self._in_text = self._in_text and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._in_text:
            self.shown[self._hint] = self.shown.get(self._hint, "") + data


def test_the_page_is_escaped_and_shades_by_heads() -> None:
    page = kept_page(kept_document())
    spans = Spans(page)
    assert "script" not in spans.tags and "b" not in spans.tags and "link" not in spans.tags
    assert spans.shown == {
        None: "<b>",
        "position 1 to 2: 6 of 6": " & é",
        "position 3: 1 of 6": " end",
    }
    assert "http" not in page and "rgba(190,70,0,1.000)" in page and "rgba(190,70,0,0.408)" in page


def test_kept_table_counts_every_token_once() -> None:
    table = kept_table(kept_document())
    rows = [line.split("|") for line in table.splitlines()[2:]]
    assert sum(int(cells[2]) for cells in rows) == 4
    assert "| in no head | 1 | 0.250 |" in table and "| in every head | 1 | 0.250 |" in table


def test_heads_that_keep() -> None:
    positions = np.array([[[0, 1, 3, 9], [0, 2, 3, 9]], [[0, 1, 2, 9], [0, 1, 2, 10]]])
    assert kept.heads_that_keep(positions, 5).tolist() == [4, 3, 3, 2, 0]


def test_tokens_that_share_a_character_stand_together() -> None:
    whole, euro = "a€b", "€".encode()
    assert kept.text_pieces([b"a", euro[:1], euro[1:], b"b"]) == [["a", 1], ["€", 2], ["b", 1]]
    assert "".join(text for text, _ in kept.text_pieces([whole.encode()])) == whole
    # broken for good, in the middle and at the end
    assert kept.text_pieces([b"\xff", b"a", euro[:2]]) == [["�", 1], ["a", 1], ["�", 1]]


@pytest.mark.model
def test_kept(bench, model: Path, tmp_path: Path) -> None:
    text, out, page = (tmp_path / name for name in ("text.txt", "kept.json", "kept.html"))
    text.write_text("The <code> of the safe is 4821 — façade. " * 12, encoding="utf-8")
    command = ("kept", "--model", model, "--text", text, "--prompt", "What is the code?",
               "--threads", 1)  # fmt: skip
    done = bench(*command, "--budget", 64, "--out", out, "--html", page)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    n_kept, n_heads = document["n_kept"], document["n_heads"]
    assert sum(n for _, n in document["pieces"]) == len(n_kept) == document["stats"]["n_tokens"]
    # every head holds as many, all of them of the prompt
    assert sum(n_kept) == n_heads * document["stats"]["n_resident"] and n_heads == 90
    assert n_kept[:4] == [n_heads] * 4, "sinks"
    assert n_kept[-8:] == [n_heads] * 8, "window"
    shown = "".join(Spans(page.read_text(encoding="utf-8")).shown.values())
    assert "<code>" in "".join(text for text, _ in document["pieces"]) and "<code>" in shown
    refused = bench(*command, "--budget", 5000)
    assert refused.returncode == 2 and "nothing of it is evicted" in refused.stderr
