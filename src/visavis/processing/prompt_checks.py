"""Refusals of prompts that a kind of model cannot take, with what to do instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from visavis.errors import InputError
from visavis.inputs import Prompt, Video
from visavis.model.config import VLMConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def need_decoder(config: VLMConfig, name: str) -> None:
    """Refuse a model without language model.

    Raises:
        InputError: there is none.
    """
    if not config.has_decoder:
        raise InputError(
            f"{name} only embeds texts and images; it has no language model that could answer. Use "
            "embed, or a model that chats, such as 'nano'."
        )


def check_chats(config: VLMConfig, pooling: str, name: str) -> None:
    """Refuse to chat with a model that only embeds.

    Raises:
        InputError: it has no language model, or one that was trained to embed tokens.
    """
    need_decoder(config, name)
    if pooling == "multi":
        raise InputError(
            f"{name} is a multi-vector model, which embeds and writes no answers: use "
            "embed_multi, or chat with the model that it was made from."
        )


def check_plain(tokenizer: Tokenizer, instruction: str, name: str) -> None:
    """Refuse an instruction that would be read as special tokens, where it stands among them.

    Raises:
        InputError: it holds the text of one.
    """
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.special and token.content in instruction:
            raise InputError(
                f"the instruction holds {token.content!r}, which {name} reads as a mark of its "
                "prompt format; write the instruction without it"
            )


def check_single(prompt: Prompt, instruction: str, name: str) -> None:
    """Refuse an item that multi-vector models were not trained with.

    Raises:
        InputError: it is neither one text nor one image, or has an instruction.
    """
    if instruction:
        raise InputError(
            f"the instruction is {instruction[:60]!r}, but {name} has prompts of its own and takes "
            "none; leave it, or make it part of the query."
        )
    visuals, text = prompt.visuals, prompt.text
    videos = sum(isinstance(one, Video) for one in visuals)
    if videos or len(visuals) + bool(text) != 1:
        raise InputError(
            f"the item holds {len(visuals) - videos} images, {videos} videos and "
            f"{'a' if text else 'no'} text, but {name} embeds one text or one image: give each "
            "text, image, page of a document or frame as an item of its own."
        )
