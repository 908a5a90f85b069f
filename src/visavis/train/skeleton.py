"""The model of a recipe without its numbers: shapes, picture sizes, and what counts words.

Models that are here are described from their files' headers, published ones that are not from
`checkpoints/hub_configs.py`. What is wrong is collected, not raised: a plan lists all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from visavis.checkpoints import hub_configs
from visavis.checkpoints.adapters import adapter_chain
from visavis.checkpoints.checkpoint import blank
from visavis.checkpoints.compose import (
    EFFICIENTNET,
    composed_config,
    composed_processor,
    tiled,
    tower_shape,
)
from visavis.checkpoints.detect import NATIVE, detect
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.hub_configs import Outline
from visavis.checkpoints.inspect import bundle_files, describe
from visavis.checkpoints.load import find, sized_as
from visavis.checkpoints.native import read_config
from visavis.errors import CheckpointError, TrainError, VisavisError
from visavis.model.vlm import VLM
from visavis.processing.tokenizer import build_tokenizer, load_tokenizer
from visavis.train.lora import add_lora, quantize_decoder
from visavis.train.recipe import ModelRecipe, Recipe, trains_whole

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
Words = Callable[[str], int]  # counts the tokens of a text


@dataclass
class Findings:
    """What is wrong with a recipe, and what is only worth knowing."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def unknown(self, where: str, name: str) -> None:
        how = "with `visavis fetch nano` " if name == "smollm2-135m" else ""
        self.problems.append(
            f"{where}: {name} is not on this machine and its shape is not known here, so nothing "
            f"can be said of it; fetch it {how}and ask again."
        )

    def from_afar(self, name: str) -> None:
        self.notes.append(f"{name} is not on this machine: planned from its published shape")


def model_outline(model: ModelRecipe, found: Findings) -> tuple[Outline | None, Words | None]:
    """Return the model of a recipe, and what counts its words where the tokenizer is here."""
    if model.base:
        outline, words = _whole(model.base, "model.base", found)
        if outline is None or outline.processor is None:
            return outline, words
        processor = outline.processor
        if model.canvases:
            processor = tiled(processor, model.canvases)
        if model.profile:
            processor = sized_as(processor, model.profile)
        return replace(outline, processor=processor), words
    text, words = _whole(model.language_model, "model.language_model", found)
    tower = _tower(model, found)
    if model.connector_weights and not Path(model.connector_weights).is_dir():
        found.problems.append(
            f"model.connector_weights: {model.connector_weights} is no folder; expected the model "
            "that another run left (its out/model), or leave it out for a new connector."
        )
    if text is None or tower is None:
        return None, words
    parts = model.composition()
    config = composed_config(parts, text.config.decoder, tower[0], image_token_id=0)
    return Outline(config, composed_processor(parts, tower[1])), words


def _whole(name: str, where: str, found: Findings) -> tuple[Outline | None, Words | None]:
    try:
        path = find(name)
        if path is not None:
            return _described(path), _words(path)
    except VisavisError as error:
        found.problems.append(f"{where}: {error}")
        return None, None
    outline = hub_configs.outline(name)
    if outline is None:
        found.unknown(where, name)
    else:
        found.from_afar(name)
    return outline, None


def _described(path: Path) -> Outline:
    """Return the outline of a checkpoint that is here.

    Raises:
        CheckpointError: it is damaged, or no whole model.
    """
    if detect(path).kind == "adapter":
        path = adapter_chain(path, None)[1]
    described = describe(path)
    if described.config is None or described.problems:
        raise CheckpointError("; ".join(described.problems) or f"{path} is no whole model")
    return Outline(described.config, described.processor)


def _words(path: Path) -> Words | None:
    """Return what counts tokens; None where the tokenizer is not to be had by itself."""
    try:
        if (path / NATIVE).is_file() and (bundled := bundle_files(read_config(path))):
            path = bundled[0]
        if path.suffix == ".gguf":
            tokenizer = build_tokenizer(open_gguf(path).metadata)
        else:
            tokenizer, _ = load_tokenizer(path)
    except VisavisError:
        return None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _tower(model: ModelRecipe, found: Findings) -> Any:
    """Return a vision tower's config and how its pictures are sized."""
    name = model.vision_tower
    try:
        if name == EFFICIENTNET or find(name) is not None:
            return tower_shape(model.composition())
    except VisavisError as error:
        found.problems.append(f"model.vision_tower: {error}")
        return None
    tower = hub_configs.tower(name)
    if tower is None:
        found.unknown("model.vision_tower", name)
    else:
        found.from_afar(name)
    return tower


def skeleton(recipe: Recipe, outline: Outline, found: Findings) -> VLM | None:
    """Return the model on the meta device, each tensor in the type that it will have."""
    model = recipe.model
    vlm = blank(outline.config, torch.float32 if trains_whole(recipe) else DTYPES[recipe.precision])
    if vlm.tower is not None and not model.base:
        vlm.tower.float()
    try:
        with torch.device("meta"):
            if model.quantize:
                quantize_decoder(vlm.decoder, model.quantize)
            if model.lora is not None:
                add_lora(vlm.decoder, model.lora)
    except TrainError as error:
        found.problems.append(f"model.lora: {error}")
        return None
    return vlm
