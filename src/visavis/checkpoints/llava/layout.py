"""LLaVA's original layout (1.0, 1.5): its config.json as our config, its tensor names as ours.

One config.json holds the language model's settings and `mm_…` ones; tensors are called
`model.layers…`, `model.mm_projector…`, `model.vision_tower.vision_tower.vision_model…`. Takes
parsed JSON and opens no file (see `folder.py`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from visavis.checkpoints.names import NameTable, Row
from visavis.checkpoints.transformers.config import CLIP, LLAVA_TOWER, SIGLIP, vit_config
from visavis.checkpoints.transformers.decoders import decoder_config
from visavis.checkpoints.transformers.names import decoder_rows, tower_table
from visavis.checkpoints.transformers.settings import Json, require, without_nulls
from visavis.errors import CheckpointError
from visavis.model.config import ConnectorConfig, VLMConfig

TOWER_PREFIX = "model.vision_tower.vision_tower."
# What the original classes build on. Their model_type is often just "llava", so classes go first.
CLASSES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
    "LlavaGemmaForCausalLM": "gemma",
}
TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_gemma": "gemma",
}
# Chat formats that follow from the config. LLaVA of Llama was trained with several; which, no file
# says, except that LLaVA 1.5's recipe (padded pictures, an MLP) was only ever Vicuna's.
TURNS = {"mistral": "mistral_instruct", "qwen2": "qwen_1_5", "gemma": "gemma_instruct"}

# Towers that checkpoints name and do not bring: (config.json, preprocessor_config.json).
_L14 = LLAVA_TOWER | {"hidden_act": CLIP["hidden_act"]}
_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": SIGLIP["hidden_act"],
}


def _clip_processor(size: int) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
    }


KNOWN_TOWERS: dict[str, tuple[Json, Json]] = {
    "openai/clip-vit-large-patch14": (_L14 | {"image_size": 224}, _clip_processor(224)),
    "openai/clip-vit-large-patch14-336": (_L14, _clip_processor(336)),
    "google/siglip-so400m-patch14-384": (
        _SO400M,
        {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 384, "width": 384},
        },
    ),
}


def is_llava(config: Json) -> bool:
    """Return whether a config.json is one of this layout."""
    return "mm_vision_tower" in config


def text_config(config: Json) -> dict[str, Any]:
    """Return the language model's config within the whole one.

    Raises:
        CheckpointError: it is none that we read.
    """
    classes = config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else None
    kind = config.get("model_type")
    found = CLASSES.get(str(named)) if named else TYPES.get(str(kind))
    if found is None:
        raise CheckpointError(
            f"config.json has model_type {kind!r} and architectures {classes!r}; in LLaVA's "
            f"original layout {', '.join(CLASSES)} are read, use a checkpoint of one of these."
        )
    return {**config, "model_type": found}


def vlm_config(config: Json, text: Json, vision: Json) -> VLMConfig:
    """Return the model that the three configs describe.

    Args:
        config: the checkpoint's, for its `mm_…` settings.
        text: the language model's.
        vision: the vision tower's.

    Raises:
        CheckpointError: a setting that no part of ours has.
    """
    decoder, tower = decoder_config(text), vit_config(vision)
    given = without_nulls(config)
    aspect = given.get("image_aspect_ratio", "square")
    require(
        "image_aspect_ratio",
        aspect,
        aspect in ("square", "pad"),
        "'square' or 'pad' (those of LLaVA 1.0 and 1.5)",
    )
    for name, plain in (
        ("mm_patch_merge_type", "flat"),
        ("mm_use_im_start_end", False),
        ("mm_resampler_type", None),
        ("use_mm_proj", True),
        ("s2", False),
    ):
        value = given.get(name, plain)
        require(name, value, value == plain, f"{plain!r} or no such setting")
    width = given.get("mm_hidden_size", tower.width)
    require("mm_hidden_size", width, width == tower.width, f"the vision tower's {tower.width}")
    layer: Any = given.get("mm_vision_select_layer", -2)
    feature = "patch"
    if tower.class_token:
        feature = given.get("mm_vision_select_feature", "patch")
        known = feature in ("patch", "cls_patch")
        require("mm_vision_select_feature", feature, known, "'patch' or 'cls_patch'")
        one = isinstance(layer, int) and -tower.num_layers - 1 <= layer <= tower.num_layers
        require("mm_vision_select_layer", layer, one, f"one number of {tower.num_layers} layers")
    else:  # SigLIP: its last block is cut off, and the setting is not looked at
        require("num_hidden_layers", tower.num_layers, tower.num_layers > 1, "at least 2")
        tower, layer = replace(tower, num_layers=tower.num_layers - 1), -1
    kind = given.get("mm_projector_type", "linear")
    mlp = re.fullmatch("mlp([1-9])x_gelu", str(kind))
    require("mm_projector_type", kind, kind == "linear" or bool(mlp), "'linear' or 'mlpNx_gelu'")
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig(
            "mlp" if mlp else "linear",
            tower.width,
            decoder.width,
            depth=int(mlp[1]) if mlp else 1,
        ),
        image_token_id=0,  # this layout has no placeholder token; images are found by position
        select_layer=layer,
        select_feature="patch" if feature == "patch" else "class_patch",
    )


def name_table(text: Json, vision: Json, ours: VLMConfig) -> NameTable:
    """Return the names of the layout's tensors."""
    assert ours.connector is not None and ours.tower is not None
    tower = tower_table(vision, TOWER_PREFIX)
    places = {n: f"{n}." for n in range(0, 2 * ours.connector.depth, 2)}  # ours: theirs
    if ours.connector.kind == "linear":
        places = {0: ""}
    connector = [
        Row(f"connector.layers.{place}.{tensor}", (f"model.mm_projector.{theirs}{tensor}",))
        for place, theirs in places.items()
        for tensor in ("weight", "bias")
    ]
    ignored = ["**.rotary_emb.inv_freq", *tower.ignored]
    if ours.decoder.tied_head:
        ignored.append("lm_head.weight")
    if not vit_config(vision).class_token:
        num_layers = vit_config(vision).num_layers
        ignored.append(f"{TOWER_PREFIX}vision_model.encoder.layers.{num_layers - 1}.**")
    return NameTable(
        rows=(*decoder_rows(text["model_type"], "", "lm_head"), *connector, *tower.rows),
        aliases=tower.aliases,
        ignored=tuple(ignored),
    )


def turns_of(config: Json, text: Json) -> str:
    """Return the name of the chat format that the config settles, empty if it does not."""
    recipe = (config.get("image_aspect_ratio"), config.get("mm_projector_type"))
    if text["model_type"] == "llama" and recipe == ("pad", "mlp2x_gelu"):
        return "vicuna_v1"
    return TURNS.get(text["model_type"], "")
