"""The same GGUF in transformers, its prompt read once for all policies of kvpress.

kvpress evicts a layer after the layer has attended to the whole prompt, so that reading is the same
for every policy: one pass hands each layer's K and V to all of them. KVzip replays the prompt after
that pass, and scores for all of its sizes at once.

Needs the extra `peers` (torch, transformers, kvpress).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import kvpress
import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging

from laq_gguf.bench.peers import Press
from laq_gguf.bench.peers_cells import ATTENTION, Batch, Cells, LayerCells, only_held

KVZIP = "KVzipPress"


@dataclass(frozen=True)
class Reading:
    """A prompt that was read.

    Attributes:
        n_prompt: its tokens.
        logits: (n_vocab,) of the next token: the full cache's, for all policies.
        full: the cells of the full cache.
        kept: cells by (name of the press, share).
    """

    n_prompt: int
    logits: torch.Tensor
    full: Cells
    kept: dict[tuple[str, float], Cells]


class Sized(kvpress.KVzipPress):
    """KVzip's press, whose one scoring serves several sizes."""

    def post_init_from_model(self, model: Any) -> None:
        self.masked: dict[float, list[Any]] = {}

    def compress_post(self, model: Any) -> None:
        for share in self.shares:
            self.compression_ratio = 1 - share
            super().compress_post(model)
            attention = [layer.self_attn for layer in model.model.layers]
            self.masked[share] = [module.masked_key_indices for module in attention]
            for module in attention:
                module.masked_key_indices = None


class PeerModel:
    """A GGUF with its weights in f32."""

    def __init__(self, model: Path, n_threads: int) -> None:
        """Load it.

        Raises:
            ValueError: transformers cannot read this GGUF, or it is none that kvpress supports.
        """
        torch.set_num_threads(n_threads)
        logging.disable_progress_bar()
        # it says at every prompt that KVzip takes several passes
        getLogger("kvpress").setLevel(ERROR)
        where = {"pretrained_model_name_or_path": model.parent, "gguf_file": model.name}
        try:
            # the bar of the dequantization cannot be turned off otherwise
            with redirect_stderr(StringIO()):
                self.model = AutoModelForCausalLM.from_pretrained(
                    **where, dtype=torch.float32, attn_implementation="sdpa"
                ).eval()
        except (KeyError, NotImplementedError, OSError, ValueError) as error:
            raise ValueError(f"transformers cannot load {model.name}: {error}") from error
        if not isinstance(self.model, kvpress.SUPPORTED_MODELS):
            kind = type(self.model).__name__
            raise ValueError(f"kvpress does not support {kind}, which {model.name} holds")
        self._where = where
        self._layers = [layer.self_attn for layer in self.model.model.layers]
        for module in self._layers:
            module.rotary_emb = self.model.model.rotary_emb  # as kvpress does; some presses use it

    @torch.inference_mode()
    def read(
        self, tokens: Sequence[int], presses: Mapping[str, Press], shares: Sequence[float]
    ) -> Reading:
        """Read a prompt, and evict it in every way.

        Args:
            presses: by the names that they have in the result.
            shares: of the cells that stay.

        Raises:
            ValueError: a prompt that a press refuses.
        """
        cache, input_ids = DynamicCache(), torch.tensor([list(tokens)])
        zips = {name: press for name, press in presses.items() if press.name == KVZIP}
        scorers = {
            name: getattr(kvpress, press.name)(**press.settings)
            for name, press in presses.items()
            if name not in zips
        }
        kept: dict[tuple[str, float], Cells] = {(p, s): [] for p in scorers for s in shares}

        def collect(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
            layer = cache.layers[module.layer_idx]
            for (name, share), cells in kept.items():
                scorers[name].compression_ratio = 1 - share
                try:
                    keys, values = scorers[name].compress(
                        module, kwargs["hidden_states"], layer.keys, layer.values, output[1], kwargs
                    )
                except AssertionError as error:  # how kvpress refuses
                    raise ValueError(f"{name}, {len(tokens)} tokens: {error}") from error
                cells.append(LayerCells(keys[0], values[0]))

        for press in scorers.values():
            press.post_init_from_model(self.model)
        with ExitStack() as stack:
            zip_presses = {n: self._enter_kvzip(stack, p, shares) for n, p in zips.items()}
            hooks = [m.register_forward_hook(collect, with_kwargs=True) for m in self._layers]
            try:
                hidden = self.model.model(input_ids=input_ids, past_key_values=cache)[0]
            finally:
                for hook in hooks:
                    hook.remove()
            logits = self.model.lm_head(hidden[0, -1])
        full = [LayerCells(layer.keys[0], layer.values[0]) for layer in cache.layers]
        for name, press in zip_presses.items():
            kept.update({(name, s): _unmasked(full, press.masked[s]) for s in shares})
        return Reading(len(tokens), logits, full, kept)

    def _enter_kvzip(self, stack: ExitStack, wanted: Press, shares: Sequence[float]) -> Sized:
        press = Sized(**wanted.settings, compression_ratio=1 - min(shares))
        press.shares = shares
        stack.enter_context(self._named_tokenizer())
        stack.enter_context(press(self.model))
        return press

    @contextmanager
    def _named_tokenizer(self) -> Iterator[None]:
        """KVzip looks for a tokenizer where the model's configuration names one."""
        config, before = self.model.config, self.model.config.name_or_path
        with tempfile.TemporaryDirectory(prefix="laq-bench-") as folder:
            AutoTokenizer.from_pretrained(**self._where).save_pretrained(folder)
            config.name_or_path = folder
            try:
                yield
            finally:
                config.name_or_path = before

    @torch.inference_mode()
    def led(
        self, reading: Reading, rows: Sequence[Cells], path: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """Logits along `path`, (n_rows, len(path), n_vocab); the first is the prompt's own."""
        first = reading.logits.expand(len(rows), 1, -1)
        if len(path) == 1:
            return first.numpy().copy()
        batch = Batch(rows, reading.n_prompt, len(path) - 1)
        tokens = torch.tensor([list(path[:-1])]).expand(len(rows), -1)
        return torch.cat([first, self._decode(batch, tokens)], dim=1).numpy()

    @torch.inference_mode()
    def freely(
        self, reading: Reading, rows: Sequence[Cells], n: int, is_end: Callable[[int], bool]
    ) -> list[list[int]]:
        """Greedy replies, an end token included, at most `n` tokens each."""
        batch = Batch(rows, reading.n_prompt, n)
        first = int(reading.logits.argmax())
        replies = [[first] for _ in rows]
        going = list(range(len(rows)))  # the rows of the batch, by their number
        while True:
            still = [i for i in going if len(replies[i]) < n and not is_end(replies[i][-1])]
            if not still:
                return replies
            if len(still) < len(going):
                batch.select([going.index(i) for i in still])
                going = still
            last = torch.tensor([[replies[i][-1]] for i in going])
            for i, token in zip(going, self._decode(batch, last)[:, -1].argmax(-1), strict=True):
                replies[i].append(int(token))

    def _decode(self, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        """Logits (n_rows, n, n_vocab) of the next n tokens (n_rows, n) of every row."""
        n = tokens.shape[1]
        positions = torch.arange(n) + batch.get_seq_length()
        config, before = self.model.config, self.model.config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            hidden = self.model.model(
                input_ids=tokens,
                past_key_values=batch,
                cache_position=positions,
                position_ids=positions[None],
                laq_batch=batch,
            )[0]
        finally:
            config._attn_implementation = before
        batch.n_new += n
        return self.model.lm_head(hidden)


def _unmasked(full: Cells, masked: Sequence[Any]) -> Cells:
    """What KVzip leaves: it masks cells of each head, here they are taken out."""
    cells = []
    for layer, (_, heads, positions) in zip(full, masked, strict=True):
        held = torch.ones(layer.keys.shape[:2], dtype=torch.bool)
        held[heads, positions] = False
        cells.append(only_held(layer.keys, layer.values, held))
    return cells
