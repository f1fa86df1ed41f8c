"""Session files: what a model has read, compact after an eviction, on disk.

offset          bytes       content; integers are little-endian
0               8           b"LAQSESS1": the last digit is the version of the format
8               3 * 8       n_header, n_tokens, n_state (uint64)
32              n_header    JSON object, UTF-8
..              4*n_tokens  tokens (int32)
..              n_state     llama.cpp's state
..              32          SHA-256 of all bytes before it
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import secrets
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from .errors import LaqArgumentError, LaqModelError, LaqStateError

MAGIC = b"LAQSESS1"
_PREFIX = struct.Struct("<8sQQQ")
_DIGEST_SIZE = hashlib.sha256().digest_size
_TOKEN = np.dtype("<i4")

_N_BLOCKS, _BLOCK_SIZE = 16, 64 * 1024

#: keys of a header that are no setting: what to change instead where they differ
_ADVICE = {
    "model_fingerprint": "load the model_path that the session was saved with",
    "lora_fingerprint": "load the lora_path that the session was saved with",
    "llama_cpp_commit": "install the laq_gguf build that the session was saved with",
    "laq_version": "install the laq_gguf version that the session was saved with",
    "abi_version": "install the laq_gguf build that the session was saved with",
}
#: settings of RoPE in `llama_context_params`: keys are rotated by them
ROPE = (
    "rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor",
    "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx",
)  # fmt: skip
_MODEL_KEYS = frozenset(
    {"architecture", "n_layer", "n_head_kv", "n_embd_head_k", "n_embd_head_v", "n_vocab", "n_embd"}
)


@dataclass(frozen=True, eq=False)
class Session:
    """A session read back.

    Attributes:
        header: what was given to `write_session`, after a round trip through JSON.
        tokens: int32 (n_tokens,), one for each position.
        state: llama.cpp's state.
    """

    header: dict[str, Any]
    tokens: npt.NDArray[np.int32]
    state: bytes


def write_session(
    path: str | os.PathLike[str], header: Mapping[str, Any], tokens: npt.ArrayLike, state: Any
) -> None:
    """Write a session file; a file of that name stays as it was until the new one is complete.

    Args:
        path: the file.
        header: what the state belongs to, see `check_header`; JSON values.
        tokens: int32 (n_tokens,).
        state: bytes, or any object with a contiguous buffer.

    Raises:
        LaqArgumentError: tokens are no int32 vector.
        LaqStateError: the file cannot be written.
    """
    array = _token_array(tokens)
    text = json.dumps(dict(header), ensure_ascii=False, allow_nan=False).encode("utf-8")
    body = memoryview(state).cast("B")
    prefix = _PREFIX.pack(MAGIC, len(text), array.size, body.nbytes)
    parts = (prefix, text, array.tobytes(), body)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    # beside the file that a link points to: a rename cannot cross file systems
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        _write_synced(partial, (*parts, digest.digest()))
        os.replace(partial, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise LaqStateError(
            f"the session {os.fspath(path)} cannot be written: {error.strerror}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def _token_array(tokens: npt.ArrayLike) -> npt.NDArray[np.int32]:
    array, limits = np.asarray(tokens), np.iinfo(np.int32)
    if array.ndim != 1 or (array.size > 0 and array.dtype.kind not in "iu"):
        raise LaqArgumentError(
            f"tokens of a session must be int32 (n_tokens,), got {array.dtype} {array.shape}"
        )
    if array.size > 0 and not limits.min <= array.min() <= array.max() <= limits.max:
        raise LaqArgumentError(
            f"tokens of a session must be int32, got values from {array.min()} to {array.max()}"
        )
    return array.astype(_TOKEN)


def _write_synced(path: Path, parts: tuple[bytes | memoryview, ...]) -> None:
    with open(path, "xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself last, where the file system can do that."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_session(path: str | os.PathLike[str]) -> Session:
    """Read a session file; nothing of it is returned before all of it has been checked.

    Raises:
        LaqStateError: it cannot be read, is no session file, of a newer format, truncated or
            damaged.
    """
    name = f"the session {os.fspath(path)}"
    try:
        with open(path, "rb") as file:
            text, tokens, state = _read_parts(file, name)
    except OSError as error:
        raise LaqStateError(f"{name} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise LaqStateError(f"{name} has a header that is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise LaqStateError(f"{name} has a header that is no JSON object")
    return Session(header, np.frombuffer(tokens, dtype=_TOKEN).astype(np.int32), state)


def _read_parts(file: BinaryIO, name: str) -> tuple[bytes, bytes, bytes]:
    """Header, tokens and state, with their checksum checked."""
    n_file = os.fstat(file.fileno()).st_size
    prefix = file.read(_PREFIX.size)
    _check_magic(prefix[: len(MAGIC)], name)
    n_least = _PREFIX.size + _DIGEST_SIZE
    if len(prefix) < _PREFIX.size:
        raise LaqStateError(f"{name} is truncated: {n_file} of at least {n_least} bytes")
    _, n_header, n_tokens, n_state = _PREFIX.unpack(prefix)
    sizes = (n_header, n_tokens * _TOKEN.itemsize, n_state, _DIGEST_SIZE)
    n_wanted = _PREFIX.size + sum(sizes)
    if n_file < n_wanted:
        raise LaqStateError(f"{name} is truncated: {n_file} of {n_wanted} bytes")
    if n_file > n_wanted:
        raise LaqStateError(f"{name} is damaged: {n_file} bytes where there should be {n_wanted}")
    parts = [file.read(size) for size in sizes]
    digest = hashlib.sha256(prefix)
    for part in parts[:-1]:
        digest.update(part)
    if digest.digest() != parts[-1]:
        raise LaqStateError(f"{name} is damaged: its checksum does not fit its content")
    return parts[0], parts[1], parts[2]


def _check_magic(magic: bytes, name: str) -> None:
    if MAGIC.startswith(magic):  # a shorter one is a truncated file
        return
    if magic[:-1] == MAGIC[:-1] and magic[-1:].isdigit() and magic[-1:] > MAGIC[-1:]:
        raise LaqStateError(
            f"{name} was written by a newer laq_gguf (format {magic[-1:].decode()}, this one reads "
            f"{MAGIC[-1:].decode()}): upgrade laq_gguf"
        )
    raise LaqStateError(f"{name} is not a session file (it begins with {magic!r})")


def check_header(header: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that a session belongs to a model.

    Args:
        header: of a session.
        expected: what the model has; each key must be in the header with the same value. A key
            is the name of a setting of `Llama`, or "model_fingerprint", "llama_cpp_commit", the
            name of a field of `ModelShape` and so on.

    Raises:
        LaqStateError: with every difference, and what to change.
    """
    differences = []
    for key, value in expected.items():
        here = json.loads(json.dumps(value))  # a tuple becomes a list, as in the file
        if key not in header:
            differences.append(f"it does not say {key} ({_shown(key, here)} here)")
        elif header[key] != here:
            there = header[key]
            differences.append(
                f"{key} is {_shown(key, there)} there and {_shown(key, here)} here: "
                f"{_advice(key, there)}"
            )
    if differences:
        raise LaqStateError(f"the session does not fit this model: {'; '.join(differences)}")


def _shown(key: str, value: Any) -> str:
    if key == "model_fingerprint" and isinstance(value, str):
        return f"{value[:12]}..."
    return repr(value)


def _advice(key: str, there: Any) -> str:
    if key in _MODEL_KEYS:
        return _ADVICE["model_fingerprint"]
    return _ADVICE.get(key, f"make the Llama with {key}={there!r}")


def fingerprints(path: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of the files that K and V come from, and the settings of `Llama` that change their content.

    Raises:
        LaqModelError: a file cannot be read.
    """
    lora = settings.get("lora_path")
    overrides = settings.get("kv_overrides") or {}
    return {
        "model_fingerprint": model_fingerprint(path),
        "lora_fingerprint": model_fingerprint(lora) if lora else None,
        "lora_scale": float(settings.get("lora_scale", 1.0)) if lora else None,
        "kv_overrides": {name: overrides[name] for name in sorted(overrides)},
    }


def model_fingerprint(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 of a model file's size and of 16 blocks of 64 KiB spread over it.

    The first and the last block are among them; a file of up to 1 MiB is hashed whole. Takes
    milliseconds for a model of any size, and is remembered until the file's size or time changes.

    Two files with different fingerprints differ. Two files with the same one are the same model
    by all odds: another model, fine-tune or quantisation differs everywhere. It does not prove
    that each byte is the same: a change made on purpose, or a few flipped bits, between the blocks
    is not seen. Of a split model, only the file that is given is looked at.

    Raises:
        LaqModelError: the file cannot be read.
    """
    try:
        status = os.stat(path)
        return _fingerprint(os.path.realpath(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise LaqModelError(
            f"model_path: {os.fspath(path)} cannot be read: {error.strerror}"
        ) from error


@functools.lru_cache(maxsize=32)
def _fingerprint(path: str, n_bytes: int, mtime_ns: int) -> str:
    digest = hashlib.sha256(struct.pack("<Q", n_bytes))
    with open(path, "rb") as file:
        for i in range(_N_BLOCKS):
            file.seek(i * max(n_bytes - _BLOCK_SIZE, 0) // (_N_BLOCKS - 1))
            digest.update(file.read(_BLOCK_SIZE))
    return digest.hexdigest()
