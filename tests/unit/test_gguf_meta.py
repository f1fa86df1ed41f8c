"""What is read from a GGUF file before a context is made."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from laq_gguf import _lib, gguf_meta
from laq_gguf.errors import LaqArgumentError, LaqLibraryError, LaqModelError
from laq_gguf.gguf_meta import ModelShape, RopeScaling, read_shape

T = gguf.GGUFValueType
SHAPE = ModelShape("llama", 3, (2, 2, 2), 64, 64, 2048, RopeScaling("none", 1.0, 2048))
PLAIN = {
    "block_count": (T.UINT32, 4),
    "embedding_length": (T.UINT32, 64),
    "context_length": (T.UINT32, 512),
    "attention.head_count": (T.UINT32, 8),
}


@pytest.fixture(autouse=True)
def library() -> Any:
    if _lib._find(_lib.library_dir(), "ggml-base") is None:
        pytest.skip(f"no libggml-base in {_lib.library_dir()}: pip install . or set LAQ_LIB_PATH")
    return gguf_meta._ggml()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(changes, **plain): a GGUF with the metadata of a model; a value of None = no such key.

    Keys without a dot in front get the prefix "llama.".
    """

    def make(changes: dict[str, tuple[T, Any] | None], arch: str | None = "llama") -> Path:
        path = tmp_path / "meta.gguf"
        writer = gguf.GGUFWriter(path, arch="llama")
        if arch is None:
            writer.kv_data[0].clear()
        for key, pair in {**PLAIN, **changes}.items():
            if pair is None:
                continue
            name = key[1:] if key.startswith(".") else f"llama.{key}"
            if isinstance(pair[1], list):
                writer.add_key_value(name, pair[1], T.ARRAY, sub_type=pair[0])
            else:
                writer.add_key_value(name, pair[1], pair[0])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return make


def test_shape_of_a_model(tiny_gguf: Callable[..., Path]) -> None:
    assert read_shape(tiny_gguf(n_layer=3)) == SHAPE
    assert read_shape(str(tiny_gguf(n_layer=3))) == SHAPE


def test_kinds_that_are_refused_later_can_be_read(tiny_gguf: Callable[..., Path]) -> None:
    assert read_shape(tiny_gguf("gemma3")).architecture == "gemma3"
    assert read_shape(tiny_gguf("bert")).n_ctx_train == 512
    assert read_shape(tiny_gguf("mpt")).n_head_kv == (2, 2)
    mamba = read_shape(tiny_gguf("mamba"))
    assert mamba.bytes_per_cell() == 0, "a recurrent model has no cells"


@pytest.mark.parametrize(
    ("type_k", "type_v"),
    [("F16", "F16"), ("F32", "F16"), ("BF16", "F32"), ("Q8_0", "Q4_0"), ("Q5_1", "Q4_1")],
)
def test_bytes_per_cell(type_k: str, type_v: str) -> None:
    kinds = [gguf.GGMLQuantizationType[name] for name in (type_k, type_v)]
    expected = 0
    for kind in kinds:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        expected += 3 * (2 * 64) // block * size
    assert SHAPE.bytes_per_cell(*map(int, kinds)) == expected


def test_bytes_per_cell_by_default_are_f16() -> None:
    assert SHAPE.bytes_per_cell() == 3 * 2 * (64 + 64) * 2
    assert SHAPE.bytes_per_cell(1, None) == SHAPE.bytes_per_cell()


def test_bytes_per_cell_of_layers_that_differ() -> None:
    shape = ModelShape("deci", 3, (4, 0, 1), 64, 32, 512, SHAPE.rope_scaling)
    assert shape.bytes_per_cell() == 5 * (64 + 32) * 2
    # V transposed: llama.cpp gives every layer the heads of the largest
    assert shape.bytes_per_cell(flash_attn=False) == (5 * 64 + 3 * 4 * 32) * 2


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ((-1, 1), "type_k=-1 is no ggml type"),
        ((1, 10_000), "type_v=10000 is no ggml type"),
        ((4, 1), "type_k=4 is no ggml type"),  # Q4_2, removed
        ((12, 1), r"type_k=12 \(q4_K\) stores blocks of 256 values, which do not divide .* of 64"),
    ],
)
def test_types_that_cannot_be(types: tuple[int, int], message: str) -> None:
    with pytest.raises(LaqArgumentError, match=message):
        SHAPE.bytes_per_cell(*types)


def test_defaults_are_those_of_llama_cpp(write: Callable[..., Path]) -> None:
    shape = read_shape(write({}))
    assert shape == ModelShape("llama", 4, (8,) * 4, 8, 8, 512, RopeScaling("none", 1.0, 512))


@pytest.mark.parametrize("kind", [T.UINT32, T.INT32, T.UINT64, T.INT64, T.UINT8, T.INT16])
def test_heads_may_differ_by_layer(write: Callable[..., Path], kind: T) -> None:
    shape = read_shape(
        write({
            "attention.head_count": (kind, [8, 8, 4, 4]),
            "attention.head_count_kv": (kind, [2, 0, 1, 4]),
            "attention.key_length": (T.UINT32, 96),
            "attention.value_length": (T.UINT32, 48),
        })
    )  # fmt: skip
    assert shape.n_head_kv == (2, 0, 1, 4)
    assert (shape.n_embd_head_k, shape.n_embd_head_v) == (96, 48)


def test_layers_that_draft_tokens_do_not_count(write: Callable[..., Path]) -> None:
    shape = read_shape(write({"nextn_predict_layers": (T.UINT32, 1)}))
    assert (shape.n_layer, shape.n_head_kv) == (3, (8, 8, 8))
    with pytest.raises(LaqModelError, match="all of its 4 layers are for drafting"):
        read_shape(write({"nextn_predict_layers": (T.UINT32, 4)}))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scaling.factor": (T.FLOAT32, 4.0)}, ("linear", 4.0, 512)),
        ({"rope.scale_linear": (T.FLOAT32, 2.0)}, ("linear", 2.0, 512)),
        (
            {
                "rope.scaling.type": (T.STRING, "yarn"),
                "rope.scaling.factor": (T.FLOAT32, 8.0),
                "rope.scaling.original_context_length": (T.UINT32, 64),
            },
            ("yarn", 8.0, 64),
        ),
        ({"rope.scaling.type": (T.STRING, "none")}, ("none", 1.0, 512)),
    ],
)
def test_rope_scaling(write: Callable[..., Path], keys: dict, expected: tuple) -> None:
    assert read_shape(write(keys)).rope_scaling == RopeScaling(*expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, "llama.block_count is missing"),
        ({"context_length": None}, "llama.context_length is missing"),
        ({"embedding_length": None}, "llama.embedding_length is missing"),
        ({"block_count": (T.UINT32, 0)}, "llama.block_count is 0, not an integer from 1 to 512"),
        ({"block_count": (T.UINT32, 2**32 - 1)}, "not an integer from 1 to 512"),
        ({"block_count": (T.STRING, "4")}, "block_count is '4', not an integer"),
        ({"block_count": (T.FLOAT32, 4.0)}, "block_count is 4.0, not an integer"),
        ({"block_count": (T.BOOL, True)}, "block_count is True, not an integer"),
        ({"block_count": (T.UINT32, [4])}, r"block_count is \(4,\), not an integer"),
        ({"attention.head_count_kv": (T.INT32, [2, 2])}, "head_count_kv has 2 values for 4 layers"),
        ({"attention.head_count_kv": (T.INT32, [2, 2, -1, 2])}, "not integers of at least 0"),
        ({"attention.head_count_kv": (T.STRING, ["2"] * 4)}, "is an array of strings"),
        ({"attention.key_length": (T.INT32, -64)}, "key_length is -64, not an integer"),
    ],
)
def test_metadata_of_no_model(
    write: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    path = write(changes)
    with pytest.raises(LaqModelError, match=message) as error:
        read_shape(path)
    assert str(error.value).startswith(f"model_path: {path}: ")


def test_file_without_an_architecture(write: Callable[..., Path]) -> None:
    with pytest.raises(LaqModelError, match=r"general.architecture is missing: this is no model"):
        read_shape(write({}, arch=None))


def test_split_models_are_read_from_their_first_file(write: Callable[..., Path]) -> None:
    count = {".split.count": (T.UINT16, 3)}
    assert read_shape(write({**count, ".split.no": (T.UINT16, 0)})).n_layer == 4
    with pytest.raises(LaqModelError, match=r"file 2 of 3 of a split model; give the first one"):
        read_shape(write({**count, ".split.no": (T.UINT16, 1)}))


def test_files_that_cannot_be_read(tmp_path: Path, tiny_gguf: Callable[..., Path]) -> None:
    missing = tmp_path / "no-such-model.gguf"
    with pytest.raises(LaqModelError, match=r"no-such-model.gguf cannot be read: .*No such file"):
        read_shape(missing)
    with pytest.raises(LaqModelError, match="cannot be read"):
        read_shape(tmp_path)
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    with pytest.raises(LaqModelError, match=r"cannot be read: invalid magic .*'not '"):
        read_shape(text)
    whole = tiny_gguf().read_bytes()
    for n in (0, 3, 4, 8, 20, 24, 100, 1000, 5000):
        text.write_bytes(whole[:n])
        with pytest.raises(LaqModelError, match=r"cannot be read: [^:]*$") as error:
            read_shape(text)
        assert "failed to read" in str(error.value)


def test_reading_leaves_the_log_as_it_was(library: Any, tmp_path: Path) -> None:
    def current() -> tuple[int | None, int | None]:
        pair = ctypes.c_void_p(), ctypes.c_void_p()
        library.ggml_log_get(*map(ctypes.byref, pair))
        return pair[0].value, pair[1].value

    before = current()
    with pytest.raises(LaqModelError):
        read_shape(tmp_path / "missing")
    assert current() == before


def test_missing_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAQ_LIB_PATH", str(tmp_path))
    with pytest.raises(LaqLibraryError, match="no libggml-base in"):
        read_shape("model.gguf")
