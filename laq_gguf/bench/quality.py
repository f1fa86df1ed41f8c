"""Quality: do the answers survive, and how near does an evicted cache stay to the full one.

Every method answers each question greedily, and is led along the full cache's own answer so that
its next-token distributions can be compared with the full cache's, position by position.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.metrics import METRICS, kl_divergence, top1_agreement
from laq_gguf.bench.provenance import provenance, usable_cores, write_json
from laq_gguf.bench.report import quality_table
from laq_gguf.bench.tasks import TASKS, Example, load_examples

# keyword arguments of laq_gguf.Llama, beside kv_budget and the lookahead
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "laq++": {"kv_policy": "laq++"},
    "laq": {"kv_policy": "laq"},
    "snapkv": {"kv_policy": "snapkv"},
    "streaming": {"kv_policy": "streaming"},
    "random": {"kv_policy": "random"},
}

NOTES = {
    "pseudo": (
        "lookahead pseudo: the cache is evicted before the first token of the reply; the reply's "
        "beginning (answer_prefix) is part of the prompt"
    ),
    "deferred": (
        "lookahead deferred: the first lookahead_size tokens of a reply are the full cache's own. "
        "The reply's beginning (answer_prefix) is therefore decoded as generated tokens, after the "
        "prompt: only where n_lead < lookahead_size does a part of the answer come from the full "
        "cache"
    ),
}


@dataclass(frozen=True)
class Prompt:
    """An example in tokens: `lead` is decoded as the reply's beginning, after the prompt."""

    example: Example
    tokens: list[int]
    lead: list[int]


@dataclass(frozen=True)
class Reply:
    """Greedy tokens (an end token included) and the logits (n, n_vocab) along the reference."""

    tokens: list[int]
    logits: npt.NDArray[np.float32]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py quality`."""
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--data", type=Path, help="folder with ruler/LENGTH/TASK.jsonl")
    parser.add_argument(
        "--tasks", type=_names(TASKS), default=["needles"], help=f"of {', '.join(TASKS)}"
    )
    parser.add_argument("--length", type=int, default=2048, help="prompt length in tokens")
    parser.add_argument("--limit", type=int, help="the first N examples of each task only")
    parser.add_argument("--n-needles", type=int, default=20, help="prompts of the task needles")
    parser.add_argument(
        "--methods", type=_names(METHODS), default=list(METHODS), help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument("--kv-staging", type=int, default=0,
                        help="cells beyond the budget; 0 = the whole prompt fits")  # fmt: skip
    parser.add_argument("--budgets", type=_integers, default=[128], help="kv_budget: 64,128,256")
    parser.add_argument("--lookahead", choices=tuple(NOTES), default="pseudo")
    parser.add_argument("--lookahead-size", type=int, default=8)
    parser.add_argument("--window-size", type=int, default=8)
    parser.add_argument(
        "--n-compare", type=int, default=16, help="tokens of the full cache's answer compared"
    )
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument(
        "--library", choices=("laq_gguf", "llama_cpp"), default="laq_gguf",
        help="llama_cpp: the class llama_cpp.Llama, which knows the method full only",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="result file, JSON")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out` after every method, print the table; return the document.

    Raises:
        ValueError: options that cannot be combined, or data that is not there.
    """
    methods = ["full", *(m for m in dict.fromkeys(args.methods) if m != "full")]
    if args.library == "llama_cpp" and methods != ["full"]:
        raise ValueError("--library llama_cpp cannot evict: pass --methods full")
    if not args.model.is_file():
        raise ValueError(f"no model at {args.model}")
    # the full cache has no budget; budgets of the others in the order given
    configurations = [("full", None)]
    configurations += [(m, b) for b in dict.fromkeys(args.budgets) for m in methods[1:]]

    document = provenance("quality", args.model, _settings(args))
    document.update(notes=[NOTES[args.lookahead]], results=[])
    prompts, n_ctx, templated = _prepare(args)
    if not templated:
        document["notes"].append("the model has no chat template: prompts are plain text")
    with tempfile.TemporaryDirectory(prefix="laq-bench-") as folder:
        references = _References(Path(folder))
        for method, budget in configurations:
            results = _run_method(args, method, budget, prompts, n_ctx, references)
            document["results"].extend(results)
            if args.out:
                write_json(args.out, document)
    print(quality_table(document))
    return document


def _run_method(
    args: argparse.Namespace,
    method: str,
    budget: int | None,
    prompts: list[Prompt],
    n_ctx: int,
    references: _References,
) -> list[dict[str, Any]]:
    label = method if budget is None else f"{method} {budget}"
    decoder = Decoder(args.library, str(args.model), _options(args, method, budget, n_ctx))
    # a reply up to here is the full cache's own, on a cache not yet evicted
    n_exact = args.lookahead_size if args.lookahead == "deferred" else 0
    results = []
    try:
        for i, prompt in enumerate(prompts):
            start = time.perf_counter()
            before = decoder.stats()
            reference = None if method == "full" else references.load(i)
            reply = answer(
                decoder,
                prompt,
                reference,
                max_new_tokens=TASKS[prompt.example.task].max_new_tokens,
                n_compare=args.n_compare,
                n_exact=n_exact,
            )
            if reference is None:
                references.save(i, reply)
                reference = reply
            result = _result(decoder, prompt, reply, reference, before)
            result.update(method=method, budget=budget, seconds=time.perf_counter() - start)
            results.append(result)
            found = sum(r["score"] for r in results)
            print(
                f"{label}: {i + 1}/{len(prompts)} {prompt.example.task}/{prompt.example.id} "
                f"found {found:.2f} of {i + 1}",
                file=sys.stderr,
            )
    finally:
        decoder.close()
    return results


def answer(
    decoder: Decoder,
    prompt: Prompt,
    reference: Reply | None,
    *,
    max_new_tokens: int,
    n_compare: int,
    n_exact: int,
) -> Reply:
    """Follow the reference for up to `n_compare` tokens, then answer freely.

    As long as the greedy token is the reference's, following it and answering freely are the same;
    at the first other token the cache goes back there. Without a reference: a free answer.

    Args:
        n_exact: length of a reply, lead included, before which the cache is not yet evicted and to
            which it cannot go back: the prompt is read again then.

    Returns:
        The free answer, and logits along the reference (along itself without one).
    """
    decoder.prefill(prompt.tokens)
    for token in prompt.lead:
        decoder.step(token)
    start = decoder.n_tokens
    rows: list[npt.NDArray[np.float32]] = []
    tokens: list[int] = []
    if reference is not None:
        tokens, rows = _follow(decoder, reference.tokens[:n_compare])
        shared = len(tokens) - 1
        if decoder.n_tokens > start + shared:
            _go_back(decoder, prompt, tokens[:shared], start, n_exact)
    while not tokens or (len(tokens) < max_new_tokens and not decoder.is_end(tokens[-1])):
        if tokens:
            decoder.step(tokens[-1])
        if reference is None and len(rows) < n_compare:
            rows.append(decoder.logits().copy())
        tokens.append(int(decoder.logits().argmax()))
    return Reply(tokens, np.stack(rows))


def _follow(decoder: Decoder, path: list[int]) -> tuple[list[int], list[npt.NDArray[np.float32]]]:
    """Decode along `path`: the greedy tokens up to the first that leaves it, the logits of all."""
    rows = []
    greedy: list[int] = []
    for i in range(len(path)):
        if i:
            decoder.step(path[i - 1])
        rows.append(decoder.logits().copy())
        if greedy == path[:i]:
            greedy.append(int(rows[-1].argmax()))
    return greedy, rows


def _go_back(decoder: Decoder, prompt: Prompt, shared: list[int], start: int, n_exact: int) -> None:
    """Restore the cache that followed `shared` reply tokens; the last logits need not be valid."""
    n_reply = len(prompt.lead) + len(shared)
    if n_reply >= n_exact and decoder.rewind(start + len(shared)):
        return
    decoder.prefill(prompt.tokens)
    for token in [*prompt.lead, *shared]:
        decoder.step(token)


class _References:
    """The full cache's replies, on disk: their logits may not fit beside a second model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, i: int, reply: Reply) -> None:
        np.savez(self._folder / f"{i}.npz", tokens=np.array(reply.tokens), logits=reply.logits)

    def load(self, i: int) -> Reply:
        with np.load(self._folder / f"{i}.npz") as file:
            return Reply(file["tokens"].tolist(), file["logits"])


def _result(
    decoder: Decoder,
    prompt: Prompt,
    reply: Reply,
    reference: Reply,
    before: dict[str, Any] | None,
) -> dict[str, Any]:
    example = prompt.example
    tokens = reply.tokens[:-1] if decoder.is_end(reply.tokens[-1]) else reply.tokens
    text = decoder.text(tokens)
    stats = decoder.stats()
    kl = kl_divergence(reference.logits, reply.logits)
    result = {
        "task": example.task,
        "id": example.id,
        "depth": example.depth,
        "n_prompt": len(prompt.tokens),
        "n_lead": len(prompt.lead),
        "outputs": list(example.outputs),
        "text": text,
        "score": METRICS[TASKS[example.task].metric](text, example.outputs),
        "top1_agreement": top1_agreement(reference.logits, reply.logits),
        "kl": float(kl.mean()),
        "kl_max": float(kl.max()),
        "n_compared": len(kl),
    }
    if stats is not None and before is not None:
        result.update({k: stats[k] for k in ("n_resident", "n_cells", "kv_bytes", "kv_bytes_full")})
        result["n_evictions"] = stats["n_evictions"] - before["n_evictions"]
    return result


def _prepare(args: argparse.Namespace) -> tuple[list[Prompt], int, bool]:
    """The prompts in tokens, the context size they need, whether the model has a chat template."""
    decoder = Decoder("llama_cpp", str(args.model), {"vocab_only": True, "n_ctx": 256})
    try:
        render = _chat_renderer(decoder)
        prompts = []
        for name in args.tasks:
            for example in load_examples(
                name,
                data=args.data,
                length=args.length,
                limit=args.limit,
                n_needles=args.n_needles,
                count_tokens=lambda text: len(decoder.tokenize(text)),
            ):
                prompts.append(_prompt(decoder, render, example, args.lookahead))
    finally:
        decoder.close()
    need = max(
        len(p.tokens) + len(p.lead) + max(TASKS[p.example.task].max_new_tokens, args.n_compare)
        for p in prompts
    )
    # pseudo tokens take cells until they are dropped
    return prompts, -(-(need + args.lookahead_size) // 256) * 256, render is not None


def _prompt(decoder: Decoder, render: Any, example: Example, lookahead: str) -> Prompt:
    text = example.message if render is None else render(example.message)
    add_bos = render is None
    if lookahead == "deferred":
        lead = decoder.tokenize(example.answer_prefix)
        return Prompt(example, decoder.tokenize(text, add_bos=add_bos, special=True), lead)
    # templates may write begin-of-text themselves
    tokens = decoder.tokenize(text + example.answer_prefix, add_bos=add_bos, special=True)
    return Prompt(example, tokens, [])


def _chat_renderer(decoder: Decoder) -> Any:
    """Message -> prompt text up to the assistant's turn, by the model's template; None without."""
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
    return lambda message: formatter(messages=[{"role": "user", "content": message}]).prompt


def _options(
    args: argparse.Namespace, method: str, budget: int | None, n_ctx: int
) -> dict[str, Any]:
    options = {
        "n_ctx": n_ctx,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
        "flash_attn": True,
    }
    if budget is not None:
        options.update(
            METHODS[method],
            kv_budget=budget,
            kv_staging=args.kv_staging or n_ctx,
            lookahead=args.lookahead,
            lookahead_size=args.lookahead_size,
            window_size=args.window_size,
        )
    return options


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    skip = {"model", "data", "out", "command", "function"}
    return {k: v for k, v in vars(args).items() if k not in skip}


def _names(known: dict[str, Any]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(unknown)}; there are: {', '.join(known)}"
            )
        return names

    return parse


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers with commas, got {text!r}") from None
