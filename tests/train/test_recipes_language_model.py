"""Every recipe is planned and trained with a real language model that has a chat template of its
own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.train.made_data import make_data
from tests.train.test_recipes import HAVE_OWN_TESTS, NAMES, recipe_of, smaller
from visavis.train.dry_run import plan
from visavis.train.recipe import ConnectorRecipe, ModelRecipe, Recipe, StepsStage
from visavis.train.runner import run_recipe

KEPT = ("lora", "quantize", "head", "pooling", "canvases", "max_tiles", "resize")


def with_language_model(name: str) -> Recipe:
    """Return a recipe that trains SmolLM2 with its own template and a small tower."""
    recipe = recipe_of(name, *smaller(name, steps=2, batch=2))
    parts = recipe.model
    model = ModelRecipe(
        language_model="smollm2-135m",
        vision_tower="tiny-random",
        connector=ConnectorRecipe(depth=2) if parts.base else parts.connector,
        **{key: getattr(parts, key) for key in KEPT},
    )
    stages = tuple(
        stage.model_copy(update={"steps": 2, "epochs": None, "chat_template": ""})
        if isinstance(stage, StepsStage)
        else stage
        for stage in recipe.stages
    )
    return recipe.model_copy(update={"model": model, "stages": stages, "trackers": ()})


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in HAVE_OWN_TESTS])
def test_every_recipe_trains_a_language_model(
    name: str, tmp_path: Path, nano_files: dict[str, Path]
) -> None:
    recipe = with_language_model(name)
    make_data(recipe, tmp_path)
    assert plan(recipe, tmp_path, flops=1e12).problems == []
    run_recipe(recipe, tmp_path, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert {one.name for one in recipe.stages} == {line["stage"] for line in lines}
    assert losses and all(loss > 0 for one in losses for loss in one.values())
