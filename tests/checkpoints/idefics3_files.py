"""Tiny Idefics3 and SmolVLM2 folders in transformers' layout, and what their peers take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.fakes import byte_tokenizer
from tests.parity.peers import randomized

TILE, EDGE, PATCH = 42, 126, 7  # 6 x 6 patches, 3 x 3 tokens a tile
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": TILE,
    "patch_size": PATCH,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 256,
}
PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
SPECIALS = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *PLACES]
# As published with SmolVLM.
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CUT: dict[str, Any] = {"size": {"longest_edge": EDGE}, "max_image_size": {"longest_edge": TILE}}
FILMED: dict[str, Any] = {"video_sampling": {"fps": 2, "max_frames": 6}}


def fast_tokenizer(tokenizer: Tokenizer | None = None) -> PreTrainedTokenizerFast:
    tokenizer = tokenizer or byte_tokenizer()
    tokens = [AddedToken(text, special=True) for text in ("<image>", *SPECIALS)]
    tokenizer.add_special_tokens(tokens)
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end_of_utterance>", pad_token="<|endoftext|>"
    )
    found.chat_template = TEMPLATE
    return found


def save_idefics3(
    folder: Path,
    *,
    smolvlm: bool = False,
    scale: int = 2,
    tied: bool = False,
    tokens: Tokenizer | None = None,
    **cut: Any,
) -> tuple[Any, Idefics3Processor]:
    """Write a model with its tokenizer, chat template and image processor; return the peers.

    SmolVLM's own processor needs torchvision for its videos, so Idefics3's is the peer of both;
    of images both write the same.
    """
    tokenizer = fast_tokenizer(tokens)
    text = LlamaConfig(**TEXT, vocab_size=len(tokenizer), tie_word_embeddings=tied)
    settings: dict[str, Any] = {
        "text_config": text,
        "image_token_id": tokenizer.convert_tokens_to_ids("<image>"),
        "scale_factor": scale,
        "tie_word_embeddings": tied,
    }
    peer: Any
    if smolvlm:
        config: Any = SmolVLMConfig(vision_config=VISION, **settings)
        peer, images = SmolVLMForConditionalGeneration(config), SmolVLMImageProcessorPil
    else:
        config = Idefics3Config(vision_config=VISION, **settings)
        peer, images = Idefics3ForConditionalGeneration(config), Idefics3ImageProcessorPil
    randomized(peer)
    if tied:
        peer.tie_weights()
    peer.save_pretrained(folder)
    filmed = FILMED if smolvlm else {}
    processor = Idefics3Processor(
        images(**CUT | filmed | cut),
        tokenizer,
        image_seq_len=(TILE // PATCH // scale) ** 2,
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return peer, processor


def inputs_of(processor: Idefics3Processor, content: list[Any]) -> dict[str, Tensor]:
    """Return what the peer's processor makes of the images and texts of one user."""
    images = [one for one in content if isinstance(one, Image.Image)]
    parts = [
        {"type": "text", "text": one} if isinstance(one, str) else {"type": "image"}
        for one in content
    ]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    if not images:
        return dict(processor.tokenizer(rendered, return_tensors="pt"))
    return dict(processor(text=rendered, images=[images], return_tensors="pt"))


def video_inputs(
    processor: Idefics3Processor, rendered: str, expanded: str, views: Tensor
) -> dict[str, Tensor]:
    """Return what the peer takes of a rendered prompt with one video.

    Args:
        expanded: what SmolVLM's processor writes for the video.
        views: its frames [V, 3, S, S].
    """
    text = rendered.replace("<video>", expanded)
    inputs = dict(processor.tokenizer(text, return_tensors="pt"))
    mask = torch.ones(1, *views.shape[:1], *views.shape[2:], dtype=torch.int64)
    return inputs | {"pixel_values": views[None], "pixel_attention_mask": mask}
