"""Kept: which tokens of a prompt stay, as a page that shades each by how many heads keep it."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.kept_page import kept_page, kept_table
from laq_gguf.bench.options import (
    add_common,
    add_eviction,
    add_policy,
    check_model,
    eviction_options,
    llama_options,
    settings,
)
from laq_gguf.bench.prompts import chat_renderer, open_tokenizer
from laq_gguf.bench.provenance import provenance, write_json
from laq_gguf.bench.tasks import read_text
from laq_gguf.config import round_cells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench kept`."""
    add_common(parser)
    parser.add_argument("--text", type=Path, required=True, help="the document, UTF-8")
    parser.add_argument("--prompt", default="", help="the question that goes after it")
    parser.add_argument("--budget", type=int, default=128, help="kv_budget")
    parser.add_argument(
        "--kv-staging", type=int, default=0,
        help="cells beyond the budget; 0 = the whole prompt fits",
    )  # fmt: skip
    add_policy(parser)
    parser.add_argument("--html", type=Path, help="the page")
    add_eviction(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Read, evict, write `args.out` and `args.html`, print a table; return the document.

    Raises:
        ValueError: options or files that cannot be used, or a prompt that is not evicted.
    """
    check_model(args)
    text = read_text(args.text)
    kept = {k: v for k, v in settings(args).items() if k != "html"}
    document = provenance("kept", args.model, {**kept, "text": args.text.name})
    with closing(open_tokenizer(str(args.model))) as vocabulary:
        tokens = prompt_tokens(vocabulary, text, args.prompt)
        document["pieces"] = text_pieces([_bytes(vocabulary, token) for token in tokens])
    if len(tokens) <= args.budget:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens: nothing of it is evicted to --budget "
            f"{args.budget}"
        )
    n_ctx = round_cells(len(tokens) + args.lookahead_size)
    options = {
        **llama_options(args, n_ctx),
        **eviction_options(args),
        "kv_budget": args.budget,
        "kv_staging": args.kv_staging or n_ctx,
        "kv_policy": args.policy,
        "lookahead": "pseudo",
    }
    with closing(Decoder("laq_gguf", str(args.model), options)) as decoder:
        decoder.prefill(tokens)
        decoder.flush()
        positions = decoder.llm.kept_positions()
        stats = decoder.stats()
        assert stats is not None
    document["n_heads"] = positions.shape[0] * positions.shape[1]
    document["n_kept"] = heads_that_keep(positions, len(tokens)).tolist()
    document["stats"] = {k: stats[k] for k in ("n_tokens", "n_resident", "n_cells", "kv_bytes")}
    if args.out:
        write_json(args.out, document)
    if args.html:
        args.html.write_text(kept_page(document), encoding="utf-8")
    print(kept_table(document))
    return document


def prompt_tokens(decoder: Decoder, text: str, question: str) -> list[int]:
    """A document and a question as `laq-gguf generate` sends them."""
    message = f"{text}\n\n{question}" if question else text
    render = chat_renderer(decoder)
    prompt = render([{"role": "user", "content": message}]) if render else message
    return decoder.tokenize(prompt, add_bos=render is None, special=render is not None)


def _bytes(decoder: Decoder, token: int) -> bytes:
    return decoder.llm.detokenize([token], special=True)


def text_pieces(pieces: list[bytes]) -> list[list[Any]]:
    """What tokens say: [text, number of tokens]; tokens that share a character stand together."""
    result: list[list[Any]] = []
    waiting, n = b"", 0
    for i, piece in enumerate(pieces):
        waiting, n = waiting + piece, n + 1
        try:
            text = waiting.decode("utf-8")
        except UnicodeDecodeError as error:
            # no character has more than four bytes; only the last one can be incomplete
            if error.reason == "unexpected end of data" and i + 1 < len(pieces):
                continue
            text = waiting.decode("utf-8", errors="replace")
        result.append([text, n])
        waiting, n = b"", 0
    return result


def heads_that_keep(positions: npt.NDArray[np.int32], n_tokens: int) -> npt.NDArray[np.int64]:
    """How many heads, over all layers, keep each of the first `n_tokens` positions.

    Args:
        positions: (n_layer, n_head_kv, n_resident), see `Llama.kept_positions`.

    Returns:
        (n_tokens,).
    """
    flat = positions.reshape(-1)
    return np.bincount(flat[flat < n_tokens], minlength=n_tokens)
