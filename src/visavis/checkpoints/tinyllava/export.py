"""A loaded model as a TinyLLaVA repository: one folder, the Factory's names.

    config.json  generation_config.json  model.safetensors (or shards and their index)
    tokenizer.json  tokenizer_config.json  preprocessor_config.json

What is written is read again by `load.py` and must come out as the very model that was asked
for. Two settings are ours, and the original passes over them: `conv_version`, the chat format, and
`vision_config2`, the second tower's config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from visavis.checkpoints.checkpoint import (
    Checkpoint,
    Written,
    whole_state,
    write_json,
    write_tensors,
    write_words,
)
from visavis.checkpoints.tinyllava.config import (
    LANGUAGE_MODELS,
    MIXTURE,
    PLACES,
    PROCESSOR,
    TOWERS,
    TURNS_SETTING,
    name_table,
    turns_of,
    vlm_config,
)
from visavis.checkpoints.tinyllava.connectors import connector_type
from visavis.checkpoints.transformers.config_reader import Json
from visavis.checkpoints.transformers.export import lost_settings
from visavis.checkpoints.transformers.export_config import decoder_json, inexpressible, tower_json
from visavis.checkpoints.transformers.export_processor import processor_json
from visavis.checkpoints.transformers.language_models import decoder_config
from visavis.checkpoints.transformers.vision_models import vit_config
from visavis.checkpoints.transformers.weights import write_as
from visavis.errors import CheckpointError
from visavis.model.config import DecoderConfig, MixtureConfig, ViTConfig, VLMConfig
from visavis.processing.chat_formats import CHAT_FORMATS

IGNORE_INDEX, IMAGE_TOKEN_INDEX = -100, -200  # the original's marks in labels and ids


def write_tinyllava(loaded: Checkpoint, folder: Path, *, progress: bool = False) -> Written:
    """Write a loaded model; all tensors in the type that its matmuls compute in.

    Raises:
        CheckpointError: TinyLLaVA does not have a part of the model, or cannot store its chat
            template; nothing is written.
    """
    config, profile = loaded.vlm.config, loaded.profile
    if profile.jinja and not profile.chat_template:
        raise CheckpointError(
            f"{loaded.name} has a jinja chat template of its own, expected a named chat format: "
            "TinyLLaVA's config.json stores only the name of one, so the written model would be "
            "asked in another format. Name the format that the model was trained with "
            "(`--chat-template`), one of: "
            f"{', '.join(sorted(CHAT_FORMATS))}; or export to transformers or native."
        )
    data, text, visions = config_json(config)
    table = name_table(text, visions, config, PLACES)
    dtype = loaded.vlm.decoder.dtype
    data["torch_dtype"] = str(dtype).removeprefix("torch.")
    assert loaded.processor is not None
    processor = processor_json(loaded.processor)
    data["image_aspect_ratio"] = "pad" if loaded.processor.resize == "pad" else "square"
    lost = lost_settings(replace(profile, chat_template=""))
    if profile.chat_template != turns_of(data, text):
        data[TURNS_SETTING] = profile.chat_template
    folder.mkdir(parents=True, exist_ok=True)
    files = [write_json(folder / "config.json", data), write_json(folder / PROCESSOR, processor)]
    files += write_words(
        folder, loaded.tokenizer, loaded.specials, context_length=config.decoder.context_length
    )
    tensors = write_as(config, table, whole_state(loaded.vlm))
    files += write_tensors(folder, tensors, dtype=dtype, progress=progress)
    return Written(files, lost)


def config_json(config: VLMConfig) -> tuple[dict[str, Any], Json, list[dict[str, Any]]]:
    """Return config.json, the language model's config and the towers' within it.

    Raises:
        CheckpointError: TinyLLaVA cannot represent a part, which the error names.
    """
    tower, connector = config.tower, config.connector
    if config.head is not None:
        raise inexpressible("the embedding head", "TinyLLaVA's models have none")
    if not isinstance(config.select_layer, int):
        raise inexpressible("features of several layers", "TinyLLaVA selects one")
    if connector is None or not isinstance(tower, ViTConfig | MixtureConfig):
        kind = "none" if tower is None else tower.kind
        raise inexpressible(f"the vision tower ({kind})", "TinyLLaVA has CLIP, SigLIP and DINOv2")
    text = language_model_json(config.decoder)
    towers = [tower.first, tower.second] if isinstance(tower, MixtureConfig) else [tower]
    visions = [tower_json(one) for one in towers]
    names = [_name(TOWERS, vit_config, one, "") for one in towers]
    if isinstance(tower, MixtureConfig):
        names = [f"{MIXTURE}:{name}" for name in names]
    has_prefix = tower.num_prefix_tokens > 0
    drops = config.drop_first_token or (has_prefix and config.select_feature == "patch")
    settings, described = connector_type(connector)
    data: dict[str, Any] = {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "model_type": "tinyllava",
        "llm_model_name_or_path": (
            name := _name(LANGUAGE_MODELS, decoder_config, config.decoder, text["model_type"])
        ),
        "tokenizer_name_or_path": name,
        "vision_model_name_or_path": names[0],
        "vision_model_name_or_path2": names[1] if len(names) == 2 else "",
        "hidden_size": config.decoder.width,
        "vocab_size": config.decoder.vocab_size,
        "vision_hidden_size": towers[0].width,
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "patch" if drops else "cls_patch",
        "ignore_index": IGNORE_INDEX,
        "image_token_index": IMAGE_TOKEN_INDEX,
        "tokenizer_model_max_length": config.decoder.context_length,
        "text_config": text,
        "vision_config": visions[0],
        **settings,
    }
    if len(visions) == 2:
        data["vision_config2"] = visions[1]
    ours = replace(
        config,
        image_token_id=0,
        video_token_id=-1,
        select_feature="patch" if drops and has_prefix else "class_patch",
    )
    if vlm_config(data, text, visions) != ours:
        raise inexpressible(
            f"the way from tower to tokens ({described}, {config.merge})",
            "TinyLLaVA lays one view's features through its connector, no more",
        )
    return data, text, visions


def language_model_json(config: DecoderConfig) -> dict[str, Any]:
    """Return the config.json of a language model, OpenELM's too.

    Raises:
        CheckpointError: no family is like it.
    """
    if not isinstance(config.ffn_width, tuple):
        return decoder_json(config)
    common = {
        "model_type": "openelm",
        "vocab_size": config.vocab_size,
        "max_context_length": config.context_length,
        "num_transformer_layers": config.num_layers,
        "model_dim": config.width,
        "head_dim": config.head_dim,
        "normalize_qk_projections": config.qk_norm,
        "share_input_output_layers": config.tied_head,
        "rope_freq_constant": config.rope_base,
    }
    published = {
        "num_gqa_groups": 4, "qkv_multipliers": [0.5, 1.0], "ffn_multipliers": [0.5, 4.0],
    }  # fmt: skip
    listed = {
        "num_query_heads": _list(config.num_heads),
        "num_kv_heads": _list(config.num_kv_heads),
        "ffn_multipliers": [width / config.width for width in config.ffn_width],
        "ffn_dim_divisor": 1,
    }
    found = next((common | one for one in (published, listed) if _is(common | one, config)), None)
    if found is None:
        raise inexpressible(
            "the language model", "its widths differ by layer, but not as OpenELM's"
        )
    return found


def _is(found: Json, config: DecoderConfig) -> bool:
    return decoder_config(found) == config


def _list(value: int | tuple[int, ...]) -> list[int]:
    return list(value) if isinstance(value, tuple) else [value]


def _name(
    table: Mapping[str, Json], read: Callable[[Json], Any], config: object, otherwise: str
) -> str:
    """Return the name on the hub of the published part that has this config."""
    return next((name for name, found in table.items() if read(found) == config), otherwise)
