"""nano's recipe for real, cut short: every stage runs, losses fall, the folder chats and embeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import visavis
from visavis.checkpoints.native import FORMAT
from visavis.data.datasets import load_source
from visavis.evaluate.run import Options, evaluate
from visavis.inputs import Image
from visavis.train.dry_run import plan
from visavis.train.recipe import read_recipe
from visavis.train.runner import run_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "nano.yaml"
STEPS = 20
CUT = [
    "stages.0.epochs=2",
    "stages.0.batch=256",
    f"stages.2.steps={STEPS}",
    "data.openstax-figures.cap=300",
    "data.tuxpaint-stamps.cap=100",
    "data.fluent-emoji.cap=100",
    "data.openclipart.cap=100",
    "data.openstax-figures-2.cap=100",
    "data.caltech101.cap=200",
    "data.grocery-store.cap=100",
    "data.easy-vqa.cap=300",
    "data.vqa-rad.cap=50",
    "trackers=[]",
]


@pytest.mark.slow
@pytest.mark.shared
def test_nano_has_no_problems(shared_data: Path) -> None:
    planned = plan(read_recipe(RECIPE), shared_data)
    assert planned.problems == []
    chat = planned.stages[2]
    assert 700 < chat.tokens_per_step < 1400
    assert [row["trained"] for row in chat.trains if row["part"] == "tower"] == [0]


@pytest.mark.slow
@pytest.mark.shared
def test_nano_trains(shared_data: Path, tmp_path: Path) -> None:
    recipe = read_recipe(RECIPE, CUT)
    folder = run_recipe(recipe, shared_data, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"]["generative"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0], losses
    settings = json.loads((folder / "visavis.json").read_text())
    assert (settings["format"], settings["bundle"]) == (FORMAT, "nano")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 40 * 2**20
    model = visavis.load(folder)
    record = load_source("grocery-store/test", shared_data)[0]
    assert model.chat("What is this?", [Image(record.image)], max_new_tokens=8).text
    task = "grocery-store names"
    options = Options(max_records=200)
    found = evaluate(model, "nano", shared_data, tasks=[task], options=options)["tasks"][task]
    assert found["hit@5"] > 25 / found["info"]["candidates"], found
    vectors = model.embed(["a cat", "a kitten", "a table of numbers"])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2
