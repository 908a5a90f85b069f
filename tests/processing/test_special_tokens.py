"""Special tokens that a tokenizer puts around a text, and its settings for cutting and padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, processors

from tests.fakes import byte_tokenizer
from visavis.errors import CheckpointError
from visavis.inputs import Prompt
from visavis.processing.chat_template import encode_plain
from visavis.processing.tokenizer import build_tokenizer, load_tokenizer, special_tokens

AROUND = {
    "$A": [],
    "$A <e>": ["<e>"],
    "<b> $A": [],
    "<b> $A <e>": ["<e>"],
    "$A <e> <e>": ["<e>"] * 2,
}
TEXT = "Two words, and more of them than eight tokens."


def saved(folder: Path, form: str, bos: str = "<b>") -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<b>", "<e>")])
    ids = [(text, tokenizer.token_to_id(text)) for text in ("<b>", "<e>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": "<e>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


@pytest.mark.parity
@pytest.mark.parametrize("form", AROUND)
def test_an_item_has_the_ids_of_transformers(form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (visavis[dev])")
    saved(tmp_path, form)
    tokenizer, specials = load_tokenizer(tmp_path)
    ours = encode_plain(
        Prompt.of(TEXT), tokenizer, specials, image_token_id=0, tokens_per_image=[]
    ).token_ids
    assert ours == transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"]
    assert specials.appended == tuple(tokenizer.token_to_id(one) for one in AROUND[form])
    assert specials.add_bos == form.startswith("<b>") and len(ours) > len(TEXT) - 1


def test_nothing_is_cut_or_padded(tmp_path: Path) -> None:
    whole = saved(tmp_path, "$A")
    assert len(whole.encode(TEXT).ids) == 64
    tokenizer, _ = load_tokenizer(tmp_path)
    assert tokenizer.truncation is None and tokenizer.padding is None
    assert tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT


def test_another_token_than_bos_before_a_text_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "<b> $A", bos="<e>")
    with pytest.raises(CheckpointError, match="puts '<b>' before every text.*'<e>'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("add_eos", [False, True])
def test_gguf_says_whether_eos_is_appended(add_eos: bool) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "</s>"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.add_eos_token": add_eos,
    }
    specials = special_tokens(metadata)
    assert specials.appended == (3,) * add_eos
    assert build_tokenizer(metadata).encode("ab").ids == [2] + [3] * add_eos
