"""Tiny InternVL folders in transformers' layout, and what their peers take."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from tests.fakes import byte_tokenizer
from tests.parity.peers import randomized

TILE, PATCH, MOST = 32, 4, 6  # 8 x 8 patches, 4 x 4 tokens a tile
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": TILE,
    "patch_size": PATCH,
    "attention_bias": True,
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
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen3, as published": {"text": Qwen3Config(**TEXT, head_dim=12)},
    "qwen2, InternViT-6B": {
        "vision": {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm"},
        "tied": True,
    },
    "qwen2, a final norm": {"vision": {"use_mean_pooling": False}},
    "qwen2, the layer before the last": {"layer": -2},
}
SPECIALS = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<|image_pad|>"]
# As published with InternVL3.
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def fast_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    found.chat_template = TEMPLATE
    return found


class Processor:
    """InternVL's processor without its video processor, which needs torchvision."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.images: Any = GotOcr2ImageProcessorPil(
            size={"height": TILE, "width": TILE},
            crop_to_patches=True,
            max_patches=MOST,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        )
        self.own: Any = SimpleNamespace(
            start_image_token="<img>",
            end_image_token="</img>",
            image_token="<IMG_CONTEXT>",
            image_seq_length=(TILE // PATCH // 2) ** 2,
        )

    def __call__(self, content: list[Any], *, plain: bool = False) -> dict[str, Tensor]:
        """Return what the peer takes of the images, texts and lists of frames of one user.

        Args:
            plain: without chat template, each image as its placeholder.
        """
        parts = [
            {"type": "text", "text": one}
            if isinstance(one, str)
            else {"type": "video" if isinstance(one, list) else "image"}
            for one in content
        ]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        if plain:
            text = "".join(one if isinstance(one, str) else "<IMG_CONTEXT>" for one in content)
        views: list[Tensor] = []
        for one in content:
            if isinstance(one, Image.Image):
                found = self.images([one], return_tensors="pt")
                views.append(found["pixel_values"])
                written = InternVLProcessor.replace_image_token(self.own, found, 0)
                text = text.replace("<IMG_CONTEXT>", written.replace("CONTEXT", "#"), 1)
            elif isinstance(one, list):
                found = self.images(one, crop_to_patches=False, return_tensors="pt")
                views.append(found["pixel_values"])
                films = {"pixel_values_videos": found["pixel_values"][None]}
                written = InternVLProcessor.replace_video_token(self.own, films, 0)
                text = text.replace("<video>", written.replace("CONTEXT", "#"), 1)
        ids = self.tokenizer(text.replace("<IMG_#>", "<IMG_CONTEXT>"), return_tensors="pt")
        return {**ids, **({"pixel_values": torch.cat(views)} if views else {})}


def save_internvl(
    folder: Path,
    text: Any = None,
    vision: dict[str, Any] | None = None,
    *,
    tied: bool = False,
    layer: int = -1,
) -> tuple[InternVLForConditionalGeneration, Processor]:
    """Write a model with its tokenizer, chat template and image processor; return the peers."""
    tokenizer = fast_tokenizer()
    text = text or Qwen2Config(**TEXT)
    text.vocab_size, text.tie_word_embeddings = len(tokenizer), tied
    config = InternVLConfig(
        text_config=text,
        vision_config=InternVLVisionConfig(**VISION | (vision or {})),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(TILE // PATCH // 2) ** 2,
        vision_feature_layer=layer,
        tie_word_embeddings=tied,
    )
    peer = InternVLForConditionalGeneration(config)
    randomized(peer)
    if tied:
        peer.tie_weights()
    peer.save_pretrained(folder)
    processor = Processor(tokenizer)
    tokenizer.save_pretrained(folder)
    processor.images.save_pretrained(folder)
    return peer, processor
