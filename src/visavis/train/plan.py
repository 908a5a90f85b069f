"""What a recipe would do, found out without loading a weight: the table of `--dry-run`."""

from __future__ import annotations

from pathlib import Path

import torch

from visavis.checkpoints import bundled
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.data.sources import SOURCES
from visavis.errors import TrainError, VisavisError
from visavis.model.vlm import VLM
from visavis.train.freeze import trainable_groups, trainable_table
from visavis.train.lora import add_lora
from visavis.train.recipe import LoopStage, Recipe, sources_of
from visavis.train.run import model_config


def plan_table(recipe: Recipe, data: Path) -> list[tuple[str, ...]]:
    """Return rows to print: each stage with its parts, parameters and how many are trained.

    Raises:
        TrainError: sources cannot be read; the message lists all of them.
    """
    check_sources(recipe, data)
    gguf = open_gguf(bundled.fetch(recipe.bundle)["language_model"])
    with torch.device("meta"):
        vlm = VLM(model_config(recipe, gguf))
        add_lora(vlm.decoder, rank=recipe.lora.rank, scale=recipe.lora.scale)
    rows: list[tuple[str, ...]] = [("stage", "part", "parameters", "trained", "sources")]
    for stage in recipe.stages:
        sources = ", ".join(sources_of(stage))
        if not isinstance(stage, LoopStage):
            part = "connector" if stage.kind == "words" else "head"
            module = vlm.connector if stage.kind == "words" else vlm.head
            assert module is not None
            count = f"{sum(p.numel() for p in module.parameters()):,}"
            rows.append((stage.name, part, count, count, sources))
            continue
        trainable_groups(vlm, stage.trainable, lora_from=stage.lora_from)
        for part, total, trained in trainable_table(vlm):
            rows.append((stage.name, part, f"{total:,}", f"{trained:,}", sources))
            sources = ""
    return rows


def check_sources(recipe: Recipe, data: Path) -> None:
    """Read the first record of every source.

    Raises:
        TrainError: naming every source that has none.
    """
    problems = []
    for name in dict.fromkeys(name for stage in recipe.stages for name in sources_of(stage)):
        read, split = SOURCES[name]
        try:
            next(read(data, split))
        except (VisavisError, StopIteration) as error:
            problems.append(f"{name}: {error or 'no records'}")
    if problems:
        raise TrainError(f"{len(problems)} source(s) cannot be read. " + " ".join(problems))
