"""Parts that TinyLLaVA's config.json only names: language models, towers, image sizing.

The original fetches these from the hub; here they are data, by the last part of the name (authors
trained from copies of their own). Holds what each published config.json sets beyond its class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Any

from visavis.checkpoints.llava.config import KNOWN_TOWERS
from visavis.checkpoints.tinyllava.connectors import (
    connector_config,
    connector_rows,
    ignored_names,
)
from visavis.checkpoints.transformers.config_reader import Json, require, section, without_nulls
from visavis.checkpoints.transformers.language_models import decoder_config, decoder_rows
from visavis.checkpoints.transformers.vision_models import vit_config
from visavis.checkpoints.transformers.weights import tower_table
from visavis.checkpoints.weight_mapping import MappingRow, NameTable
from visavis.errors import CheckpointError
from visavis.model.config import MixtureConfig, ViTConfig, VLMConfig

PROCESSOR = "preprocessor_config.json"


def _openelm(layers: int, width: int, head_dim: int) -> dict[str, Any]:
    return {
        "model_type": "openelm",
        "num_transformer_layers": layers,
        "model_dim": width,
        "head_dim": head_dim,
        "num_gqa_groups": 4,
        "qkv_multipliers": [0.5, 1.0],
        "ffn_multipliers": [0.5, 4.0],
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
    }


def _sizes(kind: str, width: int, ffn: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


_QWEN: dict[str, Any] = {
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
_QWEN_05B = _sizes("qwen2", 896, 4864, 24, 14, **_QWEN)
_QWEN_3B = _sizes("qwen2", 2048, 11008, 36, 16, **_QWEN)

LANGUAGE_MODELS: dict[str, Json] = {
    "apple/OpenELM-270M": _openelm(16, 1280, 64),
    "apple/OpenELM-270M-Instruct": _openelm(16, 1280, 64),
    "apple/OpenELM-450M": _openelm(20, 1536, 64),
    "apple/OpenELM-450M-Instruct": _openelm(20, 1536, 64),
    "apple/OpenELM-1_1B-Instruct": _openelm(28, 2048, 64),
    "apple/OpenELM-3B-Instruct": _openelm(36, 3072, 128),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _sizes(
        "llama", 2048, 5632, 22, 32, num_key_value_heads=4, rms_norm_eps=1e-5
    ),
    "stabilityai/stablelm-2-zephyr-1_6b": _sizes(
        "stablelm", 2048, 5632, 24, 32, vocab_size=100352, use_qkv_bias=True
    ),
    "Qwen/Qwen2-0.5B": _QWEN_05B | {"max_position_embeddings": 131072},
    "Qwen/Qwen2-0.5B-Instruct": _QWEN_05B,
    "Qwen/Qwen2.5-0.5B": _QWEN_05B,
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN_05B,
    "Qwen/Qwen2.5-3B": _QWEN_3B,
    "Qwen/Qwen2.5-3B-Instruct": _QWEN_3B,
    "google/gemma-2b-it": _sizes("gemma", 2048, 16384, 18, 8, num_key_value_heads=1),
    "microsoft/phi-2": _sizes("phi", 2560, 10240, 32, 32, partial_rotary_factor=0.4),
}
# Qwen2's chat format depends on which of the two it was; that of other families does not.
QWEN2_TURNS = {
    PurePath(name).name: f"tinyllava_qwen2_{'instruct' if name.endswith('Instruct') else 'base'}"
    for name in LANGUAGE_MODELS
    if LANGUAGE_MODELS[name]["model_type"] == "qwen2"
}

_DINOV2: dict[str, Any] = {"model_type": "dinov2", "image_size": 518}
TOWERS: dict[str, Json] = {
    **{name: vision for name, (vision, _) in KNOWN_TOWERS.items()},
    "openai/clip-vit-base-patch16": {"model_type": "clip_vision_model", "patch_size": 16},
    "facebook/dinov2-base": _DINOV2,
    "facebook/dinov2-large": _DINOV2
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
DINOV2_PIXELS = 224  # what its processor cuts out, whatever its positions were learned on


def known(name: str, table: dict[str, Json], what: str, setting: str) -> Json:
    """Return the settings of a published part.

    Args:
        name: on the hub, or a path that ends in the same.
        what: the part, for people.
        setting: where config.json would hold the settings themselves.

    Raises:
        CheckpointError: none is known by that name.
    """
    last = PurePath(name).name
    found = next((table[one] for one in table if PurePath(one).name == last), None)
    if found is None:
        raise CheckpointError(
            f"config.json says of the {what} only that it is {name!r}, expected its settings "
            f"under {setting}, or one of {', '.join(table)}; copy what that model's own "
            f"config.json says into {setting}."
        )
    return found


def image_processor(vision: Json, size: int) -> dict[str, Any]:
    """Return the preprocessor_config.json that towers of a kind are published with.

    Args:
        vision: a vision config.json, `model_type` included.
        size: pixels of its images.
    """
    square = {"height": size, "width": size}
    if vision["model_type"] == "siglip_vision_model":
        return {"image_processor_type": "SiglipImageProcessor", "size": square}
    clip = {"image_processor_type": "CLIPImageProcessor", "crop_size": square}
    if vision["model_type"] == "clip_vision_model":
        return {**clip, "size": {"shortest_edge": size}}
    return {
        **clip,
        "size": {"shortest_edge": size * 256 // 224},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


# The older repositories' classes: the language model within.
OLD_CLASSES = {
    "TinyLlavaLlamaForCausalLM": "llama",
    "TinyLlavaStablelmForCausalLM": "stablelm",
    "TinyLlavaPhiForCausalLM": "phi",
}
OLD_STABLELM = {"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"}
# The chat format that each language model is trained with.
TURNS = {
    "llama": "tinyllava_llama",
    "openelm": "tinyllava_llama",
    "phi": "tinyllava_phi",
    "stablelm": "tinyllava_phi",
    "gemma": "tinyllava_gemma",
}
TURNS_SETTING = "conv_version"  # the original's word for it on the command line; ours writes it
MIXTURE = "mof"


@dataclass(frozen=True)
class Places:
    """Where the parts hang in one generation's tensor names."""

    language_model: str
    head: str
    tower: str
    connector: str


PLACES = Places(
    "language_model.", "language_model.lm_head", "vision_tower._vision_tower.",
    "connector._connector",
)  # fmt: skip
OLD_PLACES = Places("", "lm_head", "model.vision_tower.vision_tower.", "model.mm_projector")


def is_old(config: Json) -> bool:
    """Return whether a config.json is one of the older repositories'."""
    classes = config.get("architectures")
    return isinstance(classes, list) and bool(classes) and str(classes[0]) in OLD_CLASSES


def modern(config: Json) -> dict[str, Any]:
    """Return an older repository's config as the Factory would have it.

    Its SigLIP runs without its last block, keeps every patch and does not look at the settings of
    which features to take.
    """
    given = without_nulls(config)
    kind = OLD_CLASSES[config["architectures"][0]]
    text = {OLD_STABLELM.get(key, key): value for key, value in given.items()}
    if kind == "stablelm":
        text = {"use_qkv_bias": True} | text
    tower = str(given.get("mm_vision_tower"))
    vision = dict(known(_tower_name(tower), TOWERS, "vision tower", "vision_config"))
    siglip = vision["model_type"] == "siglip_vision_model"
    if siglip:
        vision["num_hidden_layers"] -= 1
    layer, strategy = given.get("mm_vision_select_layer", -2), "cls_patch"
    if not siglip:
        strategy = given.get("mm_vision_select_feature", "patch")
    kinds = ("identity", "linear", *(f"mlp{n}x_gelu" for n in range(1, 10)))
    connector = given.get("mm_projector_type", "linear")
    require("mm_projector_type", connector, connector in kinds, f"one of {', '.join(kinds)}")
    return {
        "text_config": text | {"model_type": kind},
        "vision_config": vision,
        "connector_type": connector,
        "vision_feature_layer": -1 if siglip else layer,
        "vision_feature_select_strategy": strategy,
        "image_aspect_ratio": given.get("image_aspect_ratio", "square"),
    }


def _tower_name(name: str) -> str:
    """Return the tower that an older repository names: its own copies of SigLIP are so400m."""
    copy = PurePath(name).name
    if copy in ("TinyLLaVA-3.1B-SigLIP", "TinyLLaVA-2.0B-SigLIP", "TinyLLaVA-1.5B-SigLIP"):
        return "google/siglip-so400m-patch14-384"
    return name


def text_config(config: Json) -> Json:
    """Return the language model's config; what it leaves out stands at its class's default.

    Raises:
        CheckpointError: config.json holds none, and names none that is known.
    """
    found = without_nulls(section(config, "text_config"))
    if found:
        return {"model_type": "llama"} | found
    name = str(config.get("llm_model_name_or_path"))
    return known(name, LANGUAGE_MODELS, "language model", "text_config")


def vision_configs(config: Json) -> tuple[Json, ...]:
    """Return the config of the vision tower, or of both of a mixture.

    Raises:
        CheckpointError: config.json holds none, and names none that is known.
    """
    name = str(config.get("vision_model_name_or_path"))
    found = without_nulls(section(config, "vision_config"))
    first = {"model_type": "clip_vision_model"} | found if found else None
    if first is None:
        first = dict(known(_hub(name), TOWERS, "vision tower", "vision_config"))
    if name.partition(":")[0] != MIXTURE:
        return (first,)
    second = section(config, "vision_config2")  # ours; the original fetches it
    name = _hub(str(config.get("vision_model_name_or_path2")))
    return first, second or known(name, TOWERS, "second vision tower", "vision_config2")


def _hub(name: str) -> str:
    """Return the name on the hub: what stands before a colon is the class."""
    return name.rpartition(":")[2]


def vlm_config(
    config: Json, text: Json, visions: Sequence[Json], image_size: int | None = None
) -> VLMConfig:
    """Return the model that the configs describe.

    Args:
        image_size: pixels of a side of the images; None: the first tower's own.

    Raises:
        CheckpointError: a setting that no part of ours has.
    """
    decoder = decoder_config(text)
    tower = _tower([vit_config(vision) for vision in visions], image_size)
    aspect = config.get("image_aspect_ratio") or "square"
    require("image_aspect_ratio", aspect, aspect in ("square", "pad"), "'square' or 'pad'")
    strategy = config.get("vision_feature_select_strategy") or "patch"
    fits = strategy in ("patch", "cls_patch")
    require("vision_feature_select_strategy", strategy, fits, "'patch' or 'cls_patch'")
    layer: Any = config.get("vision_feature_layer", -2)
    first = tower.first if isinstance(tower, MixtureConfig) else tower
    one = isinstance(layer, int) and -first.num_layers - 1 <= layer <= first.num_layers
    require("vision_feature_layer", layer, one, f"one number of {first.num_layers} layers")
    mixed = isinstance(tower, MixtureConfig)
    kind = config.get("connector_type")
    require("connector_type", kind, (kind == "mof_mlp") == mixed, "mof_mlp with two towers alone")
    drops = strategy == "patch"
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=connector_config(config, tower.width, decoder.width),
        image_token_id=0,  # this layout has no placeholder token; images are found by position
        select_layer=layer,
        select_feature="patch" if drops and tower.num_prefix_tokens else "class_patch",
        drop_first_token=drops and not tower.num_prefix_tokens,
    )


def _tower(towers: Sequence[ViTConfig], image_size: int | None) -> ViTConfig | MixtureConfig:
    """Return the tower, or the mixture of two, for images of one size."""
    size = image_size or towers[0].image_size
    sized = [replace(tower, image_size=size) for tower in towers]
    for tower in sized:
        extra = tower.num_prefix_tokens
        require("num_register_tokens", extra - 1, extra <= 1, "no registers before the patches")
    if len(sized) == 1:
        return sized[0]
    first, second = sized
    for name, found, wanted in (
        ("hidden_size", second.width, first.width),
        ("patch_size", second.patch_size, first.patch_size),
        ("class_token", second.class_token, first.class_token),
    ):
        require(f"{name} of the second tower", found, found == wanted, f"the first's {wanted}")
    return MixtureConfig(first, second)


def name_table(text: Json, visions: Sequence[Json], ours: VLMConfig, places: Places) -> NameTable:
    """Return the names of a layout's tensors."""
    assert ours.connector is not None
    if isinstance(ours.tower, MixtureConfig):
        halves = [
            (tower_table(vision, f"{places.tower}{name}."), f"tower.{half}.")
            for vision, name, half in zip(
                visions, ("clip", "dinov2"), ("first", "second"), strict=True
            )
        ]
    else:
        halves = [(tower_table(visions[0], places.tower), "tower.")]
    rows: list[MappingRow] = [*decoder_rows(text["model_type"], places.language_model, places.head)]
    rows += connector_rows(ours.connector, places.connector)
    ignored = ["**.rotary_emb.inv_freq", *ignored_names(ours.connector, places.connector)]
    aliases: list[tuple[str, str]] = []
    for table, prefix in halves:
        rows += [replace(row, ours=row.ours.replace("tower.", prefix, 1)) for row in table.rows]
        aliases += table.aliases
        ignored += table.ignored
    if ours.decoder.tied_head:
        ignored.append(f"{places.head}.weight")
    return NameTable(tuple(rows), tuple(aliases), tuple(ignored))


def turns_of(config: Json, text: Json) -> str:
    """Return the name of the chat format that the config settles, empty if it does not."""
    kind = text["model_type"]
    if kind == "qwen2":
        return QWEN2_TURNS.get(PurePath(str(config.get("llm_model_name_or_path"))).name, "")
    return TURNS.get(kind, "")
