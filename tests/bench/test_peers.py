"""Peers: rows, sizes and tables worked by hand; with kvpress, its presses run by themselves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest

from laq_gguf.bench import peers, report
from laq_gguf.bench.answers import Reply
from laq_gguf.bench.peers_table import peers_rows, peers_table
from laq_gguf.bench.prompts import Prompt
from laq_gguf.bench.tasks import Example

QUESTION = peers.Question(
    2048, Prompt(Example("needles", "3", "a question", " It is", ("42",), 0.35), [5, 6, 7])
)


def test_a_row_is_compared_with_the_full_cache_along_the_same_tokens() -> None:
    full = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], dtype=np.float32))
    own = np.log(np.array([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]], dtype=np.float32))
    row = peers.peer_row(QUESTION, "kvpress-tova", 0.25, Reply([0], own), Reply([0], full))
    assert (row["task"], row["length"], row["id"], row["depth"]) == ("needles", 2048, "3", 0.35)
    assert (row["method"], row["share"], row["n_prompt"]) == ("kvpress-tova", 0.25, 3)
    assert (row["n_compared"], row["top1_agreement"], row["outputs"]) == (2, 0.5, ["42"])
    # .25 ln(.25/.5) + .5 ln(.5/.25) + .25 ln 1 = .25 ln 2
    assert row["kl_max"] == pytest.approx(0.25 * np.log(2))
    assert row["kl"] == pytest.approx(0.125 * np.log(2))
    assert row["prompt"] == QUESTION.prompt.digest


def test_no_cache_of_a_batch_is_padded_to_more_than_twice_its_cells() -> None:
    longest = {"full": 2000, "a 1/4": 500, "zip 1/4": 1100, "a 1/8": 250, "a 1/16": 125}
    assert peers.side_by_side(longest) == [
        ["full", "zip 1/4"], ["a 1/4", "a 1/8"], ["a 1/16"]
    ]  # fmt: skip
    assert peers.side_by_side({}) == []


def peers_document() -> dict:
    def row(task: str, method: str, share: float, score: float, kl: float, kv: int) -> dict:
        return {
            "task": task, "length": 2048, "id": "0", "method": method, "share": share,
            "score": score, "kl": kl, "top1_agreement": 0.5, "kv_bytes": kv, "kv_bytes_full": 800,
            "n_prompt": 100, "depth": None,
        }  # fmt: skip

    return {
        "kind": "peers",
        "results": [
            row("needles", "full", 1.0, 1.0, 0.002, 800),
            row("needles", "kvpress-tova", 0.25, 1.0, 0.5, 200),
            row("needles", "kvpress-tova", 0.125, 0.0, 1.0, 96),
            row("vt", "full", 1.0, 0.5, 0.004, 800),
            row("vt", "kvpress-tova", 0.25, 0.25, 0.3, 196),
        ],
    }


def test_table_of_peers() -> None:
    full, quarter, eighth = peers_rows(peers_document())
    assert [r["share"] for r in (full, quarter, eighth)] == [1.0, 0.25, 0.125]
    assert (quarter["mean"], quarter["n"]) == (pytest.approx(0.625), 2)
    assert quarter["kv_share"] == pytest.approx(396 / 1600)
    assert quarter["kl"] == pytest.approx(0.4)
    assert eighth["scores"] == {"needles": 0.0, "vt": None}
    table = peers_table(peers_document())
    assert "| 1/4 | 0.2475 | kvpress-tova | 2 | 1.00 | 0.25 | 0.625 | 0.4000 | 0.500 |" in table
    assert "| 1/8 | 0.1200 | kvpress-tova | 1 | 0.00 | - | 0.000 |" in table
    assert report.TABLES["peers"] is peers_table


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "kvpress":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr("importlib.metadata.version", version)
    with pytest.raises(ValueError, match=r"kvpress is not installed.*laq-gguf\[peers\]"):
        peers.peer_versions()


def test_what_is_asked_for_is_parsed() -> None:
    parser = argparse.ArgumentParser()
    peers.add_arguments(parser)
    args = parser.parse_args(["--model", "m.gguf"])
    assert args.shares == [0.25, 0.125, 0.0625] and args.methods == list(peers.PRESSES)
    for wrong in (["--shares", "2"], ["--methods", "kvpress-none"], ["--tasks", "none"]):
        with pytest.raises(SystemExit):
            parser.parse_args(["--model", "m.gguf", *wrong])


@pytest.fixture(scope="module")
def tiny(tiny_gguf: Callable[..., Path]) -> object:
    """A tiny random model in transformers."""
    for name in ("torch", "transformers", "kvpress"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[peers]'")
    from laq_gguf.bench.peers_model import PeerModel

    return PeerModel(tiny_gguf("llama"), 1)


TOKENS, PATH = list(range(3, 103)), [7, 50, 200, 9]


def by_itself(tiny, name: str, share: float, **settings: object) -> np.ndarray:
    """Logits along PATH as kvpress itself runs a press: one cache, one token at a time."""
    import kvpress
    import torch
    from transformers import DynamicCache

    cache, press = DynamicCache(), getattr(kvpress, name)(compression_ratio=1 - share, **settings)
    with torch.inference_mode(), tiny._named_tokenizer():
        with press(tiny.model):
            ids = torch.tensor([TOKENS])
            hidden = tiny.model.model(input_ids=ids, past_key_values=cache)[0]
            rows = [tiny.model.lm_head(hidden[0, -1])]
        for i, token in enumerate(PATH[:-1]):
            step = {"input_ids": torch.tensor([[token]]), "past_key_values": cache}
            at = torch.tensor([[len(TOKENS) + i]])
            rows.append(tiny.model(**step, position_ids=at).logits[0, -1])
    for module in tiny._layers:
        module.masked_key_indices = None
    return torch.stack(rows).numpy()


def test_one_reading_serves_all_presses(tiny) -> None:
    presses = {
        "snapkv": peers.Press("SnapKVPress", {"window_size": 8}),
        "pyramid": peers.Press("PyramidKVPress", {"window_size": 2, "beta": 4}),
        "tova": peers.Press("TOVAPress"),
        "expected": peers.Press("ExpectedAttentionPress"),
        "keydiff": peers.Press("KeyDiffPress"),
        "kvzip": peers.Press("KVzipPress"),
    }
    reading = tiny.read(TOKENS, presses, [0.5, 0.25])
    keys = list(reading.kept)
    logits = tiny.led(reading, [reading.kept[key] for key in keys], PATH)
    for (name, share), own in zip(keys, logits, strict=True):
        press = presses[name]
        expected = by_itself(tiny, press.name, share, **press.settings)
        np.testing.assert_allclose(own, expected, atol=1e-4, err_msg=f"{name} {share}")
    # caches of other lengths differ by layer (pyramid) and by head (kvzip)
    assert len({layer.n for layer in reading.kept["pyramid", 0.25]}) > 1
    assert reading.kept["kvzip", 0.25][0].held is not None


def test_sizes_are_those_of_the_cells_that_are_held(tiny) -> None:
    presses = {"tova": peers.Press("TOVAPress"), "kvzip": peers.Press("KVzipPress")}
    reading = tiny.read(TOKENS, presses, [0.25])
    for key in reading.kept:
        size = peers.sizes(reading.kept[key], reading.full)
        # 2 layers, 2 KV heads, 64 of K and 64 of V, 2 bytes each
        assert size == {"budget": 25, "kv_bytes": 25 * 1024, "kv_bytes_full": 100 * 1024}, key


def test_a_prompt_that_a_press_refuses_is_an_error_that_names_it(tiny) -> None:
    with pytest.raises(ValueError, match=r"snapkv, 50 tokens: .*window size 64"):
        tiny.read(TOKENS[:50], {"snapkv": peers.Press("SnapKVPress")}, [0.5])


def test_a_free_answer_is_that_of_each_cache_alone(tiny) -> None:
    presses = {"tova": peers.Press("TOVAPress"), "keydiff": peers.Press("KeyDiffPress")}
    reading = tiny.read(TOKENS, presses, [0.5, 0.1])
    rows = [reading.full, *reading.kept.values()]
    together = tiny.freely(reading, rows, 12, lambda token: False)
    assert [len(reply) for reply in together] == [12] * 5
    assert together == [tiny.freely(reading, [row], 12, lambda token: False)[0] for row in rows]
    # rows that end leave the batch, and the others go on as they did
    end = together[1][3]
    ended = tiny.freely(reading, rows, 12, lambda token: token == end)
    for before, after in zip(together, ended, strict=True):
        n = before.index(end) + 1 if end in before else 12
        assert after == before[:n]


def test_peers(bench, tiny, tiny_gguf: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    command = (
        "peers", "--model", tiny_gguf("llama"), "--tasks", "needles", "--n-needles", 1,
        "--length", 1800, "--methods", "kvpress-tova,kvpress-kvzip", "--shares", "1/2",
        "--threads", 1, "--references", tmp_path / "references", "--out", out,
    )  # fmt: skip
    done = bench(*command)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    full, tova, kvzip = document["results"]
    assert (full["method"], full["share"], full["length"]) == ("full", 1.0, 1800)
    # weights in f32 in both: what is left is arithmetic, and the cache in f16
    assert full["kl"] < 1e-4 and full["top1_agreement"] > 0.9
    for row in (tova, kvzip):
        assert row["kv_bytes"] / row["kv_bytes_full"] == pytest.approx(0.5, abs=0.01)
        assert row["n_compared"] == full["n_compared"] and row["kl"] > 0
    assert document["peers"].keys() == set(peers.PACKAGES)
    # what is there is not measured again
    again = bench(*command)
    assert again.returncode == 0 and again.stdout == done.stdout, again.stderr
    assert json.loads(out.read_text(encoding="utf-8"))["results"] == document["results"]
    rendered = bench("report", out)
    assert rendered.returncode == 0 and done.stdout.strip() in rendered.stdout
    assert f"kvpress {document['peers']['kvpress']}" in rendered.stdout
