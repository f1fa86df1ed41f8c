"""Session files: what is written comes back, and nothing else does."""

import errno
import hashlib
import itertools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laq_gguf import session
from laq_gguf.errors import LaqArgumentError, LaqModelError, LaqStateError
from laq_gguf.session import check_header, model_fingerprint, read_session, write_session

HEADER = {"model_fingerprint": "ab" * 32, "n_layer": 2, "n_head_kv": [2, 2], "name": "Köln"}
TOKENS = np.array([1, -1, 2**31 - 1, 70_000], dtype=np.int32)
STATE = bytes(range(256))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A session file."""
    write_session(tmp_path / "chat.session", HEADER, TOKENS, STATE)
    return tmp_path / "chat.session"


def test_round_trip(path: Path) -> None:
    back = read_session(str(path))
    assert back.header == HEADER
    assert back.tokens.dtype == np.int32 and back.tokens.flags.writeable
    np.testing.assert_array_equal(back.tokens, TOKENS)
    assert back.state == STATE
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    ("tokens", "state"),
    [
        (np.zeros(0, np.int32), b""),
        ([], memoryview(b"xyz")),
        ([5, 6], np.arange(6, dtype=np.uint16).reshape(2, 3)),
        (np.array([7, 8, 9], np.int64)[::2], bytearray(b"a")),
    ],
)
def test_round_trip_of_other_kinds(tmp_path: Path, tokens: Any, state: Any) -> None:
    write_session(tmp_path / "s", {}, tokens, state)
    back = read_session(tmp_path / "s")
    assert (back.header, back.tokens.tolist()) == ({}, np.asarray(tokens).tolist())
    assert back.state == bytes(state)


def test_layout_is_the_documented_one(path: Path) -> None:
    data = path.read_bytes()
    magic, n_header, n_tokens, n_state = struct.unpack_from("<8sQQQ", data)
    assert (magic, n_tokens, n_state) == (b"LAQSESS1", 4, 256)
    assert data[32 + n_header :][:16] == TOKENS.astype("<i4").tobytes()
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    assert len(data) == 32 + n_header + 16 + 256 + 32


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 2), np.int32), r"must be int32 \(n_tokens,\), got int32 \(2, 2\)"),
        (np.zeros(2, np.float32), "got float32"),
        ([2**31], "got values from 2147483648"),
        ([-(2**31) - 1, 0], "got values from -2147483649 to 0"),
    ],
)
def test_tokens_that_are_none(tmp_path: Path, tokens: Any, message: str) -> None:
    with pytest.raises(LaqArgumentError, match=message):
        write_session(tmp_path / "s", {}, tokens, b"")
    assert os.listdir(tmp_path) == []


def test_truncated_at_every_length(path: Path) -> None:
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        wanted = f"{n} of {len(data)} bytes" if n >= 32 else f"{n} of at least 64 bytes"
        with pytest.raises(LaqStateError, match=f"is truncated: {wanted}"):
            read_session(path)


def test_every_flipped_byte_is_found(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for i in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            data[i] ^= flip
            path.write_bytes(data)
            with pytest.raises(LaqStateError) as error:
                read_session(path)
            data[i] ^= flip
        if i >= 32:
            assert str(error.value).endswith("is damaged: its checksum does not fit its content")
    path.write_bytes(data)
    read_session(path)


def test_bytes_after_the_end(path: Path) -> None:
    n = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(LaqStateError, match=f"is damaged: {n + 1} bytes where .* should be {n}"):
        read_session(path)


@pytest.mark.parametrize("data", [b"GGUF\3\0\0\0" + bytes(100), b"{}", b"LAQSESS0", b"LAQSESSx"])
def test_foreign_files(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "s").write_bytes(data)
    with pytest.raises(LaqStateError, match="is not a session file"):
        read_session(tmp_path / "s")


def test_newer_format(path: Path) -> None:
    path.write_bytes(b"LAQSESS2" + path.read_bytes()[8:])
    with pytest.raises(LaqStateError, match=r"newer laq_gguf \(format 2, this one reads 1\)"):
        read_session(path)


def test_header_that_is_no_object(tmp_path: Path) -> None:
    for text, message in ((b"[1]", "no JSON object"), (b"{", "no JSON:"), (b"\xff", "no JSON:")):
        data = struct.pack("<8sQQQ", b"LAQSESS1", len(text), 0, 0) + text
        (tmp_path / "s").write_bytes(data + hashlib.sha256(data).digest())
        with pytest.raises(LaqStateError, match=message):
            read_session(tmp_path / "s")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(LaqStateError, match="cannot be read: No such file"):
        read_session(tmp_path / "none")
    with pytest.raises(LaqStateError, match="cannot be read"):
        read_session(tmp_path)
    with pytest.raises(LaqStateError, match="cannot be written: No such file"):
        write_session(tmp_path / "none" / "s", {}, [], b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LaqStateError, match="cannot be written: Not a directory"):
        write_session(tmp_path / "file" / "s", {}, [], b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(LaqStateError, match="cannot be written: Is a directory"):
        write_session(tmp_path / "folder", {}, [], b"")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(session.os, where, fail)
    expected = LaqStateError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_session(path, {"new": 1}, [1], b"new")
    monkeypatch.undo()
    assert read_session(path).header == HEADER
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_crash_leaves_the_old_file(path: Path, run_python: Callable, where: str) -> None:
    code = (
        "import os, sys; from laq_gguf import session\n"
        f"session.os.{where} = lambda *a: os._exit(9)\n"
        "session.write_session(sys.argv[1], {'new': 1}, [1], b'new')\n"
    )
    assert run_python("-c", code, str(path)).returncode == 9
    assert read_session(path).header == HEADER
    write_session(path, {"new": 1}, [1], b"new")
    assert read_session(path).header == {"new": 1}


@pytest.mark.skipif(os.name == "nt", reason="needs a privilege")
def test_link_stays_a_link(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path.name)
    write_session(link, {"new": 1}, [1], b"new")
    assert link.is_symlink() and read_session(path).header == {"new": 1}


def test_header_that_fits() -> None:
    check_header(HEADER, {"n_layer": 2, "n_head_kv": (2, 2)})
    check_header(HEADER, {})


def test_header_names_every_difference() -> None:
    header = {**HEADER, "llama_cpp_commit": "aaa", "type_k": 8, "flash_attn": False}
    here = {
        "model_fingerprint": "cd" * 32, "n_layer": 3, "llama_cpp_commit": "bbb", "type_k": 1,
        "flash_attn": True, "type_v": 1, "name": "Köln",
    }  # fmt: skip
    with pytest.raises(LaqStateError) as error:
        check_header(header, here)
    message = str(error.value)
    assert message.startswith("the session does not fit this model: ")
    for part in (
        "model_fingerprint is abababababab... there and cdcdcdcdcdcd... here: load the model_path",
        "n_layer is 2 there and 3 here: load the model_path that",
        "llama_cpp_commit is 'aaa' there and 'bbb' here: install the laq_gguf build",
        "type_k is 8 there and 1 here: make the Llama with type_k=8",
        "flash_attn is False there and True here: make the Llama with flash_attn=False",
        "it does not say type_v (1 here)",
    ):
        assert part in message
    assert "Köln" not in message and message.count(";") == 5


def test_fingerprint_is_of_size_and_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    block = 64 * 1024
    for n in (0, 1, 1000, block, block + 1, 16 * block, 16 * block + 1, 5_000_000):
        path = tmp_path / f"{n}.gguf"
        data = rng.bytes(n)
        path.write_bytes(data)
        offsets = [i * max(n - block, 0) // 15 for i in range(16)]
        expected = hashlib.sha256(struct.pack("<Q", n))
        for offset in offsets:
            expected.update(data[offset : offset + block])
        assert model_fingerprint(path) == expected.hexdigest()
        assert n == 0 or (offsets[0], offsets[-1]) == (0, max(n - block, 0))
        if n <= 16 * block:
            assert all(b - a <= block for a, b in itertools.pairwise(offsets))


def test_fingerprint_sees_changes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(300_000))
    first = model_fingerprint(path)
    assert model_fingerprint(str(path)) == first
    for i in (0, 150_000, 299_999):
        path.write_bytes(bytes(i) + b"\1" + bytes(300_000 - i - 1))
        os.utime(path, ns=(i + 1, i + 1))
        assert model_fingerprint(path) != first
    path.write_bytes(bytes(300_001))
    assert model_fingerprint(path) != first
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(bytes(300_000))
    assert model_fingerprint(copy) == first


def test_fingerprint_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"a" * 1000)
    first = model_fingerprint(path)
    status = path.stat()
    path.write_bytes(b"b" * 1000)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert model_fingerprint(path) == first, "same size and time: not read again"
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10))
    assert model_fingerprint(path) != first


def test_fingerprint_of_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(LaqModelError, match=r"model_path: .* cannot be read"):
            model_fingerprint(path)
