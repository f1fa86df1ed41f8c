"""The archive: where evicted tokens are kept, and when they are recalled."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .config import SCORED_POLICIES, check_integer, parse_bytes
from .errors import LaqArgumentError

STORES = ("ram", "disk")
#: the values of `enum laq_recall_when`
RECALLS = {"turn": 0, "always": 1}
#: types that an archive can have instead of the cache's: the values of `enum ggml_type`
RECALL_TYPES = {"q8_0": 8, "q4_0": 2}
_NO_LIMIT = 2**64 - 1


@dataclass(frozen=True)
class RecallConfig:
    """The archive of a `Llama`. Checked when made; see there for what each setting does.

    Raises:
        LaqArgumentError: a value is unknown or out of range, or one is given without kv_recall.
    """

    kv_recall: str | None = None
    kv_recall_type: str | None = None
    kv_recall_limit: int | str | None = None
    recall: str = "turn"

    def __post_init__(self) -> None:
        _check_choice("kv_recall", self.kv_recall, (None, *STORES))
        _check_choice("kv_recall_type", self.kv_recall_type, (None, *RECALL_TYPES))
        _check_choice("recall", self.recall, tuple(RECALLS))
        self.limit()
        for name in ("kv_recall_type", "kv_recall_limit"):
            if self.kv_recall is None and getattr(self, name) is not None:
                raise LaqArgumentError(
                    f'{name} is of the archive, and there is none: give kv_recall="ram" or "disk"'
                )

    def limit(self) -> int:
        """Bytes of the archive that may lie in host memory."""
        limit = self.kv_recall_limit
        if limit is None:
            return 0 if self.kv_recall == "disk" else _NO_LIMIT
        if isinstance(limit, str):
            return parse_bytes(limit, "kv_recall_limit")
        return check_integer("kv_recall_limit", limit, 0, _NO_LIMIT)

    def check_policy(self, kv_policy: str, evicts: bool = True) -> None:
        """Raise LaqArgumentError for a policy without scores, or for a cache that never evicts."""
        if self.kv_recall is not None and not evicts:
            raise LaqArgumentError("kv_recall keeps evicted tokens: give kv_budget as well")
        if self.kv_recall is not None and kv_policy not in SCORED_POLICIES:
            raise LaqArgumentError(
                f"kv_recall chooses by attention, and kv_policy={kv_policy!r} does not look at it: "
                f"use {', '.join(sorted(SCORED_POLICIES))}"
            )

    def to_native(self, native: Any, params: Any) -> Any:
        """Fill in `struct laq_params`; the text that it points to, to be kept alive.

        Raises:
            LaqArgumentError: kv_recall="disk" and no folder can be written to.
        """
        params.archive = self.kv_recall is not None
        params.archive_type = RECALL_TYPES.get(self.kv_recall_type or "", -1)
        params.archive_limit = self.limit()
        params.recall = RECALLS[self.recall]
        folder = file_folder() if self.kv_recall is not None else None
        if self.kv_recall == "disk" and folder is None:
            raise LaqArgumentError(
                'kv_recall="disk": neither the user\'s cache folder nor the one for temporary '
                "files can be written to; set XDG_CACHE_HOME or TMPDIR"
            )
        text = native.ffi.NULL if folder is None else native.ffi.new("char[]", os.fsencode(folder))
        params.archive_folder = text
        return text


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices or isinstance(value, bool):
        shown = ", ".join(str(choice) for choice in choices)
        raise LaqArgumentError(f"{name} must be one of {shown}; got {value!r}")


def file_folder() -> Path | None:
    """The folder for the archive's file: of the user's caches, or of temporary files; None where
    neither can be written to."""
    if sys.platform == "win32":
        cache = os.environ.get("LOCALAPPDATA")
    else:
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for folder in ([Path(cache) / "laq_gguf"] if cache else []) + [Path(tempfile.gettempdir())]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    return None


RECALL_NAMES = tuple(f.name for f in fields(RecallConfig))
