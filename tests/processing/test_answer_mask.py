"""Loss masks from jinja chat templates: by `{% generation %}`, and by comparing turns."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.transformers.export import chat_jinja
from visavis.errors import InputError
from visavis.inputs import Image, Message, Prompt, Text
from visavis.processing.chat_formats import CHAT_FORMATS
from visavis.processing.chat_template import ChatTemplate, Encoded, encode_chat, encode_turns
from visavis.processing.tokenizer import SpecialTokens, build_tokenizer, special_tokens

ADDED = (
    *("<s>", "</s>", "<eos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<image>"),
    *("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|return|>"),
)
ENDS = ("</s>", "<eos>", "<|end|>", "<|eot_id|>", "<end_of_turn>", "<|im_end|>", "<|return|>")


@pytest.fixture(scope="module")
def words(nano_files: dict[str, Path]) -> tuple[Tokenizer, SpecialTokens]:
    """SmolLM2's tokenizer with the special tokens of all families."""
    metadata = open_gguf(nano_files["language_model"]).metadata
    tokenizer, specials = build_tokenizer(metadata), special_tokens(metadata)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ADDED])
    by_text = specials.by_text | {text: tokenizer.token_to_id(text) for text in ADDED}
    ends = (by_text["<|endoftext|>"], *(by_text[text] for text in ENDS))
    return tokenizer, replace(specials, eot_ids=ends, by_text=by_text)


def talk(*texts: str, image: bool = False, system: str = "") -> Prompt:
    """Return user and assistant turns, one for each text."""
    messages = [Message("system", (Text(system),))] if system else []
    for number, text in enumerate(texts):
        role = "assistant" if number % 2 else "user"
        parts: tuple[Any, ...] = (Text(text),)
        messages.append(Message(role, (Image(b"x"), *parts) if image and not number else parts))
    return Prompt(tuple(messages))


TALKS = {
    "one answer": talk("What is it?", "A cat."),
    "several": talk("Hi", "Hello there", "And 1+1?", "2", "Why <|im_end|>?", "It </s> is."),
    "image": talk(" what is in it?\n", "Two dogs.", "Sure?", "Yes.", image=True),
    "empty answer": talk("Hi", ""),
    "unanswered": talk("Hi", "Yes.", "And then?"),
}


def encoded(
    words: tuple[Tokenizer, SpecialTokens], prompt: Prompt, source: str, image: int = 5
) -> Encoded:
    template = ChatTemplate(source, "<s>", "</s>")
    settings: dict[str, Any] = {
        "image_token_id": image,
        "tokens_per_image": [3] * len(prompt.visuals),
    }
    return encode_chat(prompt, template, *words, **settings, add_generation_prompt=False)


def learned(words: tuple[Tokenizer, SpecialTokens], found: Encoded) -> list[str]:
    """Return the learned texts, one for each run of learned tokens."""
    runs: list[list[int]] = [[]]
    for token, kept in zip(found.token_ids, found.loss_mask, strict=True):
        if kept:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [words[0].decode(run, skip_special_tokens=False) for run in runs if run]


NAMED = sorted({id(one): name for name, one in CHAT_FORMATS.items() if chat_jinja(one)}.values())


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", [*TALKS, "system"])
def test_a_named_format_as_jinja_has_the_same_ids_and_mask(
    name: str, kind: str, words: tuple[Tokenizer, SpecialTokens]
) -> None:
    chat_format = CHAT_FORMATS[name]
    if kind == "system" and "system" not in chat_format.turns:
        pytest.skip("the format has no system turn")
    if kind == "empty answer" and chat_format.turns["assistant"].gap:
        pytest.skip("nothing shows which white space stands before an empty answer")
    prompt = talk("Hi", "Hello.", system="Be kind.") if kind == "system" else TALKS[kind]
    number = words[1].by_text["<image>"]
    expected = encode_turns(
        prompt,
        chat_format,
        *words,
        image_token_id=number,
        tokens_per_image=[3] * len(prompt.visuals),
        add_generation_prompt=False,
    )
    found = encoded(words, prompt, chat_jinja(chat_format, "<image>"), number)
    assert found.token_ids == expected.token_ids and found.image_slots == expected.image_slots
    assert found.loss_mask == expected.loss_mask


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TWINS = {  # own templates of kinds that are found in published checkpoints -> learned texts
    "marked": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
        "<|im_end|>{% endif %}\n{% endfor %}" + PROMPT,
        ["Yes.<|im_end|>", "No.<|im_end|>"],
    ),
    "a default system turn": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good<|im_end|>\n{% endif %}"
        + CHATML
        + PROMPT,
        ["Yes.<|im_end|>", "No.<|im_end|>"],
    ),
    "no generation prompt": (CHATML, ["Yes.<|im_end|>", "No.<|im_end|>"]),
    "the user's end starts the answer": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim"
        " }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}",
        [" Yes.</s>", " No.</s>"],
    ),
    "headers, trimmed": (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content |"
        " trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ["Yes.<|eot_id|>", "No.<|eot_id|>"],
    ),
    "the role is called model": (
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}"
        "<start_of_turn>model\n{% endif %}",
        ["Yes.<end_of_turn>", "No.<end_of_turn>"],
    ),
    "closed at the end only": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
        ["Yes.<|end|>", "No.<|end|>"],
    ),
    "empty reasoning in the last turn": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant'"
        " %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT,
        ["Yes.<|im_end|>", "<think>\n\n</think>\n\nNo.<|im_end|>"],
    ),
    "another end in the last turn": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if loop.last and m.role"
        " == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}" + PROMPT,
        ["Yes.<|end|>", "No.<|return|>"],
    ),
    "words alone": (
        "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        [" Yes.\n", " No.\n"],
    ),
    "parts and placeholders": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}"
        "{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}<image>"
        "{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT,
        ["Yes.<|im_end|>", "No.<|im_end|>"],
    ),
}


@pytest.mark.parametrize("kind", TWINS)
@pytest.mark.parametrize("image", [False, True])
def test_templates_of_real_kinds(
    kind: str, image: bool, words: tuple[Tokenizer, SpecialTokens]
) -> None:
    source, expected = TWINS[kind]
    prompt = talk("Is it?", "Yes.", "Yes?", "No.", image=image)
    found = encoded(words, prompt, source, words[1].by_text["<image>"])
    assert learned(words, found) == expected
    assert [length for _, length in found.image_slots] == [3] * image


def test_a_text_model_that_takes_parts_gets_its_images_where_they_stand(
    words: tuple[Tokenizer, SpecialTokens],
) -> None:
    """The placeholder of a composed model is the padding token, which templates write too."""
    source, _ = TWINS["parts and placeholders"]
    end = words[1].by_text["<|im_end|>"]
    found = encoded(words, talk("Is it?", "Yes.", image=True), source.replace("<image>", ""), end)
    assert [length for _, length in found.image_slots] == [3]
    assert found.token_ids.count(end) == 3 + 2


CANNOT_TELL = {
    "opens with reasoning": (
        CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        "does not start with its generation prompt",
    ),
    "counts the turns": ("{{ messages | length }} turns\n" + CHATML + PROMPT, "does not start"),
    "counts what comes after": (
        "{% if messages | length > 3 %}Several turns\n{% endif %}" + CHATML + PROMPT,
        "later messages change the turns before it",
    ),
    "rewrites and has no prompt": (
        CHATML.replace("m.content", "(m.content | upper)"),
        "the answer is not rendered as it is",
    ),
}


@pytest.mark.parametrize("kind", CANNOT_TELL)
def test_a_template_that_cannot_tell_is_named(
    kind: str, words: tuple[Tokenizer, SpecialTokens]
) -> None:
    source, reason = CANNOT_TELL[kind]
    with pytest.raises(InputError, match=f"{reason}.*Set `chat_template`.*vicuna_v1"):
        encoded(words, talk("Is it?", "Yes.", "Yes?", "No."), source)


@pytest.mark.parity
def test_marked_answers_are_those_of_transformers(words: tuple[Tokenizer, SpecialTokens]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers (visavis[dev])")
    source, _ = TWINS["marked"]
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=words[0])
    texts = [("system", "Be brief"), ("user", "Is it, 日本?"), ("assistant", "Yes, it is.\n")]
    texts += [("user", "Why?"), ("assistant", " Because. ")]
    messages = [{"role": role, "content": text} for role, text in texts]
    prompt = Prompt.of(messages)
    theirs = peer.apply_chat_template(
        messages, chat_template=source, return_assistant_tokens_mask=True, return_dict=True
    )
    found = encoded(words, prompt, source)
    assert found.token_ids == theirs["input_ids"]
    assert [*map(int, found.loss_mask)] == theirs["assistant_masks"]
