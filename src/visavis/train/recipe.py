"""What one training run is: a small YAML file, validated whole before any weight is loaded.

    visavis train recipes/nano.yaml --data ../shared/data -o out/

Knows names and numbers; builds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from visavis.data.sources import SOURCES, TRAINING_SOURCES
from visavis.errors import TrainError
from visavis.registry import suggest


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConnectorRecipe(_Part):
    """See `model.config.ConnectorConfig`."""

    kind: Literal["linear", "mlp"] = "linear"
    depth: int = Field(1, ge=1)
    shuffle: int = Field(3, ge=1)  # 9 x 9 patches become 3 x 3 tokens
    hidden_width: int = Field(0, ge=0)
    input_norm: bool = False


class HeadRecipe(_Part):
    """See `model.config.HeadConfig`."""

    layers: tuple[int, ...] = (0, 10, 16, 25)
    dim: int = Field(256, ge=1)


class LoraRecipe(_Part):
    """Low-rank adapters on every linear of every decoder block."""

    rank: int = Field(16, ge=1)
    scale: float = Field(2.0, gt=0)


Weight = Annotated[float, Field(gt=0)]


class PairStage(_Part):
    """Linear layers on frozen vectors (`train/pair.py`).

    `align` starts the connector so that mean image tokens match frozen text states; `head` fits
    the embedding head on the model as it then is.
    """

    kind: Literal["align", "head"]
    name: str
    sources: tuple[str, ...]
    epochs: int = Field(20, ge=1)
    batch: int = Field(512, ge=2)
    dropout: float = Field(0.3, ge=0, lt=1)
    learning_rate: float = Field(1e-3, gt=0)
    logit_scale: float = Field(20.0, gt=0)
    alpha: float = Field(0.0, ge=0)
    flip: bool = False  # mirrored pictures are a second view
    members: int = Field(1, ge=1)  # seeds whose layers are stacked; the head's dim is shared out


class Contrastive(_Part):
    """The contrastive share of a step."""

    pairs: int = Field(96, ge=2)  # pictures (and texts) that meet in one loss
    sources: dict[str, Weight]
    weight: float = Field(1.0, gt=0)
    logit_scale: float = Field(20.0, gt=0)
    alpha: float = Field(0.0, ge=0)
    max_text_tokens: int = Field(80, ge=8)


class Generative(_Part):
    """The next-token share of a step."""

    tokens: int = Field(1024, ge=64)  # tokens of one step, image tokens included
    sources: dict[str, Weight]  # share of examples drawn from each source
    weight: float = Field(1.0, gt=0)
    questions_per_example: int = Field(3, ge=1)
    max_caption_words: int = Field(45, ge=4)


class LoopStage(_Part):
    """Gradient steps through the model; with both parts it is the joint task."""

    kind: Literal["steps"]
    name: str
    steps: int = Field(ge=1)
    generative: Generative | None = None
    contrastive: Contrastive | None = None
    trainable: tuple[Literal["connector", "lora", "head"], ...] = ("connector", "lora")
    learning_rate: float = Field(5e-4, gt=0)  # of LoRA
    connector_learning_rate: float = Field(5e-4, gt=0)  # of connector and head
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(20, ge=0)
    flip: bool = True  # show some pictures mirrored (sources where left and right do not matter)


Stage = Annotated[PairStage | LoopStage, Field(discriminator="kind")]


class Recipe(_Part):
    """A whole run, from bundled base weights to a folder that `visavis.load` reads."""

    name: str
    bundle: Literal["nano"] = "nano"
    seed: int = 0
    turns: str = "chatml-bare"
    image_size: int = Field(260, ge=32)
    connector: ConnectorRecipe = ConnectorRecipe()
    head: HeadRecipe = HeadRecipe()
    lora: LoraRecipe = LoraRecipe()
    stages: tuple[Stage, ...] = Field(min_length=1)

    @field_validator("stages")
    @classmethod
    def _names_and_sources(cls, stages: tuple[PairStage | LoopStage, ...]) -> object:
        names = [stage.name for stage in stages]
        problems = [f"two stages are named {n!r}" for n in sorted(set(names)) if names.count(n) > 1]
        for stage in stages:
            if isinstance(stage, LoopStage) and not (stage.generative or stage.contrastive):
                problems.append(f"stage {stage.name!r} has neither generative nor contrastive")
            for source in sources_of(stage):
                if source not in SOURCES:
                    problems.append(f"unknown source {source!r}: {suggest(source, SOURCES)}")
                elif source not in TRAINING_SOURCES:
                    problems.append(f"source {source!r} is held out for evaluation")
        if problems:
            raise ValueError("; ".join(problems))
        return stages


def sources_of(stage: PairStage | LoopStage) -> tuple[str, ...]:
    """Return the names of every source a stage reads."""
    if isinstance(stage, PairStage):
        return stage.sources
    parts = [part for part in (stage.generative, stage.contrastive) if part is not None]
    return tuple(dict.fromkeys(name for part in parts for name in part.sources))


def read_recipe(path: Path) -> Recipe:
    """Return a validated recipe.

    Raises:
        TrainError: the file is not YAML or not a recipe; the message lists every problem.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainError(f"cannot read the recipe {path}: {error}") from error
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, problem['loc'])) or 'recipe'}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise TrainError(
            f"{path} has {len(lines)} problem(s): " + "; ".join(lines) + ". "
            "Compare with recipes/nano.yaml."
        ) from error
