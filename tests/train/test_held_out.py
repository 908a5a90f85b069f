"""Small contrastive runs find held-out pictures, with what their objectives add (dev/LOG.md)."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

import visavis
from visavis.data.sources import SourceConfig, open_data_source
from visavis.train.recipe import Recipe
from visavis.train.runner import run_recipe

SEEDS = (0, 1, 2)
CHANCE = 1 / 160
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


def contrast(folder: Path, base: str, seed: int, what: str, **objective: Any) -> float:
    """Train captions to find pictures, or pictures to find captions; return hit@1 of held-out
    ones."""
    stage = {
        "steps": 60,
        "contrastive": {"sources": {"drawn": {}}, "batch": 32, **objective},
        "train": {"connector": 1.0e-3, "language_model": 1.0e-3},
    }
    options = {"as": what, "negatives": 3}
    trained = run(folder, base, stage, {**SHAPES, "options": options}, seed)
    model = visavis.load(trained, precision="f32", device="cpu")
    held_out = SourceConfig.model_validate({**SHAPES, "path": "test", "options": options})
    samples = list(open_data_source(held_out, folder, name="test"))
    queries = model.embed([one.query for one in samples])
    targets = model.embed([one.target for one in samples])
    return float(((queries @ targets.T).argmax(1) == np.arange(len(samples))).mean())


@pytest.mark.slow
def test_pictures_find_their_captions_among_hard_negatives(speaker: str, tmp_path: Path) -> None:
    settings = {"temperature": 0.1, "negatives": 3}
    assert contrast(tmp_path, speaker, 0, "name", **settings) > 40 * CHANCE


@pytest.mark.slow
def test_hardness_weighting_helps_where_the_temperature_is_high(
    speaker: str, tmp_path: Path
) -> None:
    hits: dict[float, list[float]] = {0.0: [], 9.0: []}
    for seed in SEEDS:
        for alpha, found in hits.items():
            settings = {"temperature": 0.5, "symmetric": True, "negatives": 0, "alpha": alpha}
            folder = tmp_path / f"{seed}-{alpha}"
            found.append(contrast(folder, speaker, seed, "find", **settings))
    assert min(hits[9.0]) > 40 * CHANCE
    assert mean(hits[9.0]) > mean(hits[0.0]) + 0.05, hits
