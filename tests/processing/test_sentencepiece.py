"""`tokenizer.model` or `vocab.json` alone: ids against the packages that wrote them, added tokens,
what is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.texts import FRAGMENTS, texts
from visavis.errors import CheckpointError
from visavis.processing.tokenizer import SpecialTokens, encode, load_tokenizer
from visavis.processing.tokenizer_conversion import read_sentencepiece

SIZE = 1600
SPECIALS = ["<s>", "</s>", "<unk>"]
LLAMA = {  # how the tokenizers of Llama were trained
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
}


def write_model(folder: Path, **settings: Any) -> sentencepiece.SentencePieceProcessor:
    folder.mkdir(parents=True, exist_ok=True)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(1500, [], seed=1)),
        model_writer=written,
        **{"model_type": "bpe", "vocab_size": SIZE, "minloglevel": 2, "hard_vocab_limit": False}
        | settings,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def write_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


Loaded = tuple[Tokenizer, SpecialTokens]


@pytest.fixture(scope="module")
def llama(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, sentencepiece.SentencePieceProcessor]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, write_model(folder, **LLAMA)


@pytest.mark.parity
@pytest.mark.parametrize(
    "settings",
    [
        LLAMA,
        LLAMA | {"add_dummy_prefix": False},
        LLAMA | {"byte_fallback": False, "character_coverage": 0.98},
    ],
    ids=["llama", "no prefix", "unknown characters"],
)
def test_ids_are_those_of_sentencepiece(settings: dict[str, Any], tmp_path: Path) -> None:
    peer = write_model(tmp_path, **settings)
    tokenizer, specials = load_tokenizer(tmp_path)
    samples = texts(3000, SPECIALS)
    ours = [encode(tokenizer, specials, text, parse_special=False) for text in samples]
    wrong = [
        (text, found, ids)
        for text, found, ids in zip(samples, ours, peer.encode(samples), strict=True)
        if found != ids
    ]
    assert wrong[:3] == []
    assert tokenizer.get_vocab_size() == peer.vocab_size()
    assert (specials.bos_id, specials.eos_id) == (peer.bos_id(), peer.eos_id())


@pytest.mark.parametrize("legacy", [True, False, None])
def test_texts_between_special_tokens(legacy: bool | None, llama: Any, tmp_path: Path) -> None:
    """As transformers' own SentencePiece tokenizers did: `legacy` gives each a space in front."""
    folder, peer = llama
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    write_json(tmp_path / "tokenizer_config.json", legacy=legacy)
    tokenizer, specials = load_tokenizer(tmp_path)

    def expected(text: str) -> list[int]:
        ids: list[int] = []
        for part in filter(None, re.split("(<s>|</s>|<unk>)", text)):
            if part in SPECIALS:
                ids.append(peer.piece_to_id(part))
            elif legacy is False and ids:
                ids += peer.encode("<unk>" + part)[len(peer.encode("<unk>")) :]
            else:
                ids += peer.encode(part)
        return ids

    samples = ["a</s>b", "USER: Hi ASSISTANT: Hello there.</s>USER: Well?", "</s> x", "x<s>\n1 2"]
    assert [encode(tokenizer, specials, text) for text in samples] == [*map(expected, samples)]
    assert tokenizer.encode("a").ids[0] == peer.bos_id() and specials.add_bos
    assert tokenizer.decode(peer.encode("Hello you")) == "Hello you"


@given(st.lists(st.sampled_from([f for kind in FRAGMENTS.values() for f in kind])).map("".join))
def test_text_comes_back(llama: Any, text: str) -> None:
    tokenizer, specials = load_tokenizer(llama[0])
    ids = encode(tokenizer, specials, text, parse_special=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text.replace("▁", " ")


def test_added_tokens_and_names(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((llama[0] / "tokenizer.model").read_bytes())
    write_json(tmp_path / "added_tokens.json", **{"<pad>": SIZE + 1, "<image>": SIZE})
    write_json(
        tmp_path / "special_tokens_map.json", pad_token="<pad>", eos_token={"content": "</s>"}
    )
    write_json(tmp_path / "tokenizer_config.json", add_bos_token=False, pad_token=None)
    tokenizer, specials = load_tokenizer(tmp_path)
    assert encode(tokenizer, specials, "<image><pad>") == [SIZE, SIZE + 1]
    assert specials.pad_id == SIZE + 1 and specials.by_text.keys() == {*SPECIALS, "<pad>"}
    assert (specials.bos_id, specials.eos_id, specials.add_bos) == (1, 2, False)
    decoder = {
        SIZE: {"content": "<image>", "special": True},
        SIZE + 1: {"content": "<pad>"},
    }
    write_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=decoder)
    assert "<image>" in load_tokenizer(tmp_path)[1].by_text


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_tokenizer(folder)
    return str(raised.value)


def test_added_tokens_that_do_not_fit(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((llama[0] / "tokenizer.model").read_bytes())
    write_json(tmp_path / "added_tokens.json", **{"<pad>": 9000})
    assert "'<pad>' as token 9000, but after 1600 tokens" in refusal(tmp_path)
    for wrong in ({"content": "<pad>"}, {"x": {"content": "<pad>"}}, {"1": {"special": True}}):
        write_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=wrong)
        assert "lists added tokens in a form that is not read" in refusal(tmp_path)


def test_other_kinds_and_files(tmp_path: Path) -> None:
    assert "has none of tokenizer.json, tokenizer.model, vocab.json" in refusal(tmp_path)
    write_model(tmp_path, model_type="unigram")
    assert "of kind unigram, expected BPE" in refusal(tmp_path)
    write_model(tmp_path)
    assert "it rewrites texts first (NFKC" in refusal(tmp_path)
    write_model(tmp_path, treat_whitespace_as_suffix=True)
    assert "▁ before words" in refusal(tmp_path)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 40):
        (tmp_path / "tokenizer.model").write_bytes(content)
        assert "tokenizer.model as SentencePiece's tokenizer" in refusal(tmp_path)


@given(st.data())
def test_damaged_files_end_in_one_error(llama: Any, data: st.DataObject) -> None:
    whole = bytearray((llama[0] / "tokenizer.model").read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = llama[0] / "damaged.model"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        read_sentencepiece(path)
    except CheckpointError as error:
        assert "damaged.model" in str(error)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(500, [], seed=2), trainer)
    tokenizer.model.save(str(folder))
    return folder


@pytest.mark.parity
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer"])
def test_vocab_json_gives_the_ids_of_transformers(name: str, byte_level: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (visavis[dev])")
    vocabulary = json.loads((byte_level / "vocab.json").read_text())
    lines = (byte_level / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    peer = getattr(transformers, name)(vocab=vocabulary, merges=merges)
    size = len(vocabulary)
    peer.add_tokens(["<|im_end|>"], special_tokens=True)
    added = {"<|im_end|>": peer.convert_tokens_to_ids("<|im_end|>")}
    assert peer.convert_tokens_to_ids("<|endoftext|>") == size
    added["<|endoftext|>"] = size
    write_json(byte_level / "added_tokens.json", **added)
    write_json(
        byte_level / "tokenizer_config.json",
        tokenizer_class=f"{name}Fast",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer, specials = load_tokenizer(byte_level)
    samples = texts(2000, ["<|im_end|>"])
    ours = [encode(tokenizer, specials, text) for text in samples]
    wrong = [row for row in zip(samples, ours, peer(samples)["input_ids"]) if row[1] != row[2]]  # noqa: B905
    assert wrong[:3] == []
    assert specials.by_text == added and not specials.add_bos


def test_vocab_json_of_other_classes(byte_level: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_bytes((byte_level / "vocab.json").read_bytes())
    write_json(tmp_path / "tokenizer_config.json", tokenizer_class="T5Tokenizer")
    assert "of a T5Tokenizer" in refusal(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert "merges.txt" in refusal(tmp_path)
    write_json(tmp_path / "vocab.json", a=0, b=[1])
    assert "ids without gaps" in refusal(tmp_path)
