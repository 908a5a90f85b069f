"""Recipes: committed ones are valid; wrong ones list every problem; values can be overridden."""

from __future__ import annotations

from pathlib import Path

import pytest

from visavis.errors import TrainError
from visavis.train.recipe import StepsStage, read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
RIGHT = """
name: right
model: {base: somewhere, lora: {}}
data: {talk: {format: llava, path: talk.json}}
stages:
  - {kind: steps, name: a, steps: 3, train: {lora: 1.0e-3}, generative: {sources: {talk: {}}}}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid(path: Path) -> None:
    assert read_recipe(path).stages
    assert f"visavis train recipes/{path.name}" in path.read_text()  # how to run it


def test_all_problems_are_listed(tmp_path: Path) -> None:
    text = RIGHT.replace("name: right", "name: wrong\ncolour: blue")
    text = text.replace("lora: {}", "lora: {rank: 0}").replace("steps: 3", "steps: 3, speed: 2")
    with pytest.raises(TrainError) as caught:
        read_recipe(written(tmp_path, text))
    message = str(caught.value)
    assert "problem(s)" in message
    for word in ("colour", "model.lora.rank", "speed"):
        assert word in message


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("base: somewhere", "vision_tower: siglip", "give either `base`"),
        ("lora: {}", "connector: {kind: lineal}", "did you mean 'linear'"),
        (", lora: {}", "", "trains `lora`, but the model has none"),
        (", lora: {}", ", quantize: int4", "add `lora`"),
        ("lora: {}", "chat_template: chatml-bear", "unknown chat format"),
        ("{talk: {}}", "{tork: {}}", "did you mean 'talk'"),
        ("steps: 3", "steps: 3, epochs: 1", "give one of `steps` and `epochs`"),
        ("{lora: 1.0e-3}", "{}", "`train` names no part"),
        (", generative: {sources: {talk: {}}}", "", "neither `generative` nor `contrastive`"),
        ("format: llava, path: talk.json", "format: records, path: openstax", "is unknown"),
        ("format: llava, path: talk.json", "format: records, path: easy-vqa/test", "held out"),
        ("name: right", "name: right\nfeature_cache: true\nseed: x", "seed"),
    ],
)
def test_what_does_not_fit_is_said(old: str, new: str, problem: str, tmp_path: Path) -> None:
    assert old in RIGHT
    with pytest.raises(TrainError, match=problem):
        read_recipe(written(tmp_path, RIGHT.replace(old, new)))


def test_values_are_overridden_by_dotted_names(tmp_path: Path) -> None:
    path = written(tmp_path, RIGHT)
    recipe = read_recipe(path, ["stages.0.steps=10", "model.lora.rank=4", "seed=3"])
    (stage,) = recipe.stages
    assert isinstance(stage, StepsStage) and stage.steps == 10
    assert recipe.model.lora is not None and (recipe.model.lora.rank, recipe.seed) == (4, 3)
    for wrong in ("stages.7.steps=1", "stages.0.steps", "name.x=1", "stages.a=1"):
        with pytest.raises(TrainError, match="changes nothing of the recipe"):
            read_recipe(path, [wrong])


def test_not_yaml_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="cannot read the recipe"):
        read_recipe(written(tmp_path, "a: ["))
