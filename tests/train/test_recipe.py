"""Recipes: the committed one is valid; wrong ones list every problem."""

from __future__ import annotations

from pathlib import Path

import pytest

from visavis.errors import TrainError
from visavis.train.recipe import LoopStage, read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_is_valid(path: Path) -> None:
    recipe = read_recipe(path)
    assert any(isinstance(stage, LoopStage) for stage in recipe.stages)
    assert f"visavis train recipes/{path.name}" in path.read_text()  # how to run it


def test_all_problems_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        """
name: wrong
colour: blue
lora: {rank: 0}
stages:
  - {kind: steps, name: a, steps: 3, generative: {sources: {easy-vqa: 1.0}}, speed: 2}
"""
    )
    with pytest.raises(TrainError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert "3 problem(s)" in message
    for word in ("colour", "lora.rank", "speed"):
        assert word in message


def test_evaluation_data_cannot_be_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    stage = "{kind: words, name: w, sources: [openstax-figures/val, openstax]}"
    path.write_text(f"name: wrong\nstages:\n  - {stage}\n")
    with pytest.raises(TrainError, match="held out for evaluation") as caught:
        read_recipe(path)
    assert "did you mean 'openstax-figures'" in str(caught.value)


def test_not_yaml_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("a: [")
    with pytest.raises(TrainError, match="cannot read the recipe"):
        read_recipe(path)
