"""Tiny folders of Qwen2-VL, Qwen2.5-VL and Qwen3-VL in transformers' layout, and what their peers
take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.fakes import byte_tokenizer
from tests.parity.peers import randomized
from visavis.model.image_input import ImageGrid

SPECIALS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
START, END, IMAGE, VIDEO = 260, 261, 262, 263  # after the byte tokenizer's own
PATCH = 4  # 8 x 8 pixels a token
SIZES: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}
VISION: dict[str, Any] = {
    "depth": 3,
    "embed_dim": 48,
    "hidden_size": 32,
    "num_heads": 3,
    "mlp_ratio": 2,
    "patch_size": PATCH,
}
WINDOWED: dict[str, Any] = {  # windows of 2 x 2 tokens
    "depth": 4,
    "hidden_size": 48,
    "out_hidden_size": 32,
    "num_heads": 3,
    "intermediate_size": 56,
    "patch_size": PATCH,
    "window_size": 4 * PATCH,
    "fullatt_block_indexes": [1, 3],
    "tokens_per_second": 2,
}
TEXT_3: dict[str, Any] = SIZES | {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
}
VISION_3: dict[str, Any] = {  # positions of a table of 5 x 5
    "depth": 4,
    "hidden_size": 48,
    "out_hidden_size": 32,
    "num_heads": 3,
    "intermediate_size": 56,
    "patch_size": PATCH,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
}
VIDEO_3: dict[str, Any] = {  # what transformers writes with torchvision, which is not needed here
    "video_processor_type": "Qwen3VLVideoProcessor",
    "size": {"shortest_edge": 256, "longest_edge": 8192},
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "fps": 2,
    "min_frames": 4,
    "max_frames": 16,
    "do_sample_frames": True,
}
# Qwen2-VL's own.
TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Qwen3-VL-Instruct's own, without its part for tools.
TEMPLATE_3 = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].content is string %}{{- messages[0].content }}{%- else %}"
    "{%- for content in messages[0].content %}{%- if 'text' in content %}"
    "{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- set image_count = namespace(value=0) %}{%- set video_count = namespace(value=0) %}"
    '{%- for message in messages %}{%- if message.role == "user" %}'
    "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.content is string %}"
    "{{- message.content }}{%- else %}{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "{%- set image_count.value = image_count.value + 1 %}"
    "{%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif content.type == 'video' or 'video' in content %}"
    "{%- set video_count.value = video_count.value + 1 %}"
    "{%- if add_vision_id %}Video {{ video_count.value }}: {% endif -%}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- elif message.role == \"assistant\" %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.content is string %}"
    "{{- message.content }}{%- else %}{%- for content_item in message.content %}"
    "{%- if 'text' in content_item %}{{- content_item.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
PROCESSOR = Qwen2VLImageProcessorPil(patch_size=PATCH, min_pixels=256, max_pixels=1600)


def save_qwen2_vl(folder: Path, **text: Any) -> Qwen2VLForConditionalGeneration:
    """Write a model with its tokenizer, chat template and image processor; return the peer."""
    config = Qwen2VLConfig(text_config=SIZES | text, vision_config=VISION, **_whole(text))
    return _saved(Qwen2VLForConditionalGeneration(config), folder)


def save_qwen2_5_vl(folder: Path, **text: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Write a Qwen2.5-VL as `save_qwen2_vl` does."""
    config = Qwen2_5_VLConfig(text_config=SIZES | text, vision_config=WINDOWED, **_whole(text))
    return _saved(Qwen2_5_VLForConditionalGeneration(config), folder)


def save_qwen3_vl(folder: Path, **text: Any) -> Qwen3VLForConditionalGeneration:
    """Write a Qwen3-VL as `save_qwen2_vl` does."""
    config = Qwen3VLConfig(text_config=TEXT_3 | text, vision_config=VISION_3, **_whole(text))
    peer = _saved(Qwen3VLForConditionalGeneration(config), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE_3)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_3))
    return peer


def _whole(text: dict[str, Any]) -> dict[str, Any]:
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    ids |= {"vision_start_token_id": START, "vision_end_token_id": END}
    return ids | {key: text[key] for key in ("tie_word_embeddings",) if key in text}


def _saved(peer: PreTrainedModel, folder: Path) -> Any:
    randomized(peer)
    peer.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return peer


def tokenizer() -> PreTrainedTokenizerFast:
    bytewise = byte_tokenizer()
    bytewise.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    found = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    found.chat_template = TEMPLATE
    return found


def noise(size: tuple[int, int], seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def peer_inputs(
    ids: list[int], visuals: list[tuple[Tensor, ImageGrid]], *, grid: bool = True
) -> dict[str, Tensor]:
    """Return what the peer takes of ids and patches; without `grid` its positions are 0, 1, 2, …"""
    kinds = {"": [v for v in visuals if not v[1].video], "s": [v for v in visuals if v[1].video]}
    found = {"input_ids": torch.tensor([ids])}
    for video, chosen in kinds.items():
        if chosen:
            name = "video" if video else "image"
            found[f"pixel_values{'_videos' * bool(video)}"] = torch.cat([p for p, _ in chosen])
            grids = [(shape.frames, shape.rows, shape.columns) for _, shape in chosen]
            found[f"{name}_grid_thw"] = torch.tensor(grids)
    if not grid:
        found["position_ids"] = torch.arange(len(ids)).expand(3, 1, -1)
    types = [1 if i == IMAGE else 2 if i == VIDEO else 0 for i in ids]
    return found | {"mm_token_type_ids": torch.tensor([types])}
