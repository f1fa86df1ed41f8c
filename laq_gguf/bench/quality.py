"""Quality: do the answers survive, and how near does an evicted cache stay to the full one.

Every method answers each question greedily, and is led along the full cache's own answer so that
its next-token distributions can be compared with the full cache's, position by position.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laq_gguf.bench.answers import Reply, answer, reply_text
from laq_gguf.bench.decoder import Decoder
from laq_gguf.bench.metrics import METRICS, kl_divergence, top1_agreement
from laq_gguf.bench.options import (
    add_common,
    add_eviction,
    add_resume,
    check_model,
    eviction_options,
    integers,
    llama_options,
    names,
)
from laq_gguf.bench.prompts import Prompt, chat_renderer, make_prompt, open_tokenizer
from laq_gguf.bench.references import References
from laq_gguf.bench.results import ResultFile
from laq_gguf.bench.tables import quality_table
from laq_gguf.bench.tasks import TASKS, load_examples

# keyword arguments of laq_gguf.Llama, beside kv_budget and the lookahead
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "laq++": {"kv_policy": "laq++"},
    "laq++-recall": {"kv_policy": "laq++", "kv_recall": "ram"},
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
REUSED = "rows of the full cache marked reused come from an earlier run (--references)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench.py quality`."""
    add_common(parser)
    parser.add_argument("--data", type=Path, help="folder with ruler/LENGTH/TASK.jsonl")
    parser.add_argument(
        "--tasks", type=names(TASKS), default=["needles"], help=f"of {', '.join(TASKS)}"
    )
    parser.add_argument("--length", type=int, default=2048, help="prompt length in tokens")
    parser.add_argument("--limit", type=int, help="the first N examples of each task only")
    parser.add_argument("--n-needles", type=int, default=20, help="prompts of the task needles")
    parser.add_argument(
        "--methods", type=names(METHODS), default=list(METHODS), help=f"of {', '.join(METHODS)}"
    )
    parser.add_argument("--budgets", type=integers, default=[128], help="kv_budget: 64,128,256")
    parser.add_argument(
        "--kv-staging", type=int, default=0,
        help="cells beyond the budget; 0 = the whole prompt fits",
    )  # fmt: skip
    parser.add_argument("--lookahead", choices=tuple(NOTES), default="pseudo")
    add_eviction(parser)
    parser.add_argument(
        "--n-compare", type=int, default=16, help="tokens of the full cache's answer compared"
    )
    parser.add_argument(
        "--library", choices=("laq_gguf", "llama_cpp"), default="laq_gguf",
        help="llama_cpp: the class llama_cpp.Llama, which knows the method full only",
    )  # fmt: skip
    add_resume(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, write `args.out` after every answer, print the table; return the document.

    Raises:
        ValueError: options that cannot be combined, data that is not there, or a result file of
            other settings.
    """
    methods = ["full", *(m for m in args.methods if m != "full")]
    if args.library == "llama_cpp" and methods != ["full"]:
        raise ValueError("--library llama_cpp cannot evict: pass --methods full")
    check_model(args)
    # the full cache has no budget; budgets of the others in the order given
    configurations = [(m, b) for b in args.budgets for m in methods[1:]]
    file = ResultFile("quality", args, ("task", "id", "method", "budget"), [NOTES[args.lookahead]])
    prompts, n_ctx, templated = _prepare(args)
    if not templated:
        file.note("the model has no chat template: prompts are plain text")
    with reference_folder(args.references) as folder:
        document = file.document
        library = f"{args.library}-{document['versions']['llama-cpp-python']}"
        references = References(folder, document["model"]["sha256"], library)
        run = _Run(args, prompts, n_ctx, file, references)
        run.measure_full(configurations)
        for method, budget in configurations:
            run.measure(method, budget)
    file.write()
    print(quality_table(file.document))
    return file.document


@contextmanager
def reference_folder(path: Path | None) -> Iterator[Path]:
    """The folder of --references, or one that is gone afterwards."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="laq-bench-") as folder:
        yield Path(folder)


@dataclass(frozen=True)
class _Run:
    """What all methods of a run share."""

    args: argparse.Namespace
    prompts: list[Prompt]
    n_ctx: int
    file: ResultFile
    references: References

    def measure_full(self, others: list[tuple[str, int]]) -> None:
        """The full cache's rows, and its replies to all questions that `others` still need."""
        decoder = None
        try:
            for i, prompt in enumerate(self.prompts):
                row = self.find(prompt, "full", None)
                if row and all(self.find(prompt, *other) for other in others):
                    continue
                kept = self.references.load(*self._reference(prompt))
                if kept is None:
                    decoder = decoder or self._open("full", None)
                    start = time.perf_counter()
                    reply = self._answer(decoder, prompt, None)
                    facts = {"text": reply_text(decoder, reply.tokens)}
                    facts["seconds"] = time.perf_counter() - start
                    self.references.save(*self._reference(prompt), reply, **facts)
                else:
                    reply, facts = kept
                if row is None:
                    if kept is not None:
                        self.file.note(REUSED)
                    row = _row(prompt, "full", None, reply, reply, facts)
                    self.file.add({**row, "reused": kept is not None})
                self._progress("full", i, row)
        finally:
            if decoder is not None:
                decoder.close()

    def measure(self, method: str, budget: int) -> None:
        """The rows of a method that are not there yet."""
        missing = [p for p in self.prompts if self.find(p, method, budget) is None]
        if not missing:
            return
        with closing(self._open(method, budget)) as decoder:
            for i, prompt in enumerate(missing):
                kept = self.references.load(*self._reference(prompt))
                assert kept is not None
                start = time.perf_counter()
                reply = self._answer(decoder, prompt, kept[0])
                facts = {"text": reply_text(decoder, reply.tokens)}
                facts["seconds"] = time.perf_counter() - start
                stats = decoder.stats()
                assert stats is not None
                for name in ("n_resident", "n_cells", "kv_bytes", "kv_bytes_full"):
                    facts[name] = stats[name]
                row = _row(prompt, method, budget, reply, kept[0], facts)
                self.file.add(row)
                self._progress(f"{method} {budget}", i, row, len(missing))

    def find(self, prompt: Prompt, method: str, budget: int | None) -> dict[str, Any] | None:
        """The row of a question, if it is there.

        Raises:
            ValueError: it belongs to another question of the same name.
        """
        task, id = prompt.example.task, prompt.example.id
        row = self.file.find(task=task, id=id, method=method, budget=budget)
        if row is not None and row["prompt"] != prompt.digest:
            raise ValueError(
                f"--out has an answer to another {task}/{id}: --data has changed; give another "
                "--out, or --overwrite"
            )
        return row

    def _reference(self, prompt: Prompt) -> tuple[list[list[int]], int, int]:
        max_new_tokens = TASKS[prompt.example.task].max_new_tokens
        return [prompt.tokens, prompt.lead], self.args.n_compare, max_new_tokens

    def _answer(self, decoder: Decoder, prompt: Prompt, reference: Reply | None) -> Reply:
        return answer(
            decoder,
            prompt,
            reference,
            max_new_tokens=TASKS[prompt.example.task].max_new_tokens,
            n_compare=self.args.n_compare,
            # a reply up to here is the full cache's own, on a cache not yet evicted
            n_exact=self.args.lookahead_size if self.args.lookahead == "deferred" else 0,
        )

    def _open(self, method: str, budget: int | None) -> Decoder:
        options = llama_options(self.args, self.n_ctx)
        if budget is not None:
            options.update(
                METHODS[method],
                kv_budget=budget,
                kv_staging=self.args.kv_staging or self.n_ctx,
                lookahead=self.args.lookahead,
                **eviction_options(self.args),
            )
        return Decoder(self.args.library, str(self.args.model), options)

    def _progress(self, label: str, i: int, row: dict[str, Any], n: int | None = None) -> None:
        where = f"{i + 1}/{n or len(self.prompts)} {row['task']}/{row['id']}"
        found = f"found {row['score']:.2f}, KL {row['kl']:.4f}"
        print(f"{label}: {where} {found}", file=sys.stderr)


def _row(
    prompt: Prompt,
    method: str,
    budget: int | None,
    reply: Reply,
    reference: Reply,
    facts: dict[str, Any],
) -> dict[str, Any]:
    example = prompt.example
    kl = kl_divergence(reference.logits, reply.logits)
    return {
        "task": example.task,
        "id": example.id,
        "method": method,
        "budget": budget,
        "depth": example.depth,
        "prompt": prompt.digest,
        "n_prompt": len(prompt.tokens),
        "n_lead": len(prompt.lead),
        "outputs": list(example.outputs),
        "score": METRICS[TASKS[example.task].metric](facts["text"], example.outputs),
        "top1_agreement": top1_agreement(reference.logits, reply.logits),
        "kl": float(kl.mean()),
        "kl_max": float(kl.max()),
        "n_compared": len(kl),
        **facts,
        **reply.cost,
    }


def _prepare(args: argparse.Namespace) -> tuple[list[Prompt], int, bool]:
    """The prompts in tokens, the context size they need, whether the model has a chat template."""
    with closing(open_tokenizer(str(args.model))) as decoder:
        render = chat_renderer(decoder)
        prompts = [
            make_prompt(decoder, render, example, args.lookahead)
            for name in args.tasks
            for example in load_examples(
                name,
                data=args.data,
                length=args.length,
                limit=args.limit,
                n_needles=args.n_needles,
                count_tokens=lambda text: len(decoder.tokenize(text)),
            )
        ]
    need = max(
        len(p.tokens) + len(p.lead) + max(TASKS[p.example.task].max_new_tokens, args.n_compare)
        for p in prompts
    )
    # pseudo tokens take cells until they are dropped
    return prompts, -(-(need + args.lookahead_size) // 256) * 256, render is not None
