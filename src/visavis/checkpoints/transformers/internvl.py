"""InternVL3 and InternVL3.5 of transformers (the `-HF` repositories): config.json, tensor names and
image processor as ours.

An InternViT, a fold of neighbouring patches, a norm and an MLP of two layers, and a language model
of `language_models.py`. Opens no file. The layout of the original repositories (`internvl_chat`),
which runs their own code, is not read.
"""

from __future__ import annotations

from typing import Any

from visavis.checkpoints.transformers.config_reader import (
    Json,
    count,
    number,
    require,
    section,
    vit_fields,
    without_nulls,
)
from visavis.checkpoints.transformers.language_models import decoder_config, decoder_rows
from visavis.checkpoints.transformers.processor import MAX_TILES, common_fields
from visavis.checkpoints.weight_mapping import MappingRow, NameTable
from visavis.errors import CheckpointError
from visavis.model.config import ConnectorConfig, ViTConfig, VLMConfig
from visavis.processing.config import ImageProcessorConfig, RatioConfig, VideoConfig

KIND, ORIGINAL = "internvl", "internvl_chat"
CLASS, VIDEO_CLASS = "GotOcr2ImageProcessor", "InternVLVideoProcessor"
PLACEHOLDER = "<IMG_CONTEXT>"
# Names that its processor reads from the tokenizer.
TOKENS = {
    "context_image_token": PLACEHOLDER,
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "attention_bias": False,
    "use_qk_norm": False,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "image_size": 448,
    "patch_size": 14,
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
}
SETTINGS: dict[str, Any] = {
    "image_token_id": 151667,
    "downsample_ratio": 0.5,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
PROCESSOR: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": {"height": 384, "width": 384},
    "min_patches": 1,
    "max_patches": 12,
}
FRAMES = 8  # as its model cards do, where files say nothing
NORMS = {"layer_norm": "layer", "rms_norm": "rms"}


def internvl_config(config: Json) -> VLMConfig:
    """Return the model that a config.json describes.

    Raises:
        CheckpointError: a setting that no part of ours has.
    """
    text = {"model_type": "qwen2"} | section(config, "text_config")
    outer = config.get("tie_word_embeddings")
    text["tie_word_embeddings"] = bool(
        text.get("tie_word_embeddings", True) if outer is None else outer
    )
    decoder, tower = decoder_config(text), _tower(section(config, "vision_config"))
    config = SETTINGS | without_nulls(config)
    ratio = number(config, "downsample_ratio")
    fold = round(1 / ratio)
    whole = abs(ratio * fold - 1) < 1e-6 and tower.grid % fold == 0
    require("downsample_ratio", ratio, whole, f"1 through a divisor of {tower.grid} patches")
    act = config["projector_hidden_act"]
    require("projector_hidden_act", act, act == "gelu", "'gelu'")
    select = config["vision_feature_select_strategy"]
    require("vision_feature_select_strategy", select, select == "default", "'default'")
    layer: Any = config["vision_feature_layer"]
    one = isinstance(layer, int) and -tower.num_layers - 1 <= layer < tower.num_layers
    require("vision_feature_layer", layer, one, f"-{tower.num_layers + 1} to -1")
    found: Any = config["image_token_id"]
    known = isinstance(found, int) and 0 <= found < decoder.vocab_size
    require("image_token_id", found, known, f"0 to {decoder.vocab_size - 1}")
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig(
            "mlp", tower.width, decoder.width, depth=2, shuffle=fold, input_norm=True
        ),
        image_token_id=found,
        select_layer=layer,
    )


def _tower(vision: Json) -> ViTConfig:
    vision = VISION | without_nulls(vision)
    vision |= {name: _side(vision, name) for name in ("image_size", "patch_size")}
    fields, norm = vit_fields(vision), vision["norm_type"]
    require("norm_type", norm, norm in NORMS, " or ".join(NORMS))
    positions = vision["use_absolute_position_embeddings"]
    require("use_absolute_position_embeddings", positions, positions is True, "true")
    pooled = bool(vision["use_mean_pooling"])
    return ViTConfig(
        **fields,
        ffn_width=count(vision, "intermediate_size"),
        patch_bias=True,
        post_norm=not pooled,
        norm_output=not pooled,
        layer_scale=True,
        norm="rms" if norm == "rms_norm" else "layer",
        qkv_bias=bool(vision["attention_bias"]),
        qk_norm=bool(vision["use_qk_norm"]),
    )


def _side(vision: Json, name: str) -> int:
    """Return the side of a square, given as one number or two."""
    value: Any = vision[name]
    if isinstance(value, list | tuple):
        require(name, value, len(value) == 2 and value[0] == value[1], "a square")
        vision = {name: value[0]}
    return count(vision, name)


def internvl_table(config: Json, ours: VLMConfig) -> NameTable:
    """Return the names of the tensors."""
    kind = section(config, "text_config").get("model_type", "qwen2")
    embeddings, layer = "vision_tower.embeddings", "vision_tower.encoder.layer.*"
    block = "tower.blocks.*"
    rows = [
        *decoder_rows(kind, "language_model.", "language_model.lm_head"),
        MappingRow("tower.class_token", (f"{embeddings}.cls_token",), unit_axes=2),
        MappingRow("tower.positions", (f"{embeddings}.position_embeddings",), unit_axes=1),
        MappingRow(f"{block}.attn_scale", (f"{layer}.lambda_1",)),
        MappingRow(f"{block}.ffn_scale", (f"{layer}.lambda_2",)),
    ]
    parts = {
        "tower.patch": f"{embeddings}.patch_embeddings.projection",
        "tower.post_norm": "vision_tower.layernorm",
        f"{block}.attn_norm": f"{layer}.layernorm_before",
        f"{block}.q_norm": f"{layer}.attention.q_norm",
        f"{block}.k_norm": f"{layer}.attention.k_norm",
        f"{block}.out": f"{layer}.attention.projection_layer",
        f"{block}.ffn_norm": f"{layer}.layernorm_after",
        f"{block}.up": f"{layer}.mlp.fc1",
        f"{block}.down": f"{layer}.mlp.fc2",
        "connector.norm": "multi_modal_projector.layer_norm",
        "connector.layers.0": "multi_modal_projector.linear_1",
        "connector.layers.2": "multi_modal_projector.linear_2",
    }
    for tensor in ("weight", "bias"):
        qkv = tuple(f"{layer}.attention.{part}_proj.{tensor}" for part in "qkv")
        rows.append(MappingRow(f"{block}.qkv.{tensor}", qkv, ("width", "width", "width")))
        rows += [
            MappingRow(f"{own}.{tensor}", (f"{name}.{tensor}",)) for own, name in parts.items()
        ]
    tied = ("language_model.lm_head.weight",) if ours.decoder.tied_head else ()
    return NameTable(
        rows=tuple(rows),
        aliases=(
            ("lm_head.weight", "language_model.lm_head.weight"),
            ("model.language_model.**", "language_model.model.**"),
            ("model.multi_modal_projector.**", "multi_modal_projector.**"),
            ("model.vision_tower.**", "vision_tower.**"),
        ),
        ignored=("**.rotary_emb.inv_freq", f"{embeddings}.mask_token", *tied),
    )


def internvl_processor(image: Json, video: Json | None) -> ImageProcessorConfig:
    """Return how images and videos are cut, sized and normalised.

    Args:
        image: settings of the image processor.
        video: those of the video processor, if a folder has any.

    Raises:
        CheckpointError: a step that ours does not do.
    """
    kind = str(image.get("image_processor_type"))
    known = kind.removesuffix("Fast").removesuffix("Pil") == CLASS
    require("image_processor_type", kind, known, f"{CLASS!r}")
    config = PROCESSOR | without_nulls(image)
    fields, tile = common_fields(config), _square(config)
    least, most = count(config, "min_patches"), count(config, "max_patches")
    require("max_patches", most, least <= most <= MAX_TILES, f"{least} to {MAX_TILES}")
    filmed = config | without_nulls(video or {})
    frames = count({"num_frames": FRAMES} | filmed, "num_frames")
    side, own = _square(filmed), common_fields(filmed)
    require("size of videos", side, side == tile, f"{tile}, as of images")
    require("the pixels of videos", own, own == fields, f"{fields}, as of images")
    return ImageProcessorConfig(
        tile,
        "ratio",
        **fields,
        ratio=RatioConfig(least, most),
        video=VideoConfig(frames, sampling="internvl", max_frames=max(frames, 128)),
    )


def _square(config: Json) -> int:
    size = section(config, "size")
    same = size.get("height") == size.get("width")
    require("size", size, same, "a square: the same height and width")
    return count(size, "height")


def refuse_original(config: Json) -> VLMConfig:
    """Refuse a folder in the original layout.

    Raises:
        CheckpointError: always; the message names the repository to take.
    """
    raise CheckpointError(
        f"config.json has model_type {ORIGINAL!r}, the layout of InternVL's original repositories, "
        f"which runs their own code; expected {KIND!r}: take the repository whose name ends in -HF "
        "(InternVL3_5-1B-HF for InternVL3_5-1B), which has the same weights"
    )


def internvl_json(config: VLMConfig, text: Json) -> dict[str, Any]:
    """Return the config.json of an InternVL; the inverse of `internvl_config`.

    Args:
        text: config.json of its language model.
    """
    tower, connector = config.tower, config.connector
    assert isinstance(tower, ViTConfig) and connector is not None
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": KIND,
        "image_token_id": config.image_token_id,
        "image_seq_length": (tower.grid // connector.shuffle) ** 2,
        "downsample_ratio": 1 / connector.shuffle,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.decoder.tied_head,
        "text_config": dict(text),
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": tower.width,
            "intermediate_size": tower.ffn_width,
            "num_hidden_layers": tower.num_layers,
            "num_attention_heads": tower.num_heads,
            "attention_bias": tower.qkv_bias,
            "use_qk_norm": tower.qk_norm,
            "image_size": [tower.image_size] * 2,
            "patch_size": [tower.patch_size] * 2,
            "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(
                tower.activation, tower.activation
            ),
            "layer_norm_eps": tower.norm_eps,
            "norm_type": {"layer": "layer_norm", "rms": "rms_norm"}[tower.norm],
            "use_mean_pooling": not tower.norm_output,
        },
    }


def ratio_json(config: ImageProcessorConfig) -> dict[str, Any]:
    """Return the settings of an image processor beyond those that all of them have."""
    assert config.ratio is not None
    return {
        "image_processor_type": CLASS,
        "size": {"height": config.size, "width": config.size},
        "crop_to_patches": True,
        "min_patches": config.ratio.min_tiles,
        "max_patches": config.ratio.max_tiles,
    }


def ratio_video_json(config: ImageProcessorConfig, image: Json) -> dict[str, Any]:
    """Return the settings of a video processor.

    Args:
        image: those of the image processor.
    """
    assert config.video is not None
    own = ("image_processor_type", "crop_to_patches", "min_patches", "max_patches")
    kept = {name: image[name] for name in image if name not in own}
    return kept | {"video_processor_type": VIDEO_CLASS, "num_frames": config.video.frames}
