"""LLaVA-OneVision-1.5: its config.json and tensor names as ours.

RICE-ViT, Qwen2-VL's merger and image processor, and a Qwen3 whose positions have one axis. The
published repositories run their own code, which transformers 5 no longer loads; none of it is
needed here. Opens no file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from visavis.checkpoints.transformers.config_reader import (
    Json,
    count,
    number,
    require,
    section,
    without_nulls,
)
from visavis.checkpoints.transformers.language_models import decoder_config, decoder_rows
from visavis.checkpoints.transformers.qwen2_vl import tied_head, tower_fields, whole
from visavis.checkpoints.weight_mapping import MappingRow, NameTable
from visavis.model.config import DecoderConfig, Qwen2VLTowerConfig, VLMConfig

KIND, TEXT_KIND, VISION_KIND = "llavaonevision1_5", "LLaVAOneVision1_5_text", "rice_vit"
ARCHITECTURE = "LLaVAOneVision1_5_ForConditionalGeneration"
TEXT: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "max_window_layers": 36,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
VISION: dict[str, Any] = {
    "depth": 24,
    "hidden_size": 1024,
    "hidden_act": "gelu",
    "intermediate_size": 4096,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "layer_norm_eps": 1e-5,
    "text_hidden_size": 2560,
}


def onevision15_config(config: Json) -> VLMConfig:
    """Return the model that a config.json describes.

    Raises:
        CheckpointError: a setting that no part of ours has.
    """
    vision = VISION | without_nulls(section(config, "vision_config"))
    kind = vision.get("model_type", VISION_KIND)
    require("vision_config.model_type", kind, kind == VISION_KIND, f"{VISION_KIND!r}")
    frames = vision["temporal_patch_size"]
    require("temporal_patch_size", frames, frames == 1, "1")
    tower = Qwen2VLTowerConfig(
        **tower_fields(vision, "hidden_size"),
        ffn_width=count(vision, "intermediate_size"),
        norm_eps=number(vision, "layer_norm_eps"),
        class_token=True,
    )
    width = count(vision, "text_hidden_size")
    found = whole(config, _decoder(config), tower, "text_hidden_size", width)
    assert found.connector is not None
    return replace(found, connector=replace(found.connector, norm_eps=tower.norm_eps))


def _decoder(config: Json) -> DecoderConfig:
    nested = without_nulls(section(config, "text_config"))
    kind = str(nested.get("model_type", TEXT_KIND))
    known = kind.lower() in (TEXT_KIND.lower(), "qwen3")
    require("text_config.model_type", kind, known, f"{TEXT_KIND!r}")
    text = TEXT | nested
    rope = section(text, "rope_parameters") or section(text, "rope_scaling")
    rule = rope.get("rope_type", rope.get("type", "default"))
    require("rope_type", rule, rule in ("default", "mrope"), "'default'")
    text |= {"model_type": "qwen3", "tie_word_embeddings": tied_head(config, nested)}
    text["rope_parameters"] = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else None
    text["rope_scaling"] = None
    return decoder_config(text)


def onevision15_table(config: VLMConfig) -> NameTable:
    """Return the names of the tensors."""
    tower = config.tower
    assert isinstance(tower, Qwen2VLTowerConfig)
    axes = (3, tower.patch_size, tower.patch_size)
    rows = [
        MappingRow("tower.patch.weight", ("visual.patch_embed.proj.weight",), axes=axes),
        MappingRow("tower.class_token", ("visual.class_embedding",)),
        MappingRow("tower.class_angles", ("visual.class_pos_emb",), unit_axes=1),
    ]
    block = "visual.blocks.*"
    parts = {
        "tower.pre_norm": "visual.pre_layernorm",
        "tower.blocks.*.attn_norm": f"{block}.norm1",
        "tower.blocks.*.qkv": f"{block}.attn.qkv",
        "tower.blocks.*.out": f"{block}.attn.proj",
        "tower.blocks.*.ffn_norm": f"{block}.norm2",
        "tower.blocks.*.up": f"{block}.mlp.fc1",
        "tower.blocks.*.down": f"{block}.mlp.fc2",
        "connector.norm": "visual.merger.ln_q",
        "connector.layers.0": "visual.merger.mlp.0",
        "connector.layers.2": "visual.merger.mlp.2",
    }
    for ours, theirs in parts.items():
        rows += [MappingRow(f"{ours}.{kind}", (f"{theirs}.{kind}",)) for kind in ("weight", "bias")]
    tied = ("lm_head.weight",) if config.decoder.tied_head else ()
    return NameTable(
        rows=(*decoder_rows("qwen3", "", "lm_head"), *rows),
        aliases=(("model.visual.**", "visual.**"), ("model.language_model.**", "model.**")),
        ignored=("**.rotary_emb.inv_freq", "visual.rotary_pos_emb.inv_freq", *tied),
    )


def onevision15_json(config: VLMConfig, text: Json) -> dict[str, Any]:
    """Return the config.json of a model; the inverse of `onevision15_config`.

    Args:
        text: config.json of its language model.
    """
    tower = config.tower
    assert isinstance(tower, Qwen2VLTowerConfig)
    own = {key: value for key, value in text.items() if key != "architectures"}
    activations = {"gelu_tanh": "gelu_pytorch_tanh"}  # as the library calls them
    return {
        "architectures": [ARCHITECTURE],
        "model_type": KIND,
        "text_config": {**own, "model_type": TEXT_KIND},
        "vision_config": {
            "model_type": VISION_KIND,
            "depth": tower.num_layers,
            "embed_dim": tower.width,
            "hidden_size": tower.width,
            "intermediate_size": tower.ffn_width,
            "num_heads": tower.num_heads,
            "in_channels": 3,
            "patch_size": tower.patch_size,
            "spatial_merge_size": tower.merge,
            "temporal_patch_size": tower.temporal_size,
            "hidden_act": activations.get(tower.activation, tower.activation),
            "layer_norm_eps": tower.norm_eps,
            "text_hidden_size": config.decoder.width,
        },
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "tie_word_embeddings": config.decoder.tied_head,
    }
