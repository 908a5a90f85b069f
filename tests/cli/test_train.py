"""`visavis train` and `visavis compose` as people use them: plans, runs, Ctrl-C, two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import visavis
from tests.cli.conftest import Run
from tests.train.hub_configs import save_settings

RECIPES = Path(__file__).parents[2] / "recipes"
LLAVA = RECIPES / "tiny-llava.yaml"
LLAVE = RECIPES / "tiny-llave.yaml"
SHORT = (
    "stages.0.steps=2",
    "stages.0.generative.batch=4",
    "stages.1.steps=2",
    "stages.1.contrastive.batch=4",
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISAVIS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [value for line in lines for value in line.get("loss", {}).values()]


def test_a_plan_is_printed_and_nothing_written(run: Run, tmp_path: Path) -> None:
    result = run("train", LLAVA, "--dry-run", "--flops", "1e9", "stages.0.steps=7")
    assert result.exit_code == 0, result.output
    for words in ("stage pretrain  7 steps of about", "stage finetune", "connector", "0.002"):
        assert words in result.stdout
    assert "memory of each process: about" in result.stdout and "time: about" in result.stdout
    assert list(tmp_path.iterdir()) == []
    whole = json.loads(run("train", LLAVA, "--dry-run", "--json", "--flops", "1e9").stdout)
    assert [stage["steps"] for stage in whole["stages"]] == [20, 200]
    assert whole["problems"] == []


def test_every_problem_of_a_plan_is_printed(run: Run, tmp_path: Path) -> None:
    parts = [
        f"model.{part}={save_settings(tmp_path, name)}"
        for part, name in (
            ("language_model", "lmsys/vicuna-7b-v1.5"),
            ("vision_tower", "openai/clip-vit-large-patch14-336"),
        )
    ]
    recipe = RECIPES / "llava-1.5-finetune.yaml"
    words = ("train", recipe, "--dry-run", "--flops", "1e15", *parts)
    result = run(*words)
    assert result.exit_code == 2
    assert "problem 1 of 2: the source 'mix-665k' cannot be opened" in result.stderr
    assert "problem 2 of 2: model.connector_weights" in result.stderr
    assert "6,738,415,616" in result.stdout  # what can be said is said
    made = run(*words, "--json")
    assert made.exit_code == 2 and len(json.loads(made.stdout)["problems"]) == 2


def test_a_wrong_recipe_is_one_line(run: Run) -> None:
    result = run("train", LLAVA, "stages.0.steps=many", "--dry-run")
    assert result.exit_code == 2
    assert result.stderr.startswith("visavis: error:") and "stages.0" in result.stderr
    assert "changes nothing of the recipe" in run("train", LLAVA, "stages.7.steps=1").stderr
    assert "cannot read the recipe" in run("train", "nothing.yaml").stderr


def test_a_run_leaves_a_model_and_goes_on(run: Run, tmp_path: Path) -> None:
    words = ("train", LLAVE, "-o", "out", *SHORT)
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "trained model" in result.stdout
    before = losses(tmp_path / "out")
    again = json.loads(run(*words, "--json").stdout)
    assert again["model"] == "out/model" and losses(tmp_path / "out") == before
    assert visavis.load(tmp_path / "out" / "model").embed(["a red circle"]).shape == (1, 96)
    other = run(*words, "seed=1")
    assert other.exit_code == 2 and "another recipe" in other.stderr


def start(folder: Path, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_an_interrupted_run_goes_on_with_the_same_command(run: Run, tmp_path: Path) -> None:
    words = ("-m", "visavis", "train", LLAVE, "-o", "out", *SHORT[:2])
    words = (*words, "stages.0.log_every=1", "stages.1.steps=12")
    words = (*words, "stages.1.contrastive.batch=8", "stages.1.log_every=1")
    child = start(tmp_path, *words)
    log = tmp_path / "out" / "log.jsonl"
    while child.poll() is None and not (log.is_file() and log.read_text().count("\n") >= 4):
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 130, errors
    assert "the same command" in errors
    result = run(*words[2:])
    assert result.exit_code == 0, result.output
    assert len(losses(tmp_path / "out")) == 2 + 12


@pytest.mark.slow
def test_two_processes_by_torchrun(run: Run, tmp_path: Path) -> None:
    """The steps are those of one process; the second says nothing."""
    command = ("train", LLAVE, *SHORT, "stages.1.log_every=1", "--json")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    both = start(tmp_path, *launcher, "-m", "visavis", *command, "-o", "both")
    printed, errors = both.communicate(timeout=240)
    assert both.returncode == 0, errors
    assert json.loads(printed)["model"] == "both/model"
    assert run(*command, "-o", "alone").exit_code == 0
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "alone"), abs=1e-3)


def test_compose_writes_a_model_that_loads(run: Run, tmp_path: Path) -> None:
    words = ("compose", "mine", "language_model=tiny-random", "vision_tower=tiny-random")
    result = run(*words, "connector.kind=resampler", "connector.num_queries=8", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == "mine"
    connector = visavis.load(tmp_path / "mine").vlm.config.connector
    assert connector is not None and (connector.kind, connector.num_queries) == ("resampler", 8)
    assert "mine exists" in run(*words).stderr
    assert "did you mean 'resampler'" in run(*words, "connector.kind=resample").stderr
    assert "give either `base`" in run("compose", "other", "language_model=tiny-random").stderr
