"""Phi-3-vision and Phi-3.5-vision: config.json as our config, tensor names as ours.

Their model code was published beside the weights and never entered transformers. The language
model is a Phi-3 (its settings stand in the outer config); the tower is a CLIP that is named and not
described.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from visavis.checkpoints.adapters import Adapter, merged
from visavis.checkpoints.checkpoint_format import (
    CONFIG,
    Companions,
    DetectedFormat,
    FolderFormat,
    adapter_files,
    outermost,
    refuse_quantised,
)
from visavis.checkpoints.llava.config import KNOWN_TOWERS
from visavis.checkpoints.tensor_files import read_json, read_tensors, weight_files
from visavis.checkpoints.transformers.config_reader import (
    Json,
    count,
    require,
    section,
    without_nulls,
)
from visavis.checkpoints.transformers.language_models import decoder_config, decoder_rows
from visavis.checkpoints.transformers.processor import processor_config
from visavis.checkpoints.transformers.vision_models import vit_config
from visavis.checkpoints.transformers.weights import tower_table
from visavis.checkpoints.weight_mapping import MappingRow, NameTable
from visavis.errors import CheckpointError
from visavis.model.config import ConnectorConfig, ImageLayoutConfig, VLMConfig
from visavis.processing.config import ImageProcessorConfig, Phi3VConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer import SpecialTokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
        merge=ImageLayoutConfig("hd"),
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
    """Return how images are prepared.

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
    return replace(clip, **resize, hd=Phi3VConfig(crops))


def name_table(config: Json, ours: VLMConfig) -> NameTable:
    """Return the names of the layout's tensors."""
    tower = tower_table(vision_config(config), TOWER_PREFIX)
    connector = [
        MappingRow(
            f"connector.layers.{place}.{kind}", (f"{EMBEDDER}img_projection.{place}.{kind}",)
        )
        for place in (0, 2)
        for kind in ("weight", "bias")
    ]
    separators = (
        MappingRow("separators.line", (f"{EMBEDDER}sub_GN",), unit_axes=3),
        MappingRow("separators.middle", (f"{EMBEDDER}glb_GN",), unit_axes=2),
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


PROCESSOR = "preprocessor_config.json"


@dataclass(kw_only=True)
class Phi3VFormat(FolderFormat):
    """Phi-3-vision or Phi-3.5-vision as published."""

    kind = "phi3_v"
    title = "Phi-3.5-vision"
    model_types = ("phi3_v",)

    @classmethod
    def open(cls, detected: DetectedFormat, companions: Companions) -> Self:
        folder, adapters = detected.path, companions.adapters
        data = read_json(folder / CONFIG)
        refuse_quantised(data, folder)
        config = vlm_config(data)
        processor = image_processor(data, _processor_settings(adapters, folder))
        table, files = name_table(data, config), weight_files(folder)
        return cls(
            detected=detected,
            companions=companions,
            name=outermost(folder, adapters).resolve().name,
            settings=data,
            config=config,
            processor=processor,
            table=table,
            weights=merged(read_tensors(files), adapters, table.canonical),
            files=[folder / CONFIG, *files, *adapter_files(adapters)],
            facts={"architecture": "phi3_v", "chat template": "phi3_v"},
            identity={**data, "processor": processor.to_dict()},
        )

    @classmethod
    def read_config(cls, path: Path) -> tuple[VLMConfig, ImageProcessorConfig | None]:
        data = read_json(path / CONFIG)
        return vlm_config(data), image_processor(data, _processor_settings((), path))

    def prompt_config(self, tokenizer: Tokenizer, specials: SpecialTokens) -> PromptConfig:
        # The published processor tokenises what stands between images piece by piece, so that
        # beginning-of-sequence stands after each image too.
        repeated = specials.bos_id if specials.add_bos else None
        bos = "" if repeated is None else tokenizer.id_to_token(repeated) or ""
        return PromptConfig(chat_template="phi3_v", image_end=bos)


def _processor_settings(adapters: Sequence[Adapter], folder: Path) -> Json:
    """Return the preprocessor_config.json of the outermost adapter that brings one, or the base's.

    Raises:
        CheckpointError: there is none.
    """
    places = [*(adapter.folder for adapter in reversed(adapters)), folder]
    path = next((one / PROCESSOR for one in places if (one / PROCESSOR).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{folder} says nowhere how many tiles a picture becomes; expected {PROCESSOR} beside "
            "the weights, copy it from the model's source."
        )
    return read_json(path)
