"""Decoding in batches gives what decoding token by token gives; a prompt read once serves all."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.methods import parse_method
from laq_gguf.bench.reading import BoundedReader, Reader, TwoStageReader
from tolerances import assert_nmse

PROMPT = [3 + i * 7 % 200 for i in range(300)]
PATH = [5, 9, 200, 31, 7, 88, 40, 12, 3]


def arguments(model: Path) -> argparse.Namespace:
    return argparse.Namespace(model=model, threads=1, bounded_staging=None)


@pytest.fixture
def reader(native: object, tiny: Path):
    with closing(Reader(arguments(tiny), 512, "f16")) as made:
        made.read(PROMPT)
        yield made


def test_a_batch_gives_the_logits_of_its_steps(reader: Reader) -> None:
    decoder = reader.decoder
    decoder.llm.n_batch = 4  # of nine tokens
    rows = []
    reader.start(parse_method("laq++"), 64)
    for token in PATH:
        decoder.step(token)
        rows.append(decoder.logits().copy())
    reader.start(parse_method("laq++"), 64)
    batched = decoder.decode(PATH)
    assert decoder.n_tokens == len(PROMPT) + len(PATH)
    assert_nmse(batched, np.stack(rows), 1e-6, "logits")
    assert decoder.decode([]).shape == (0, decoder.n_vocab)


@pytest.mark.parametrize("name", ["full", "streaming", "snapkv", "laq++"])
def test_a_method_begins_where_the_prompt_was_read(reader: Reader, tiny: Path, name: str) -> None:
    """As in a cache of its own, whatever another method did with this one before."""
    method = parse_method(name)
    budget = 64 if method.evicts else None
    for before in ("random", "deferred"):  # the latter leaves an eviction waiting
        reader.start(parse_method(before), 80)
        reader.start(method, budget)
    options = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, **method.options}
    with closing(
        Decoder("laq_gguf", str(tiny), {**options, "kv_budget": budget or 512, "kv_staging": 512})
    ) as own:
        own.prefill(PROMPT)
        mine, theirs = reader.decoder.llm.kept_positions(), own.llm.kept_positions()
        assert mine.shape == theirs.shape
        # the last token of the prompt was decoded alone: a score may differ in its last bits
        assert (mine == theirs).mean() > 0.99
        assert_nmse(reader.decoder.logits(), own.logits(), 1e-6, "logits")


def test_two_stages_keep_as_much_as_one(reader: Reader, tiny: Path) -> None:
    method = parse_method("laq")
    with closing(TwoStageReader(arguments(tiny), 512, "f16")) as two:
        two.read(PROMPT)
        kept = []
        for _ in range(2):
            two.start(method, 64)
            stats = two.stats()
            assert (stats["n_tokens"], stats["n_resident"]) == (len(PROMPT), 64)
            assert stats["n_recalls"] == len(kept) + 1
            kept.append(two.decoder.llm.kept_positions())
        np.testing.assert_array_equal(*kept)
        reader.start(parse_method("snapkv"), 64)
        assert (kept[0] != reader.decoder.llm.kept_positions()).any()
        # the answer begins as the whole prompt says
        assert_nmse(two.decoder.logits(), reader.decoder.logits(), 1e-6, "logits")


def test_a_bounded_reader_goes_back_to_its_prompt(native: object, tiny: Path) -> None:
    method = parse_method("bounded")
    with pytest.raises(ValueError, match="100 cells are too few for bounded"):
        BoundedReader(arguments(tiny), 512, method, 100)
    with closing(BoundedReader(arguments(tiny), 512, method, 256)) as reader:
        reader.start(PROMPT)
        stats = reader.decoder.stats()
        assert stats is not None and stats["n_cells"] == 256 and stats["n_evictions"] > 0
        kept = reader.decoder.llm.kept_positions()
        first = reader.decoder.decode(PATH)
        reader.again()
        assert (reader.decoder.llm.kept_positions() == kept).all()
        np.testing.assert_array_equal(reader.decoder.decode(PATH), first)
