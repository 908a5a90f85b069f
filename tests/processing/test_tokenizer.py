"""Tokenizers: ids against llama.cpp and transformers, special tokens, what is refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.gguf_files import tiny_config, write_llama
from tests.llamacpp import llama_cpp
from tests.texts import FRAGMENTS, texts
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.errors import CheckpointError
from visavis.processing.tokenizer import (
    SpecialTokens,
    build_tokenizer,
    encode,
    load_tokenizer,
    special_tokens,
)
from visavis.processing.tokenizer_conversion import PRE_TOKENIZERS

NUM_TEXTS = 1500
# Any text that UTF-8 can hold, with the pieces that tokenizers trip over.
ANY_TEXT = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from([f for kind in FRAGMENTS.values() for f in kind]),
        st.sampled_from(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>"]),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def metadata(nano_files: dict[str, Path]) -> dict[str, Any]:
    """SmolLM2's own metadata."""
    return open_gguf(nano_files["language_model"]).metadata


@pytest.fixture(scope="module")
def smollm(metadata: dict[str, Any]) -> tuple[Tokenizer, SpecialTokens]:
    return build_tokenizer(metadata), special_tokens(metadata)


def differences(ours: list[list[int]], theirs: list[list[int]], samples: list[str]) -> list[Any]:
    return [row for row in zip(samples, ours, theirs, strict=True) if row[1] != row[2]][:5]


@pytest.mark.parity
@pytest.mark.parametrize("parse_special", [True, False])
def test_ids_are_those_of_llama_cpp(
    smollm: tuple[Tokenizer, SpecialTokens], nano_files: dict[str, Path], parse_special: bool
) -> None:
    samples = texts(NUM_TEXTS, list(smollm[1].by_text))
    with llama_cpp(nano_files["language_model"]) as peer:
        theirs = [peer.tokenize(text, parse_special=parse_special) for text in samples]
    ours = [encode(*smollm, text, parse_special=parse_special) for text in samples]
    assert not differences(ours, theirs, samples)


@pytest.fixture(scope="module")
def transformers_tokenizer(metadata: dict[str, Any]) -> Any:
    """SmolLM2's tokenizer as its tokenizer.json describes it, in transformers."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (visavis[dev])")
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    special = list(special_tokens(metadata).by_text)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=special
    )


@pytest.mark.parity
def test_ids_are_those_of_transformers(
    smollm: tuple[Tokenizer, SpecialTokens], transformers_tokenizer: Any
) -> None:
    samples = texts(NUM_TEXTS, list(smollm[1].by_text), seed=1)
    ours = [encode(*smollm, text) for text in samples]
    assert not differences(ours, transformers_tokenizer(samples)["input_ids"], samples)


@pytest.mark.parity
@given(text=ANY_TEXT)
@example(text="")
@example(text=" ")
@example(text="\x00")
def test_any_text_has_the_ids_of_transformers(
    text: str, smollm: tuple[Tokenizer, SpecialTokens], transformers_tokenizer: Any
) -> None:
    assert encode(*smollm, text) == transformers_tokenizer(text)["input_ids"]


text_as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@given(text=ANY_TEXT)
def test_any_text_survives_a_round_trip(text: str, smollm: tuple[Tokenizer, SpecialTokens]) -> None:
    """Byte-level BPE loses nothing but bytes for which SmolLM2 has no token (21 rare ones)."""
    letters = set(text_as_bytes.pre_tokenize_str(text)[0][0]) if text else set()
    assume(all(smollm[0].token_to_id(letter) is not None for letter in letters))
    for parse_special in (True, False):
        ids = encode(*smollm, text, parse_special=parse_special)
        assert smollm[0].decode(ids, skip_special_tokens=False) == text


@given(text=ANY_TEXT)
def test_plain_encoding_never_gives_special_ids(
    text: str, smollm: tuple[Tokenizer, SpecialTokens]
) -> None:
    special = set(smollm[1].by_text.values())
    assert not special & set(encode(*smollm, text, parse_special=False))


def test_plain_encoding_leaves_the_tokenizer_as_it_is(
    smollm: tuple[Tokenizer, SpecialTokens],
) -> None:
    tokenizer, specials = smollm
    assert len(encode(tokenizer, specials, "<|im_end|>", parse_special=False)) > 1
    assert tokenizer.encode("<|im_end|>").ids == [specials.by_text["<|im_end|>"]]


def test_smollm_special_tokens(smollm: tuple[Tokenizer, SpecialTokens]) -> None:
    specials = smollm[1]
    assert (specials.bos_id, specials.eos_id, specials.pad_id) == (1, 2, 2)
    assert not specials.add_bos
    assert set(specials.eot_ids) == {2, 0}  # <|im_end|> and <|endoftext|>
    assert specials.by_text["<|im_start|>"] == 1


KINDS = {kind: name for name, kind in reversed(PRE_TOKENIZERS.items())}
# llama.cpp has a simpler pattern here, without combining marks; ours are the models' own.
WITHOUT_MARKS = {"tekken", "gpt-4o"}


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS.values())
def test_every_way_of_cutting_text_is_that_of_llama_cpp(
    name: str, metadata: dict[str, Any], tmp_path: Path
) -> None:
    """The same vocabulary with each kind of pre-tokenizer, in a tiny model."""
    changed = {key: v for key, v in metadata.items() if key.startswith("tokenizer.ggml.")}
    changed["tokenizer.ggml.pre"] = name
    config = tiny_config(vocab_size=len(metadata["tokenizer.ggml.tokens"]), num_layers=1)
    path = write_llama(tmp_path / "model.gguf", config, changed)
    samples = texts(600, [])
    if name in WITHOUT_MARKS:
        samples = [t for t in samples if not any(unicodedata.category(c)[0] == "M" for c in t)]
        assert len(samples) > 300
    with llama_cpp(path) as peer:
        theirs = [peer.tokenize(text) for text in samples]
    specials = special_tokens(changed)
    tokenizer = build_tokenizer(changed)
    ours = [encode(tokenizer, specials, text) for text in samples]
    assert not differences(ours, theirs, samples)


def sentencepiece_metadata(*, prefix: bool, size: int = 1500) -> dict[str, Any]:
    """Return a SentencePiece vocabulary trained on the test texts; rare characters are bytes."""
    samples = [t for t in texts(600, [], seed=5) if not any(s in t for s in UNLIKE_TEXT)]
    trained = Tokenizer(models.BPE())
    spaced = ["▁" + text.replace(" ", "▁") for text in samples]
    trained.train_from_iterator(spaced, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    merges = json.loads(trained.to_str())["model"]["merges"]
    words = list(dict.fromkeys(left + right for left, right in merges))
    letters = sorted({letter for word in words for letter in word} | set("▁0123456789"))
    rows = [("<unk>", 2, 0.0), ("<s>", 3, 0.0), ("</s>", 3, 0.0)]
    rows += [(f"<0x{byte:02X}>", 6, 0.0) for byte in range(256)]
    rows += [(word, 1, -float(rank)) for rank, word in enumerate(words)]
    rows += [(letter, 1, -float(len(words) + i)) for i, letter in enumerate(letters)]
    rows += [("<|im_start|>", 3, 0.0), ("<tool>", 4, 0.0)]
    tokens, types, scores = zip(*rows, strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


# Not in the training text, so that no half of a special token becomes a token: from such halves
# llama.cpp builds the special token itself out of plain text, which must never happen.
UNLIKE_TEXT = FRAGMENTS["almost special"]


@pytest.mark.parity
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_are_those_of_llama_cpp(prefix: bool, tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(prefix=prefix)
    config = tiny_config(vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    path = write_llama(tmp_path / "model.gguf", config, metadata)
    tokenizer, specials = build_tokenizer(metadata), special_tokens(metadata)
    samples = texts(1000, [*specials.by_text, "<tool>"], seed=2)
    with llama_cpp(path) as peer:
        for parse_special in (True, False):
            theirs = [peer.tokenize(text, parse_special=parse_special) for text in samples]
            ours = [encode(tokenizer, specials, t, parse_special) for t in samples]
            assert not differences(ours, theirs, samples)
    used = {number for ids in ours for number in ids}
    assert used & set(range(3, 259)), "no text fell back to bytes"


@pytest.mark.parity
def test_sentencepiece_ids_are_those_of_transformers(tmp_path: Path) -> None:
    """Where the two agree: transformers adds the first space once only, and not before one."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (visavis[dev])")
    metadata = sentencepiece_metadata(prefix=True)
    config = tiny_config(vocab_size=len(metadata["tokenizer.ggml.tokens"]))
    write_llama(tmp_path / "model.gguf", config, metadata)
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    tokenizer, specials = build_tokenizer(metadata), special_tokens(metadata)
    samples = [t for t in texts(1500, [], seed=3) if not t.startswith((" ", "▁"))]
    samples = [t for t in samples if not any(special in t for special in (*UNLIKE_TEXT, "<"))]
    assert len(samples) > 600
    ours = [encode(tokenizer, specials, text) for text in samples]
    theirs = peer(samples, add_special_tokens=False)["input_ids"]
    assert not differences(ours, theirs, samples)


def test_sentencepiece_builds_no_special_token_from_its_halves() -> None:
    metadata = sentencepiece_metadata(prefix=False)
    tokens = metadata["tokenizer.ggml.tokens"]
    metadata["tokenizer.ggml.tokens"] = [*tokens, "</s", "/s", "s>", "</"]
    for key, value in (("token_type", 1), ("scores", -1.0)):
        name = f"tokenizer.ggml.{key}"
        metadata[name] = np.append(metadata[name], np.full(4, value, metadata[name].dtype))
    tokenizer, specials = build_tokenizer(metadata), special_tokens(metadata)
    assert encode(tokenizer, specials, "</s>") == [2]
    assert 2 not in encode(tokenizer, specials, "</s>", parse_special=False)


def test_sentencepiece_text_comes_back() -> None:
    metadata = sentencepiece_metadata(prefix=True)
    tokenizer, specials = build_tokenizer(metadata), special_tokens(metadata)
    assert specials.add_bos
    for text in ("The quick brown foxes", "naïve 𐍈 日本語", "a  b\n c", "  two"):
        ids = encode(tokenizer, specials, text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text).ids == [1, *ids]  # the tokenizer itself adds bos


SMALL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<|eot_id|>"],
    "tokenizer.ggml.merges": ["a b"],
}


def test_turn_ends_are_special_even_if_the_file_does_not_say_so() -> None:
    specials = special_tokens(SMALL)
    assert specials.eot_ids == (3,) and specials.by_text == {"<|eot_id|>": 3}
    assert encode(build_tokenizer(SMALL), specials, "ab<|eot_id|>") == [2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "unigram"}, "of kind 'unigram', expected one of gpt2, llama"),
        ({"model": None}, "of kind ''"),
        ({"model": ["gpt2"]}, "is of type list, expected str"),
        ({"pre": "qwen3"}, "did you mean 'qwen2'"),
        ({"tokens": None}, "has no 'tokenizer.ggml.tokens'"),
        ({"tokens": ["a", "a", "b", "ab"]}, "4 tokens, 3 of them different"),
        ({"merges": None}, "has no 'tokenizer.ggml.merges'"),
        ({"merges": ["a c"]}, "does not make a tokenizer"),
        ({"token_type": np.zeros(3, np.int32)}, "3 token types"),
        ({"model": "llama", "scores": np.zeros(2, np.float32)}, "2 'tokenizer.ggml.scores' for 4"),
        ({"eos_token_id": "b"}, "is of type str, expected int"),
    ],
)
def test_unusable_vocabularies_are_named(change: dict[str, Any], message: str) -> None:
    metadata = SMALL | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(CheckpointError) as raised:
        build_tokenizer({key: value for key, value in metadata.items() if value is not None})
    assert message in str(raised.value)


def test_ids_out_of_range_are_not_used() -> None:
    specials = special_tokens(SMALL | {"tokenizer.ggml.eos_token_id": 99})
    assert specials.eos_id is None and specials.eot_ids == (3,)


def test_a_folder_with_tokenizer_json(
    tmp_path: Path, smollm: tuple[Tokenizer, SpecialTokens]
) -> None:
    smollm[0].save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    tokenizer, specials = load_tokenizer(tmp_path)
    assert specials.by_text == smollm[1].by_text
    assert (specials.bos_id, specials.eos_id, specials.pad_id) == (1, 2, 2)
    assert set(specials.eot_ids) == {0, 2, 5} and not specials.add_bos
    for text in texts(50, list(specials.by_text)):
        assert encode(tokenizer, specials, text) == encode(*smollm, text)


@pytest.mark.parametrize("content", [None, "{", '{"model": 1}'])
def test_a_folder_without_a_readable_tokenizer(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
