"""Plan of a recipe, made without loading weights: every problem, tables, estimates.

    recipe ──► outline of the model, on the meta device ──► what each stage trains
       └─────► sources, a few samples of each ───────────► steps, tokens, memory, time

The model is built in `skeleton.py`; the formulas are in `cost_model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from visavis.data.check import leave_out_bad_rows
from visavis.data.examples import ContrastiveExample, Conversation, Sample
from visavis.data.sources import open_data_source
from visavis.errors import ContextLengthError, TrainError, VisavisError
from visavis.model.vlm import VLM
from visavis.processing.prompt_encoder import PromptEncoder
from visavis.train import cost_model
from visavis.train.cost_model import Reader, Survey
from visavis.train.data_loader import check_learned
from visavis.train.metrics import peak_flops
from visavis.train.param_groups import trainable_groups, trainable_table
from visavis.train.recipe import AnyStage, Contrastive, Generative, Recipe, StepsStage, sources_of
from visavis.train.skeleton import (
    DTYPES,
    Findings,
    Outline,
    model_outline,
    prompt_encoder,
    skeleton,
)

REACHED = 0.4  # share of the speed of matrix products that training is taken to reach
MAX_LISTED = 3  # problems of a source's samples
FITTED = {"words": "connector", "head": "head"}  # what stages without gradient steps find

Sources = Mapping[str, Sequence[Sample]]


@dataclass
class SourcePlan:
    """One source in a stage; None is what cannot be known."""

    source: str
    samples: int | None = None
    share: float | None = None  # of a step's samples of its objective
    tokens: float | None = None  # of a sample, all its prompts together
    epochs: float | None = None  # how often the stage goes through it


@dataclass
class StagePlan:
    """The plan of one stage; None stands for values that cannot be determined."""

    stage: str
    kind: str
    trains: list[dict[str, object]] = field(default_factory=list)
    sources: list[SourcePlan] = field(default_factory=list)
    steps: int | None = None
    tokens_per_step: int | None = None
    memory: dict[str, int] | None = None  # bytes of each process, by what holds them
    operations: float | None = None
    seconds: float | None = None


@dataclass
class Plan:
    """The plan of a recipe, and the problems that prevent it from running."""

    recipe: str
    model: str
    flops: float  # operations per second that seconds are reckoned with
    problems: list[str]
    notes: list[str]
    stages: list[StagePlan]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(recipe: Recipe, data: Path, *, flops: float | None = None) -> Plan:
    """Return the plan of a recipe, with all problems that prevent it from running.

    Args:
        data: the folder that sources' paths start at.
        flops: operations per second that training reaches, all devices together; None: a share
            of what this machine's reaches in matrix products.
    """
    found = Findings()
    sources = _opened(recipe, data, found)
    outline = model_outline(recipe.model, found)
    reader = None
    if outline is not None:
        words = outline.text.count if outline.text else None
        reader = Reader(outline.config, outline.processor, words)
    vlm = skeleton(recipe, outline, found) if outline else None
    speed = flops or _reached(recipe, found)
    stages = [
        _steps(recipe, stage, sources, reader, outline, vlm, speed, found)
        if isinstance(stage, StepsStage)
        else _fitting(stage, sources, vlm, found)
        for stage in recipe.stages
    ]
    if outline is not None:
        _check(recipe, outline, found)
    model = recipe.model
    parts = f"{model.vision_tower} + {model.connector.kind} + {model.language_model}"
    problems, notes = (list(dict.fromkeys(one)) for one in (found.problems, found.notes))
    return Plan(recipe.name, model.base or parts, speed, problems, notes, stages)


def _opened(recipe: Recipe, data: Path, found: Findings) -> Sources:
    """Open every source that some stage reads."""
    opened: dict[str, Sequence[Sample]] = {}
    wanted = dict.fromkeys(name for stage in recipe.stages for name in sources_of(stage))
    for name in wanted:
        try:
            source = open_data_source(recipe.data[name], data, name=name)
            if recipe.bad_rows == "skip" and (left_out := leave_out_bad_rows(source)):
                first = f"{left_out[0].id!r}: {left_out[0].text}"
                found.notes.append(f"{len(left_out)} rows of {name!r} are skipped, first {first}")
            opened[name] = source
        except VisavisError as error:
            found.problems.append(str(error))
    for name in recipe.data.keys() - wanted.keys():
        found.notes.append(f"no stage reads the source {name!r}")
    return opened


def _reached(recipe: Recipe, found: Findings) -> float:
    """Return the operations per second that training is taken to reach on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = peak_flops(device, DTYPES[recipe.precision])
    if peak is None:
        found.notes.append(f"how fast {device.type} is, is not known: times are for 1 TFLOP/s")
        return 1e12
    found.notes.append(
        f"times are for one device at {_flops(REACHED * peak)}, {REACHED:.0%} of the "
        f"{_flops(peak)} that matrix products reach on this {device.type}; say --flops for others"
    )
    return REACHED * peak


def _flops(number: float) -> str:
    return f"{number / 1e12:.3g} TFLOP/s" if number >= 1e12 else f"{number / 1e9:.3g} GFLOP/s"


def _check(recipe: Recipe, outline: Outline, found: Findings) -> None:
    """Note what of the recipe does not go with its model."""
    config, context = outline.config, outline.config.decoder.context_length
    for stage in recipe.stages:
        if not isinstance(stage, StepsStage):
            continue
        for part in (stage.generative, stage.contrastive):
            if part is not None and part.max_tokens is not None and part.max_tokens > context:
                found.problems.append(
                    f"stage {stage.name!r} allows sequences of {part.max_tokens} tokens "
                    f"(max_tokens), but the model's context is {context}"
                )
        by_head = recipe.model.pooling == "head" and not recipe.model.base
        if stage.contrastive is not None and by_head and config.head is None:
            found.problems.append("model.pooling is 'head', but the model has none: add `head`")
    if recipe.feature_cache and (config.merge.kind != "flat" or not hasattr(config.tower, "grid")):
        found.problems.append(
            "feature_cache keeps one view of each picture, but this model sees pictures in several "
            "or at any size: set it to false"
        )


# ---- stages --------------------------------------------------------------------------------------


def _fitting(stage: AnyStage, sources: Sources, vlm: VLM | None, found: Findings) -> StagePlan:
    """Plan a stage that fits a part without gradient steps."""
    planned = StagePlan(stage.name, stage.kind)
    planned.sources = [
        SourcePlan(name, len(sources[name]) if name in sources else None)
        for name in sources_of(stage)
    ]
    part = FITTED[stage.kind]
    module = None if vlm is None else getattr(vlm, part)
    if module is not None:
        count = sum(p.numel() for p in module.parameters())
        planned.trains = [{"part": part, "parameters": count, "trained": count, "as": "fitted"}]
    elif vlm is not None:
        found.problems.append(f"stage {stage.name!r} fits the {part}, which the model has not")
    return planned


@dataclass(frozen=True)
class _Objective:
    """One objective of a stage, with what is known of its sources."""

    part: Generative | Contrastive
    surveys: dict[str, Survey]

    @property
    def whole(self) -> bool:
        return self.part.sources.keys() <= self.surveys.keys()

    @property
    def size(self) -> int:
        return sum(one.size for one in self.surveys.values())

    def share(self, name: str) -> float:
        """Return a source's share of the samples."""
        drawn = self.part.sources
        weighted = any(one.weight is not None for one in drawn.values())
        weights = {
            source: drawn[source].weight or one.size if weighted else one.size
            for source, one in self.surveys.items()
        }
        return weights[name] / sum(weights.values())

    @property
    def mean(self) -> tuple[float, float, float] | None:
        """Tokens, learned tokens and patches of a sample."""
        means = [(self.share(name), one.mean) for name, one in self.surveys.items()]
        if not self.whole or any(mean is None for _, mean in means):
            return None
        sums = (sum(share * mean[i] for share, mean in means if mean) for i in range(3))
        tokens, learned, patches = sums
        return tokens, learned, patches

    @property
    def pass_tokens(self) -> int:
        """Tokens of one pass through the model, at most."""
        part = self.part
        budget = part.micro_tokens if isinstance(part, Generative) else part.chunk_tokens
        step = part.batch * (self.mean or (budget,))[0]
        longest = max((one.longest[0] for one in self.surveys.values()), default=0)
        return max(longest, min(budget, math.ceil(step)))


def _steps(
    recipe: Recipe,
    stage: StepsStage,
    sources: Sources,
    reader: Reader | None,
    outline: Outline | None,
    vlm: VLM | None,
    speed: float,
    found: Findings,
) -> StagePlan:
    """Plan a stage of gradient steps."""
    planned = StagePlan(stage.name, stage.kind)
    objectives = []
    chat_format = stage.chat_template or recipe.model.chat_template
    encoder = prompt_encoder(outline, chat_format) if outline is not None else None
    chat = None if encoder is None else partial(_check_chat, encoder)
    for part in (stage.generative, stage.contrastive):
        if part is not None:
            surveys = {
                name: _survey(stage, part, name, sources[name], reader, chat, found)
                for name in part.sources
                if name in sources
            }
            objectives.append(_Objective(part, surveys))
    if stage.steps is not None:
        planned.steps = stage.steps
    elif all(one.whole for one in objectives):
        longest = max(one.size / one.part.batch for one in objectives)
        planned.steps = math.ceil((stage.epochs or 0) * longest)
    for one in objectives:
        planned.sources += [_source(one, name, planned.steps) for name in one.part.sources]
        batch = one.part.batch
        if isinstance(one.part, Contrastive) and one.whole and one.size < batch:
            found.problems.append(
                f"stage {stage.name!r} draws {batch} queries a step of {one.size} samples, so that "
                "each batch would hold some twice; lower `batch`, or add data"
            )
    means = [one.mean for one in objectives]
    if all(means):
        batches = [one.part.batch for one in objectives]
        tokens = sum(batch * mean[0] for batch, mean in zip(batches, means, strict=True) if mean)
        planned.tokens_per_step = round(tokens)
    if vlm is not None:
        planned.trains = _table(vlm, stage, found)
        planned.memory = _memory(recipe, stage, vlm, objectives)
        planned.operations = _operations(recipe, stage, vlm, objectives)
        if planned.operations is not None and planned.steps is not None:
            planned.seconds = planned.operations * planned.steps / speed
    return planned


def _survey(
    stage: StepsStage,
    part: Generative | Contrastive,
    name: str,
    samples: Sequence[Sample],
    reader: Reader | None,
    chat: Callable[[Conversation], None] | None,
    found: Findings,
) -> Survey:
    """Look at a few samples of a source; note what is wrong with them."""
    if reader is None:
        return Survey(len(samples))
    chats = isinstance(part, Generative)
    negatives = part.negatives if isinstance(part, Contrastive) else None
    survey = cost_model.survey(
        samples,
        Conversation if chats else ContrastiveExample,
        reader,
        negatives,
        check=chat if chats else None,
    )
    where, more = f"stage {stage.name!r}, {name!r}:", len(survey.problems) - MAX_LISTED
    found.problems += [f"{where} {one}" for one in survey.problems[:MAX_LISTED]]
    if more > 0:
        found.problems.append(
            f"{where} and {more} more of the samples that were looked at; `visavis data check` "
            "looks at all"
        )
    length, id = survey.longest
    most = min(part.max_tokens or reader.config.decoder.context_length, 10**9)
    if length > most and not getattr(part, "cut", False):
        text = (
            f"stage {stage.name!r}, {name!r}: the sample {id!r} has about {length} tokens, "
            f"expected at most {most}"
        )
        (found.notes if reader.words is None else found.problems).append(text)
    return survey


def _check_chat(encoder: PromptEncoder, sample: Conversation) -> None:
    """Refuse a conversation of which nothing would be learned.

    Raises:
        VisavisError: its chat template refuses it, or marks no token as learned.
    """
    try:
        encoded = encoder.chat(sample.prompt, add_generation_prompt=False)
    except ContextLengthError:
        return  # reported by length, with what the recipe allows
    check_learned(sample.id, encoded)


def _source(objective: _Objective, name: str, steps: int | None) -> SourcePlan:
    """Return the plan of a source within a stage."""
    survey = objective.surveys.get(name)
    if survey is None:
        return SourcePlan(name)
    row = SourcePlan(name, survey.size)
    row.tokens = None if survey.mean is None else round(survey.mean[0], 1)
    if objective.whole:
        row.share = round(objective.share(name), 4)
        if steps is not None:
            row.epochs = round(steps * objective.part.batch * row.share / survey.size, 2)
    return row


def _table(vlm: VLM, stage: StepsStage, found: Findings) -> list[dict[str, object]]:
    """Return the table of parts that a stage trains; each missing part is reported."""
    there = {}
    for part, rate in stage.train.items():
        try:
            trainable_groups(vlm, stage.model_copy(update={"train": {part: rate}}))
            there[part] = rate
        except TrainError as error:
            found.problems.append(str(error))
    groups = trainable_groups(vlm, stage.model_copy(update={"train": there}))
    return trainable_table(vlm, groups, {str(part): rate for part, rate in there.items()})


def _memory(
    recipe: Recipe, stage: StepsStage, vlm: VLM, objectives: Sequence[_Objective]
) -> dict[str, int]:
    """Return bytes by what holds them, of a stage's trainable parts as they now stand."""
    number_bytes = DTYPES[recipe.precision].itemsize
    gradients, optimizer = cost_model.trained_bytes(vlm, ema=stage.ema > 0)
    decoder, passes = vlm.config.decoder, []
    for one in objectives:
        tokens, mean = one.pass_tokens, one.mean or (1.0, 0.0, 0.0)
        per_token = [number / max(1.0, mean[0]) for number in mean]
        held = cost_model.activation_bytes(
            decoder, tokens, number_bytes, recomputed=stage.checkpointing
        )
        if isinstance(one.part, Generative):
            held += cost_model.score_bytes(decoder, round(tokens * per_token[1]), number_bytes)
        if "vision_tower" in stage.train:
            patches = round(tokens * per_token[2])
            held += cost_model.tower_bytes(vlm.config, patches, stage.vision_from)
        passes.append(held)
    return {
        "weights": cost_model.weight_bytes(vlm),
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": max(passes),
    }


def _operations(
    recipe: Recipe, stage: StepsStage, vlm: VLM, objectives: Sequence[_Objective]
) -> float | None:
    """Return the operations of one step."""
    total = 0.0
    for one in objectives:
        if one.mean is None:
            return None
        tokens, learned, patches = one.mean
        total += cost_model.step_operations(
            vlm,
            (tokens, learned, 0.0 if recipe.feature_cache else patches),
            one.part.batch,
            cached=isinstance(one.part, Contrastive),
            recomputed=stage.checkpointing,
        )
    return total
