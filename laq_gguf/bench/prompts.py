"""Prompts in the model's own tokens: a question with its reply's beginning, or a text."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.longbench import middle_cut
from laq_gguf.bench.tasks import Example, load_examples

T = TypeVar("T")
Renderer = Callable[[Sequence[dict[str, str]]], str]


@dataclass(frozen=True)
class Prompt:
    """An example in tokens.

    Attributes:
        tokens: what is read, the beginning of the reply included.
        path: how the text really goes on, where nothing is answered.
    """

    example: Example
    tokens: list[int]
    path: tuple[int, ...] = ()

    @property
    def digest(self) -> str:
        """Tells prompts apart: 12 hex digits."""
        return digest(self.tokens, self.path)


def digest(*parts: Sequence[int]) -> str:
    """12 hex digits of lists of tokens."""
    made = hashlib.sha256()
    for part in parts:
        made.update(len(part).to_bytes(8, "little"))
        made.update(np.asarray(part, dtype="<i4").tobytes())
    return made.hexdigest()[:12]


def open_tokenizer(model: str) -> Decoder:
    """The model's vocabulary alone."""
    return Decoder("llama_cpp", model, {"vocab_only": True, "n_ctx": 256})


def make_prompt(decoder: Decoder, render: Renderer | None, example: Example) -> Prompt:
    """An example in tokens.

    Args:
        render: the chat template, see `chat_renderer`; None: plain text.
    """
    message = example.message
    if example.cut is not None:
        message = middle_cut(message, example.cut, decoder.tokenize, decoder.text)
    is_chat = render is not None and not example.is_plain
    text = render([{"role": "user", "content": message}]) if is_chat else message
    # templates may write begin-of-text themselves
    tokens = decoder.tokenize(text + example.answer_prefix, add_bos=not is_chat, special=is_chat)
    return Prompt(example, tokens)


def task_prompts(
    decoder: Decoder,
    render: Renderer | None,
    name: str,
    length: int,
    args: argparse.Namespace,
    text: Path | None = None,
) -> list[Prompt]:
    """The examples of a task, as --data, --limit and --n-needles say (see tasks.load_examples)."""
    examples = load_examples(
        name,
        data=args.data,
        length=length,
        limit=args.limit,
        n_needles=args.n_needles,
        count_tokens=lambda text: len(decoder.tokenize(text)),
        text=text,
    )
    return [make_prompt(decoder, render, example) for example in examples]


def rounds_of(series: Sequence[Sequence[T]]) -> list[list[T]]:
    """The first of each series, then the second of each: a run that is stopped is balanced."""
    n = max(map(len, series), default=0)
    return [[items[i] for items in series if i < len(items)] for i in range(n)]


def text_prompts(decoder: Decoder, text: str, n_tokens: int, n_path: int, n: int) -> list[Prompt]:
    """Pieces of a text of `n_tokens` tokens, spread over it, and the `n_path` that follow each.

    Raises:
        ValueError: the text is too short for one.
    """
    # no token is longer than a word: what is tokenized need not be the whole of a long text
    tokens = decoder.tokenize(text[: 64 * n * (n_tokens + n_path)])
    begin, need = decoder.tokenize("", add_bos=True), n_tokens + n_path
    if len(tokens) < need:
        raise ValueError(f"the text has {len(tokens)} tokens, {need} are needed: lower --lengths")
    n = min(n, len(tokens) // need)
    step = (len(tokens) - need) // max(n - 1, 1)
    prompts = []
    for i in range(n):
        piece = tokens[i * step : i * step + need]
        example = Example("perplexity", str(i), "", "", (), length=n_tokens)
        prompts.append(Prompt(example, [*begin, *piece[:n_tokens]], tuple(piece[n_tokens:])))
    return prompts


def chat_renderer(decoder: Decoder) -> Renderer | None:
    """Messages -> prompt text up to the assistant's turn, by the model's template; None without."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = decoder.llm.metadata.get("tokenizer.chat_template")
    if not template:
        return None

    def piece(token: int) -> str:
        return "" if token < 0 else decoder.llm._model.token_get_text(token)

    formatter = Jinja2ChatFormatter(
        template=template,
        eos_token=piece(decoder.llm.token_eos()),
        bos_token=piece(decoder.llm.token_bos()),
    )
    return lambda messages: formatter(messages=list(messages)).prompt
