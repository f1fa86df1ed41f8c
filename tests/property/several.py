"""A context of several sequences: laq.h by cffi, llama.h by ctypes; the setups of its tests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from laq_gguf.config import LOOKAHEADS, POLICIES
from parity.rows import ggml_type

N_SEQS, N_CTX, N_BATCH = 8, 512, 128
FIRST_TOKEN, N_TOKENS = 300, 8  # the tokens that are decoded
N_SINK, BUDGET = 4, 32
SHAPE = {"n_layer": 2, "n_head": 4, "n_head_kv": 2, "n_embd_head": 32, "n_embd": 32, "n_ff": 32}
N_LAYER, N_HEAD_KV, N_EMBD_HEAD = SHAPE["n_layer"], SHAPE["n_head_kv"], SHAPE["n_embd_head"]

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Setup:
    """A context and what is attached to it.

    Attributes:
        name: of the test.
        unified: one stream of cells for all sequences.
        archive: None, "ram", "disk", or "part": the oldest blocks are in a file.
        params: fields of `laq_params` beside these.
    """

    name: str
    unified: bool = True
    archive: str | None = None
    lookahead: str = "deferred"
    value_fit: float = 0.0
    cache_type: str = "f16"
    compaction: str = "graph"
    policy: str = "laq++"
    flash_attn: bool = True
    recall: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def n_cells(self) -> int:
        """Of the context: with streams of their own each sequence has 256, the least there are."""
        return 512 if self.unified else 256 * N_SEQS

    @property
    def row_bytes(self) -> int:
        """Of K or V of one token in one head."""
        n_values, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type(self.cache_type))]
        return N_EMBD_HEAD // n_values * n_bytes

    @property
    def block_bytes(self) -> int:
        """Of 64 archived tokens."""
        return 64 * 2 * self.row_bytes * N_LAYER * N_HEAD_KV

    def fields(self, folder: bytes) -> dict[str, Any]:
        """Of laq_params; folder: a `char *` that outlives them."""
        limit = {"disk": 0, "part": 2 * self.block_bytes}.get(self.archive or "", 2**64 - 1)
        fields = {
            "n_ctx": N_CTX,
            "n_kv_budget": BUDGET,
            "n_lookahead": 8,
            "n_probe": 16,
            "n_window_snapkv": 16,
            "n_sink": N_SINK,
            "value_fit": self.value_fit,
            "policy": POLICIES[self.policy],
            "lookahead": LOOKAHEADS[self.lookahead],
            "archive": self.archive is not None,
            "archive_limit": limit,
            "recall": self.recall,
        }
        if self.archive in ("disk", "part"):
            fields["archive_folder"] = folder
        return fields


FITTED = {"value_fit": 0.01}
PSEUDO = {"lookahead": "pseudo"}
STREAMS = {"unified": False}
BY_HOST = {"compaction": "host"}

SETUPS = (
    Setup("fitted", **FITTED),
    Setup("pseudo, f32", **PSEUDO, **BY_HOST, cache_type="f32", flash_attn=False),
    Setup("streams, pseudo, fitted, q8_0", **STREAMS, **PSEUDO, **FITTED, cache_type="q8_0"),
    Setup("streams", **STREAMS, **BY_HOST),
    Setup("archive, fitted", archive="ram", **FITTED),
    Setup("archive on disk, pseudo, q8_0", archive="disk", **PSEUDO, **BY_HOST, cache_type="q8_0"),
    Setup("archive, part on disk, f32", archive="part", cache_type="f32", recall=1),
    Setup("archive, part on disk, snapkv", archive="part", policy="snapkv", **BY_HOST),
    Setup(
        "streams, archive, pseudo, fitted, f32",
        archive="ram",
        **STREAMS,
        **PSEUDO,
        **FITTED,
        **BY_HOST,
        cache_type="f32",
        flash_attn=False,
    ),
    Setup(
        "streams, archive, part on disk, pseudo, fitted",
        archive="part",
        **STREAMS,
        **PSEUDO,
        **FITTED,
        recall=1,
    ),
    Setup(
        "streams, archive on disk, q8_0", archive="disk", **STREAMS, **BY_HOST, cache_type="q8_0"
    ),
)


@dataclass(frozen=True, eq=False)
class Seen:
    """What a sequence holds, read back.

    Attributes:
        kept: (n_layer, n_head_kv, n_resident).
        rows: K and V, (2, n_layer, n_head_kv, n_resident, row_bytes).
    """

    n_tokens: int
    n_intact: int
    n_lost: int
    waits: bool
    kept: Ints
    rows: Bytes

    def same(self, other: Seen) -> bool:
        """Whether nothing has changed, to the bit."""
        mine, its = (
            (s.n_tokens, s.n_intact, s.n_lost, s.waits, s.kept.shape) for s in (self, other)
        )
        return mine == its and bool(
            (self.kept == other.kept).all() and (self.rows == other.rows).all()
        )


def load_model(path: Path) -> Any:
    """A llama_model; the log of llama.cpp is dropped from then on."""
    import llama_cpp

    if not _quiet:
        _quiet.append(llama_cpp.llama_log_callback(lambda level, text, user_data: None))
    llama_cpp.llama_log_set(_quiet[0], llama_cpp.ctypes.c_void_p())
    params = llama_cpp.llama_model_default_params()
    return llama_cpp.llama_model_load_from_file(str(path).encode(), params)


_quiet: list[Any] = []


class Several:
    """A llama_context of eight sequences with its laq_context."""

    def __init__(self, native: Any, model: Any, setup: Setup, folder: Path, **changes: Any) -> None:
        """changes: of the fields of laq_params."""
        import llama_cpp

        os.environ["LAQ_COMPACT"] = setup.compaction
        self.api, self.native, self.setup = llama_cpp, native, setup
        self.ffi, self.lib = native.ffi, native.lib
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = setup.n_cells, N_SEQS, setup.unified
        params.n_batch = params.n_ubatch = N_BATCH
        params.type_k = params.type_v = ggml_type(setup.cache_type)
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = int(setup.flash_attn)
        self.ctx = llama_cpp.llama_init_from_model(model, params)
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self._folder = self.ffi.new("char[]", os.fsencode(folder))
        self.fields = setup.fields(self._folder) | changes
        out = self.ffi.new("struct laq_context **")
        address = llama_cpp.ctypes.cast(self.ctx, llama_cpp.ctypes.c_void_p).value
        ctx = self.ffi.cast("struct llama_context *", address)
        native.check("laq_attach", self.lib.laq_attach(ctx, self.params(), out))
        self.laq = out[0]
        self.batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        self._stats = self.ffi.new("struct laq_stats *")
        self.abort_in: int | None = None
        self._abort = llama_cpp.ggml_abort_callback(self._count_down)
        llama_cpp.llama_set_abort_callback(self.ctx, self._abort, None)

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.lib.laq_detach(self.laq)
        self.api.llama_free(self.ctx)

    def params(self, **changes: Any) -> Any:
        """struct laq_params of the setup."""
        params = self.ffi.new("struct laq_params *", self.lib.laq_default_params())
        for name, value in (self.fields | changes).items():
            setattr(params, name, value)
        return params

    def _count_down(self, _: object) -> bool:
        if self.abort_in is None:
            return False
        self.abort_in -= 1
        return self.abort_in < 0

    def decode(self, rows: Sequence[tuple[int, int, int]]) -> int:
        """rows (token, position, sequence): what llama_decode returns. Each has logits."""
        batch = self.batch
        for i, (token, position, seq) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = seq, True
        batch.n_tokens = len(rows)
        return int(self.api.llama_decode(self.ctx, batch))

    def logits(self) -> npt.NDArray[np.float32]:
        """Of the last token."""
        vocab = self.api.llama_model_get_vocab(self.api.llama_get_model(self.ctx))
        pointer = self.api.llama_get_logits_ith(self.ctx, -1)
        return np.ctypeslib.as_array(pointer, (self.api.llama_vocab_n_tokens(vocab),)).copy()

    def error(self) -> str:
        return self.native.last_error()

    def stats(self, seq: int) -> Any:
        """struct laq_stats, the same one each time."""
        self._stats.size = self.ffi.sizeof("struct laq_stats")
        status = self.lib.laq_get_stats(self.laq, seq, self._stats)
        self.native.check("laq_get_stats", status)
        return self._stats

    def look(self, seq: int) -> Seen:
        """All of a sequence."""
        s, check = self.stats(seq), self.native.check
        n = int(s.n_resident)
        seen = (int(s.n_tokens), int(s.n_intact), int(s.n_lost), bool(s.pending))
        kept = np.full((N_LAYER, N_HEAD_KV, n), -1, np.int32)
        dst = self.ffi.from_buffer("int32_t[]", kept, require_writable=True)
        check("laq_kept_positions", self.lib.laq_kept_positions(self.laq, seq, dst, kept.size))
        size = self.setup.row_bytes
        rows = np.zeros((2, N_LAYER, N_HEAD_KV, n, size), np.uint8)
        dst = self.ffi.from_buffer("uint8_t[]", rows, require_writable=True)
        for i in range(0 if n else 8, 8):
            status = self.lib.laq_get_rows(
                self.laq, seq, i // 2 % 2, i % 2, bool(i // 4), dst + i * n * size, n * size
            )
            check("laq_get_rows", status)
        return Seen(*seen, kept, rows)

    def is_archived(self, seq: int, position: int) -> bool:
        held = self.ffi.new("bool *")
        status = self.lib.laq_get_archived(
            self.laq, seq, 0, 0, False, position, self.ffi.NULL, 0, held
        )
        self.native.check("laq_get_archived", status)
        return bool(held[0])

    def archived(self, seq: int, position: int) -> Bytes | None:
        """(2, n_layer, n_head_kv, row_bytes); None: not held."""
        size, held = self.setup.row_bytes, self.ffi.new("bool *")
        rows = np.zeros((2, N_LAYER, N_HEAD_KV, size), np.uint8)
        dst = self.ffi.from_buffer("uint8_t[]", rows, require_writable=True)
        for i in range(8):
            status = self.lib.laq_get_archived(
                self.laq, seq, i // 2 % 2, i % 2, bool(i // 4), position, dst + i * size, size, held
            )
            self.native.check("laq_get_archived", status)
            if not held[0]:
                return None
        return rows

    # states; seq -1: of the whole context

    def save(self, seq: int) -> bytes:
        """A state, b"" if it could not be saved."""
        api, ctx, one = self.api, self.ctx, [seq] if seq >= 0 else []
        size = (api.llama_state_seq_get_size if one else api.llama_state_get_size)(ctx, *one)
        data = (api.ctypes.c_uint8 * size)()
        get = api.llama_state_seq_get_data if one else api.llama_state_get_data
        return bytes(data) if get(ctx, data, size, *one) == size > 0 else b""

    def load(self, seq: int, data: bytes) -> int:
        """How many bytes were read; 0: it was refused."""
        api, source = self.api, (self.api.ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        if seq < 0:
            return int(api.llama_state_set_data(self.ctx, source, len(data)))
        return int(api.llama_state_seq_set_data(self.ctx, source, len(data), seq))


class Twin:
    """Rows of K in the first layer, which depend on a token and its position alone.

    One token is multiplied by another kernel than several are, which may round in another way: a
    token has two rows at each position.
    """

    def __init__(self, native: Any, model: Any, setup: Setup, folder: Path) -> None:
        """Decode every token at every position of a cache that is never evicted."""
        full = Setup(setup.name, cache_type=setup.cache_type, flash_attn=setup.flash_attn)
        shape = (2, N_HEAD_KV, N_TOKENS, N_CTX, setup.row_bytes)
        self.rows = np.zeros(shape, np.uint8)
        context = Several(native, model, full, folder, policy=POLICIES["full"])
        for i in range(N_TOKENS):
            for variant, n_step in enumerate((1, N_BATCH)):
                for first in range(0, N_CTX, n_step):
                    rows = [(FIRST_TOKEN + i, first + j, 0) for j in range(n_step)]
                    assert context.decode(rows) == 0
                self.rows[variant, :, i] = context.look(0).rows[0, 0]
                context.api.llama_memory_clear(context.memory, False)
        context.close()

    def agrees(self, tokens: Ints, positions: Ints, rows: Bytes) -> npt.NDArray[np.bool_]:
        """tokens, positions (n_head_kv, n), rows (n_head_kv, n, row_bytes): which are theirs."""
        heads = np.arange(N_HEAD_KV)[:, None]
        own = self.rows[:, heads, tokens - FIRST_TOKEN, positions]
        agree: npt.NDArray[np.bool_] = (own == rows).all(-1).any(0)
        return agree
