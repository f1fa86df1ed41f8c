"""A llama in numpy over the reference's cache: what a context gives after an eviction.

Reads the tiny GGUFs of scripts/make_tiny_gguf.py (F32 weights, architecture llama).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from laq_gguf.reference import KVCache, Tokens, causal_mask

Array = npt.NDArray[np.float64]


def _field(reader: gguf.GGUFReader, name: str) -> float:
    field = reader.get_field(name)
    if field is None:
        raise ValueError(f"the model has no {name}")
    return float(field.contents())


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * weight


def _rope(x: Array, positions: npt.NDArray[np.int32], base: float) -> Array:
    """Rotate the pairs (2i, 2i + 1) of x (n_tokens, heads, d) by position * base^(-2i/d)."""
    d = x.shape[-1]
    angle = positions[:, None] * base ** (-np.arange(0, d, 2) / d)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


class NumpyLlama:
    """The model, in float64. State lives in the reference's KVCache."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.tensors = {t.name: np.array(t.data, np.float64) for t in reader.tensors}
        self.n_layer = int(_field(reader, "llama.block_count"))
        self.n_head = int(_field(reader, "llama.attention.head_count"))
        self.n_head_kv = int(_field(reader, "llama.attention.head_count_kv"))
        self.d = int(_field(reader, "llama.attention.key_length"))
        self.eps = _field(reader, "llama.attention.layer_norm_rms_epsilon")
        self.base = _field(reader, "llama.rope.freq_base")
        self.n_vocab = len(self.tensors["token_embd.weight"])

    @property
    def shape(self) -> dict[str, int]:
        """Keywords of reference.KVCache."""
        return {
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_head_kv": self.n_head_kv,
            "n_embd_head": self.d,
        }

    def _weight(self, name: str, il: int) -> Array:
        return self.tensors[f"blk.{il}.{name}.weight"]

    def _attend(self, q: Array, k: Array, v: Array, mask: Array) -> Array:
        """q (n_tokens, n_head, d); k, v (n_head_kv, n_kv, d); mask (n_head_kv, n_tokens, n_kv)."""
        n_group = self.n_head // self.n_head_kv
        out = np.empty_like(q)
        for h in range(self.n_head):
            g = h // n_group
            logits = q[:, h] @ k[g].T * self.d**-0.5 + mask[g]
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            out[:, h] = weights / weights.sum(axis=-1, keepdims=True) @ v[g]
        return out

    def forward(self, tokens: npt.ArrayLike, cache: KVCache) -> Array:
        """Decode tokens after those of the cache and append them to it.

        Returns:
            (n_vocab,) logits of the last token.
        """
        ids = np.asarray(tokens)
        n = len(ids)
        positions = np.arange(cache.n_tokens, cache.n_tokens + n, dtype=np.int32)
        x = self.tensors["token_embd.weight"][ids]
        made, rows = [], cache.visible()
        for il in range(cache.n_layer):
            seen, old_k, old_v = rows[il].positions, rows[il].k, rows[il].v
            h = _norm(x, self._weight("attn_norm", il), self.eps)
            q, k, v = ((h @ self._weight(f"attn_{c}", il).T).reshape(n, -1, self.d) for c in "qkv")
            q, k = _rope(q, positions, self.base), _rope(k, positions, self.base)
            made.append((k, v, q))
            seen = np.concatenate([seen, np.broadcast_to(positions, (self.n_head_kv, n))], axis=1)
            keys = np.concatenate([old_k, k.swapaxes(0, 1)], axis=1)
            values = np.concatenate([old_v, v.swapaxes(0, 1)], axis=1)
            mask = causal_mask(positions, seen).astype(np.float64)
            attended = self._attend(q, keys, values, mask).reshape(n, -1)
            x = x + attended @ self._weight("attn_output", il).T
            h = _norm(x, self._weight("ffn_norm", il), self.eps)
            gate = h @ self._weight("ffn_gate", il).T
            up = h @ self._weight("ffn_up", il).T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ self._weight("ffn_down", il).T
        k, v, q = (np.stack([row[i] for row in made]).astype(np.float32) for i in range(3))
        cache.append(Tokens(k, v, q))
        last = _norm(x[-1], self.tensors["output_norm.weight"], self.eps)
        return self.tensors["output.weight"] @ last
