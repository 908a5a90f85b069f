"""The loop's switches: precision, schedule, clipping, running means, compiled blocks; and how it
ends where numbers or samples are bad."""

from __future__ import annotations

import copy
import io
import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fakes import picture
from tests.train.training import TinyRun, chats, matches
from visavis.data.examples import ContrastiveExample, Conversation
from visavis.errors import TrainError
from visavis.inputs import Image, Message, Prompt, Text
from visavis.train import data_loader
from visavis.train.checkpoint import found
from visavis.train.distributed import Processes
from visavis.train.loop import LoopSettings, flat, schedule, train_loop
from visavis.train.metrics import Meter, flops_per_token, peak_flops
from visavis.train.objectives import Part
from visavis.train.objectives.contrastive import JointTask

# ---- precision -----------------------------------------------------------------------------------


def joint(run: TinyRun) -> JointTask:
    return JointTask([run.generative(), run.contrastive(chunk_tokens=60)])


def test_bfloat16_is_near_float32(tmp_path: Path) -> None:
    exact, rough = TinyRun(), TinyRun(precision="bf16")
    expected = exact.train(joint(exact), tmp_path / "exact")
    lines = rough.train(joint(rough), tmp_path / "rough")
    for one, other in zip(lines, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert one["loss"] != other["loss"]
        assert one["norm"] == pytest.approx(other["norm"], rel=0.1)
    assert all(p.dtype == torch.float32 for p in rough.vlm.parameters())


def test_float16_is_near_float32(tmp_path: Path) -> None:
    """accelerate leaves float16 to GPUs; the same steps with its scaler, on the CPU."""
    exact, rough = TinyRun(), TinyRun()
    rough.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    rough.accelerator.autocast = lambda: torch.autocast("cpu", torch.float16)
    expected = exact.train(joint(exact), tmp_path / "exact")
    lines = rough.train(joint(rough), tmp_path / "rough")
    for one, other in zip(lines, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.005)
        assert one["norm"] == pytest.approx(other["norm"], rel=0.05)


def test_a_scaler_changes_no_step_and_is_kept(tmp_path: Path) -> None:
    def run(folder: Path, scale: float, **settings: Any) -> tuple[TinyRun, list[Any]]:
        run = TinyRun()
        task = run.contrastive(learned_scale=True, chunk_tokens=60)
        run.groups["temperature"] = [task.log_scale]
        if scale:
            run.accelerator.scaler = torch.amp.GradScaler("cpu", scale, growth_interval=2)
        return run, run.train(task, folder, **settings)

    plain, expected = run(tmp_path / "plain", 0)
    _, lines = run(tmp_path / "scaled", 2.0**12, stop_after=3)
    scaled, more = run(tmp_path / "scaled", 2.0**30)
    for one, other in zip(lines + more, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["norm"] == pytest.approx(other["norm"], rel=1e-4)
    assert scaled.accelerator.scaler.get_scale() == 2.0**14  # grown twice, by steps of both
    torch.testing.assert_close(scaled.weights(), plain.weights(), atol=1e-5, rtol=0)


def test_an_overflow_leaves_a_step_out(tmp_path: Path) -> None:
    run = TinyRun()
    before = run.weights()
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    run.accelerator.autocast = lambda: torch.autocast("cpu", torch.float16)
    (line,) = run.train(run.generative(), tmp_path, steps=1)
    assert not math.isfinite(line["norm"]["language_model"])
    assert torch.equal(run.weights(), before)
    assert run.accelerator.scaler.get_scale() == 2.0**59


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.8536, 0.5, 0.1464]),
    ],
)
def test_schedules(kind: Any, expected: list[float]) -> None:
    settings = LoopSettings(steps=6, learning_rates={}, warmup=2, schedule=kind)
    found = [schedule(step, settings) for step in range(6)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_clipping_is_by_group_and_the_mean_is_kept(tmp_path: Path) -> None:
    run = TinyRun()
    before = {name: [p.detach().clone() for p in own] for name, own in run.groups.items()}
    seen: list[dict[str, float]] = []
    task = run.generative()
    stage = run.stage(task, tmp_path, lambda line: None, steps=1, clip=0.01, ema=0.75)

    class Watched(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            seen.append(
                {
                    name: float(torch.cat([p.grad.flatten() for p in own]).norm())
                    for name, own in run.groups.items()
                }
            )
            return super().step(closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        train_loop(stage)
    assert seen == [pytest.approx({"connector": 0.01, "language_model": 0.01}, rel=1e-3)]
    state = torch.load(found(tmp_path)[0], weights_only=True)
    for name, own in run.groups.items():
        names = {id(p): n for n, p in run.trainee.named_parameters()}
        for parameter, old in zip(own, before[name], strict=True):
            stepped = state["parameters"][names[id(parameter)]]
            torch.testing.assert_close(parameter.data, 0.75 * old + 0.25 * stepped)


def test_rates_are_by_group(tmp_path: Path) -> None:
    run = TinyRun()
    tower = copy.deepcopy(run.vlm.tower.state_dict())  # type: ignore[union-attr]
    before = [p.detach().clone() for p in run.groups["connector"]]
    rates = {"connector": 1e-12, "language_model": 1e-3}
    run.train(run.generative(), tmp_path, learning_rates=rates)
    for parameter, old in zip(run.groups["connector"], before, strict=True):
        torch.testing.assert_close(parameter.data, old, atol=1e-9, rtol=0)
    for name, tensor in run.vlm.tower.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, tower[name])


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_blocks_take_the_same_steps(backend: str, tmp_path: Path) -> None:
    plain, compiled = TinyRun(), TinyRun()
    expected = plain.train(joint(plain), tmp_path / "plain", steps=2)
    torch._dynamo.reset()
    lines = compiled.train(joint(compiled), tmp_path / "compiled", steps=2, compile=backend)
    for one, other in zip(lines, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert "forward" not in vars(compiled.vlm.decoder.blocks[0])


def test_new_lengths_compile_nothing_anew(tmp_path: Path) -> None:
    run = TinyRun()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    counts = []
    stage = run.stage(run.generative(micro_tokens=60), tmp_path, lambda line: None, steps=6)
    object.__setattr__(stage.settings, "compile", counter)
    stage.report = lambda step, text: counts.append(counter.frame_count)
    train_loop(stage)
    assert 0 < counts[1] == counts[-1]


# ---- bad runs ------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    run = TinyRun()
    run.train(run.generative(), tmp_path, stop_after=2)
    with torch.no_grad():
        content = torch.load(found(tmp_path)[0], weights_only=True)
        content["parameters"]["vlm.decoder.norm.weight"].fill_(float("nan"))
        torch.save(content, found(tmp_path)[0])
    before = found(tmp_path)[0].read_bytes()
    with pytest.raises(TrainError, match=r"the generative loss is nan at step 3;.*failed_batch"):
        run.train(run.generative(), tmp_path)
    failed = json.loads((tmp_path / "failed_batch.json").read_text())
    assert failed["step"] == 3 and failed["loss"] == {"generative": "nan"}
    assert len(failed["samples"]["generative"]) == 6
    assert set(failed["samples"]["generative"]) <= {sample.id for sample in chats(9)}
    assert found(tmp_path)[0].read_bytes() == before


def test_a_gradient_that_is_no_number_is_not_applied(tmp_path: Path) -> None:
    run = TinyRun()
    before = run.weights()
    run.groups["connector"][0].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(TrainError, match=r"the gradient of connector is (nan|inf) at step 1"):
        run.train(run.contrastive(), tmp_path)
    assert torch.equal(run.weights(), before) and not found(tmp_path)
    assert (tmp_path / "failed_batch.json").is_file()


def broken_picture() -> Image:
    file = io.BytesIO()
    picture(0).save(file, "PNG")
    return Image(file.getvalue()[:-40])


@pytest.mark.parametrize("kind", ["generative", "contrastive"])
def test_a_broken_picture_amid_a_run_is_named(kind: str, tmp_path: Path) -> None:
    run = TinyRun()
    if kind == "generative":
        answer = Message("assistant", (Text("red"),))
        broken = Prompt((Message("user", (broken_picture(), Text("what?"))), answer))
        task: Any = run.generative(
            samples=[*chats(8), Conversation("the-broken-one", broken)], batch=2
        )
    else:
        bad = ContrastiveExample("the-broken-one", Prompt.of("red"), Prompt.of(broken_picture()))
        task = run.contrastive(samples=[*matches(8), bad], batch=2)
    with pytest.raises(TrainError, match=r"sample 'the-broken-one' cannot be read: .*data check"):
        run.train(task, tmp_path, steps=20, save_every=1)
    steps = len(found(tmp_path))
    state = torch.load(found(tmp_path)[-1], weights_only=True)  # what was learned before is kept
    assert steps == 1 and 1 <= state["step"] < 9


def test_a_worker_that_fails_names_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(data_loader, "load_pixels", fail)
    run = TinyRun()
    with pytest.raises(TrainError, match=r"worker failed .* 'chat-\d' \(MemoryError: no room\)"):
        run.train(run.generative(), tmp_path)


def test_one_query_alone_cannot_be_contrasted(tmp_path: Path) -> None:
    run = TinyRun()
    with pytest.raises(TrainError, match=r"one query, 'match-0', which has no hard negatives"):
        run.train(run.contrastive(samples=matches(1), batch=1), tmp_path / "a")
    lines = run.train(run.contrastive(samples=matches(2)[1:], batch=1), tmp_path / "b", steps=1)
    assert lines[0]["loss"]["contrastive"] > 0  # it has a hard negative


def test_too_little_memory_says_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate")

    run = TinyRun()
    monkeypatch.setattr(run.trainee, "forward", fail)
    with pytest.raises(TrainError, match="Lower micro_tokens or chunk_tokens"):
        run.train(run.generative(), tmp_path)


# ---- what is said --------------------------------------------------------------------------------


def test_the_meter_counts_and_says_so() -> None:
    meter = Meter(flops=100.0, peak=1e9)
    meter.add([Part("generative", 2.0, 30), Part("contrastive", 1.0, 12)])
    meter.add([Part("generative", 4.0, 30)])
    assert "generative 4.000 contrastive 1.000" in meter.line() and "MFU" in meter.line()
    kept = Meter()
    kept.restore(json.loads(json.dumps(meter.state())))
    for one in (meter, kept):
        line = one.take()
        assert line["loss"] == {"generative": 3.0, "contrastive": 1.0} and line["tokens"] == 72
    assert "mfu" not in line and meter.take()["tokens"] == 0
    nested = {"step": 3, "loss": {"generative": 3.0}}
    assert flat(nested) == {"step": 3, "loss/generative": 3.0}


def test_time_spent_waiting_for_data_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter()
    meter.started -= 10
    meter.add([Part("generative", 2.0, 30, waited=0.5), Part("contrastive", 1.0, 12, waited=2.0)])
    assert meter.take()["stall"] == pytest.approx(0.25, abs=0.01)
    run, ticks = TinyRun(), count()
    monkeypatch.setattr("visavis.train.data_loader.time.perf_counter", lambda: float(next(ticks)))
    task = JointTask([run.generative(micro_tokens=60), run.contrastive(chunk_tokens=60)])
    parts = task.step(run.trainee, Processes(run.accelerator, run.trainee, run.groups))
    assert all(part.waited > 1 for part in parts)  # at the start, and for each chunk
    monkeypatch.undo()
    lines = run.train(task, tmp_path, steps=2)
    assert all(0 < line["stall"] < 1 for line in lines)


def test_operations_are_counted_by_what_is_trained() -> None:
    run = TinyRun()
    blocks = run.vlm.decoder.blocks
    weights = sum(p.numel() for p in blocks.parameters() if p.dim() == 2)
    assert flops_per_token(run.vlm.decoder) == 6 * weights
    blocks.requires_grad_(False)
    assert flops_per_token(run.vlm.decoder) == 4 * weights
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak is not None and peak > 1e8
