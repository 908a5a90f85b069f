"""Training recipes: a YAML file, fully validated before any weight is loaded.

    visavis train recipes/llava-1.5-pretrain.yaml --data DATA -o out/ stages.0.steps=100

A recipe names the model, the data sources, and the stages in order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from visavis.data.datasets import SOURCES, TRAINING_SOURCES
from visavis.data.sources import SourceConfig
from visavis.errors import TrainError
from visavis.model.connectors import CONNECTORS
from visavis.processing.chat_formats import CHAT_FORMATS
from visavis.processing.prompt_config import PROFILES
from visavis.utils import parse_yaml, suggest

if TYPE_CHECKING:
    from visavis.checkpoints.compose import Composition

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
PARTS = ("vision_tower", "connector", "language_model", "lora", "head")
Part = Literal["vision_tower", "connector", "language_model", "lora", "head"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# ---- the model -----------------------------------------------------------------------------------


class ConnectorRecipe(_Strict):
    """See `model.config.ConnectorConfig`; widths follow from the parts."""

    kind: str = "mlp"
    depth: Count = 1
    shuffle: Count = 1
    hidden_width: Annotated[int, Field(ge=0)] = 0
    input_norm: bool = False
    num_queries: Annotated[int, Field(ge=0)] = 0
    word_margin: Annotated[float, Field(ge=0)] = 0.0

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in CONNECTORS:
            raise ValueError(f"no connector is called {kind!r}: {suggest(kind, CONNECTORS)}")
        return kind


class HeadRecipe(_Strict):
    """See `model.config.HeadConfig`."""

    layers: tuple[int, ...] = ()
    dim: Count
    tower: bool = True  # the image side reads the mean feature of the vision tower
    class_names: bool = False  # and starts from the names of its classes


class LoraRecipe(_Strict):
    """Low-rank adapters on linears of the decoder's blocks (Hu et al. 2021).

    `scale` is alpha / r. Targets are ours: `qkv` is q, k and v, `up` is gate and up.
    """

    rank: Count = 16
    scale: Positive = 2.0
    dropout: Share = 0.0
    dora: bool = False
    targets: tuple[Literal["qkv", "out", "up", "down"], ...] = ("qkv", "out", "up", "down")
    init: Literal["kaiming", "gaussian"] = "kaiming"


class ModelRecipe(_Strict):
    """Which model is trained: one that exists (`base`), or parts with a fresh connector."""

    base: str = ""  # anything `visavis.load` takes
    language_model: str = ""
    vision_tower: str = ""
    connector: ConnectorRecipe = ConnectorRecipe()
    connector_weights: str = ""  # a run's model folder, whose connector is taken over
    chat_template: str = ""  # chat format by name; empty: the base's own
    resize: Literal["", "squash", "crop", "pad"] = ""
    canvases: tuple[tuple[Count, Count], ...] = ()  # columns and rows of tiles (LLaVA's anyres)
    max_tiles: Annotated[int, Field(ge=0)] = 0
    image_size: Annotated[int, Field(ge=32)] = 260  # of efficientnet-lite2
    select_layer: int = 0
    head: HeadRecipe | None = None
    text_tower: str = ""  # all-minilm-l6-v2: the head's text side reads it
    pooling: Literal["head", "last", "mean"] = "last"
    min_score: Annotated[float, Field(ge=-1, le=1)] = -1.0  # below it a text matches no image
    profile: str = ""  # how it embeds, by name (`processing.profile.PROFILES`)
    lora: LoraRecipe | None = None
    quantize: Literal["", "int8", "int4"] = ""  # frozen weights of the decoder (QLoRA)

    @model_validator(mode="after")
    def _parts(self) -> ModelRecipe:
        composed = bool(self.language_model) and bool(self.vision_tower)
        if bool(self.base) == composed:
            raise ValueError(
                "give either `base`, a model that exists, or both `language_model` and "
                "`vision_tower`, to be joined by a new connector"
            )
        if self.chat_template and self.chat_template not in CHAT_FORMATS:
            raise ValueError(
                f"unknown chat format {self.chat_template!r}: "
                f"{suggest(self.chat_template, CHAT_FORMATS)}"
            )
        if self.profile and self.profile not in PROFILES:
            raise ValueError(f"unknown profile {self.profile!r}: {suggest(self.profile, PROFILES)}")
        if self.base and (self.connector_weights or self.resize or self.max_tiles):
            raise ValueError(
                "connector_weights, resize and max_tiles are of new models; `base` has its own"
            )
        if self.quantize and self.lora is None:
            raise ValueError("quantized weights cannot be trained: add `lora`")
        return self

    def composition(self) -> Composition:
        """Return the parts as `checkpoints.compose` takes them."""
        from visavis.checkpoints.compose import Composition

        names = (
            "language_model",
            "vision_tower",
            "connector_weights",
            "chat_template",
            "resize",
            "canvases",
            "max_tiles",
            "image_size",
            "select_layer",
            "pooling",
            "text_tower",
            "min_score",
        )
        return Composition(
            connector=self.connector.model_dump(),
            head=None if self.head is None else self.head.model_dump(),
            **{name: getattr(self, name) for name in names},
        )


# ---- stages --------------------------------------------------------------------------------------


class DrawnFrom(_Strict):
    """How much of a step comes from a source, and in blocks of how many samples (of all
    processes together) from it alone."""

    weight: Positive | None = None
    block: Annotated[int, Field(ge=0)] = 0


class Generative(_Strict):
    """The next-token share of a step."""

    sources: dict[str, DrawnFrom]
    batch: Count = 16  # conversations of a step, of all processes together
    micro_tokens: Annotated[int, Field(ge=16)] = 4096  # of one pass through the model
    max_tokens: Annotated[int, Field(ge=8)] | None = None  # of one conversation
    cut: bool = False  # longer ones lose their end, as LLaVA's do; else they are errors
    weight: Positive = 1.0


class Contrastive(_Strict):
    """The contrastive share of a step; see `objectives.Contrast`."""

    sources: dict[str, DrawnFrom]
    batch: Annotated[int, Field(ge=2)] = 64  # queries of a step, of all processes together
    chunk_tokens: Annotated[int, Field(ge=16)] = 4096  # of one pass through the model
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    weight: Positive = 1.0
    temperature: Positive = 0.02
    learned_temperature: bool = False
    symmetric: bool = False
    alpha: Annotated[float, Field(ge=0)] = 0.0
    margin: float | None = None
    ratio: Positive | None = None
    dims: tuple[Count, ...] = ()
    negatives: Annotated[int, Field(ge=0)] | None = None  # maximum per query; None: all


class StepsStage(_Strict):
    """Gradient steps through the model; with both objectives it is the joint task.

    Args:
        chat_template: chat format of this stage, by name; empty: the model's.
        train: peak learning rate of each part that is trained.
        vision_from: of the vision tower, only this block and later ones.
        lora_from: of LoRA, only adapters of this block and later ones.
        steps, epochs: give one; an epoch is as many steps as its largest objective needs.
        warmup: steps, or below 1 a share of them.
    """

    kind: Literal["steps"]
    name: str
    steps: Count | None = None
    epochs: Positive | None = None
    generative: Generative | None = None
    contrastive: Contrastive | None = None
    chat_template: str = ""
    train: dict[Part, Rate]
    vision_from: Annotated[int, Field(ge=0)] = 0
    lora_from: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    clip: Annotated[float, Field(ge=0)] = 1.0
    ema: Share = 0.0
    checkpointing: bool = False  # activations are computed again on the way back
    compile: bool = False  # torch.compile the decoder's blocks
    save_every: Count = 500
    keep: Count = 1
    log_every: Count = 10

    @model_validator(mode="after")
    def _whole(self) -> StepsStage:
        problems = []
        if not (self.generative or self.contrastive):
            problems.append("it has neither `generative` nor `contrastive`")
        if (self.steps is None) == (self.epochs is None):
            problems.append("give one of `steps` and `epochs`")
        if not self.train:
            problems.append("`train` names no part")
        if self.chat_template and self.chat_template not in CHAT_FORMATS:
            problems.append(
                f"unknown chat format {self.chat_template!r}: "
                f"{suggest(self.chat_template, CHAT_FORMATS)}"
            )
        if problems:
            raise ValueError(f"stage {self.name!r}: {'; '.join(problems)}")
        return self


class WordsStage(_Strict):
    """Start the connector so that image tokens resemble captions' words."""

    kind: Literal["words"]
    name: str
    sources: tuple[str, ...]


class HeadStage(_Strict):
    """Fit the embedding head of a dual encoder on frozen vectors (`train/dual_encoder.py`).

    Args:
        sources: how often each source's pairs occur.
        shrink: how far both maps go from where they start to what was trained, 0 to 1.
        members: seeds whose maps are averaged.
    """

    kind: Literal["head"]
    name: str
    sources: dict[str, Count]
    epochs: Count = 24
    batch: Annotated[int, Field(ge=2)] = 2048
    dropout: Share = 0.6
    learning_rate: Positive = 1e-3
    text_learning_rate: Positive = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.3
    logit_scale: Positive = 25.0
    shrink: Annotated[float, Field(gt=0, le=1)] = 0.5
    members: Count = 2


AnyStage = WordsStage | HeadStage | StepsStage
Stage = Annotated[AnyStage, Field(discriminator="kind")]


class Recipe(_Strict):
    """A whole run, to a folder that `visavis.load` reads.

    Args:
        bad_rows: what happens at a row that its format does not allow, or whose image or video
            cannot be decoded: `stop` the run; or `skip` it: all rows are tried before training,
            and those that are left out are listed in `skipped_rows.json`.
    """

    name: str
    model: ModelRecipe
    data: dict[str, SourceConfig]
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    seed: int = 0
    bad_rows: Literal["stop", "skip"] = "stop"
    precision: Literal["f32", "bf16", "f16"] = "bf16"
    feature_cache: bool = False  # keep the frozen vision tower's output on disk
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)

    @model_validator(mode="after")
    def _fits(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        problems = [f"two stages are named {n!r}" for n in sorted(set(names)) if names.count(n) > 1]
        for name, one in self.data.items():
            if one.format == "records" and one.path not in TRAINING_SOURCES:
                why = "is held out for evaluation" if one.path in SOURCES else "is unknown"
                known = suggest(one.path, TRAINING_SOURCES)
                problems.append(f"data {name!r}: the data set {one.path!r} {why}: {known}")
        for stage in self.stages:
            problems += [
                f"stage {stage.name!r} names the source {source!r}, missing in `data`: "
                f"{suggest(source, self.data)}"
                for source in sources_of(stage)
                if source not in self.data
            ]
            if not isinstance(stage, StepsStage):
                if not self.feature_cache:
                    problems.append(f"stage {stage.name!r} needs `feature_cache: true`")
                continue
            if "lora" in stage.train and self.model.lora is None:
                problems.append(f"stage {stage.name!r} trains `lora`, but the model has none")
            if "language_model" in stage.train and self.model.quantize:
                problems.append(f"stage {stage.name!r} trains quantized weights; train `lora`")
            if self.feature_cache and "vision_tower" in stage.train:
                problems.append(f"stage {stage.name!r} trains the tower that feature_cache keeps")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def trains_whole(recipe: Recipe) -> bool:
    """Return whether any stage trains the language model's or the tower's own weights."""
    return any(
        isinstance(stage, StepsStage) and {"language_model", "vision_tower"} & stage.train.keys()
        for stage in recipe.stages
    )


def sources_of(stage: AnyStage) -> tuple[str, ...]:
    """Return the names of every source a stage reads."""
    if not isinstance(stage, StepsStage):
        return tuple(stage.sources)
    parts = [part for part in (stage.generative, stage.contrastive) if part is not None]
    return tuple(dict.fromkeys(name for part in parts for name in part.sources))


def read_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return a validated recipe.

    Args:
        overrides: `dotted.name=value` each, values as in YAML; `stages.0.steps=10` counts in lists.

    Raises:
        TrainError: the file is not YAML or not a recipe; the message lists every problem.
    """
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainError(f"cannot read the recipe {path}: {error}") from error
    for override in overrides:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _wrong(str(path), error, "Compare with recipes/tiny-llava.yaml.") from error


def read_model(settings: Iterable[str]) -> ModelRecipe:
    """Return the `model` part of a recipe from `dotted.name=value` each.

    Raises:
        TrainError: they are no model of parts.
    """
    data: dict[str, Any] = {"connector": {}}
    for setting in settings:
        _override(data, setting)
    try:
        return ModelRecipe.model_validate(data)
    except ValidationError as error:
        hint = "Names are those under `model` in a recipe: language_model, vision_tower, …"
        raise _wrong("the model", error, hint) from error


def _wrong(what: str, error: ValidationError, hint: str) -> TrainError:
    lines = [
        f"{'.'.join(map(str, problem['loc'])) or 'recipe'}: "
        + problem["msg"].removeprefix("Value error, ").removesuffix(".")
        for problem in error.errors()
    ]
    return TrainError(f"{what} has {len(lines)} problem(s): {'; '.join(lines)}. {hint}")


def _override(data: Any, override: str) -> None:
    """Set one value of a recipe's data, in place."""
    name, equals, text = override.partition("=")
    try:
        value = parse_yaml(text)
        *path, last = [int(key) if re.fullmatch("[0-9]+", key) else key for key in name.split(".")]
        for key in path:
            data = data[key]
        if not equals or (isinstance(data, list) and not isinstance(last, int)):
            raise KeyError(last)
        data[last] = value
    except (LookupError, TypeError, ValueError) as error:
        raise TrainError(
            f"{override!r} changes nothing of the recipe ({type(error).__name__}: {error}); "
            "expected name=value with names as in the file, such as stages.0.steps=10."
        ) from error
