"""The recipes that come with the program: all are planned on data of their shape, the small ones
run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import visavis
from tests.train.hub_configs import with_local_settings
from tests.train.made_data import make_data
from visavis.train.dry_run import Plan, plan
from visavis.train.recipe import Recipe, StepsStage, read_recipe
from visavis.train.runner import run_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
HAVE_OWN_TESTS = ("nano", "scene-graph", "tiny-scene-graph")
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TINY = [name for name in NAMES if name.startswith("tiny-") and name not in HAVE_OWN_TESTS]
CHANGE = re.compile(r"(?:model|stages)\.[\w.]+=\S+")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache for all, in which nothing but tiny-random will be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISAVIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield  # type: ignore[misc]


def recipe_of(name: str, *changes: str) -> Recipe:
    return read_recipe(FOLDER / f"{name}.yaml", changes)


def smaller(name: str, **numbers: int) -> list[str]:
    """Return changes that set numbers of every stage and objective that has them."""
    found = []
    for place, stage in enumerate(recipe_of(name).stages):
        if isinstance(stage, StepsStage):
            if "steps" in numbers and stage.steps is not None:
                found.append(f"stages.{place}.steps={numbers['steps']}")
            for kind in ("generative", "contrastive"):
                if getattr(stage, kind) is not None and "batch" in numbers:
                    found.append(f"stages.{place}.{kind}.batch={numbers['batch']}")
    return found


def planned(name: str, folder: Path, *changes: str) -> Plan:
    """Plan a recipe on two rows of each of its sources."""
    (folder / "pretrain" / "model").mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(name, *smaller(name, batch=2), *changes)
    make_data(recipe, folder)
    return plan(with_local_settings(recipe, folder), folder, flops=1e12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in HAVE_OWN_TESTS])
def test_every_recipe_is_planned(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = planned(name, tmp_path)
    assert made.problems == []
    for stage in made.stages:
        assert any(row["trained"] for row in stage.trains), stage.stage
        if stage.kind == "steps":
            assert stage.steps and stage.tokens_per_step and stage.memory and stage.seconds
            assert all(row.samples and row.share for row in stage.sources)
    json.dumps(made.to_dict())


def written_changes() -> list[tuple[str, str]]:
    """Return what the recipes' heads say can be changed, line by line."""
    found = []
    for name in NAMES:
        for line in (FOLDER / f"{name}.yaml").read_text("utf-8").splitlines():
            if line.startswith("#") and (changes := CHANGE.findall(line)):
                found.append((name, " ".join(change.strip("`.") for change in changes)))
    return found


@pytest.mark.parametrize(("name", "changes"), written_changes())
def test_what_heads_say_can_be_changed_can(
    name: str, changes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert planned(name, tmp_path, *changes.split()).problems == []


def test_every_family_of_tinyllava_is_named() -> None:
    named = {changes.split()[0] for name, changes in written_changes() if name == "tinyllava-base"}
    assert len(named) == 7


def test_weights_and_caps_of_vlm2vec_are_as_published() -> None:
    recipe = recipe_of("vlm2vec-v2")
    (stage,) = recipe.stages
    assert isinstance(stage, StepsStage) and stage.contrastive is not None
    drawn = stage.contrastive.sources
    assert sum(one.weight or 0 for one in drawn.values()) == 52
    assert {one.block for one in drawn.values()} == {64}
    assert sum(recipe.data[name].cap or 0 for name in drawn if name != "colpali") == 1_943_000


@pytest.mark.parametrize("name", [name for name in TINY if name != "tiny-nano"])  # 4,000 pictures
def test_small_recipes_start(name: str, tmp_path: Path) -> None:
    changes = smaller(name, steps=2, batch=4)
    model = visavis.load(run_recipe(recipe_of(name, *changes), tmp_path, tmp_path / "out"))
    assert len(model.embed(["a red circle"])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_small_recipes_learn(name: str, tmp_path: Path) -> None:
    run_recipe(recipe_of(name), tmp_path, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    last = recipe_of(name).stages[-1].name
    losses = [line["loss"] for line in lines if line["stage"] == last and "loss" in line]
    for objective, loss in losses[-1].items():
        assert loss < 0.75 * losses[0][objective]
