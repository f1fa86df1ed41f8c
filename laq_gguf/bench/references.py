"""The full cache's replies, kept in a folder: one run of it serves many configurations."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from laq_gguf.bench.answers import Reply
from laq_gguf.bench.prompts import digest

REUSED = "rows of the full cache marked reused come from an earlier run (--references)"


@contextmanager
def reference_folder(path: Path | None) -> Iterator[Path]:
    """The folder of --references, or one that is gone afterwards."""
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="laq-bench-") as folder:
        yield Path(folder)


class References:
    """Replies on disk: their logits may not fit beside a second model.

    A reply is found again by everything that it depends on: the model's sha256, the library, the
    tokens of prompt and lead, how many tokens it may have and how many of them have logits.
    """

    def __init__(self, folder: Path, sha256: str, library: str) -> None:
        """Open a folder, made if it is not there. library: its name and version."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._prefix = folder, f"{sha256[:16]}-{library}"

    def save(
        self, prompt: Sequence[Sequence[int]], n_compare: int, max_new_tokens: int, reply: Reply,
        **facts: Any,
    ) -> None:  # fmt: skip
        """Keep a reply; an interrupted call leaves nothing that `load` would find.

        Args:
            prompt: its tokens, in parts: parts that are cut elsewhere are another prompt.
            facts: JSON values that come back beside it.
        """
        path = self._path(prompt, n_compare, max_new_tokens)
        temporary = path.with_name(path.name + ".part")
        with temporary.open("wb") as file:
            np.savez(
                file,
                tokens=np.array(reply.tokens, dtype=np.int32),
                logits=reply.logits,
                facts=np.array(json.dumps({**facts, "cost": reply.cost})),
            )
        temporary.replace(path)

    def load(
        self, prompt: Sequence[Sequence[int]], n_compare: int, max_new_tokens: int
    ) -> tuple[Reply, dict[str, Any]] | None:
        """A kept reply and its facts; None where there is none.

        Raises:
            ValueError: the file is none of ours.
        """
        path = self._path(prompt, n_compare, max_new_tokens)
        if not path.is_file():
            return None
        try:
            with np.load(path) as file:
                facts = json.loads(str(file["facts"]))
                tokens, logits = file["tokens"].tolist(), file["logits"]
        except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path.name} in --references is damaged: remove it") from error
        return Reply(tokens, logits, facts.pop("cost")), facts

    def _path(self, prompt: Sequence[Sequence[int]], n_compare: int, max_new_tokens: int) -> Path:
        name = f"{self._prefix}-{digest(*prompt)}-{n_compare}-{max_new_tokens}.npz"
        return self._folder / name
