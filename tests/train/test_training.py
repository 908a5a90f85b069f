"""The loop with real tasks on a tiny model: what must not change a step changes none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import picture
from tests.train.training import TinyRun, chats
from visavis.data.examples import ContrastiveExample
from visavis.inputs import Prompt
from visavis.train.objectives.contrastive import JointTask


@pytest.mark.parametrize("kind", ["generative", "contrastive"])
def test_how_a_step_is_cut_does_not_change_it(kind: str, tmp_path: Path) -> None:
    whole, cut = TinyRun(), TinyRun()
    if kind == "generative":
        first = whole.train(whole.generative(), tmp_path / "a")
        second = cut.train(cut.generative(micro_tokens=60), tmp_path / "b")
    else:
        first = whole.train(whole.contrastive(), tmp_path / "a")
        second = cut.train(cut.contrastive(chunk_tokens=50), tmp_path / "b")
    for one, other in zip(first, second, strict=True):
        assert one["loss"][kind] == pytest.approx(other["loss"][kind], abs=1e-5)
        for group, norm in one["norm"].items():
            assert norm == pytest.approx(other["norm"][group], rel=1e-4)


def test_losses_fall(tmp_path: Path) -> None:
    run = TinyRun()
    task = JointTask([run.generative(), run.contrastive()])
    lines = run.train(task, tmp_path, steps=12, schedule="constant")
    for name in ("generative", "contrastive"):
        assert lines[-1]["loss"][name] < lines[0]["loss"][name]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole, broken, resumed = TinyRun(), TinyRun(), TinyRun()
    settings = {"steps": 6, "warmup": 2, "ema": 0.5, "keep": 2}

    def task(run: TinyRun) -> JointTask:
        return JointTask([run.generative(), run.contrastive(learned_scale=True)])

    expected = whole.train(task(whole), tmp_path / "whole", **settings)
    started = broken.train(task(broken), tmp_path / "run", stop_after=3, **settings)
    went_on = resumed.train(task(resumed), tmp_path / "run", **settings)
    losses = [line["loss"] for line in started + went_on]
    assert losses == [line["loss"] for line in expected]
    assert torch.equal(resumed.weights(), whole.weights())
    names = sorted(path.name for path in (tmp_path / "run").glob("[!.]*"))
    assert names == ["step-00000004.pt", "step-00000006.pt"]


def test_text_alone_teaches_a_connector_nothing(tmp_path: Path) -> None:
    run = TinyRun()
    run.vlm.decoder.requires_grad_(False)
    run.groups = {"connector": run.groups["connector"]}
    before = run.weights()
    task = run.generative(samples=chats(9)[2::3], batch=3)
    (line,) = run.train(task, tmp_path, steps=1)
    assert line["norm"] == {"connector": 0.0}
    assert torch.equal(run.weights(), before)


def test_right_targets_of_the_same_query_are_not_its_negatives(tmp_path: Path) -> None:
    """Two captions of one image, which lies in two files."""
    file, copy = tmp_path / "same.png", tmp_path / "copy.png"
    picture(1).save(file)
    copy.write_bytes(file.read_bytes())

    def loss(samples: list[ContrastiveExample]) -> float:
        run = TinyRun()
        task = run.contrastive(samples=samples, batch=len(samples))
        (line,) = run.train(task, tmp_path / str(len(list(tmp_path.iterdir()))), steps=1)
        return float(line["loss"]["contrastive"])

    def one(id: str, source: Any, text: str, **fields: Any) -> ContrastiveExample:
        return ContrastiveExample(id, Prompt.of(source), Prompt.of(text), **fields)

    captions = [one("a", file, "a red square"), one("b", copy, "a wide thing")]
    assert loss(captions) == 0.0, "with nothing to tell apart"
    assert loss([captions[0], one("b", picture(2), "a wide thing")]) > 0.1
    tasks = [
        one("a", file, "a red square", instruction="describe it"),
        one("b", file, "a wide thing", instruction="name its shape"),
    ]
    assert loss(tasks) > 0.1, "another instruction asks another question"
