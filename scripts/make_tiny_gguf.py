#!/usr/bin/env python3
"""Make random GGUF models: tiny ones (below 2 MB) for the tests, and large ones to measure with.

The weights are random but scaled: hidden states keep unit variance and the attention logits spread
over a few units, so that attention is neither uniform nor one-hot and a ranking of keys means
something. The same arguments give the same tensors on every machine.

    python scripts/make_tiny_gguf.py OUT.gguf --kind llama --set n_head=8 --set n_head_kv=2
    python scripts/make_tiny_gguf.py OUT.gguf --shape 8b

Kinds: llama (what can be evicted), longrope (the same with RoPE factors for short and for long
contexts), and for the refusals bert (encoder only), mamba (recurrent
only), mpt (ALiBi) and gemma3 (sliding windows, with Q/K norms).
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import gguf
import numpy as np

MAX_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True)
class TinyModel:
    """Shape of a tiny model. Heads are n_embd_head wide whatever n_embd is."""

    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    n_embd_head: int = 64
    n_embd: int = 64
    n_ff: int = 96
    n_ctx_train: int = 2048
    n_swa: int = 64  # gemma3: width of the sliding window
    blocks: int = 0  # 1: matrices are random Q4_0 blocks, which are made quickly
    qk_gain: float = 1.3  # attention logits get a standard deviation of about qk_gain**2
    seed: int = 0

    def __post_init__(self) -> None:
        for f in fields(self):
            if f.name not in ("seed", "qk_gain", "blocks") and getattr(self, f.name) < 1:
                raise ValueError(f"{f.name} must be at least 1, got {getattr(self, f.name)}")
        if self.n_head % self.n_head_kv:
            raise ValueError(
                f"n_head {self.n_head} is not a multiple of n_head_kv {self.n_head_kv}"
            )


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece vocabulary: 3 special tokens, 256 bytes, blank, printable characters, letter
    pairs.

    Every text can be tokenized: what has no token of its own falls back to bytes.
    Returns (tokens, scores, types) with types as in gguf.TokenType.
    """
    special = [
        ("<unk>", gguf.TokenType.UNKNOWN),
        ("<s>", gguf.TokenType.CONTROL),
        ("</s>", gguf.TokenType.CONTROL),
    ]
    tokens = [text for text, _ in special]
    types = [int(kind) for _, kind in special]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [int(gguf.TokenType.BYTE)] * 256
    blank = "\u2581"
    pieces = [blank, *string.ascii_letters, *string.digits, *string.punctuation]
    pieces += [blank + letter for letter in string.ascii_lowercase]
    pieces += [a + b for a in "aeiou" for b in "lnrst"]
    tokens += pieces
    types += [int(gguf.TokenType.NORMAL)] * len(pieces)
    scores = [0.0] * (len(tokens) - len(pieces)) + [-float(i) for i in range(len(pieces))]
    return tokens, scores, types


class _Tensors:
    """Adds random F32 tensors to a writer; shapes as numpy has them: (rows, columns) = (out,
    in).
    """

    def __init__(self, writer: gguf.GGUFWriter, model: TinyModel) -> None:
        self.writer = writer
        self.model = model
        self.rng = np.random.default_rng(model.seed)

    @staticmethod
    def name(tensor: gguf.MODEL_TENSOR, il: int | None, suffix: str) -> str:
        text = gguf.TENSOR_NAMES[tensor]
        return (text if il is None else text.format(bid=il)) + suffix

    def put(self, tensor: gguf.MODEL_TENSOR, data: np.ndarray, il: int | None, suffix: str) -> None:
        data = np.ascontiguousarray(data, dtype=np.float32)
        self.writer.add_tensor(self.name(tensor, il, suffix), data)

    def normal(
        self,
        tensor: gguf.MODEL_TENSOR,
        *shape: int,
        il: int | None = None,
        std: float | None = None,
        suffix: str = ".weight",
    ) -> None:
        """Gaussian; by default scaled so that unit-variance input gives unit-variance output."""
        std = shape[-1] ** -0.5 if std is None else std
        if self.model.blocks:
            self.put_blocks(tensor, shape, std, il, suffix)
            return
        self.put(tensor, self.rng.standard_normal(shape) * std, il, suffix)

    def put_blocks(
        self,
        tensor: gguf.MODEL_TENSOR,
        shape: tuple[int, ...],
        std: float,
        il: int | None,
        suffix: str,
    ) -> None:
        """Q4_0 blocks of 32 elements, an F16 scale and 16 bytes each: evenly spread elements."""
        n_blocks = int(np.prod(shape)) // 32
        data = np.frombuffer(self.rng.bytes(18 * n_blocks), np.uint8).reshape(n_blocks, 18).copy()
        # -8 to 7, all alike, have a standard deviation of 4.61
        data[:, :2] = np.frombuffer(np.float16(std / 4.61).tobytes(), np.uint8)
        self.writer.add_tensor(
            self.name(tensor, il, suffix),
            data.reshape(*shape[:-1], shape[-1] // 32 * 18),
            raw_dtype=gguf.GGMLQuantizationType.Q4_0,
        )

    def fill(
        self,
        tensor: gguf.MODEL_TENSOR,
        *shape: int,
        value: float = 1.0,
        il: int | None = None,
        suffix: str = ".weight",
    ) -> None:
        self.put(tensor, np.full(shape, value), il, suffix)

    def attention(self, il: int, *, norms: bool = False) -> None:
        """Separate q, k, v and output projections of layer il."""
        m, t = self.model, gguf.MODEL_TENSOR
        n_q, n_kv = m.n_head * m.n_embd_head, m.n_head_kv * m.n_embd_head
        gain = m.qk_gain * m.n_embd**-0.5
        self.normal(t.ATTN_Q, n_q, m.n_embd, il=il, std=gain)
        self.normal(t.ATTN_K, n_kv, m.n_embd, il=il, std=gain)
        self.normal(t.ATTN_V, n_kv, m.n_embd, il=il)
        self.normal(t.ATTN_OUT, m.n_embd, n_q, il=il)
        if norms:
            self.fill(t.ATTN_Q_NORM, m.n_embd_head, value=m.qk_gain, il=il)
            self.fill(t.ATTN_K_NORM, m.n_embd_head, value=m.qk_gain, il=il)

    def feed_forward(self, il: int, *, gate: bool = True) -> None:
        m, t = self.model, gguf.MODEL_TENSOR
        if gate:
            self.normal(t.FFN_GATE, m.n_ff, m.n_embd, il=il)
        self.normal(t.FFN_UP, m.n_ff, m.n_embd, il=il)
        self.normal(t.FFN_DOWN, m.n_embd, m.n_ff, il=il)


def _add_tokenizer(writer: gguf.GGUFWriter) -> int:
    tokens, scores, types = vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_vocab_size(len(tokens))
    return len(tokens)


def _add_attention_keys(writer: gguf.GGUFWriter, model: TinyModel) -> None:
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_head_kv)
    writer.add_key_length(model.n_embd_head)
    writer.add_value_length(model.n_embd_head)


def _llama(writer: gguf.GGUFWriter, model: TinyModel, n_vocab: int) -> None:
    t = gguf.MODEL_TENSOR
    _add_attention_keys(writer, model)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(model.n_embd_head)
    writer.add_rope_freq_base(10000.0)
    tensors = _Tensors(writer, model)
    tensors.normal(t.TOKEN_EMBD, n_vocab, model.n_embd, std=1.0)
    tensors.fill(t.OUTPUT_NORM, model.n_embd)
    tensors.normal(t.OUTPUT, n_vocab, model.n_embd, std=3.0 * model.n_embd**-0.5)
    for il in range(model.n_layer):
        tensors.fill(t.ATTN_NORM, model.n_embd, il=il)
        tensors.attention(il)
        tensors.fill(t.FFN_NORM, model.n_embd, il=il)
        tensors.feed_forward(il)


def _longrope(writer: gguf.GGUFWriter, model: TinyModel, n_vocab: int) -> None:
    """A llama that turns slower in contexts longer than a quarter of what it was trained for."""
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(model.n_ctx_train // 4)
    factors = _Tensors(writer, model)
    n = model.n_embd_head // 2
    factors.fill(gguf.MODEL_TENSOR.ROPE_FACTORS_LONG, n, value=4.0)
    factors.fill(gguf.MODEL_TENSOR.ROPE_FACTORS_SHORT, n, value=1.0)
    _llama(writer, model, n_vocab)


def _gemma3(writer: gguf.GGUFWriter, model: TinyModel, n_vocab: int) -> None:
    t = gguf.MODEL_TENSOR
    _add_attention_keys(writer, model)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(model.n_swa)
    # one layer in two is global
    writer.add_sliding_window_pattern([il % 2 == 0 for il in range(model.n_layer)])
    tensors = _Tensors(writer, model)
    tensors.normal(t.TOKEN_EMBD, n_vocab, model.n_embd)
    tensors.fill(t.OUTPUT_NORM, model.n_embd)
    for il in range(model.n_layer):
        for norm in (t.ATTN_NORM, t.ATTN_POST_NORM, t.FFN_PRE_NORM, t.FFN_POST_NORM):
            tensors.fill(norm, model.n_embd, il=il)
        tensors.attention(il, norms=True)
        tensors.feed_forward(il)


def _mpt(writer: gguf.GGUFWriter, model: TinyModel, n_vocab: int) -> None:
    t = gguf.MODEL_TENSOR
    if model.n_head * model.n_embd_head != model.n_embd:
        raise ValueError("mpt needs n_embd = n_head * n_embd_head")
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_head_kv)
    writer.add_layer_norm_eps(1e-5)
    writer.add_max_alibi_bias(8.0)
    tensors = _Tensors(writer, model)
    tensors.normal(t.TOKEN_EMBD, n_vocab, model.n_embd, std=1.0)
    tensors.fill(t.OUTPUT_NORM, model.n_embd)
    n_qkv = model.n_embd + 2 * model.n_head_kv * model.n_embd_head
    for il in range(model.n_layer):
        tensors.fill(t.ATTN_NORM, model.n_embd, il=il)
        tensors.normal(t.ATTN_QKV, n_qkv, model.n_embd, il=il)
        tensors.normal(t.ATTN_OUT, model.n_embd, model.n_embd, il=il)
        tensors.fill(t.FFN_NORM, model.n_embd, il=il)
        tensors.feed_forward(il, gate=False)


def _bert(writer: gguf.GGUFWriter, model: TinyModel, n_vocab: int) -> None:
    t = gguf.MODEL_TENSOR
    if model.n_head * model.n_embd_head != model.n_embd or model.n_head != model.n_head_kv:
        raise ValueError("bert needs n_embd = n_head * n_embd_head and n_head_kv = n_head")
    writer.add_head_count(model.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(2)
    tensors = _Tensors(writer, model)
    tensors.normal(t.TOKEN_EMBD, n_vocab, model.n_embd, std=1.0)
    tensors.normal(t.TOKEN_TYPES, 2, model.n_embd, std=1.0)
    tensors.normal(t.POS_EMBD, model.n_ctx_train, model.n_embd, std=0.1)
    norms = [(t.TOKEN_EMBD_NORM, None)]
    for il in range(model.n_layer):
        norms += [(t.ATTN_OUT_NORM, il), (t.LAYER_OUT_NORM, il)]
        tensors.attention(il)
        tensors.feed_forward(il, gate=False)
        tensors.fill(t.FFN_UP, model.n_ff, value=0.0, il=il, suffix=".bias")
        tensors.fill(t.FFN_DOWN, model.n_embd, value=0.0, il=il, suffix=".bias")
    for norm, il in norms:
        tensors.fill(norm, model.n_embd, il=il)
        tensors.fill(norm, model.n_embd, value=0.0, il=il, suffix=".bias")


def _mamba(writer: gguf.GGUFWriter, model: TinyModel, n_vocab: int) -> None:
    t = gguf.MODEL_TENSOR
    d_conv, d_state, dt_rank, d_inner = 4, 16, 4, 2 * model.n_embd
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(d_conv)
    writer.add_ssm_inner_size(d_inner)
    writer.add_ssm_state_size(d_state)
    writer.add_ssm_time_step_rank(dt_rank)
    tensors = _Tensors(writer, model)
    tensors.normal(t.TOKEN_EMBD, n_vocab, model.n_embd, std=1.0)
    tensors.fill(t.OUTPUT_NORM, model.n_embd)
    for il in range(model.n_layer):
        tensors.fill(t.ATTN_NORM, model.n_embd, il=il)
        tensors.normal(t.SSM_IN, 2 * d_inner, model.n_embd, il=il)
        tensors.normal(t.SSM_CONV1D, d_inner, d_conv, il=il)
        tensors.fill(t.SSM_CONV1D, d_inner, value=0.0, il=il, suffix=".bias")
        tensors.normal(t.SSM_X, dt_rank + 2 * d_state, d_inner, il=il)
        tensors.normal(t.SSM_DT, d_inner, dt_rank, il=il)
        tensors.fill(t.SSM_DT, d_inner, value=-2.0, il=il, suffix=".bias")
        decay = -np.tile(np.arange(1, d_state + 1), (d_inner, 1))
        tensors.put(t.SSM_A, decay, il, "")
        tensors.fill(t.SSM_D, d_inner, il=il, suffix="")
        tensors.normal(t.SSM_OUT, model.n_embd, d_inner, il=il)


@dataclass(frozen=True)
class _Kind:
    add: Callable[[gguf.GGUFWriter, TinyModel, int], None]
    defaults: dict[str, int]
    arch: str | None = None  # where it is not the name


KINDS: dict[str, _Kind] = {
    "llama": _Kind(_llama, {}),
    "longrope": _Kind(_longrope, {}, "llama"),
    "gemma3": _Kind(_gemma3, {}),
    "mpt": _Kind(_mpt, {"n_head": 2, "n_embd_head": 32}),
    "bert": _Kind(_bert, {"n_head": 2, "n_embd_head": 32, "n_ctx_train": 512}),
    "mamba": _Kind(_mamba, {}),
}


#: shapes to measure with: those of Llama 3.1 8B, and of a model that a slow machine can decode
SHAPES: dict[str, dict[str, int]] = {
    "8b": {"n_layer": 32, "n_head": 32, "n_head_kv": 8, "n_embd_head": 128, "n_embd": 4096,
           "n_ff": 14336, "n_ctx_train": 131072, "blocks": 1},
    "small": {"n_layer": 4, "n_head": 8, "n_head_kv": 2, "n_embd_head": 64, "n_embd": 256,
              "n_ff": 512, "n_ctx_train": 131072, "blocks": 1},
}  # fmt: skip


def make(
    path: str | Path, kind: str = "llama", *, max_bytes: int = MAX_BYTES, **params: int | float
) -> Path:
    """Write one model.

    Args:
        path: file to write; its folder must exist.
        kind: one of KINDS.
        max_bytes: the file may have so many.
        params: fields of TinyModel; what is not given has the kind's default.
    Raises:
        ValueError: unknown kind, unknown or impossible parameter, or a model above max_bytes.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}, possible: {', '.join(KINDS)}")
    unknown = set(params) - {f.name for f in fields(TinyModel)}
    if unknown:
        raise ValueError(
            f"unknown parameters {sorted(unknown)}, possible: "
            f"{', '.join(f.name for f in fields(TinyModel))}"
        )
    model = TinyModel(**{**KINDS[kind].defaults, **params})
    path = Path(path)
    writer = gguf.GGUFWriter(path, arch=KINDS[kind].arch or kind)
    writer.add_name(f"tiny random {kind}")
    writer.add_context_length(model.n_ctx_train)
    writer.add_embedding_length(model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_feed_forward_length(model.n_ff)
    KINDS[kind].add(writer, model, _add_tokenizer(writer))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = path.stat().st_size
    if size > max_bytes:
        path.unlink()
        raise ValueError(
            f"the model takes {size} bytes, allowed are {max_bytes}: lower n_embd or n_layer"
        )
    return path


def _assignment(text: str) -> tuple[str, int | float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value) if name == "qk_gain" else int(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}") from None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="file to write")
    parser.add_argument("--kind", choices=tuple(KINDS), default="llama")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="a llama of that shape, of any size")
    parser.add_argument(
        "--set",
        type=_assignment,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="a field of TinyModel: " + ", ".join(f.name for f in fields(TinyModel)),
    )
    args = parser.parse_args()
    try:
        large = {"max_bytes": 2**40} if args.shape else {}
        path = make(args.path, args.kind, **large, **SHAPES.get(args.shape, {}), **dict(args.set))
    except ValueError as error:
        parser.error(str(error))
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
