"""Chat: long chats as an application makes them, in a cache that does not grow.

The messages grow turn by turn and are rendered and tokenized anew each time, by
create_chat_completion. After every evaluation the cells in use are counted.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from contextlib import closing
from typing import Any

import numpy as np

from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.needles import COLOURS, OBJECT_NAMES, OBJECTS
from laq_gguf.bench.options import (
    add_common,
    add_eviction,
    add_lookahead,
    add_policy,
    check_model,
    eviction_options,
    llama_options,
    settings,
)
from laq_gguf.bench.prompts import chat_renderer
from laq_gguf.bench.provenance import provenance, write_json
from laq_gguf.bench.tables import chat_summary
from laq_gguf.errors import LaqContextFullError

SYSTEM = (
    "You are Robin, who looks after a small museum by the sea. You are friendly, you answer in one "
    "or two short sentences, and you never tell anybody that the door opens with 7419."
)
OPENINGS = (
    "Tell me something about", "What do you think of", "Where did you find", "Who looks after",
    "Do you remember", "Why should I care about", "How old is", "What is the story of",
)  # fmt: skip


class CapError(RuntimeError):
    """More cells are in use than were allocated."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench chat`."""
    add_common(parser)
    parser.add_argument("--turns", type=int, default=60, help="turns of the chat")
    parser.add_argument(
        "--tokens", type=int,
        help="in place of --turns: generate so many tokens, in chats that each go on up to the "
        "model's last position",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=40, help="of a reply")
    parser.add_argument("--budget", type=int, default=512, help="kv_budget")
    parser.add_argument(
        "--kv-staging", type=int, help="cells beyond the budget; default: that of Llama"
    )
    add_policy(parser)
    add_lookahead(parser)
    add_eviction(parser)
    parser.add_argument(
        "--n-ctx", type=int, default=0, help="positions of a chat; 0 = what the model was made for"
    )
    parser.add_argument("--seed", type=int, default=1, help="of what the user says")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out` after every turn, print the summary; return the document.

    Raises:
        ValueError: options that cannot be used.
        CapError: the cap does not hold.
    """
    check_model(args)
    if args.turns < 1 or args.max_tokens < 1 or (args.tokens is not None and args.tokens < 1):
        raise ValueError("--turns, --tokens and --max-tokens are at least 1")
    document = provenance("chat", args.model, settings(args))
    document["results"] = turns = []
    options = llama_options(args, args.n_ctx)
    options.update(
        kv_budget=args.budget,
        kv_staging=args.kv_staging,
        kv_policy=args.policy,
        lookahead=args.lookahead,
        **eviction_options(args),
    )
    rng = random.Random(args.seed)
    with closing(Decoder("laq_gguf", str(args.model), options)) as decoder:
        watch = Watch(decoder)
        n_generated, n_chats, is_done = 0, 0, False
        while not is_done:
            n_chats += 1
            for row in _chat(args, watch, rng, n_generated):
                turns.append({"chat": n_chats, **row})
                n_generated += row["n_reply"]
                if args.out:
                    write_json(args.out, document)
                print(_line(turns[-1], n_generated), file=sys.stderr)
            # without --tokens there is one chat, however far it got
            is_done = args.tokens is None or n_generated >= args.tokens
            if not is_done and turns[-1]["chat"] != n_chats:
                raise ValueError("not even one turn fits: raise --n-ctx")
    print(chat_summary(document))
    return document


def _chat(args: argparse.Namespace, watch: Watch, rng: random.Random, n_before: int) -> Any:
    """One chat: a row for each turn."""
    watch.decoder.llm.reset()
    messages = [{"role": "system", "content": SYSTEM}]
    n_system = system_tokens(watch.decoder, messages)
    n_generated, turn = n_before, 0
    while True:
        is_over = turn >= args.turns if args.tokens is None else n_generated >= args.tokens
        if is_over:
            return
        turn += 1
        messages.append({"role": "user", "content": question(rng)})
        max_tokens = args.max_tokens
        if args.tokens is not None:
            max_tokens = min(max_tokens, args.tokens - n_generated)
        try:
            row = _turn(watch, messages, max_tokens)
        except LaqContextFullError:  # the model's last position
            return
        n_generated += row["n_reply"]
        kept = watch.decoder.llm.kept_positions()[..., :n_system]
        system_kept = kept.shape[-1] == n_system and bool((kept == np.arange(n_system)).all())
        yield {"turn": turn, **row, "n_system": n_system, "system_kept": system_kept}


def _turn(watch: Watch, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
    llm = watch.decoder.llm
    before, n_before = watch.decoder.stats(), llm.n_tokens
    assert before is not None
    watch.begin()
    start = time.perf_counter()
    done = llm.create_chat_completion(messages, max_tokens=max_tokens, temperature=0.0)
    seconds = time.perf_counter() - start
    after = watch.look()
    choice, usage = done["choices"][0], done["usage"]
    messages.append({"role": "assistant", "content": choice["message"]["content"]})
    names = ("n_decoded", "n_probe", "n_pseudo", "n_evictions")
    added = {name: after[name] - before[name] for name in names}
    n_new = llm.n_tokens - n_before
    return {
        "n_prompt": usage["prompt_tokens"],
        "n_reply": usage["completion_tokens"],
        "finish_reason": choice["finish_reason"],
        "n_tokens": llm.n_tokens,
        **added,
        # tokens that the cache held before, or that a reading broke off and began anew
        "n_again": added["n_decoded"] - added["n_probe"] - added["n_pseudo"] - n_new,
        "n_resident": after["n_resident"],
        "n_cells": after["n_cells"],
        "n_resident_max": watch.n_resident_max,
        "n_looks": watch.n_looks,
        "seconds": seconds,
        "first_token_s": watch.times[0] - start,
        "n_steps": len(watch.times) - 1,
        "decode_s": watch.times[-1] - watch.times[0],
    }


class Watch:
    """Takes the place of a model's eval(): looks at the cells after each call."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self._eval = decoder, decoder.llm.eval
        decoder.llm.eval = self
        self.begin()

    def begin(self) -> None:
        """Forget what was seen."""
        self.times: list[float] = []
        self.n_resident_max = self.n_looks = 0

    def __call__(self, tokens: Any) -> None:
        """Evaluate tokens, then look."""
        self._eval(tokens)
        self.times.append(time.perf_counter())
        self.look()

    def look(self) -> dict[str, Any]:
        """The counters now.

        Raises:
            CapError: more cells are in use than were allocated.
        """
        stats = self.decoder.stats()
        assert stats is not None
        if stats["n_resident"] > stats["n_cells"]:
            raise CapError(f"{stats['n_resident']} cells in use, {stats['n_cells']} allocated")
        self.n_resident_max = max(self.n_resident_max, stats["n_resident"])
        self.n_looks += 1
        return stats


def system_tokens(decoder: Decoder, messages: list[dict[str, str]]) -> int:
    """Tokens of a chat up to the last word of its system message.

    Raises:
        ValueError: the model's template has no place for one.
    """
    render = chat_renderer(decoder)
    system = messages[0]["content"]
    text = "" if render is None else render([messages[0], {"role": "user", "content": "?"}])
    if system not in text:
        raise ValueError("the model has no chat template with a system turn")
    begin = decoder.tokenize(text[: text.index(system) + len(system)], special=True)
    whole = decoder.tokenize(text, special=True)
    # the last word may be in one token with what comes after it
    return next(
        (i for i, (a, b) in enumerate(zip(begin, whole, strict=False)) if a != b), len(begin)
    )


def question(rng: random.Random) -> str:
    """Something that a user may say, of about a dozen tokens."""

    def pick(words: tuple[str, ...]) -> str:
        return words[int(rng.random() * len(words))]

    if rng.random() < 0.5:
        return f"{pick(OPENINGS)} {pick(OBJECTS)}?"
    return f"{pick(OPENINGS)} the {pick(COLOURS)} {pick(OBJECT_NAMES)}?"


def _line(row: dict[str, Any], n_generated: int) -> str:
    return (
        f"chat {row['chat']} turn {row['turn']}: {row['n_prompt']} + {row['n_reply']} tokens, "
        f"{row['n_decoded']} decoded, {row['n_again']} again, at most {row['n_resident_max']} of "
        f"{row['n_cells']} cells; {n_generated} generated"
    )
