"""Nothing that ends a run loses anything: killed, stopped, out of disk, it goes on bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.training import TinyRun
from visavis.checkpoints.load import load_checkpoint
from visavis.errors import TrainError
from visavis.train.checkpoint import found
from visavis.train.export import save_model
from visavis.train.loop import Stopped, train_loop
from visavis.train.lora import add_lora
from visavis.train.metrics import RunLog, read_log
from visavis.train.objectives.contrastive import JointTask
from visavis.train.recipe import LoraRecipe, read_recipe

STEPS = 26
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch._dynamo", "tests.train.training", "visavis.train.lora"])


def train(folder: Path, slow_saves: bool = False) -> None:
    """A run with everything that draws random numbers or counts, in a process of its own."""
    if slow_saves:
        torch.save = save_in_two_halves
    torch.set_num_threads(1)
    run = TinyRun()
    torch.manual_seed(0)
    add_lora(run.vlm.decoder, LoraRecipe(rank=2, dropout=0.2))
    run.groups["lora"] = [p for name, p in run.vlm.named_parameters() if ".lora_" in name]
    adapters = {id(p) for p in run.groups["lora"]}
    run.groups["language_model"] = [
        p for p in run.groups["language_model"] if id(p) not in adapters
    ]
    match = run.contrastive(learned_scale=True)
    run.groups["temperature"] = [match.log_scale]
    stage = run.stage(
        JointTask([run.generative(), match]),
        folder / "stage",
        RunLog(folder / "log.jsonl", "stage"),
        steps=STEPS,
        save_every=3,
        log_every=2,
        warmup=3,
        ema=0.8,
        keep=2,
    )
    stage.report = lambda step, text: time.sleep(0.01)  # for the killer to keep up
    train_loop(stage)
    torch.save(run.weights(), folder / "weights.pt")


def save_in_two_halves(content: Any, path: Any, whole: Any = torch.save) -> None:
    """Write half a file, wait to be killed, and write the rest."""
    whole(content, path)
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])
    time.sleep(0.2)
    Path(path).write_bytes(data)


def num_lines(folder: Path) -> int:
    path = folder / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def half_saved(folder: Path) -> bool:
    return any((folder / "stage").glob(".step-*"))


def losses(folder: Path) -> list[Any]:
    lines = read_log(folder / "log.jsonl")
    return [(line["step"], line["loss"], line["norm"], line["tokens"]) for line in lines]


@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_unbroken_one(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    unbroken = forks.Process(target=train, args=(whole,))
    unbroken.start()
    draw = random.Random(0)
    kills = ["before a step", "save", "step", "save", "step", "step"]
    for kind in kills:
        process = forks.Process(target=train, args=(broken, kind == "save"))
        process.start()
        lines = num_lines(broken) + draw.randrange(1, 3)
        while process.is_alive() and not (
            kind == "before a step"
            or (kind == "save" and half_saved(broken))
            or (kind == "step" and num_lines(broken) >= lines)
        ):
            time.sleep(0.001)
        if kind != "save":
            time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, kind
        assert kind != "save" or half_saved(broken)
    last = forks.Process(target=train, args=(broken,))
    for process in (unbroken, last):
        if process is last:
            process.start()
        process.join()
        assert process.exitcode == 0
    assert losses(broken) == losses(whole) and len(losses(whole)) == STEPS // 2
    assert torch.equal(torch.load(broken / "weights.pt"), torch.load(whole / "weights.pt"))
    names = [path.name for path in found(broken / "stage")]
    assert names == ["step-00000024.pt", "step-00000026.pt"] and not half_saved(broken)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_saves(
    number: signal.Signals, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = TinyRun(), TinyRun()
    expected = whole.train(whole.generative(), tmp_path / "whole", steps=6)
    lines: list[Any] = []
    stage = run.stage(run.generative(), tmp_path / "run", lines.append, steps=6, save_every=100)
    stage.report = lambda step, text: os.kill(os.getpid(), number) if step == 3 else None
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        train_loop(stage)
    assert stopped.value.code == code and signal.getsignal(number) is before
    said = capsys.readouterr().err
    assert f"stopped by {number.name} after step 3 of 6" in said
    assert "run the same command again" in said
    resumed = TinyRun()
    lines += resumed.train(resumed.generative(), tmp_path / "run", steps=6)
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert torch.equal(resumed.weights(), whole.weights())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    whole, run = TinyRun(), TinyRun()
    expected = whole.train(whole.generative(), tmp_path / "whole")
    run.train(run.generative(), tmp_path / "run", stop_after=2)
    before = found(tmp_path / "run")[0].read_bytes()
    again = TinyRun()
    message = r"step-00000004\.pt could not be written .*step-00000002\.pt is intact\."
    with files_of_at_most(len(before) // 2), pytest.raises(TrainError, match=message):
        again.train(again.generative(), tmp_path / "run")
    (path,) = [one for one in (tmp_path / "run").iterdir() if one.name != ".lock"]
    assert path.name == "step-00000002.pt" and path.read_bytes() == before
    last = TinyRun()
    lines = last.train(last.generative(), tmp_path / "run")
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected[2:]]


def test_a_full_disk_leaves_the_last_model(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "recipes" / "tiny-llave.yaml"
    recipe, loaded = read_recipe(path, []), load_checkpoint("tiny-random", device="cpu")
    save_model(loaded, recipe, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    message = r"could not be written to .*model .* before is intact\. .*run the same command again"
    with files_of_at_most(20_000), pytest.raises(TrainError, match=message):
        save_model(loaded, recipe, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_log_on_a_full_disk_is_an_error() -> None:
    with pytest.raises(TrainError, match=r"cannot write /dev/full: .*No space left"):
        RunLog(Path("/dev/full"), "stage")({"step": 1})


def test_changed_data_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    run = TinyRun()
    run.train(run.generative(), tmp_path, identity="0123abcd", stop_after=1)
    with pytest.raises(TrainError, match=r"'0123abcd', this one has '4567beef'.*data or recipe"):
        run.train(run.generative(), tmp_path, identity="4567beef")


def test_other_tensors_are_refused_by_name(tmp_path: Path) -> None:
    run = TinyRun()
    run.train(run.generative(), tmp_path, stop_after=1)
    other = TinyRun()
    del other.groups["connector"]
    with pytest.raises(TrainError, match=r"vlm\.connector\.\S+ is \(.*\) there, not trained here"):
        other.train(other.generative(), tmp_path)


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    run = TinyRun()
    run.train(run.generative(), tmp_path, stop_after=3, keep=2)
    _, newer = found(tmp_path)
    newer.write_bytes(newer.read_bytes()[:1000])
    with pytest.raises(TrainError, match=r"step-00000003\.pt cannot be read .* Delete it"):
        run.train(run.generative(), tmp_path)
    newer.unlink()
    again = TinyRun()
    assert again.train(again.generative(), tmp_path)[0]["step"] == 3


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    run = TinyRun()
    stage = run.stage(run.generative(), tmp_path, lambda line: None)
    stage.report = lambda step, text: run.train(run.generative(), tmp_path)
    with pytest.raises(TrainError, match="another process is training in"):
        train_loop(stage)


def test_a_log_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first, second = RunLog(path, "first"), RunLog(path, "second")
    for step in (1, 2):
        first({"step": step, "norm": {"lora": float("inf")}})
    second({"step": 2})
    first({"saved": "model"})
    with path.open("a") as file:
        file.write('{"stage": "second", "st')
    first.rewind(1)
    assert path.read_text().endswith('{"stage": "second", "step": 2}\n')
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    assert read_log(path)[0]["norm"] == {"lora": None}
