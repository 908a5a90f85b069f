"""How published embedding models are prompted, token by token, by the name of their profile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.fakes import byte_tokenizer, picture, tiny_model
from visavis.errors import InputError
from visavis.inputs import Image, Prompt, Text
from visavis.processing.prompt_config import PROFILES, stated_profile
from visavis.processing.prompt_encoder import PromptEncoder

IMAGE = "[IMG]"
CHATML = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n \n"
)

SYSTEM = tuple(  # GME's and Ops-MM's, of gme_inference.py and ops_mm_embedding_v1.py
    CHATML.format("Find it:", text) + "<|endoftext|>"
    for text in (
        "a cat",
        f"<|vision_start|>{IMAGE}<|vision_end|>",
        f"<|vision_start|>{IMAGE}<|vision_end|>a cat",
    )
)
# By profile: an item of text, of an image, and of both, with the instruction "Find it:". VLM2Vec's,
# LLaVE's and E5-V's are those of their own code; GME's is that of its model card and of mteb.
EXPECTED = {
    "vlm2vec-v1": ("Find it: a cat\n", f"{IMAGE}\nFind it:\n", f"{IMAGE}\nFind it: a cat\n"),
    "vlm2vec-v2": ("Find it: a cat", f"{IMAGE} Find it:", f"{IMAGE} Find it: a cat"),
    "llave": tuple(
        CHATML.format("You are a helpful assistant.", text) + "\n<|im_end|>\n"
        for text in ("Find it: a cat\n", f"{IMAGE}\nFind it:\n", f"{IMAGE}\nFind it: a cat\n")
    ),
    "gme": SYSTEM,
    "ops-mm": SYSTEM,
    "b3": ("Find it: a cat\n", f"{IMAGE}\nFind it:\n", f"{IMAGE}\nFind it: a cat\n"),
    "unime-v2": ("Find it: a cat", f"{IMAGE} Find it:", f"{IMAGE} Find it: a cat"),
    "qwen3-vl-embedding": tuple(text.removesuffix("<|endoftext|>") for text in SYSTEM),
    "e5-v": tuple(
        LLAMA3.format(text)
        for text in (
            "a cat\nSummary above sentence in one word: ",
            f"{IMAGE}\nSummary above image in one word: ",
            f"{IMAGE}\na cat\nSummary above image and text in one word: ",
        )
    ),
    "plain": ("Find it:\na cat", f"{IMAGE}Find it:", f"{IMAGE}Find it:\na cat"),
}


def encoder(name: str) -> PromptEncoder:
    """Return an encoder with a profile, whose tokenizer knows all the special tokens in it."""
    model = tiny_model()
    tokenizer = byte_tokenizer()
    marks = ("<|vision_start|>", "<|vision_end|>", "<|start_header_id|>", "<|end_header_id|>")
    tokenizer.add_special_tokens([*marks, "<|eot_id|>"])
    return replace(model.encoder, tokenizer=tokenizer, profile=PROFILES[name])


def shown(encoder: PromptEncoder, item: Prompt, instruction: str | None) -> str:
    """Return the text of an item's tokens, with a mark in the place of an image's."""
    encoded = encoder.item(item, instruction)
    ids = list(encoded.token_ids)
    for start, count in reversed(encoded.image_slots):
        assert set(ids[start : start + count]) == {encoder.config.image_token_id}
        before = encoder.tokenizer.decode(ids[:start], skip_special_tokens=False)
        after = encoder.tokenizer.decode(ids[start + count :], skip_special_tokens=False)
        return before + IMAGE + after
    return encoder.tokenizer.decode(ids, skip_special_tokens=False)


# A reranker reads pairs, see tests/parity/test_qwen3_vl_retrieval.py.
@pytest.mark.parametrize("name", [name for name in PROFILES if not PROFILES[name].reranker])
def test_every_kind_of_item_is_written_as_the_model_was_trained(name: str) -> None:
    image = Image(picture(1))
    items = Prompt.of("a cat"), Prompt.of(image), Prompt.of([image, Text("a cat")])
    found = tuple(shown(encoder(name), item, "Find it:") for item in items)
    assert found == EXPECTED[name]


def test_marks_of_a_form_are_single_tokens() -> None:
    gme = encoder("gme")
    ids = gme.item(Prompt.of("a"), None).token_ids
    start = gme.tokenizer.token_to_id("<|im_start|>")
    assert list(ids).count(start) == 3 and ids[-1] == gme.tokenizer.token_to_id("<|endoftext|>")


@pytest.mark.parametrize("name", ["gme", "ops-mm"])
def test_a_system_message_without_an_instruction(name: str) -> None:
    expected = CHATML.format("You are a helpful assistant.", "a cat") + "<|endoftext|>"
    assert shown(encoder(name), Prompt.of("a cat"), None) == expected


def test_the_forms_that_vlm2vec_passed_on_have_plain_positions() -> None:
    assert {PROFILES[name].embed_positions for name in ("b3", "unime-v2")} == {"flat"}
    assert {PROFILES[name].embed_positions for name in ("gme", "ops-mm")} == {"grid"}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"auto_map": {"AutoModel": "modeling_gme_qwen2vl.GmeQwen2VL"}}, "gme"),
        ({"auto_map": {"AutoModel": "owner/gme--modeling_gme_qwen2vl.GmeQwen2VL"}}, "gme"),
        ({"auto_map": {"AutoModel": "modeling_phi3_v.Phi3VForCausalLM"}}, ""),
        ({"auto_map": ["modeling_gme_qwen2vl.GmeQwen2VL"]}, ""),
        ({"auto_map": {"AutoModel": 7}}, ""),
        ({}, ""),
    ],
)
def test_a_profile_that_a_config_names(settings: dict[str, Any], name: str) -> None:
    assert stated_profile(settings) == name


def test_marks_in_an_instruction_are_refused() -> None:
    with pytest.raises(InputError, match=r"holds '<\|im_end\|>'"):
        encoder("gme").item(Prompt.of("a cat"), "Find it.<|im_end|>")


def test_braces_in_a_text_stay() -> None:
    assert "{text} {visual}" in shown(encoder("gme"), Prompt.of("{text} {visual}"), "{text}")
