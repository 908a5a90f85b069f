"""The GGUF reader: every metadata type, every way of being damaged, bounded memory."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gguf_files import llama_metadata, random_state, tiny_config, write_gguf
from visavis.checkpoints.gguf.decoder import decoder_config, decoder_state, gguf_state
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.errors import CheckpointError
from visavis.processing.tokenizer import build_tokenizer, special_tokens

TOKENS = ["<|endoftext|>", "a", "b", "c", "ab", "abc", "<think>"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": np.array([3, 1, 1, 1, 1, 1, 4], np.int32),
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.add_bos_token": False,
}


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole small model: metadata of many types, vocabulary, tensors of four types."""
    config = tiny_config(vocab_size=len(TOKENS))
    tensors = dict(gguf_state(random_state(config), config))
    types = {}
    for name, kind in (("blk.0.attn_output.weight", "Q8_0"), ("blk.1.ffn_gate.weight", "Q4_1")):
        quantised = gguf.GGMLQuantizationType[kind]
        tensors[name] = gguf.quants.quantize(tensors[name], quantised)
        types[name] = kind
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"].astype(np.float16)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, llama_metadata(config) | TOKENIZER, tensors, types)
    return path.read_bytes()


def use(path: Path) -> None:
    """Do all that loading does with a file."""
    file = open_gguf(path)
    for _ in decoder_state(file):
        pass
    build_tokenizer(file.metadata)
    special_tokens(file.metadata)


def test_every_metadata_type_comes_back(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "types.gguf", "llama")
    added: dict[str, tuple[Callable[..., None], Any]] = {
        "u8": (writer.add_uint8, 255),
        "i8": (writer.add_int8, -128),
        "u16": (writer.add_uint16, 65535),
        "i16": (writer.add_int16, -32768),
        "u32": (writer.add_uint32, 2**32 - 1),
        "i32": (writer.add_int32, -(2**31)),
        "u64": (writer.add_uint64, 2**64 - 1),
        "i64": (writer.add_int64, -(2**63)),
        "f32": (writer.add_float32, 0.5),
        "f64": (writer.add_float64, 0.1),
        "yes": (writer.add_bool, True),
        "no": (writer.add_bool, False),
        "text": (writer.add_string, "naïve 日本 👍"),
        "ints": (writer.add_array, [1, -2, 3]),
        "floats": (writer.add_array, [0.5, 0.25]),
        "bools": (writer.add_array, [True, False, True]),
        "texts": (writer.add_array, ["", "a", "é"]),
    }
    for key, (add, value) in added.items():
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    found = open_gguf(tmp_path / "types.gguf").metadata
    for key, (_, value) in added.items():
        got = found[key].tolist() if isinstance(found[key], np.ndarray) else found[key]
        assert got == value and type(got) is type(value), key


def test_tensors_come_back_with_rows_first(model_bytes: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(model_bytes)
    file = open_gguf(path)
    reference = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(file.tensors) == list(reference)
    for name, info in file.tensors.items():
        theirs = reference[name]
        assert info.shape == tuple(int(size) for size in reversed(theirs.shape))
        assert info.type == theirs.tensor_type.name
        assert np.array_equal(file.raw(name), theirs.data.view(np.uint8).reshape(-1))
        expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        assert np.array_equal(file.dequantize(name), expected)


def test_version_2_is_read_too(model_bytes: bytes, tmp_path: Path) -> None:
    """Versions 2 and 3 differ only in that 3 may be big-endian."""
    path = tmp_path / "model.gguf"
    path.write_bytes(model_bytes[:4] + struct.pack("<I", 2) + model_bytes[8:])
    use(path)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape))
    return head + struct.pack(f"<{len(shape)}QIQ", *shape, kind, offset)


def container(
    pairs: list[bytes] = [],  # noqa: B006 - never changed
    tensors: list[bytes] = [],  # noqa: B006
    data: bytes = b"",
    counts: tuple[int, int] | None = None,
) -> bytes:
    num_tensors, num_pairs = counts or (len(tensors), len(pairs))
    head = struct.pack("<4sIQQ", b"GGUF", 3, num_tensors, num_pairs) + b"".join(pairs + tensors)
    return head + bytes(-len(head) % 32) + data


U32, STRING, ARRAY = 4, 8, 9
HUGE = 2**63
ONE_F32 = tensor("w", (8,), 0, 0)
NESTED = struct.pack("<IQ", ARRAY, 1)
BAD_FILES = {
    "empty": (b"", "0 bytes"),
    "magic": (b"<!DOCTYPE html>" * 4, "not a GGUF file"),
    "version 1": (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "version 1, expected 2 or 3"),
    "big-endian": (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
    "pairs": (container(counts=(0, HUGE)), "metadata pairs in"),
    "tensors": (container(counts=(HUGE, 0)), "tensors in"),
    "key length": (container([struct.pack("<QII", HUGE, U32, 1)]), "at most"),
    "string length": (container([pair("a", STRING, struct.pack("<Q", 10**6))]), "bytes long"),
    "not utf-8": (container([pair("a", STRING, struct.pack("<Q", 2) + b"\xff\xfe")]), "not UTF-8"),
    "value type": (container([pair("a", 13, bytes(8))]), "value type 13"),
    "bool": (container([pair("a", 7, b"\x02")]), "boolean 2"),
    "twice": (container([pair("a", U32, bytes(4))] * 2), "'a' occurs twice"),
    "array count": (container([pair("a", ARRAY, struct.pack("<IQ", U32, HUGE))]), "ends at byte"),
    "string array": (container([pair("a", ARRAY, struct.pack("<IQ", 8, HUGE))]), "ends at byte"),
    "string in array": (
        container([pair("a", ARRAY, struct.pack("<IQQ", 8, 1, HUGE))]),
        "inside string 0 of 'a'",
    ),
    "array type": (container([pair("a", ARRAY, struct.pack("<IQ", 99, 1))]), "value type 99"),
    "nested arrays": (container([pair("a", ARRAY, NESTED * 100)]), "nests arrays deeper"),
    "alignment": (
        container([pair("general.alignment", U32, struct.pack("<I", 33))]),
        "general.alignment is 33",
    ),
    "no dims": (container(tensors=[tensor("w", (), 0, 0)], data=bytes(32)), "0 dimensions"),
    "dims": (container(tensors=[tensor("w", (1,) * 9, 0, 0)], data=bytes(32)), "9 dimensions"),
    "zero dim": (container(tensors=[tensor("w", (8, 0), 0, 0)], data=bytes(32)), "positive"),
    "overflow": (
        container(tensors=[tensor("w", (2**32, 2**32), 0, 0)], data=bytes(32)),
        "inside tensor 'w'",
    ),
    "type": (container(tensors=[tensor("w", (8,), 4, 0)], data=bytes(32)), "type number 4"),
    "block": (container(tensors=[tensor("w", (31,), 2, 0)], data=bytes(32)), "multiple of 32"),
    "misaligned": (container(tensors=[tensor("w", (8,), 0, 4)], data=bytes(64)), "offset 4"),
    "beyond": (container(tensors=[tensor("w", (8,), 0, HUGE)], data=bytes(64)), "inside tensor"),
    "overlap": (
        container(tensors=[tensor("v", (16,), 0, 0), tensor("w", (8,), 0, 32)], data=bytes(64)),
        "'v' and 'w' overlap",
    ),
    "tensor twice": (container(tensors=[ONE_F32, ONE_F32], data=bytes(64)), "'w' occurs twice"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        open_gguf(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_absent_files_and_folders_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="cannot be read"):
            open_gguf(path)


def test_an_empty_container_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(container())
    file = open_gguf(path)
    assert file.metadata == {} and file.tensors == {}


def test_types_that_cannot_be_dequantised_are_listed_but_refused(tmp_path: Path) -> None:
    path = tmp_path / "iq.gguf"
    path.write_bytes(container(tensors=[tensor("w", (256,), 23, 0)], data=bytes(160)))
    file = open_gguf(path)
    assert file.tensors["w"].type == "IQ4_XS"
    with pytest.raises(CheckpointError, match="'w' is of type IQ4_XS, expected one of F32"):
        file.dequantize("w")


def test_every_truncation_is_refused(model_bytes: bytes, tmp_path: Path) -> None:
    """The last tensor ends with the file, so no shorter file is whole."""
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 2000, 7), *range(2000, len(model_bytes), 997)]:
        path.write_bytes(model_bytes[:length])
        with pytest.raises(CheckpointError):
            use(path)


EXTREME = [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]
# Header and metadata come first; damage there is what a reader can stumble over.
POSITION = st.one_of(st.integers(0, 3000), st.integers(0, 10**6))
EDIT = st.tuples(
    POSITION,
    st.one_of(
        st.binary(min_size=1, max_size=8),
        st.sampled_from(EXTREME).map(lambda number: struct.pack("<Q", number)),
        st.sampled_from(EXTREME).map(lambda number: struct.pack("<Q", number)[:4]),
    ),
    st.booleans(),
)


@settings(max_examples=300)
@given(edits=st.lists(EDIT, min_size=1, max_size=4))
def test_damaged_files_parse_or_are_refused(
    edits: list[tuple[int, bytes, bool]],
    model_bytes: bytes,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    content = bytearray(model_bytes)
    for position, new, insert in edits:
        at = position % len(content)
        content[at : at if insert else at + len(new)] = new
    path = tmp_path_factory.mktemp("damaged", numbered=True) / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        use(path)
    except CheckpointError as error:
        assert str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        path.unlink()
    assert peak < 20 * len(content), "a damaged size led to a large allocation"


def test_config_of_a_damaged_file_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = dict(gguf_state(random_state(config), config))
    damage = {
        "llama.block_count": 2**31,
        "llama.attention.head_count_kv": 0,
        "llama.attention.key_length": 7,
        "llama.rope.freq_base": 0.0,
        "llama.context_length": "long",
        "llama.attention.head_count": [4, 4, 4],
        "llama.expert_count": 8,
        "split.count": 3,
    }
    for key, value in damage.items():
        path = write_gguf(tmp_path / f"{key}.gguf", llama_metadata(config) | {key: value}, tensors)
        with pytest.raises(CheckpointError):
            decoder_config(open_gguf(path))
