"""Tiny folders in LLaVA's original layout, their tensors renamed from transformers' by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.checkpoints.transformers_files import IMAGE_SIZE, TEXT, VISION, fast_tokenizer
from tests.parity.peers import randomized

CLASSES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM",
           "qwen2": "LlavaQwenForCausalLM"}  # fmt: skip
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def original_names(peer: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Return a model's tensors as the original code calls them."""
    tensors = {}
    for name, tensor in peer.state_dict().items():
        if name.startswith("model.language_model."):
            new = "model." + name.removeprefix("model.language_model.")
        elif name.startswith("model.vision_tower."):
            inner = name.removeprefix("model.vision_tower.").removeprefix("vision_model.")
            new = "model.vision_tower.vision_tower.vision_model." + inner
        elif name.startswith("model.multi_modal_projector."):
            new = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
            new = new.replace("multi_modal_projector.linear_2", "mm_projector.2")
        else:
            assert name == "lm_head.weight"
            new = name
        tensors[new] = tensor.clone()
    return tensors


def tiny_peer(
    text: PreTrainedConfig | None = None,
    vision: PreTrainedConfig | None = None,
    *,
    layer: int = -2,
    select: str = "default",
) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        text_config=text or LlamaConfig(**TEXT),
        vision_config=vision or CLIPVisionConfig(**VISION),
        image_token_index=0,
        vision_feature_layer=layer,
        vision_feature_select_strategy=select,
    )
    peer = LlavaForConditionalGeneration(config)
    randomized(peer)
    return peer


def save_original(
    folder: Path,
    peer: LlavaForConditionalGeneration,
    *,
    with_tower: bool = True,
    with_words: bool = True,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Write a model as LLaVA 1.5 does; return its tensors by their original names."""
    folder.mkdir(parents=True, exist_ok=True)
    text = peer.config.text_config
    config = text.to_dict() | {
        "architectures": [CLASSES[text.model_type]],
        "model_type": "llava",
        "mm_vision_tower": "vision_tower",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": VISION["hidden_size"],
        "mm_vision_select_layer": peer.config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
    }
    write_config(folder, config | settings)
    tensors = original_names(peer)
    kept = {n: t for n, t in tensors.items() if with_tower or "vision_tower" not in n}
    save_file(kept, folder / "model.safetensors")
    if with_words:
        fast_tokenizer().save_pretrained(folder)
    return tensors


def write_config(folder: Path, config: dict[str, Any]) -> None:
    text = json.dumps({k: v for k, v in config.items() if v is not None}, default=str)
    (folder / "config.json").write_text(text, encoding="utf-8")


def save_tower(
    folder: Path, peer: LlavaForConditionalGeneration, processor: Any = None
) -> dict[str, torch.Tensor]:
    """Write the vision tower alone, as the hub's CLIP folders hold it."""
    peer.model.vision_tower.save_pretrained(folder)
    processor = processor or CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE
    )
    processor.save_pretrained(folder)
    return peer.model.vision_tower.state_dict()
