"""A new model of parts that exist: a language model, a vision tower, and a fresh connector.

    text tower          none, or `all-minilm-l6-v2`, which nano has
    language model      anything `load` takes; its own tower and head, if any, are left behind
    vision tower        a CLIP, SigLIP or DINOv2 folder, that of a visavis folder, or
                        `efficientnet-lite2`, which nano has
    connector, head     random, from the seed; training is what they are for

Checks that the parts fit together. Training is configured by recipes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from visavis.checkpoints import bundled
from visavis.checkpoints.bert import MINILM, load_bert
from visavis.checkpoints.checkpoint import Checkpoint, checkpoint_fingerprint
from visavis.checkpoints.efficientnet import NUM_CLASSES, load_efficientnet
from visavis.checkpoints.load import NANO_FOLDER, load_checkpoint, resolve
from visavis.checkpoints.native import CONFIG_NAME as NATIVE
from visavis.checkpoints.native import TEXT_TOKENIZER, read_config
from visavis.checkpoints.tensor_files import read_json, read_tensors, weight_files
from visavis.checkpoints.transformers.processor import processor_config
from visavis.checkpoints.transformers.vision_models import vision_part, vit_config
from visavis.checkpoints.transformers.weights import read_tower
from visavis.errors import CheckpointError
from visavis.model.config import (
    BertConfig,
    ConnectorConfig,
    DecoderConfig,
    EfficientNetConfig,
    HeadConfig,
    ImageLayoutConfig,
    TowerConfig,
    ViTConfig,
    VLMConfig,
    vlm_config_from_dict,
)
from visavis.model.connectors import build_connector
from visavis.model.embedding_head import EmbeddingHead
from visavis.model.vlm import VLM
from visavis.processing.config import AnyresConfig, ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.tokenizer_check import read_tokenizer
from visavis.utils import lookup

EFFICIENTNET = "efficientnet-lite2"
MINILM_NAME = "all-minilm-l6-v2"


@dataclass(frozen=True)
class Composition:
    """The parts of a new model and the settings that `compose` builds it with.

    Args:
        language_model, vision_tower: names, hub names or paths.
        connector: its kind and numbers (`ConnectorConfig`), widths left out.
        connector_weights: path of a visavis folder whose connector is taken over; empty: a
            new one.
        chat_template: chat format by name; empty: the language model's own.
        resize: how images become the tower's square; empty: as its own processor says.
        canvases: columns and rows of tiles that an image may be laid on (LLaVA's anyres); empty:
            images are not tiled.
        max_tiles: shrink what exceeds this many tiles' tokens (anyres_max_N).
        image_size: of `efficientnet-lite2`.
        select_layer: hidden state of the tower; 0: -2 for towers with a class token, else the last.
        head: layers and dim of an embedding head, whether its image side reads the tower, and
            whether it starts from the names of the tower's classes; None: vectors are hidden
            states.
        text_tower: empty, or `all-minilm-l6-v2`: the head's text side reads it, and the model is
            a dual encoder beside a decoder.
        min_score: see `PromptConfig`.
    """

    language_model: str
    vision_tower: str
    connector: dict[str, Any]
    connector_weights: str = ""
    chat_template: str = ""
    resize: Literal["", "squash", "crop", "pad"] = ""
    canvases: tuple[tuple[int, int], ...] = ()
    max_tiles: int = 0
    image_size: int = 260
    select_layer: int = 0
    head: dict[str, Any] | None = None
    text_tower: str = ""
    min_score: float = -1.0
    pooling: Literal["head", "last", "mean"] = "last"


def compose(
    parts: Composition, *, precision: str = "auto", device: str = "cpu", seed: int = 0
) -> Checkpoint:
    """Return a model of existing parts and a connector that is not trained yet.

    Raises:
        CheckpointError, UnknownNameError, FetchError: a part cannot be loaded.
    """
    base = load_checkpoint(parts.language_model, precision=precision, device=device)
    if not base.vlm.config.has_decoder:
        raise CheckpointError(
            f"{parts.language_model} only embeds and has no language model to build on; take its "
            "vision tower (vision_tower), and a language model such as smollm2-135m."
        )
    tower, processor = tower_shape(parts)
    decoder = base.vlm.config.decoder
    # Image tokens are found by position, so any id may stand for them.
    config = composed_config(parts, decoder, tower, image_token_id=base.specials.pad_id or 0)
    assert config.connector is not None
    with torch.device("meta"):
        vlm = VLM(config)
    vlm.decoder = base.vlm.decoder
    assert vlm.tower is not None
    vlm.tower.to_empty(device=device).load_state_dict(_tower_state(parts))
    torch.manual_seed(seed)
    vlm.connector = build_connector(config.connector).to(device)
    if config.head is not None:
        vlm.head = EmbeddingHead(config.head, decoder.width).to(device)
    if vlm.text_tower is not None:
        state = load_bert(bundled.fetch("nano")["text_tower"])
        vlm.text_tower.to_empty(device=device).load_state_dict(state)
    if vlm.image_newline is not None:
        newline = torch.randn(decoder.width, device=device) / math.sqrt(decoder.width)
        vlm.image_newline = torch.nn.Parameter(newline)
    if parts.connector_weights:
        _take_connector(vlm, Path(parts.connector_weights))
    processor = composed_processor(parts, processor)
    chat_template = parts.chat_template or base.profile.chat_template
    identity = {"parts": repr(parts), "base": base.fingerprint, "seed": seed}
    return Checkpoint(
        name=f"{Path(parts.vision_tower).name} + {base.name}",
        vlm=vlm.requires_grad_(False).eval(),
        tokenizer=base.tokenizer,
        specials=base.specials,
        profile=PromptConfig(
            chat_template=chat_template,
            jinja="" if chat_template else base.profile.jinja,
            pooling=parts.pooling,
            min_score=parts.min_score,
        ),
        processor=processor,
        fingerprint=checkpoint_fingerprint([], identity),
        files=base.files,
        text_tokenizer=read_tokenizer(NANO_FOLDER / TEXT_TOKENIZER) if parts.text_tower else None,
    )


def composed_config(
    parts: Composition, decoder: DecoderConfig, tower: TowerConfig, *, image_token_id: int
) -> VLMConfig:
    """Return the config of a model of parts."""
    layer = parts.select_layer
    if layer == 0:
        layer = -2 if isinstance(tower, ViTConfig) and tower.class_token else -1
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=_connector(parts, tower.width, decoder.width),
        head=_head(parts, tower.width),
        text_tower=_text_tower(parts),
        image_token_id=image_token_id,
        select_layer=layer,
        merge=_merge(parts),
    )


def composed_processor(parts: Composition, processor: ImageProcessorConfig) -> ImageProcessorConfig:
    """Return how images are sized for a model of parts, given how the tower's own files say."""
    if parts.canvases:
        return tiled(processor, parts.canvases)
    return replace(processor, resize=parts.resize) if parts.resize else processor


def tiled(
    processor: ImageProcessorConfig, canvases: tuple[tuple[int, int], ...]
) -> ImageProcessorConfig:
    """Return a processor that lays images on canvases of this many columns and rows of tiles."""
    grids = tuple((columns * processor.size, rows * processor.size) for columns, rows in canvases)
    tiles = (
        AnyresConfig(grids) if processor.tiles is None else replace(processor.tiles, grids=grids)
    )
    if tiles.axes == "hw":
        tiles = replace(tiles, grids=tuple((height, width) for width, height in grids))
    return replace(processor, resize="squash", tiles=tiles)


def _take_connector(vlm: VLM, folder: Path) -> None:
    """Put the connector of another model of the same parts in place of the new one.

    Raises:
        CheckpointError: it has none, or of another shape.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}, which the connector is to be taken from, is no folder.")
    tensors = read_tensors(sorted(folder.glob("*.safetensors"))).entries
    own = {
        name: tensor
        for name, tensor in vlm.state_dict().items()
        if name.startswith("connector.") or name == "image_newline"
    }
    wrong = [n for n, t in own.items() if n not in tensors or tensors[n].shape != tuple(t.shape)]
    if wrong:
        raise CheckpointError(
            f"{folder} has no connector that fits: {', '.join(wrong[:3])} are missing or of "
            "another shape; expected a folder that visavis wrote, such as out/model of a first "
            "stage, of the same connector, tower and language model."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name].read())


def tower_shape(parts: Composition) -> tuple[TowerConfig, ImageProcessorConfig]:
    """Return a tower's config, and how its images are sized; no weight is read.

    Raises:
        CheckpointError, UnknownNameError: there is none, or of a kind that is not read.
    """
    if parts.vision_tower == EFFICIENTNET:
        size = parts.image_size
        level = (127 / 255,) * 3
        processor = ImageProcessorConfig(size, "squash", level, (128 / 255,) * 3)
        return EfficientNetConfig(2, size), processor
    folder = resolve(parts.vision_tower)
    if (folder / NATIVE).is_file():
        found = read_config(folder)
        whole = vlm_config_from_dict(found["config"])
        if whole.tower is None or not found.get("processor"):
            raise CheckpointError(f"{folder} has no vision tower; name a model that has one.")
        return whole.tower, ImageProcessorConfig.from_dict(found["processor"])
    config_path, settings = folder / "config.json", folder / "preprocessor_config.json"
    if not config_path.is_file() or not settings.is_file():
        raise CheckpointError(
            f"{folder} is no vision tower: expected config.json and preprocessor_config.json of a "
            f"CLIP, SigLIP or DINOv2, a visavis folder, or the name {EFFICIENTNET!r}."
        )
    tower = vit_config(vision_part(read_json(config_path)))
    processor = processor_config(read_json(settings))
    if processor.size != tower.image_size:
        raise CheckpointError(
            f"{settings} prepares pictures of {processor.size} pixels, but the tower takes "
            f"{tower.image_size}; one of the two files belongs to another model."
        )
    return tower, processor


def _tower_state(parts: Composition) -> dict[str, Tensor]:
    """Return a tower's tensors by our names.

    Raises:
        CheckpointError: they cannot be read.
    """
    if parts.vision_tower == EFFICIENTNET:
        return load_efficientnet(bundled.fetch("nano")["vision_tower"])[0]
    folder = resolve(parts.vision_tower)
    if (folder / NATIVE).is_file():
        tower = load_checkpoint(folder, precision="f32", device="cpu").vlm.tower
        assert tower is not None
        return dict(tower.state_dict())
    tensors = read_tensors(weight_files(folder))
    config = vision_part(read_json(folder / "config.json"))
    return read_tower(config, tensors, where=str(folder))


def _head(parts: Composition, width: int) -> HeadConfig | None:
    if parts.head is None:
        return None
    head, text = parts.head, _text_tower(parts)
    if head["class_names"] and (parts.vision_tower != EFFICIENTNET or text is None):
        raise CheckpointError(
            "class_names takes the classifier of efficientnet-lite2 and vectors of its classes' "
            "names from a text tower; use both parts, or leave it out."
        )
    return HeadConfig(
        tuple(head["layers"]),
        head["dim"],
        tower_width=width if head["tower"] else 0,
        text_width=text.width if text else 0,
        num_classes=NUM_CLASSES if head["class_names"] else 0,
    )


def _text_tower(parts: Composition) -> BertConfig | None:
    return lookup("text tower", parts.text_tower, {"": None, MINILM_NAME: MINILM})


def everyday_words() -> list[str]:
    """Return the names of things, animals, people and places that the connector `words` knows:
    first names of ImageNet's classes, common nouns of WordNet, and words of captions."""
    return (NANO_FOLDER / "words.txt").read_text(encoding="utf-8").splitlines()


def _connector(parts: Composition, in_width: int, out_width: int) -> ConnectorConfig:
    config = ConnectorConfig(in_width=in_width, out_width=out_width, **parts.connector)
    if config.kind != "words":
        return config
    if parts.head is None or not parts.head["tower"]:
        raise CheckpointError(
            "the connector 'words' reads an embedding head that reads the vision tower: add "
            "`head` with `tower: true`, or take another connector."
        )
    return replace(config, num_words=len(everyday_words()), word_width=parts.head["dim"])


def _merge(parts: Composition) -> ImageLayoutConfig:
    if not parts.canvases:
        return ImageLayoutConfig()
    return ImageLayoutConfig("spatial", unpad=True, newline=True, max_tiles=parts.max_tiles)
