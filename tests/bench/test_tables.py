"""Tables of multi-turn, chat and memory results, with numbers worked by hand."""

from __future__ import annotations

from typing import Any

import pytest

from laq_gguf.bench import commands, quality_tables, report, tables


def multiturn_row(method: str, index: int, turn: int, kl: float, **extra: Any) -> dict[str, Any]:
    row = {"method": method, "index": index, "turn": turn, "f1": 0.5, "em": 0.0, "kl": kl}
    return {**row, "top1_agreement": 0.75, "n_new": 20 * turn, **extra}


def multiturn_document() -> dict[str, Any]:
    def evicting(index: int, turn: int, kl: float, n_again: int) -> dict[str, Any]:
        extra = {"n_decoded": 100 * turn, "n_again": n_again, "n_resident": 80 + index}
        return multiturn_row("laq++-deferred", index, turn, kl, **extra)

    return {
        "kind": "multiturn",
        "results": [
            *(multiturn_row("full", index, turn, 0.0) for index in (0, 1) for turn in (1, 2)),
            evicting(0, 1, 0.1, 0), evicting(0, 2, 0.3, 3),
            evicting(1, 1, 0.3, 0), evicting(1, 2, 0.7, 4),
        ],
    }  # fmt: skip


def test_multiturn_rows_are_means_over_the_texts() -> None:
    rows = tables.multiturn_rows(multiturn_document())
    assert [(r["method"], r["turn"], r["n"]) for r in rows] == [
        (method, turn, n) for method in ("full", "laq++-deferred")
        for turn, n in ((1, 2), (2, 2), (None, 4))
    ]  # fmt: skip
    first, second, mean = rows[3:]
    assert (first["kl"], second["kl"], mean["kl"]) == pytest.approx((0.2, 0.5, 0.35))
    assert (first["again"], second["again"], mean["again"]) == (0, 7, 7)
    assert (first["n_decoded"], second["n_decoded"], second["n_resident"]) == (100, 200, 80.5)
    assert rows[2]["n_decoded"] is None and rows[2]["again"] is None


def test_multiturn_tables() -> None:
    document = multiturn_document()
    table = tables.multiturn_table(document)
    assert (
        "| laq++-deferred | 2 | 2 | 0.500 | 0.000 | 0.5000 | 0.750 | 40 | 200 | 7 | 80 |" in table
    )
    assert "| full | mean | 4 | 0.500 | 0.000 | 0.0000 | 0.750 | 30 | - | - | - |" in table
    summary = tables.multiturn_summary(document)
    assert "| method | F1 | EM | KL, turn 1 | KL, turn 2 | KL, mean |" in summary
    assert "| laq++-deferred | 0.500 | 0.000 | 0.200 | 0.500 | 0.350 | 0.75 | 200 |" in summary
    # a stopped run: a turn that nobody of a method has reached
    del document["results"][5], document["results"][-1]
    assert "| 0.200 | - | 0.200 |" in tables.multiturn_summary(document)


def chat_row(chat: int, turn: int, n_steps: int, seconds: float, **extra: Any) -> dict[str, Any]:
    row = {
        "chat": chat, "turn": turn, "n_prompt": 50 * turn, "n_reply": n_steps + 1,
        "n_tokens": 60 * turn, "n_decoded": 30, "n_evictions": 1, "n_again": 0, "n_cells": 512,
        "n_resident_max": 300, "n_steps": n_steps, "decode_s": seconds, "seconds": 2 * seconds,
        "system_kept": True,
    }  # fmt: skip
    return {**row, **extra}


CHAT = {
    "kind": "chat",
    "results": [
        chat_row(1, 1, 30, 1.0),
        chat_row(1, 2, 10, 1.0),
        *(chat_row(1, turn, 40, 2.0) for turn in (3, 4, 5)),
        chat_row(1, 6, 40, 2.0, n_again=16, n_resident_max=512),
        chat_row(2, 1, 10, 0.5, system_kept=False),
        chat_row(2, 2, 5, 0.5),
    ],
}


def test_chat_figures() -> None:
    figures = tables.chat_figures(CHAT)
    # quarters of eight turns: tokens of two turns over their seconds
    assert (figures["first"], figures["last"]) == (20.0, 15.0)
    assert (figures["n_chats"], figures["n_turns"], figures["n_generated"]) == (2, 8, 223)
    assert (figures["n_resident_max"], figures["n_cells"], figures["longest"]) == (512, 512, 360)
    assert (figures["again_mean"], figures["again_max"], figures["n_again"]) == (2.0, 16, 1)
    assert figures["n_system_kept"] == 7
    with pytest.raises(ValueError, match="without turns"):
        tables.chat_figures({"results": []})


def test_chat_tables() -> None:
    summary = tables.chat_summary(CHAT)
    for line in (
        "| turns | 8 in 2 chats |",
        "| tokens of the longest chat | 360 |",
        "| most cells in use, of those allocated | 512 of 512 |",
        "| tokens decoded again in a turn | 2.0 (at most 16; none in 7 of 8 turns) |",
        "| turns after which every head holds the system turn | 7 of 8 |",
    ):
        assert line in summary
    table = tables.chat_table(CHAT)
    assert table.startswith(summary) and table.count("LOST") == 1
    assert "| 2 | 2 | 100 | 6 | 30 | 0 | 300 | 1 | 1.00 | 10.0 | whole |" in table
    # a reply of one token has no speed
    one = {"results": [chat_row(1, 1, 0, 0.0)]}
    assert ["", " first quarter of the turns ", " - tokens/s ", ""][2] in tables.chat_summary(one)


def memory_row(library: str, name: str, n_ctx: int, *sizes: int) -> dict[str, Any]:
    kv, ring, compute, peak = (2**20 * size for size in sizes)
    row = {"library": library, "type": name, "n_ctx": n_ctx, "n_cells": 1024, "n_prompt": 1536}
    held = {"kv_bytes": kv, "ring_bytes": ring, "compute_bytes": compute}
    if library == "laq_gguf":
        held["kv_bytes_full"] = kv * n_ctx // 1024
    return {**row, **held, "peak_bytes": peak}


MEMORY = {
    "kind": "memory",
    "results": [
        memory_row("laq_gguf", "f16", 2048, 24, 1, 25, 210),
        memory_row("laq_gguf", "f16", 131072, 24, 1, 25, 210),
        memory_row("llama_cpp", "f16", 1024, 24, 0, 16, 200),
        memory_row("laq_gguf", "q8_0", 2048, 12, 1, 25, 198),
    ],
}


def test_memory_ratios_are_to_the_stock_context_of_the_same_types() -> None:
    small, large, stock, alone = tables.memory_rows(MEMORY)
    assert (small["held_ratio"], small["peak_ratio"]) == (1.25, 1.05)
    assert (large["held_ratio"], stock["held_ratio"]) == (1.25, 1.0)
    assert (alone["held_ratio"], alone["peak_ratio"]) == (None, None)
    table = tables.memory_table(MEMORY)
    assert (
        "| ours | f16 | 131,072 | 1,024 | 1,536 | 3,072.0 | 24.00 | 50.0 | 1.250 | 210.0 | 1.050 |"
        in table
    )
    assert "| stock | f16 | 1,024 | 1,024 | 1,536 | - | 24.00 | 40.0 | 1.000 |" in table
    assert "| ours | q8_0 | 2,048 | 1,024 | 1,536 | 24.0 | 12.00 | 38.0 | - | 198.0 | - |" in table


def test_every_command_has_a_table() -> None:
    # speed and memory have a second kind of result: over contexts
    others = {"report", "pictures", "fetch"}
    assert report.TABLES.keys() - {"sweep", "memory_curve"} == commands.COMMANDS.keys() - others
    assert report.SUMMARIES.keys() < report.TABLES.keys()


def size_row(method: str, size: str | None, task: str, **extra: Any) -> dict[str, Any]:
    row = {
        "task": task, "length": 2048, "id": "0", "method": method, "size": size, "score": 1.0,
        "share": None if size is None else {"1/4": 0.25, "1/8": 0.125}[size], "kl": 0.2,
        "top1_agreement": 0.5, "attention_mass": 0.75, "kv_bytes": 2**20, "kv_bytes_full": 2**22,
        "n_kept": 100, "counts": "kept cells",
    }  # fmt: skip
    return {**row, **extra}


SIZES = {
    "kind": "quality",
    "results": [
        size_row("full", None, "niah_single_1", kv_bytes=2**22, n_kept=800, kl=0.0),
        size_row("full", None, "vt", kv_bytes=2**22, n_kept=800, kl=0.0, score=0.5),
        size_row("full@q4_0", None, "vt", kv_bytes=1.2 * 2**20, score=0.25),
        size_row("laq++", "1/8", "niah_single_1", kv_bytes=2**19),
        size_row("laq++", "1/4", "niah_single_1", score=0.5, attention_mass=None),
        size_row("laq++", "1/4", "niah_single_2", score=0.0),
        size_row("laq++", "1/4", "vt", score=0.75, kl=0.5),
        size_row("bounded", "1/4", "vt", counts="all cells", attention_mass=None),
    ],
}


def test_rows_of_sizes_are_ordered_by_share() -> None:
    rows = quality_tables.size_rows(SIZES)
    assert [(r["method"], r["size"]) for r in rows] == [
        ("full", None), ("full@q4_0", None), ("laq++", "1/4"), ("bounded", "1/4"), ("laq++", "1/8")
    ]  # fmt: skip
    full, q4_0, laq, bounded, eighth = rows
    # a group is the mean of its rows, the mean that of the groups
    assert laq["groups"] == {"niah single": 0.25, "vt": 0.75} and laq["mean"] == 0.5
    assert (laq["n"], laq["kl"], laq["attention_mass"]) == (3, pytest.approx(0.3), 0.75)
    assert (full["mean"], full["of_full"], q4_0["of_full"]) == (0.75, 1.0, pytest.approx(0.3))
    # no mean over other groups than the others have
    assert q4_0["mean"] is None and bounded["mean"] is None and eighth["mean"] is None
    assert bounded["attention_mass"] is None


def test_halves_of_the_examples() -> None:
    """Even and odd by their order in each task, beside the method without settings."""
    values = {  # of the examples a and b of vt, c and d of niah_single_1
        "laq++": (0.1, 0.4, 0.3, 0.4),
        "laq++:n_sink=0": (0.2, 0.2, 0.1, None),
        "snapkv": (0.2, 0.2, 0.4, 0.6),
    }
    examples = [("vt", "a"), ("niah_single_1", "c"), ("vt", "b"), ("niah_single_1", "d")]
    results = [
        size_row(method, "1/8", task, id=name, kl=kl["abcd".index(name)])
        for task, name in examples
        for method, kl in values.items()
        if kl["abcd".index(name)] is not None
    ]
    document = {"kind": "quality", "results": results}
    plain, other, snapkv = quality_tables.half_rows(document)
    assert [h["kl"] for h in plain["halves"]] == pytest.approx([0.2, 0.4])
    assert [h["kl"] for h in snapkv["halves"]] == pytest.approx([0.3, 0.4])
    assert [h["ratio"] for h in plain["halves"] + snapkv["halves"]] == [None] * 4
    even, odd = other["halves"]
    assert (even["n"], even["n_both"], even["n_lower"]) == (2, 2, 1)
    assert (even["kl"], even["ratio"]) == pytest.approx((0.15, 0.75))
    # the missing example is left out on both sides
    assert (odd["n"], odd["n_both"], odd["n_lower"]) == (1, 1, 1)
    assert odd["ratio"] == pytest.approx(0.2 / 0.4)
    text = quality_tables.halves_table(document)
    assert (
        "| laq++:n_sink=0 | 1/8 | 2 | 0.1500 | 0.750 | 1 of 2 | 1 | 0.2000 | 0.500 | 1 of 1 |"
        in text
    )
    assert "| snapkv | 1/8 | 2 | 0.3000 | - | - | 2 | 0.4000 | - | - |" in text
    with pytest.raises(ValueError, match="--shares"):
        quality_tables.halves_table({"results": [{"task": "vt", "kl": 0.1}]})


def test_table_of_sizes() -> None:
    text = quality_tables.quality_table(SIZES)
    assert "| n | niah single (2) | vt (1) | mean |" in text and "perplexity" not in text
    assert "| laq++ | 1/4 | 100 | 1.00 | 3 | 0.25 | 0.75 | 0.500 | 0.3000 | 0.500 | 0.750 |" in text
    assert "| bounded | 1/4, all cells | 100 | 1.00 | 1 | - | 1.00 | - |" in text
    assert "| full@q4_0 | 0.30 |" in text
    assert quality_tables.quality_summary(SIZES) == text
    text_alone = [
        size_row("full", None, "perplexity", score=None, nll=1.0),
        size_row("full", None, "perplexity", score=None, nll=3.0, id="1"),
    ]
    table = quality_tables.quality_table({"results": text_alone})
    assert "| mean | perplexity | KL" in table and "| 2 | - | 7.39 |" in table
    assert quality_tables.quality_table({"results": []}).count("\n") == 1
