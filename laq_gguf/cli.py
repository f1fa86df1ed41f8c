"""The `laq-gguf` command: answer from a document in a small KV cache, check an install, measure."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import config, log, recall
from ._version import LLAMA_CPP_PYTHON_VERSION, __version__
from .errors import LaqArgumentError, LaqError, LaqLibraryError

if TYPE_CHECKING:
    from ._lib import Native
    from .llama import Llama
    from .stats import KvStats

#: K/V types that can be evicted: the values of `enum ggml_type`
CACHE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "bf16": 30,
}  # fmt: skip

EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def _budget(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    try:
        config.parse_bytes(text)
    except LaqArgumentError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of tokens, nor a share of n_ctx between 0 and 1, nor a "
            "size in bytes such as 512MiB"
        ) from error
    return text


def _limit(text: str) -> int | str:
    with suppress(ValueError):
        return int(text)
    try:
        config.parse_bytes(text, "--kv-recall-limit")
    except LaqArgumentError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _add_cache_flags(add: Any) -> None:
    """Flags of the KV cache; names and defaults are those of `Llama`."""
    defaults = config.LaqConfig()
    add(
        "--kv-budget",
        type=_budget,
        metavar="N",
        help="tokens per layer and KV head that stay in the cache when the prompt has been read, "
        "a share of --n-ctx between 0 and 1, or bytes for all cells such as 512MiB; without it "
        "nothing is evicted",
    )
    staging = "cells beyond the budget, for what is being read and generated; by default as many "
    staging += f"as the budget, but at least {config.default_staging(0)}"
    add("--kv-staging", type=int, metavar="N", help=staging)
    policy, lookahead = defaults.kv_policy, defaults.lookahead
    add("--kv-policy", choices=config.POLICIES, default=policy, help="what ranks the tokens")
    add(
        "--lookahead",
        choices=config.LOOKAHEADS,
        default=lookahead,
        help="tokens that the lookahead looks at: really generated ones, greedy pseudo tokens, "
        "or newlines at the positions that follow",
    )
    numbers = {
        "lookahead_size": "lookahead tokens",
        "window_size": "last prompt tokens that every head keeps",
        "n_sink": "first tokens that every head keeps",
    }
    for name, text in numbers.items():
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=int, metavar="N", default=getattr(defaults, name), help=text)
    add(
        "--kv-recall",
        choices=recall.STORES,
        help="keep evicted tokens there, and recall the best of all tokens; ram takes the "
        "memory that the budget saves, unless the cells are on a GPU with memory of its own",
    )
    limit = "bytes of that in host memory, such as 512MiB; the oldest tokens then go to a file"
    add("--kv-recall-limit", type=_limit, metavar="N", help=limit)
    when = "when tokens are recalled: once a prompt has been read, or also while generating"
    add("--recall", choices=recall.RECALLS, default=recall.RecallConfig.recall, help=when)
    add("--type-k", choices=CACHE_TYPES, default="f16", help="type of K in the cache")
    add("--type-v", choices=CACHE_TYPES, default="f16", help="type of V in the cache")


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer a question about a document",
        description="Read a document and a question, and stream the answer to stdout.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="GGUF", help="the model file")
    add("--prompt", required=True, metavar="TEXT", help="the question")
    add("--file", metavar="DOC", help="a text in UTF-8 that goes before the question; - is stdin")
    _add_cache_flags(add)
    n_ctx = "tokens that prompt and answer may have; 0 = what the model was trained for"
    add("--n-ctx", type=int, default=0, metavar="N", help=n_ctx)
    add("--max-tokens", type=int, default=256, metavar="N", help="length of the answer at most")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 = greedy")
    add("--seed", type=int, default=0xFFFFFFFF, metavar="N", help="of sampling")
    add("--no-flash-attn", action="store_true", help="turn FlashAttention off")
    add("--n-gpu-layers", type=int, default=0, metavar="N", help="layers on the GPU, -1 = all")
    add("--threads", type=int, metavar="N", help="threads; by default llama_cpp decides")
    add("--json", action="store_true", help="print one JSON object, when the answer is complete")
    add("--raw", action="store_true", help="do not use the model's chat template")
    add("--verbose", action="store_true", help="show llama.cpp's log on stderr")
    parser.set_defaults(run=_generate)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; needs no library."""
    parser = argparse.ArgumentParser(
        prog="laq-gguf", description="Long documents out of a small KV cache, in llama.cpp."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    doctor = commands.add_parser("doctor", help="show versions, the loaded library, the devices")
    doctor.set_defaults(run=_doctor)
    commands.add_parser(
        "bench", help="measure quality, memory and speed with a model of yours; see bench --help"
    )
    return parser


def _read_document(path: str | None) -> str:
    if path is None:
        return ""
    try:
        if path == "-":
            return sys.stdin.read()
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise LaqArgumentError(f"--file: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise LaqArgumentError(f"--file: {path} is not a text in UTF-8: {error.reason}") from error


class _ReadingBar:
    """Progress bar on stderr while the prompt is read; remembers how long the prompt was."""

    def __init__(self) -> None:
        self.n_prompt = 1  # a prompt of one token is never reported
        self._bar: Any = None

    def __call__(self, n_done: int, n_total: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self.n_prompt = n_total
            self._bar = tqdm(total=n_total, desc="reading", unit=" tokens", file=sys.stderr)
        self._bar.update(n_done - self._bar.n)
        if n_done == n_total:
            self.close()

    def close(self) -> None:
        """End the line of the bar, also when reading was cut short."""
        if self._bar is not None:
            self._bar.close()


def _open_model(args: argparse.Namespace) -> Llama:
    from .llama import Llama

    if not args.verbose:
        import llama_cpp

        log.silence(llama_cpp)
    return Llama(
        args.model,
        kv_budget=args.kv_budget,
        kv_staging=args.kv_staging,
        kv_policy=args.kv_policy,
        lookahead=args.lookahead,
        lookahead_size=args.lookahead_size,
        window_size=args.window_size,
        n_sink=args.n_sink,
        kv_recall=args.kv_recall,
        kv_recall_limit=args.kv_recall_limit,
        recall=args.recall,
        n_ctx=args.n_ctx,
        seed=args.seed,
        flash_attn=not args.no_flash_attn,
        n_gpu_layers=args.n_gpu_layers,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        type_k=CACHE_TYPES[args.type_k],
        type_v=CACHE_TYPES[args.type_v],
        verbose=args.verbose,
    )


def _answer(llm: Llama, args: argparse.Namespace, document: str) -> Iterator[str]:
    """The pieces of the answer, as they are generated."""
    text = f"{document}\n\n{args.prompt}" if document else args.prompt
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature, "stream": True}
    if args.raw or "tokenizer.chat_template" not in llm.metadata:
        for chunk in llm.create_completion(text, seed=args.seed, **sampling):
            yield chunk["choices"][0]["text"]
    else:
        messages = [{"role": "user", "content": text}]
        for chunk in llm.create_chat_completion(messages, seed=args.seed, **sampling):
            yield chunk["choices"][0]["delta"].get("content") or ""


def _summary(stats: KvStats | None, n_ctx: int) -> str:
    if stats is None:
        return f"KV cache: everything was kept (n_ctx={n_ctx}); set --kv-budget to keep less"
    mib, full = stats.kv_bytes / 2**20, stats.kv_bytes_full / 2**20
    usable = f"n_ctx={n_ctx}"
    if stats.n_positions < n_ctx:
        usable = f"the {stats.n_positions} positions of {usable} that the model can use"
    return (
        f"KV cache: {mib:.1f} MiB ({stats.n_resident} of {stats.n_cells} cells hold the "
        f"{stats.n_tokens} tokens), instead of {full:.1f} MiB for {usable}"
    )


def _generate(args: argparse.Namespace) -> int:
    document = _read_document(args.file)
    llm = _open_model(args)
    bar = llm.progress = _ReadingBar()
    try:
        pieces = []
        for piece in _answer(llm, args, document):
            pieces.append(piece)
            if not args.json:
                print(piece, end="", flush=True)
        stats = llm.kv_stats() if llm.kv_budget is not None else None
        if args.json:
            result = {
                "text": "".join(pieces),
                "prompt_tokens": bar.n_prompt,
                "stats": None if stats is None else asdict(stats),
            }
            print(json.dumps(result))
        else:
            print(flush=True)
            print(_summary(stats, llm.n_ctx()), file=sys.stderr)
    finally:
        bar.close()
        llm.close()
    return 0


def _kernels(native: Native, i_device: int) -> str:
    """What scores keys on a device."""
    size = 128
    fused = [t for t, value in CACHE_TYPES.items() if native.has_kernel(i_device, value, size)]
    others = [t for t in CACHE_TYPES if t not in fused]
    parts = [f"fused for {' '.join(fused)} keys"] if fused else []
    if others:
        parts.append(
            f"composed of mul_mat, soft_max and sum_rows for {' '.join(others)}: the backend has "
            f"no kernel for heads of {size}"
        )
    return "; ".join(parts)


def _doctor(args: argparse.Namespace) -> int:
    from . import _lib

    print(f"laq-gguf          {__version__}")
    print(f"python            {platform.python_version()} on {platform.platform()}")
    print(f"llama-cpp-python  {LLAMA_CPP_PYTHON_VERSION} needed")
    print(f"library folder    {_lib.library_dir()}")
    native = _lib.load()
    import llama_cpp

    log.silence(llama_cpp)
    print(f"llama_cpp         {llama_cpp.__version__} in {llama_cpp.__path__[0]}")
    print(f"libllama          {native.path}")
    for key, value in native.build_info().items():
        print(f"  {key:<15} {value}")
    devices = _lib.devices(native.path.parent)
    for i, device in enumerate(devices):
        size = device.n_total / 2**20
        print(f"device            {device.name}: {device.description}, {size:.0f} MiB")
        print(f"  score kernel    {_kernels(native, i)}")
    print(f"archive's file    in {recall.file_folder() or 'no folder that can be written to'}")
    print(f"features          {llama_cpp.llama_print_system_info().decode('utf-8').strip()}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 1 (failed), 2 (wrong input), 130 (interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["bench"]:
        from .bench import commands

        return commands.main(argv[1:])
    args = build_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console may lack a character of the answer
    try:
        return args.run(args)
    except BrokenPipeError:
        # who reads the answer has seen enough; what is still to be written goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (LaqError, ValueError, RuntimeError, MemoryError) as error:
        with suppress(OSError):
            print(f"laq-gguf: error: {' '.join(str(error).split())}", file=sys.stderr)
        is_input = isinstance(error, ValueError) and not isinstance(error, LaqLibraryError)
        return EXIT_WRONG_INPUT if is_input else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
