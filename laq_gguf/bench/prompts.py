"""Prompts in the model's own tokens: a question with its reply's beginning, or a chat."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.tasks import Example

Renderer = Callable[[Sequence[dict[str, str]]], str]


@dataclass(frozen=True)
class Prompt:
    """An example in tokens: `lead` is decoded as the reply's beginning, after the prompt."""

    example: Example
    tokens: list[int]
    lead: list[int]

    @property
    def digest(self) -> str:
        """Tells prompts apart: 12 hex digits."""
        return digest(self.tokens, self.lead)


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


def make_prompt(
    decoder: Decoder, render: Renderer | None, example: Example, lookahead: str
) -> Prompt:
    """An example in tokens.

    Args:
        render: the chat template, see `chat_renderer`; None: plain text.
        lookahead: "deferred": the reply's beginning is apart from the prompt, as its `lead`.
    """
    text, add_bos = example.message, render is None
    if render is not None:
        text = render([{"role": "user", "content": example.message}])
    if lookahead == "deferred":
        lead = decoder.tokenize(example.answer_prefix)
        return Prompt(example, decoder.tokenize(text, add_bos=add_bos, special=True), lead)
    # templates may write begin-of-text themselves
    tokens = decoder.tokenize(text + example.answer_prefix, add_bos=add_bos, special=True)
    return Prompt(example, tokens, [])


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
