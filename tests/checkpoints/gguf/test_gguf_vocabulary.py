"""Tokenizers and chat formats as GGUF metadata: read again, and by llama.cpp, they are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.gguf_files import tiny_config, write_llama
from tests.llamacpp import llama_cpp
from tests.processing.test_chat_formats import IMAGE, conversation, with_specials
from tests.processing.test_sentencepiece import LLAMA, SPECIALS, write_model
from tests.texts import texts
from visavis.checkpoints.gguf.export import chat_template, vocabulary_metadata
from visavis.errors import CheckpointError
from visavis.processing.chat_formats import CHAT_FORMATS
from visavis.processing.chat_template import ChatTemplate, encode_chat, encode_turns
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import (
    SpecialTokens,
    build_tokenizer,
    encode,
    load_tokenizer,
    special_tokens,
)
from visavis.processing.tokenizer_conversion import PRE_TOKENIZERS

CUTS: dict[str, tuple[Any, str]] = {  # as tokenizer.json files have them -> llama.cpp's name
    "GPT-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
    "SmolLM": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
        "smollm",
    ),
    "Qwen2": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PRE_TOKENIZERS["qwen2"].patterns[0]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        "qwen2",
    ),
}


def trained(cut: Any, normalizer: Any = None) -> tuple[Tokenizer, SpecialTokens]:
    """Return a byte-level tokenizer of some hundred merges, with special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(300, [], seed=2),
        trainers.BpeTrainer(
            vocab_size=700,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    tokenizer.normalizer = normalizer
    return with_specials(tokenizer)


def assert_same(tokenizer: Tokenizer, specials: SpecialTokens, metadata: dict[str, Any]) -> None:
    again, marks = build_tokenizer(metadata), special_tokens(metadata)
    assert marks.by_text.items() >= specials.by_text.items()
    assert (marks.bos_id, marks.eos_id, marks.add_bos) == (
        specials.bos_id,
        specials.eos_id,
        specials.add_bos,
    )
    assert set(marks.eot_ids) >= set(specials.eot_ids)
    for text in texts(400, list(specials.by_text)[:4], seed=5):
        ids = encode(tokenizer, specials, text)
        assert encode(again, marks, text) == ids, text
        assert again.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", CUTS)
def test_byte_level_tokenizers(name: str) -> None:
    cut, expected = CUTS[name]
    tokenizer, specials = trained(cut)
    num_tokens = tokenizer.get_vocab_size()
    found = vocabulary_metadata(tokenizer, specials, num_tokens + 6)
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == expected
    assert found["tokenizer.ggml.tokens"][-1] == f"[PAD{num_tokens + 5}]"
    assert found["tokenizer.ggml.token_type"].tolist()[-1] == 5  # unused
    assert_same(tokenizer, specials, found)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_way_of_cutting_gets_its_name_back(name: str) -> None:
    """Or that of another which cuts the same."""
    tokenizer, specials = trained(CUTS["GPT-2"][0])
    metadata = vocabulary_metadata(tokenizer, specials, tokenizer.get_vocab_size())
    metadata["tokenizer.ggml.pre"] = name
    cut = build_tokenizer(metadata)
    again = vocabulary_metadata(cut, special_tokens(metadata), cut.get_vocab_size())
    found, named = PRE_TOKENIZERS[again["tokenizer.ggml.pre"]], PRE_TOKENIZERS[name]
    assert (found.patterns, found.whole_words) == (named.patterns, named.whole_words)


@pytest.mark.parity
@pytest.mark.parametrize("prefix", [True, False], ids=["prefix", "no prefix"])
def test_sentencepiece_tokenizers_and_llama_cpps_ids(prefix: bool, tmp_path: Path) -> None:
    peer = write_model(tmp_path, **LLAMA | {"add_dummy_prefix": prefix})
    tokenizer, specials = load_tokenizer(tmp_path)
    found = vocabulary_metadata(tokenizer, specials, tokenizer.get_vocab_size())
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert_same(tokenizer, specials, found)
    again, marks = build_tokenizer(found), special_tokens(found)
    samples = texts(1000, SPECIALS, seed=6)
    assert [encode(again, marks, t, parse_special=False) for t in samples] == peer.encode(samples)
    config = tiny_config(vocab_size=tokenizer.get_vocab_size())
    with llama_cpp(write_llama(tmp_path / "m.gguf", config, found)) as server:
        for text in texts(40, [], seed=7):
            if "<" not in text:  # llama.cpp builds special tokens of their parts
                assert server.tokenize(text) == encode(tokenizer, specials, text)


def test_what_gguf_cannot_say_is_refused() -> None:
    def refusal(tokenizer: Tokenizer) -> str:
        specials = SpecialTokens(None, None, (), None, False)
        with pytest.raises(CheckpointError) as raised:
            vocabulary_metadata(tokenizer, specials, tokenizer.get_vocab_size())
        return str(raised.value)

    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    assert "is a WordLevel, expected BPE of bytes" in refusal(words)
    odd = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[aeiou]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert "cuts text in a way that llama.cpp has no name for" in refusal(trained(odd)[0])
    lower = trained(CUTS["GPT-2"][0], normalizers.Lowercase())[0]
    assert "where GGUF's would give" in refusal(lower)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("name", [name for name in CHAT_FORMATS if not name.endswith("plain")])
def test_chat_formats_as_jinja_give_the_same_ids(name: str, add_bos: bool) -> None:
    tokenizer, specials = with_specials(trained(CUTS["GPT-2"][0])[0], add_bos=add_bos)
    bos = "<s>" if add_bos else ""
    template = ChatTemplate(chat_template(PromptConfig(chat_template=name), bos))
    settings: dict[str, Any] = {"image_token_id": IMAGE, "tokens_per_image": []}
    for prompt in (
        conversation("How many?"),
        conversation("What is this?", "A cat.", "Are you sure? 100 %"),
    ):
        expected = encode_turns(prompt, CHAT_FORMATS[name], tokenizer, specials, **settings)
        found = encode_chat(prompt, template, tokenizer, specials, **settings)
        assert found.token_ids == expected.token_ids


def test_what_stands_beside_pictures_stands_beside_llama_cpps_mark() -> None:
    profile = PromptConfig(chat_template="vicuna_v1", image_start="<a>", image_end="<b>")
    template = ChatTemplate(chat_template(profile, "<s>"))
    text = template.render([{"role": "user", "content": "<__media_x3Yz__>What?"}])
    assert text.startswith("<s>A chat between")
    assert text.endswith(" USER: <a><__media_x3Yz__><b>\nWhat? ASSISTANT:")


def test_formats_that_leave_words_out_have_no_jinja() -> None:
    assert chat_template(PromptConfig(chat_template="plain"), "") == ""
    assert chat_template(PromptConfig(jinja="{{ x }}"), "<s>") == "{{ x }}"
