"""Phi-3-vision and Phi-3.5-vision: config.json as our config, tensor names as ours.

Their model code was published beside the weights and never entered transformers. The language
model is a Phi-3 (its settings stand in the outer config); the tower is a CLIP that is named and not
described. Takes parsed JSON and opens no file (see `folder.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from visavis.checkpoints.llava.layout import KNOWN_TOWERS
from visavis.checkpoints.names import NameTable, Row
from visavis.checkpoints.transformers.config import vit_config
from visavis.checkpoints.transformers.decoders import decoder_config
from visavis.checkpoints.transformers.names import decoder_rows, tower_table
from visavis.checkpoints.transformers.processor import processor_config
from visavis.checkpoints.transformers.settings import Json, count, require, section, without_nulls
from visavis.model.config import ConnectorConfig, MergeConfig, VLMConfig
from visavis.processing.hd import HDConfig
from visavis.processing.images import ImageProcessorConfig

EMBEDDER = "model.vision_embed_tokens."
TOWER_PREFIX = f"{EMBEDDER}img_processor."
PROCESSOR_TYPE = "Phi3VImageProcessor"
# What the published code takes from config.json, and its defaults where it has any.
EMBEDDER_SETTINGS = {
    "use_hd_transform": True,
    "with_learnable_separator": True,
    "hd_transform_order": "sub_glb",
    "projection_cls": "mlp",
}


def vlm_config(config: Json) -> VLMConfig:
    """Return the model that a config.json describes.

    Raises:
        CheckpointError: a setting that no part of ours has.
    """
    decoder = decoder_config({**config, "model_type": "phi3"})
    tower = vit_config(vision_config(config))
    embedder, vision = section(config, "embd_layer"), section(config, "img_processor")
    for name, wanted in EMBEDDER_SETTINGS.items():
        require(f"embd_layer.{name}", embedder.get(name), embedder.get(name) == wanted, f"{wanted}")
    width, feature = vision.get("image_dim_out"), vision.get("type_feature", "patch")
    require("image_dim_out", width, width == tower.width, f"the vision tower's {tower.width}")
    require("type_feature", feature, feature == "patch", "'patch'")
    layer: Any = vision.get("layer_idx", -2)
    one = isinstance(layer, int) and -tower.num_layers - 1 <= layer <= tower.num_layers
    require("layer_idx", layer, one, f"one number of {tower.num_layers} layers")
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig("mlp", tower.width, decoder.width, depth=2, shuffle=2),
        image_token_id=0,  # published code writes negative ids; ours are found by position
        select_layer=layer,
        merge=MergeConfig("hd"),
    )


def vision_config(config: Json) -> Json:
    """Return the config.json of the tower that is named.

    Raises:
        CheckpointError: it is not known.
    """
    named = section(config, "img_processor").get("model_name")
    known = str(named) in KNOWN_TOWERS
    require("img_processor.model_name", named, known, " or ".join(KNOWN_TOWERS))
    return KNOWN_TOWERS[str(named)][0]


def image_processor(config: Json, settings: Json) -> ImageProcessorConfig:
    """Return how pictures are prepared.

    Args:
        config: of the model, which names the tower.
        settings: a preprocessor_config.json.

    Raises:
        CheckpointError: it is another processor's.
    """
    kind = settings.get("image_processor_type", PROCESSOR_TYPE)
    require("image_processor_type", kind, kind == PROCESSOR_TYPE, f"{PROCESSOR_TYPE!r}")
    named = section(config, "img_processor")["model_name"]
    given = {k: settings[k] for k in ("image_mean", "image_std") if settings.get(k) is not None}
    clip = processor_config({**KNOWN_TOWERS[named][1], **given})
    crops = count({"num_crops": 1} | without_nulls(settings), "num_crops")
    resize: dict[str, Any] = {"resize": "hd", "resample": "bilinear", "crop_fraction": 1.0}
    return replace(clip, **resize, hd=HDConfig(crops))


def name_table(config: Json, ours: VLMConfig) -> NameTable:
    """Return the names of the layout's tensors."""
    tower = tower_table(vision_config(config), TOWER_PREFIX)
    connector = [
        Row(f"connector.layers.{place}.{kind}", (f"{EMBEDDER}img_projection.{place}.{kind}",))
        for place in (0, 2)
        for kind in ("weight", "bias")
    ]
    separators = (
        Row("separators.line", (f"{EMBEDDER}sub_GN",), unit_axes=3),
        Row("separators.middle", (f"{EMBEDDER}glb_GN",), unit_axes=2),
    )
    # The embedder holds the token embeddings once more.
    ignored = ["**.rotary_emb.inv_freq", f"{EMBEDDER}wte.weight", *tower.ignored]
    if ours.decoder.tied_head:
        ignored.append("lm_head.weight")
    return NameTable(
        rows=(*decoder_rows("phi3", "", "lm_head"), *connector, *separators, *tower.rows),
        aliases=tower.aliases,
        ignored=tuple(ignored),
    )
