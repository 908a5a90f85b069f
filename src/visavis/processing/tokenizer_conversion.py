"""SentencePiece's `tokenizer.model`: the protobuf, as the metadata that GGUF files give.

A message is a run of (field number << 3 | wire type) keys, each before its value. Only the fields
that change ids are read, every length is checked against the file, and what is not understood is
refused. Builds no tokenizer (see `tokenizer.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from visavis.errors import CheckpointError
from visavis.processing.tokenizer_check import check_lengths

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

MAX_BYTES = 64 << 20
MAX_VARINT_BYTES = 10
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of a model
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
MODEL_TYPE, WHITESPACE_SUFFIX, UNK_ID, BOS_ID, EOS_ID, PAD_ID = 3, 24, 40, 41, 42, 43
CHARSMAP, DUMMY_PREFIX, ONE_SPACE, ESCAPE_SPACE = 2, 3, 4, 5  # of the normalizer
BPE = 2
MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}

END_TEXTS = frozenset(  # tokens that end a turn in some family, recognised by their text
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<｜end▁of▁sentence｜>",
    }
)


def read_sentencepiece(path: Path) -> dict[str, Any]:
    """Return the content of a `tokenizer.model`, under the keys of GGUF's `tokenizer.ggml`.

    Raises:
        CheckpointError: the file is damaged, or of a kind that is not read.
    """
    try:
        return _metadata(read_bounded(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path} as SentencePiece's tokenizer: {error}. The file is damaged, is a "
            "Git LFS pointer or holds another kind; fetch it again, or put the tokenizer.json of "
            "the same model beside it."
        ) from error


def read_bounded(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        ValueError: it is larger than any tokenizer.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{size} bytes, expected at most {MAX_BYTES}")
    return path.read_bytes()


@dataclass(frozen=True)
class SentencePieceModel:
    """A parsed model: pieces with scores and types, and the settings that change ids."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    trainer: Mapping[int, Any]
    normalizer: Mapping[int, Any]

    @property
    def kind(self) -> int:
        return _number(self.trainer.get(MODEL_TYPE, 1))


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """Return the content of a SentencePiece model of any kind.

    Raises:
        ValueError: it is damaged, or writes spaces in another way.
    """
    tokens, scores, types = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == PIECES:
            piece = dict(_fields(_bytes(value)))
            tokens.append(_bytes(piece.get(PIECE_TEXT, b"")).decode("utf-8"))
            scores.append(struct.unpack("<f", _bytes(piece.get(PIECE_SCORE, bytes(4))))[0])
            types.append(_number(piece.get(PIECE_TYPE, NORMAL)))
        elif number == TRAINER:
            trainer = dict(_fields(_bytes(value)))
        elif number == NORMALIZER:
            normalizer = dict(_fields(_bytes(value)))
    if not tokens:
        raise ValueError("it holds no pieces, expected a vocabulary")
    if _number(trainer.get(WHITESPACE_SUFFIX, 0)) or not _number(normalizer.get(ESCAPE_SPACE, 1)):
        raise ValueError("it writes spaces another way, expected ▁ before words")
    return SentencePieceModel(tokens, scores, types, trainer, normalizer)


def _metadata(data: bytes) -> dict[str, Any]:
    model = parse_sentencepiece(data)
    tokens, scores, types = model.tokens, model.scores, model.types
    trainer, normalizer = model.trainer, model.normalizer
    if model.kind != BPE:
        raise ValueError(f"it is of kind {MODEL_TYPES.get(model.kind, model.kind)}, expected BPE")
    if normalizer.get(CHARSMAP) or _number(normalizer.get(ONE_SPACE, 1)):
        raise ValueError("it rewrites texts first (NFKC, runs of spaces), expected plain ones")
    if UNUSED in types:
        raise ValueError(f"piece {tokens[types.index(UNUSED)]!r} is marked as unused")
    ids = {
        name: _number(trainer.get(field, default))
        for name, field, default in (
            *(("unknown", UNK_ID, 0), ("bos", BOS_ID, 1), ("eos", EOS_ID, 2)),
            ("padding", PAD_ID, -1),
        )
    }
    found = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.array(scores, np.float32),
        "token_type": np.array(types, np.int32),
        "add_space_prefix": bool(_number(normalizer.get(DUMMY_PREFIX, 1))),
        **{f"{name}_token_id": number for name, number in ids.items()},
    }
    return {f"tokenizer.ggml.{name}": value for name, value in found.items()}


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message: numbers as int, all others as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == BYTES:
            length, at = _varint(data, at)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise ValueError(f"byte {at} has wire type {wire}, expected one of a protobuf")
        if length > len(data) - at:
            raise ValueError(f"{length} bytes at {at} of {len(data)}, expected them to fit")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number and where the next byte is; 7 bits a byte, the least significant first."""
    number = 0
    for place, byte in enumerate(data[at : at + MAX_VARINT_BYTES]):
        number |= (byte & 127) << 7 * place
        if byte < 128:  # negative numbers are written as 64 bits
            return number - (1 << 64) if number >> 63 else number, at + place + 1
    raise ValueError(f"byte {at} starts a number without an end")


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError(f"found {len(value)} bytes, expected a number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError(f"found the number {value}, expected bytes")
    return value


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SUFFIXES}|{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}"
_QWEN2 = rf"{_SUFFIXES}|{_WORDS}|\p{{N}}|{_SIGNS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER
_CASED_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}|{_CASED_SIGNS}"
_GPT4O = (
    rf"{_CASED}*{_LOWER}+{_SUFFIXES}?|{_CASED}+{_LOWER}*{_SUFFIXES}?|\p{{N}}{{1,3}}|{_CASED_SIGNS}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merging: each pattern in turn isolates its matches."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a piece that is a token is not built from merges
    add_bos: bool = False


_DIGITS_APART = PreTokenizer((r"\p{N}", _GPT2))
_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_LLAMA_3 = PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)
_LLAMA_3_LIKE = PreTokenizer((_LLAMA3,))
_QWEN_2 = PreTokenizer((_QWEN2,))
PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> kind
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN_GPT2,
    "phi-2": _PLAIN_GPT2,
    "mpt": _PLAIN_GPT2,
    "olmo": _PLAIN_GPT2,
    "jais": _PLAIN_GPT2,
    "exaone4": _PLAIN_GPT2,
    "trillion": _PLAIN_GPT2,
    "granite-docling": _PLAIN_GPT2,
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "command-r": _DIGITS_APART,
    "codeshell": _DIGITS_APART,
    "exaone": _DIGITS_APART,
    "minerva-7b": _DIGITS_APART,
    "llama-bpe": _LLAMA_3,
    "llama3": _LLAMA_3,
    "llama-v3": _LLAMA_3,
    "falcon3": _LLAMA_3,
    "pixtral": _LLAMA_3,
    "lfm2": _LLAMA_3,
    "dbrx": _LLAMA_3_LIKE,
    "smaug-bpe": _LLAMA_3_LIKE,
    "chatglm-bpe": _LLAMA_3_LIKE,
    "glm4": _LLAMA_3_LIKE,
    "qwen2": _QWEN_2,
    "deepseek-r1-qwen": _QWEN_2,
    "stablelm2": _QWEN_2,
    "megrez": _QWEN_2,
    "hunyuan": _QWEN_2,
    "deepseek-v3": PreTokenizer((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK3)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")),
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "llama4": PreTokenizer((_GPT4O,)),
    "bloom": PreTokenizer((_BLOOM,)),
    "poro-chat": PreTokenizer((_BLOOM,)),
    "viking": PreTokenizer((_BLOOM, r"\p{N}")),
}


def merges_from_scores(
    vocab: Mapping[str, int], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Return merges in the order in which SentencePiece would make them: best score first.

    Special and byte tokens are never built from text, as in SentencePiece itself. (llama.cpp
    does build them when both halves happen to be tokens: "<" and "s>".)
    """
    check_lengths(vocab)
    merges: list[tuple[float, int, int, str, str]] = []
    for token, number in vocab.items():
        if types[number] not in (NORMAL, USER_DEFINED, UNUSED):
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[number], left, right, token[:cut], token[cut:]))
    merges.sort()
    return [(left, right) for *_, left, right in merges]
