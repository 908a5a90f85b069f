"""What hard negatives teach: hits of small runs on held-out pictures (numbers in dev/LOG.md)."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

import visavis
from visavis.data.formats import open_source
from visavis.train.recipe import Recipe, SourceRecipe
from visavis.train.run import run_recipe

SEEDS = (0, 1, 2)
OPTIONS = {"as": "find", "negatives": 1}  # the picture turned round: the same words, another order
SHAPES = {"format": "shapes", "path": "train"}


def run(folder: Path, base: str, stage: dict[str, Any], data: dict[str, Any], seed: int) -> Path:
    """Take steps from a model; return what they made of it."""
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "seed": seed,
            "model": {"base": base, "profile": "vlm2vec-v2"},
            "data": {"drawn": data},
            "stages": [{"kind": "steps", "name": "steps", "warmup": 0.05, **stage}],
            "precision": "f32",
            "feature_cache": True,
            "trackers": [],
        }
    )
    return run_recipe(recipe, folder, folder)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that has learned to describe pictures, as those that VLM2Vec starts from."""
    stage = {
        "steps": 150,
        "generative": {"sources": {"drawn": {}}, "batch": 32},
        "train": {"connector": 2.0e-3, "language_model": 2.0e-3},
    }
    folder = tmp_path_factory.mktemp("speaker")
    return str(run(folder, "tiny-random", stage, {**SHAPES, "options": {"as": "caption"}}, 0))


def contrast(folder: Path, base: str, seed: int, negatives: int) -> tuple[float, float]:
    """Train captions to find their pictures; return hit@1 of held-out ones: among all pictures,
    and between their own and that turned round."""
    stage = {
        "steps": 60,
        "contrastive": {
            "sources": {"drawn": {}},
            "batch": 32,
            "temperature": 0.1,
            "negatives": negatives,
        },
        "train": {"connector": 1.0e-3, "language_model": 1.0e-3},
    }
    trained = run(folder, base, stage, {**SHAPES, "options": OPTIONS}, seed)
    model = visavis.load(trained, precision="f32", device="cpu")
    held_out = SourceRecipe.model_validate({**SHAPES, "path": "test", "options": OPTIONS})
    samples = list(open_source(held_out, folder, name="test"))
    queries = model.embed([one.query for one in samples])
    targets = model.embed([one.target for one in samples])
    turned = model.embed([one.negatives[0] for one in samples])
    best = (queries @ targets.T).argmax(1)
    own, other = (queries * targets).sum(1), (queries * turned).sum(1)
    return float((best == np.arange(len(samples))).mean()), float((own > other).mean())


@pytest.mark.slow
def test_hard_negatives_teach_what_they_show(speaker: str, tmp_path: Path) -> None:
    told: dict[int, list[float]] = {0: [], 1: []}
    for seed in SEEDS:
        for negatives, hits in told.items():
            among_all, between = contrast(
                tmp_path / f"{seed}-{negatives}", speaker, seed, negatives
            )
            assert among_all > 0.2  # chance: 1 of 160
            hits.append(between)
    assert mean(told[1]) > mean(told[0]) + 0.03, told
