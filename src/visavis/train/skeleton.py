"""The model of a recipe on the meta device: shapes, image sizes, tokenizer and chat template.

Settings decide: a folder's or GGUF file's own, or the config.json of a name on the hub. Where
weights lie beside them, their headers are checked too. Problems are collected and not raised, so
that a dry run lists all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from visavis.checkpoints.checkpoint import blank
from visavis.checkpoints.checkpoint_format import CheckpointFormat, DetectedFormat
from visavis.checkpoints.compose import (
    EFFICIENTNET,
    composed_config,
    composed_processor,
    tiled,
    tower_shape,
)
from visavis.checkpoints.formats import AdapterFormat, detect
from visavis.checkpoints.load import find_settings
from visavis.checkpoints.tensor_files import read_json
from visavis.checkpoints.transformers.load import TransformersFormat, chat_template
from visavis.errors import CheckpointError, FetchError, TrainError, VisavisError
from visavis.model.config import VLMConfig
from visavis.model.vlm import VLM
from visavis.processing.config import ImageProcessorConfig, sized_as
from visavis.processing.prompt_config import PromptConfig
from visavis.processing.prompt_encoder import PromptEncoder
from visavis.processing.tokenizer import SpecialTokens, encode, load_tokenizer
from visavis.train.lora import add_lora, quantize_decoder
from visavis.train.recipe import ModelRecipe, Recipe, trains_whole

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
MAX_CHAIN = 8  # adapters on one another


@dataclass(frozen=True)
class Outline:
    """A model's shapes, how its images are prepared, and its text settings; None where the files
    of the tokenizer are not on this machine."""

    config: VLMConfig
    processor: ImageProcessorConfig | None = None
    text: TextSettings | None = None


@dataclass(frozen=True)
class TextSettings:
    """A tokenizer with its special tokens, and the chat format that belongs to it; None where
    settings alone do not tell."""

    tokenizer: Tokenizer
    specials: SpecialTokens
    profile: PromptConfig | None

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, without special tokens around it."""
        return len(encode(self.tokenizer, self.specials, text))


@dataclass
class Findings:
    """Problems of a recipe, and notes that do not prevent it from running."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def refused(self, where: str, error: VisavisError) -> None:
        """Note a model or a part that cannot be planned with."""
        advice = ""
        if isinstance(error, FetchError):
            advice = " A dry run reads only its config.json: name a local folder that holds one."
        self.problems.append(f"{where}: {error}{advice}")


def model_outline(model: ModelRecipe, found: Findings) -> Outline | None:
    """Return the model of a recipe."""
    if model.base:
        outline = _whole(model.base, "model.base", found)
        if outline is None or outline.processor is None:
            return outline
        processor = outline.processor
        if model.canvases:
            processor = tiled(processor, model.canvases)
        if model.profile:
            processor = sized_as(processor, model.profile)
        return replace(outline, processor=processor)
    text = _whole(model.language_model, "model.language_model", found)
    tower = _tower(model, found)
    if model.connector_weights and not Path(model.connector_weights).is_dir():
        found.problems.append(
            f"model.connector_weights: {model.connector_weights} is no folder; expected the model "
            "that another run left (its out/model), or leave it out for a new connector."
        )
    if text is None or tower is None:
        return None
    parts = model.composition()
    config = composed_config(parts, text.config.decoder, tower[0], image_token_id=0)
    return Outline(config, composed_processor(parts, tower[1]), text.text)


def prompt_encoder(outline: Outline, chat_format: str) -> PromptEncoder | None:
    """Return the encoder of a model's prompts; None where its tokenizer or its chat format is not
    on this machine.

    Args:
        chat_format: its name; empty: the model's own.
    """
    text = outline.text
    profile = None if text is None else text.profile
    if chat_format:
        profile = replace(profile or PromptConfig(), chat_template=chat_format)
    if text is None or profile is None:
        return None
    return PromptEncoder(
        "the model of this recipe",
        outline.config,
        text.tokenizer,
        text.specials,
        profile,
        outline.processor,
    )


def _whole(name: str, where: str, found: Findings) -> Outline | None:
    """Return a whole model."""
    try:
        outline = _described(find_settings(name), found)
        if not outline.config.has_decoder:
            raise CheckpointError(
                f"{name} only embeds and has no language model; recipes train models with one."
            )
        return outline
    except VisavisError as error:
        found.refused(where, error)
        return None


def _described(path: Path, found: Findings) -> Outline:
    """Return the outline of a checkpoint.

    Raises:
        CheckpointError: it is damaged, or no whole model.
        FetchError: the base of an adapter is not on this machine.
    """
    for _ in range(MAX_CHAIN):
        detected = detect(path)
        if detected.format is not AdapterFormat:
            break
        path = _base_of(path)
    if not _has_weights(path):
        found.notes.append(f"{path} holds no weights: planned from its settings")
        return Outline(*detected.format.read_config(path), _settings_alone(detected))
    opened = detected.open()
    if opened.config is None or opened.problems:
        raise CheckpointError("; ".join(opened.problems) or f"{path} is no whole model")
    return Outline(opened.config, opened.processor, _text_settings(opened))


def _base_of(adapter: Path) -> Path:
    """Return the folder of the model that an adapter was trained on."""
    named = str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path"))
    return adapter / named if (adapter / named).is_dir() else find_settings(named)


def _has_weights(path: Path) -> bool:
    return path.is_file() or any(next(path.rglob(one), None) for one in WEIGHTS)


def _text_settings(opened: CheckpointFormat) -> TextSettings | None:
    """Return the text settings of a checkpoint; None where its tokenizer is not on this machine."""
    try:
        tokenizer, specials = opened.tokenizer()
    except VisavisError:
        return None
    return TextSettings(tokenizer, specials, opened.prompt_config(tokenizer, specials))


def _settings_alone(detected: DetectedFormat) -> TextSettings | None:
    """Return the text settings of a folder without weights, if it has a tokenizer."""
    try:
        tokenizer, specials = load_tokenizer(detected.path)
    except VisavisError:
        return None
    own = issubclass(detected.format, TransformersFormat)  # others' config.json decides
    jinja = chat_template(detected.path) if own else ""
    return TextSettings(tokenizer, specials, PromptConfig(jinja=jinja) if jinja else None)


def _tower(model: ModelRecipe, found: Findings) -> Any:
    """Return a vision tower's config, and how its images are sized."""
    parts = model.composition()
    try:
        if parts.vision_tower != EFFICIENTNET:
            parts = replace(parts, vision_tower=str(find_settings(parts.vision_tower)))
        return tower_shape(parts)
    except VisavisError as error:
        found.refused("model.vision_tower", error)
        return None


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
