"""What hard negatives are for: small runs that tell held-out pictures from near ones."""

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
NEAR = 3  # captions that differ in a word or in the order
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


def contrast(folder: Path, base: str, seed: int, **objective: Any) -> tuple[float, float]:
    """Train pictures to find their captions; return hit@1 of held-out ones: among all captions,
    and among their own and near ones."""
    stage = {
        "steps": 60,
        "contrastive": {"sources": {"drawn": {}}, "batch": 32, "temperature": 0.1, **objective},
        "train": {"connector": 1.0e-3, "language_model": 1.0e-3},
    }
    options = {"as": "name", "negatives": NEAR}
    trained = run(folder, base, stage, {**SHAPES, "options": options}, seed)
    model = visavis.load(trained, precision="f32", device="cpu")
    held_out = SourceRecipe.model_validate({**SHAPES, "path": "test", "options": options})
    samples = list(open_source(held_out, folder, name="test"))
    queries = model.embed([one.query for one in samples])
    targets = model.embed([one.target for one in samples])
    near = model.embed([other for one in samples for other in one.negatives])
    similarity, own = queries @ targets.T, (queries * targets).sum(1)
    among_near = np.einsum("nd,nkd->nk", queries, near.reshape(len(samples), NEAR, -1))
    return (
        float((similarity.argmax(1) == np.arange(len(samples))).mean()),
        float((among_near.max(1) < own).mean()),
    )


@pytest.mark.slow
def test_hard_negatives_teach_what_is_near(speaker: str, tmp_path: Path) -> None:
    found: dict[int, list[float]] = {0: [], NEAR: []}
    for seed in SEEDS:
        for number, hits in found.items():
            folder = tmp_path / f"{seed}-{number}"
            among_all, near = contrast(folder, speaker, seed, negatives=number)
            assert among_all > 0.2  # chance: 1 of 160
            hits.append(near)
    assert mean(found[NEAR]) > mean(found[0]) + 0.04, found
