"""Stages of fitting: image tokens near their words, pictures near their captions, done once."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as pil

from tests.fakes import picture, tiny_config, write_tiny_checkpoint
from visavis.errors import TrainError
from visavis.inputs import Image
from visavis.model.config import ConnectorConfig, HeadConfig
from visavis.train import closed_form_stages
from visavis.train.context import TrainingRun
from visavis.train.recipe import Recipe
from visavis.train.runner import run_recipe, start

COLOURS = {"crimson": (220, 20, 40), "emerald": (20, 200, 80), "azure": (20, 80, 220)}
STAGES: dict[str, dict[str, Any]] = {
    "words": {"kind": "words", "name": "words", "sources": ["stamps"]},
    "head": {"kind": "head", "name": "head", "sources": {"stamps": 1}},
}


def stamp(number: int) -> tuple[str, bytes]:
    """A picture mostly of one colour, and the colour's name."""
    name, colour = list(COLOURS.items())[number % 3]
    noise = np.asarray(picture(number, (32, 32)), np.float32)
    file = io.BytesIO()
    mixed = 0.75 * np.asarray(colour, np.float32) + 0.25 * noise
    pil.fromarray(mixed.astype(np.uint8)).save(file, "PNG")
    return name, file.getvalue()


def write_stamps(root: Path, num: int = 60) -> None:
    """Write a data set as `tuxpaint-stamps` lies on disk."""
    (root / "tuxpaint-stamps").mkdir(parents=True)
    with tarfile.open(root / "tuxpaint-stamps" / "train-00000.tar", "w") as shard:
        for number in range(num):
            name, image = stamp(number)
            fields = json.dumps({"caption": f"a {name} thing"}).encode()
            for suffix, content in (("png", image), ("json", fields)):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def recipe(root: Path, *stages: str, connector: str = "linear", **changes: Any) -> Recipe:
    config = tiny_config()
    config = replace(
        config,
        connector=ConnectorConfig(connector, 24, 32, shuffle=2),
        head=HeadConfig(layers=(0, 1), dim=16, tower_width=24),
    )
    base = root / "base"
    if not base.exists():
        write_tiny_checkpoint(base, config=config)
        write_stamps(root)
    return Recipe.model_validate(
        {
            "name": "small",
            "model": {"base": str(base)},
            "data": {"stamps": {"format": "records", "path": "tuxpaint-stamps"}},
            "stages": [STAGES[stage] for stage in stages],
            "precision": "f32",
            "feature_cache": True,
            "trackers": [],
            **changes,
        }
    )


def started(root: Path, made: Recipe) -> TrainingRun:
    return start(made, root, root / "out", lambda *words: None)


def test_image_tokens_are_near_the_words_of_captions(tmp_path: Path) -> None:
    run = started(tmp_path, recipe(tmp_path, "words"))
    (stage,) = run.recipe.stages
    closed_form_stages.run_frozen_stage(run, stage)  # type: ignore[arg-type]
    vlm, tokenizer = run.loaded.vlm, run.loaded.tokenizer
    words = torch.stack(
        [vlm.decoder.embed.weight[tokenizer.encode(f" {name}").ids].mean(0) for name in COLOURS]
    )
    words = words - words.mean(0)
    assert run.features is not None and vlm.connector is not None
    unseen = run.features.get([Image(stamp(n)[1]) for n in range(100, 130)], ["s"] * 30)
    tokens = vlm.connector(unseen).mean(1)  # [30, D]
    nearest = (tokens @ torch.nn.functional.normalize(words, dim=1).T).argmax(1)
    right = (nearest == torch.arange(100, 130) % 3).float().mean()
    assert right > 0.8, f"{right:.2f} of pictures are nearest to their word, by chance 0.33"


def test_what_was_found_is_not_fitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(tmp_path, "words")
    folder = run_recipe(made, tmp_path, tmp_path / "out")
    before = (folder / "model.safetensors").read_bytes()
    fail = lambda *args: pytest.fail("fitted again")  # noqa: E731
    monkeypatch.setattr(closed_form_stages, "fit_start", fail)
    run_recipe(made, tmp_path, tmp_path / "out")
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("words", {"connector": "mlp"}, "of kind 'linear', and the model's is 'mlp'"),
        ("head", {}, "fits the head of a dual encoder, and the model has none"),
        (
            "head",
            {"data": {"stamps": {"format": "llava", "path": "stamps.json"}}},
            "of the format 'llava'; expected 'records'",
        ),
        (
            "words",
            {"data": {"stamps": {"format": "records", "path": "imagenet-classes"}}},
            "use it as vision_tower",
        ),
    ],
)
def test_what_cannot_be_fitted_is_said(
    stage: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = recipe(tmp_path, stage, **changes)
    with pytest.raises(TrainError, match=message):
        run_recipe(made, tmp_path, tmp_path / "out")


def test_fitting_needs_kept_features_and_training_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'head' needs `feature_cache: true`"):
        recipe(tmp_path, "words", "head", feature_cache=False)
    data = {"stamps": {"format": "records", "path": "grocery-store/test"}}
    with pytest.raises(ValueError, match="held out for evaluation: did you mean 'grocery-store'"):
        recipe(tmp_path, "words", data=data)
