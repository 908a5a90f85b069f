"""What one training run is: a small YAML file, validated whole before any weight is loaded.

    visavis train recipes/nano.yaml --data DATA -o out/

Knows names and numbers; builds nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from visavis.data.sources import SOURCES, TRAINING_SOURCES
from visavis.errors import TrainError
from visavis.model.connectors import CONNECTORS
from visavis.registry import suggest


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ConnectorRecipe(_Part):
    """See `model.config.ConnectorConfig`."""

    kind: str = "linear"
    depth: Annotated[int, Field(ge=1)] = 1
    shuffle: Annotated[int, Field(ge=1)] = 3  # 9 x 9 patches become 3 x 3 tokens
    hidden_width: Annotated[int, Field(ge=0)] = 0
    input_norm: bool = False
    num_queries: Annotated[int, Field(ge=0)] = 0

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in CONNECTORS:
            raise ValueError(f"no connector is called {kind!r}: {suggest(kind, CONNECTORS)}")
        return kind


class HeadRecipe(_Part):
    """See `model.config.HeadConfig`."""

    layers: tuple[int, ...] = (0, 10, 16, 25)
    dim: Annotated[int, Field(ge=1)] = 256


class LoraRecipe(_Part):
    """Low-rank adapters on every linear of every decoder block."""

    rank: Annotated[int, Field(ge=1)] = 16
    scale: Annotated[float, Field(gt=0)] = 2.0


Weight = Annotated[float, Field(gt=0)]


class WordsStage(_Part):
    """Start the connector so that image tokens resemble captions' words (`train/words.py`)."""

    kind: Literal["words"]
    name: str
    sources: tuple[str, ...]


class HeadStage(_Part):
    """Fit the embedding head on the model as it then is (`train/pair.py`)."""

    kind: Literal["head"]
    name: str
    sources: dict[str, Annotated[int, Field(ge=1)]]  # how often each source's pairs occur
    epochs: Annotated[int, Field(ge=1)] = 20
    batch: Annotated[int, Field(ge=2)] = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    logit_scale: Annotated[float, Field(gt=0)] = 20.0
    alpha: Annotated[float, Field(ge=0)] = 0.0
    flip: bool = True  # mirrored pictures are a second view
    members: Annotated[int, Field(ge=1)] = 1  # seeds stacked; they share the head's dim


class Contrastive(_Part):
    """The contrastive share of a step."""

    pairs: Annotated[int, Field(ge=2)] = 96  # pictures (and texts) that meet in one loss
    sources: dict[str, Weight]
    weight: Annotated[float, Field(gt=0)] = 1.0
    logit_scale: Annotated[float, Field(gt=0)] = 20.0
    alpha: Annotated[float, Field(ge=0)] = 0.0
    max_text_tokens: Annotated[int, Field(ge=8)] = 80


class Generative(_Part):
    """The next-token share of a step."""

    tokens: Annotated[int, Field(ge=64)] = 1024  # tokens of one step, image tokens included
    sources: dict[str, Weight]  # share of examples drawn from each source
    weight: Annotated[float, Field(gt=0)] = 1.0
    questions_per_example: Annotated[int, Field(ge=1)] = 3
    max_caption_words: Annotated[int, Field(ge=4)] = 45


class LoopStage(_Part):
    """Gradient steps through the model; with both parts it is the joint task."""

    kind: Literal["steps"]
    name: str
    steps: int = Field(ge=1)
    generative: Generative | None = None
    contrastive: Contrastive | None = None
    trainable: tuple[Literal["connector", "lora", "head"], ...] = ("connector", "lora")
    lora_from: Annotated[int, Field(ge=0)] = 0  # only adapters of this block and later ones
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4  # of LoRA
    connector_learning_rate: Annotated[float, Field(gt=0)] = 5e-4  # of connector and head
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    flip: bool = True  # show some pictures mirrored (sources where left and right do not matter)


AnyStage = WordsStage | HeadStage | LoopStage
Stage = Annotated[AnyStage, Field(discriminator="kind")]


class Recipe(_Part):
    """A whole run, from bundled base weights to a folder that `visavis.load` reads."""

    name: str
    bundle: Literal["nano"] = "nano"
    seed: int = 0
    turns: str = "chatml-bare"
    image_size: Annotated[int, Field(ge=32)] = 260
    connector: ConnectorRecipe = ConnectorRecipe()
    head: HeadRecipe = HeadRecipe()
    lora: LoraRecipe = LoraRecipe()
    stages: tuple[Stage, ...]

    @field_validator("stages")
    @classmethod
    def _names_and_sources(cls, stages: tuple[AnyStage, ...]) -> object:
        names = [stage.name for stage in stages]
        problems = [f"two stages are named {n!r}" for n in sorted(set(names)) if names.count(n) > 1]
        problems += [] if stages else ["there are no stages"]
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


def sources_of(stage: AnyStage) -> tuple[str, ...]:
    """Return the names of every source a stage reads."""
    if not isinstance(stage, LoopStage):
        return tuple(stage.sources)
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
