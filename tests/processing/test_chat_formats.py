"""Chat formats as data: what each one writes, what is learned of it, and which ids come out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from visavis.errors import InputError
from visavis.inputs import Image, Message, Prompt, Text
from visavis.processing.chat_formats import CHAT_FORMATS, EXAMPLE, SAFE_ASSISTANT
from visavis.processing.chat_template import Encoded, encode_turns
from visavis.processing.tokenizer import SpecialTokens, encode

TEXTS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<eos>", "<|eot_id|>",
         "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>",
         "<image>")  # fmt: skip
USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)


TAG = (
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
ABLE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is able "
    "to understand the visual content that the user provides, and assist the user with a variety "
    f"of tasks using natural language.{TAG}"
)
ABOUT = "Answer the questions about the visual content that the user provides."
ORCA = (
    "You are MistralOrca, a large language model trained by Alignment Lab AI. Write out your "
    "reasoning step-by-step to be sure you get the right answers!"
)


def chatml(system: str, newline: str) -> str:
    return (
        f"<|im_start|>system\n{system}<|im_end|>{newline}<|im_start|>user\nQ1<|im_end|>{newline}"
        f"<|im_start|>assistant\n[A1<|im_end|>]{newline}<|im_start|>user\nQ2<|im_end|>{newline}"
        "<|im_start|>assistant\n"
    )


def llama_2(system: str) -> str:
    return f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\nQ1 [/INST] (A1 </s>)<s>[INST] Q2 [/INST]"


def human(system: str) -> str:
    return f"{system}###Human: Q1###Assistant: [A1###]Human: Q2###Assistant:"


def llama_3(role: str, text: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"


RENDERED = {  # as the original repositories write them; what is learned stands in brackets
    "vicuna_v1": f"{USER} USER: Q1 ASSISTANT: [A1</s>]USER: Q2 ASSISTANT:",
    "v1": f"{USER} USER: Q1 ASSISTANT: [A1</s>]USER: Q2 ASSISTANT:",
    "llava_v1": f"{HUMAN} USER: Q1 ASSISTANT: [A1</s>]USER: Q2 ASSISTANT:",
    "llava_v1_mmtag": f"{ABLE} USER: Q1 ASSISTANT: [A1</s>]USER: Q2 ASSISTANT:",
    "v1_mmtag": f"{ABLE} USER: Q1 ASSISTANT: [A1</s>]USER: Q2 ASSISTANT:",
    "v0": human(f"{HUMAN}###{EXAMPLE}".removesuffix("###")),
    "default": human(f"{HUMAN}###{EXAMPLE}".removesuffix("###")),
    "llava_v0": human(HUMAN),
    "llava_v0_mmtag": human(ABLE),
    "v0_mmtag": human(ABLE),
    "llama_2": llama_2(SAFE_ASSISTANT),
    "llava_llama_2": llama_2(VISION),
    "llava_llama_2_simple": llama_2(ABOUT),
    "llava_llama_2_mmtag": llama_2(ABOUT + TAG),
    "llava_llama_3": llama_3("system", VISION)
    + "<|eot_id|>"
    + llama_3("user", "Q1<|eot_id|>")
    + llama_3("assistant", "[A1<|eot_id|>]")
    + llama_3("user", "Q2<|eot_id|>")
    + llama_3("assistant", ""),
    "mpt": chatml(MPT, ""),
    "chatml_direct": chatml("Answer the questions.", ""),
    "mistral_direct": chatml("Answer the questions.", ""),
    "qwen_1_5": chatml("You are a helpful assistant.", "\n"),
    "qwen_2": chatml("You are a helpful assistant.", "\n"),
    "qwen_2_5": chatml(
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", "\n"
    ),
    "mistral_instruct": "[INST] Q1 [/INST] (A1 </s>)[INST] Q2 [/INST]",
    "llava_mistral_instruct": "[INST] Q1 [/INST] (A1 </s>)[INST] Q2 [/INST]",
    "mistral_orca": chatml(ORCA, ""),
    "mistral_zephyr": "<|system|>\nYou are a helpful AI assistant.</s><|user|>\nQ1</s>"
    "<|assistant|>\n[A1</s>]<|user|>\nQ2</s><|assistant|>\n",
    "gemma_instruct": "<start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n"
    "[A1<end_of_turn>]\n<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n",
    "tinyllava_llama": f"{USER} USER: Q1 ASSISTANT: [A1</s>]USER: Q2 ASSISTANT:",
    "tinyllava_phi": f"{USER} USER: Q1 ASSISTANT: [A1<|endoftext|>]USER: Q2 ASSISTANT:",
    "tinyllava_gemma": f"{USER} USER: Q1 ASSISTANT: [A1<eos>]USER: Q2 ASSISTANT:",
    "tinyllava_qwen2_base": f"{USER} USER: Q1 ASSISTANT: [A1<|endoftext|>]USER: Q2 ASSISTANT:",
    "tinyllava_qwen2_instruct": f"{USER} USER: Q1 ASSISTANT: [A1<|im_end|>]USER: Q2 ASSISTANT:",
    "phi3_v": "<|user|>\nQ1<|end|>\n<|assistant|>\n[A1<|end|>]\n<|user|>\nQ2<|end|>\n"
    "<|assistant|>\n",
    "plain": "[A1\n]",
    "v0_plain": "[A1\n]",
    "chatml-bare": chatml("", "\n").split("<|im_end|>\n", 1)[1],
}


def byte_level() -> Tokenizer:
    """A token per byte, and one that joins a space and the letter after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate([*alphabet, "ĠA"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "A")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Spaces as ▁, one more of them at the start of every text, as Llama's."""
    letters = [chr(number) for number in range(32, 127)] + ["\n", "é", "▁", "▁A", "<unk>"]
    vocabulary = {text: number for number, text in enumerate(letters)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "A")], unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Replace("▁", " ")
    return tokenizer


def with_specials(tokenizer: Tokenizer, add_bos: bool = False) -> tuple[Tokenizer, SpecialTokens]:
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in TEXTS])
    by_text = {text: tokenizer.token_to_id(text) for text in TEXTS}
    return tokenizer, SpecialTokens(by_text["<s>"], by_text["</s>"], (), None, add_bos, by_text)


BYTES = with_specials(byte_level())
PIECES = with_specials(sentencepiece(), add_bos=True)
IMAGE = BYTES[1].by_text["<image>"]


def turns(
    name: str,
    prompt: Prompt,
    coder: tuple[Tokenizer, SpecialTokens] = BYTES,
    *,
    open_answer: bool = True,
) -> Encoded:
    return encode_turns(
        prompt,
        CHAT_FORMATS[name],
        *coder,
        image_token_id=coder[1].by_text["<image>"],
        tokens_per_image=[2] * len(prompt.visuals),
        add_generation_prompt=open_answer,
    )


def text_of(ids: list[int]) -> str:
    return BYTES[0].decode(ids, skip_special_tokens=False)


def conversation(*texts: str, image: bool = False) -> Prompt:
    messages = []
    for number, text in enumerate(texts):
        parts: tuple[Any, ...] = (Text(text),)
        if image and number == 0:
            parts = (Image(b"x"), *parts)
        messages.append(Message("assistant" if number % 2 else "user", parts))
    return Prompt(tuple(messages))


def unmarked(rendered: str) -> tuple[str, str]:
    """Return a text and what is learned of it."""
    opening, closing = "()" if "(A1" in rendered else "[]"
    before, rest = rendered.split(f"{opening}A1")
    inside, after = rest.split(closing, 1)
    return f"{before}A1{inside}{after}", f"A1{inside}"


@pytest.mark.parametrize("name", RENDERED)
def test_two_turns_are_written_as_in_the_original(name: str) -> None:
    encoded = turns(name, conversation("Q1", "A1", "Q2"))
    whole, learned = unmarked(RENDERED[name])
    assert text_of(encoded.token_ids) == whole
    kept = [i for i, m in zip(encoded.token_ids, encoded.loss_mask, strict=True) if m]
    # A token that joins the space before an answer to its first letter is learned whole.
    assert text_of(kept).removeprefix(" ") == learned
    if CHAT_FORMATS[name].joined:
        assert encoded.token_ids == encode(*BYTES, whole)


def test_every_format_is_compared() -> None:
    assert set(RENDERED) == set(CHAT_FORMATS)


@pytest.mark.parametrize("name", sorted(set(CHAT_FORMATS) - {"plain", "v0_plain", "chatml-bare"}))
def test_an_image_stands_before_its_question(name: str) -> None:
    encoded = turns(name, conversation("Q1", image=True))
    text = text_of(encoded.token_ids)
    image = "<Image><image><image></Image>" if name.endswith("mmtag") else "<image><image>"
    assert f"{image}\nQ1" in text and [n for _, n in encoded.image_slots] == [2]


def test_plain_is_a_picture_and_its_caption() -> None:
    encoded = turns("plain", conversation("Describe it.", "A cat.", image=True), open_answer=False)
    assert text_of(encoded.token_ids) == "<image><image>A cat.\n"
    assert encoded.loss_mask == [False] * 2 + [True] * (len(encoded.token_ids) - 2)


@pytest.mark.parametrize("name", sorted(CHAT_FORMATS))
@pytest.mark.parametrize("coder", [BYTES, PIECES], ids=["bytes", "sentencepiece"])
@given(answer=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8))
def test_what_is_learned_follows_what_is_asked(
    name: str, coder: tuple[Tokenizer, SpecialTokens], answer: str
) -> None:
    """The ids of a question are those of the same question with its answer, up to the answer."""
    asking = turns(name, conversation("Q1", image=True), coder).token_ids
    whole = turns(name, conversation("Q1", answer, image=True), coder, open_answer=False)
    learned = [number for number, kept in enumerate(whole.loss_mask) if kept]
    assert learned == list(range(learned[0], learned[-1] + 1))
    gap = CHAT_FORMATS[name].turns["assistant"].gap
    first = learned[0]
    if first > len(asking):  # the gap is a token of its own
        assert coder[0].decode(whole.token_ids[len(asking) : first]).strip() == "" and gap
    assert whole.token_ids[: len(asking)] == asking[:first]


def test_one_beginning_whatever_comes_between() -> None:
    """LLaVA tokenises the text between images piece by piece and keeps the first <s> alone."""
    tokenizer, specials = PIECES
    prompt = Prompt((Message("user", (Image(b"a"), Text("One and"), Image(b"b"), Text("two?"))),))
    encoded = turns("vicuna_v1", prompt, PIECES)
    pieces = [f"{USER} USER: ", "\nOne and", "\ntwo? ASSISTANT:"]
    image = specials.by_text["<image>"]
    expected = [specials.bos_id]
    for number, piece in enumerate(pieces):
        expected += [image, image] if number else []
        expected += tokenizer.encode(piece, add_special_tokens=False).ids
    assert encoded.token_ids == expected
    assert encoded.token_ids.count(specials.bos_id) == 1


def test_a_system_message_replaces_the_formats_own() -> None:
    prompt = Prompt((Message("system", "Be brief."), Message("user", "Q1")))
    expected = {
        "vicuna_v1": "Be brief. USER: Q1 ASSISTANT:",
        "llava_llama_2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ1 [/INST]",
        "qwen_1_5": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
        "<|im_start|>assistant\n",
    }
    for name, text in expected.items():
        assert text_of(turns(name, prompt).token_ids) == text
    with pytest.raises(InputError, match="role 'system', expected one of user, assistant"):
        turns("mistral_instruct", prompt)
    late = Prompt((Message("user", "Q1"), Message("system", "Be brief.")))
    with pytest.raises(InputError, match="system message comes after others"):
        turns("vicuna_v1", late)


@pytest.mark.parametrize("name", ["vicuna_v1", "mistral_instruct", "qwen_1_5"])
def test_typed_special_texts_stay_text(name: str) -> None:
    answer = "so</s><|im_end|>"
    prompt = conversation("a</s>b <image>", answer, image=True)
    encoded = turns(name, prompt, open_answer=False)
    harmless = turns(name, conversation("ab", "so", image=True), open_answer=False)
    known = set(BYTES[1].by_text.values())
    assert [i for i in encoded.token_ids if i in known] == [
        i for i in harmless.token_ids if i in known
    ]
    kept = [i for i, m in zip(encoded.token_ids, encoded.loss_mask, strict=True) if m]
    assert text_of(kept).removeprefix(" ").startswith(answer)
    end = CHAT_FORMATS[name].turns["assistant"].end
    assert text_of(kept).removeprefix(" ") == answer + end
