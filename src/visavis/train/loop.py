"""The training loop: steps, precision, devices, schedule, checkpoints, log. Knows no objective.

A checkpoint holds the trained tensors, the optimiser, random states, the task's drawing state and
the step, and is replaced in one rename; a run that was killed goes on as if it had not been. One
process or many: `accelerate` starts them, wraps the model and knows the precision.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from visavis.errors import TrainError
from visavis.files import write_atomically
from visavis.train.gradcache import RandomState
from visavis.train.tasks import Part, Task
from visavis.train.trainee import Trainee

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class LoopSettings:
    """Numbers of one stage of gradient steps.

    Args:
        learning_rates: peak rate per group of parameters.
        warmup: steps of a rising rate.
        clip: longest gradient of a group of parameters; 0: any length.
        ema: share of the old value in a running mean of the parameters, which is what is kept in
            the end; 0: none.
        save_every: steps between checkpoints; `keep` of them stay.
        log_every: steps between log lines; losses are means since the last one.
        stop_after: end, with a checkpoint, after this step.
    """

    steps: int
    learning_rates: Mapping[str, float]
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float = 1.0
    ema: float = 0.0
    save_every: int = 50
    keep: int = 1
    log_every: int = 10
    stop_after: int | None = None


@dataclass
class Processes:
    """The processes that train together, as tasks see them (`tasks.Devices`)."""

    accelerator: Accelerator
    wrapped: nn.Module

    @property
    def world(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        scaler = self.accelerator.scaler
        if gradient is None:
            gradient = torch.ones_like(loss)
        if scaler is not None:  # float16: gradients would vanish
            gradient = gradient * scaler.scale(torch.ones((), device=gradient.device))
        loss.backward(gradient)

    def no_sync(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.accelerator.no_sync(self.wrapped)
        return context

    def sum(self, value: float) -> float:
        if self.world == 1:
            return value
        total = torch.tensor(float(value), dtype=torch.float64, device=self.accelerator.device)
        return float(self.accelerator.reduce(total, "sum"))


@dataclass
class Run:
    """One stage of gradient steps, where it stands."""

    trainee: Trainee
    task: Task
    groups: Mapping[str, Sequence[nn.Parameter]]
    settings: LoopSettings
    folder: Path
    accelerator: Accelerator
    log: Callable[[dict[str, Any]], None]
    report: Callable[[int, str], None] = lambda step, text: None
    identity: str = ""  # of the data and settings; a checkpoint of another one is refused
    step: int = 0
    mean: list[Tensor] = field(default_factory=list)  # running means, with `ema`

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups.values() for parameter in group]


def train_loop(run: Run) -> None:
    """Take gradient steps until the stage is done, from its last checkpoint if there is one.

    Raises:
        TrainError: a loss is not finite, or the checkpoint is of another stage.
    """
    settings, accelerator = run.settings, run.accelerator
    optimizer = torch.optim.AdamW(
        [
            {"params": list(parameters), "peak": settings.learning_rates[name]}
            for name, parameters in run.groups.items()
            if parameters
        ],
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    wrapped, prepared = accelerator.prepare(run.trainee, optimizer)
    processes = Processes(accelerator, wrapped)
    if settings.ema:
        run.mean = [parameter.detach().clone().float() for parameter in run.parameters]
    restore(run, optimizer)
    meter = Meter()
    wrapped.train()
    while run.step < settings.steps and run.step != settings.stop_after:
        rate = schedule(run.step, settings)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        with accelerator.autocast():
            parts = run.task.step(wrapped, processes)
        _check(run, parts)
        if accelerator.scaler is not None:
            accelerator.scaler.unscale_(optimizer)
        limit = settings.clip or math.inf
        norms = {
            name: float(nn.utils.clip_grad_norm_(parameters, limit))
            for name, parameters in run.groups.items()
            if parameters
        }
        prepared.step()
        optimizer.zero_grad(set_to_none=True)
        _average(run)
        run.step += 1
        meter.add(parts)
        run.report(run.step, meter.line())
        if run.step % settings.log_every == 0 or run.step == settings.steps:
            line = {"step": run.step, "rate": rate, "norm": norms, **meter.take()}
            if accelerator.is_main_process:
                run.log(line)
                accelerator.log(_flat(line), step=run.step)
        if run.step % settings.save_every == 0:
            save(run, optimizer)
    save(run, optimizer)
    wrapped.eval()
    if settings.ema and run.step == settings.steps:
        with torch.no_grad():
            for parameter, mean in zip(run.parameters, run.mean, strict=True):
                parameter.copy_(mean)


def schedule(step: int, settings: LoopSettings) -> float:
    """Return the share of the peak rate at a step: up in a line, then down as the settings say."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return max(0.0, 1 - done) if settings.schedule == "linear" else 1.0


def _check(run: Run, parts: Sequence[Part]) -> None:
    """Stop at a loss that is no number, leaving the ids of the batch behind."""
    for part in parts:
        if not math.isfinite(part.loss):
            path = run.folder / "failed_batch.json"
            ids = {"step": run.step, "loss": str(part.loss), "samples": list(part.ids)}
            path.write_text(json.dumps(ids, indent=1), encoding="utf-8")
            raise TrainError(
                f"the {part.name} loss is {part.loss} at step {run.step}; the learning rate is "
                f"probably too high, or a sample is broken. The batch's samples are listed in "
                f"{path}; the last checkpoint in {run.folder} is sound: change the recipe's rate "
                "or its data, and run again."
            )


def _average(run: Run) -> None:
    """Move the running means towards the parameters."""
    if run.mean:
        with torch.no_grad():
            for parameter, mean in zip(run.parameters, run.mean, strict=True):
                mean.lerp_(parameter.float(), 1 - run.settings.ema)


# ---- checkpoints ---------------------------------------------------------------------------------


def save(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint in one rename, and drop those that are too old."""
    random_states = _random_states(run.accelerator)
    if run.accelerator.is_main_process:
        state = {
            "step": run.step,
            "identity": run.identity,
            "parameters": [parameter.detach() for parameter in run.parameters],
            "mean": run.mean,
            "optimizer": optimizer.state_dict(),
            "random": random_states,
            "task": json.dumps(run.task.state()),
        }
        run.folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(run.folder / f"step-{run.step:08d}.pt") as temporary:
            torch.save(state, temporary)
        for old in checkpoints(run.folder)[: -run.settings.keep]:
            old.unlink()
    run.accelerator.wait_for_everyone()


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def restore(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Load the newest checkpoint, if there is one.

    Raises:
        TrainError: it holds other tensors than this stage trains, or of other data.
    """
    found = checkpoints(run.folder)
    if not found:
        return
    path = found[-1]
    state = torch.load(path, weights_only=True, map_location="cpu")
    if state["identity"] != run.identity:
        raise TrainError(
            f"{path} is of a run with the fingerprint {state['identity']!r}, this one has "
            f"{run.identity!r}: its data or recipe changed since. Use another output folder, or "
            "delete that one to start over."
        )
    shapes = [parameter.shape for parameter in run.parameters]
    if [tensor.shape for tensor in state["parameters"]] != shapes:
        raise TrainError(
            f"{path} holds {len(state['parameters'])} tensors that do not fit the {len(shapes)} "
            "this stage trains; the recipe was changed since. Use another output folder, or "
            "delete the file."
        )
    with torch.no_grad():
        for parameter, tensor in zip(run.parameters, state["parameters"], strict=True):
            parameter.copy_(tensor)
    run.mean = [tensor.to(run.accelerator.device) for tensor in state["mean"]]
    optimizer.load_state_dict(state["optimizer"])
    run.task.restore(json.loads(state["task"]))
    run.step = int(state["step"])
    own = state["random"][run.accelerator.process_index % len(state["random"])]
    torch.set_rng_state(own["torch"])
    if own["cuda"]:
        torch.cuda.set_rng_state_all(own["cuda"])
    version, internal, gauss = json.loads(own["python"])
    random.setstate((version, tuple(internal), gauss))


def _random_states(accelerator: Accelerator) -> list[dict[str, Any]]:
    """Return the random states of all processes."""
    now = RandomState()
    own = {"torch": now.cpu, "cuda": now.cuda, "python": json.dumps(random.getstate())}
    if accelerator.num_processes == 1:
        return [own]
    from accelerate.utils import gather_object

    everyone: list[dict[str, Any]] = gather_object([own])
    return everyone


# ---- what is said --------------------------------------------------------------------------------


class Meter:
    """Mean losses and tokens per second since the last `take`."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.losses: dict[str, list[float]] = {}
        self.tokens = 0
        self.started = time.perf_counter()

    def add(self, parts: Sequence[Part]) -> None:
        """Count one step."""
        for part in parts:
            self.losses.setdefault(part.name, []).append(part.loss)
            self.tokens += part.tokens

    def take(self) -> dict[str, Any]:
        """Return means and speed, and start over."""
        means = {name: sum(values) / len(values) for name, values in self.losses.items()}
        speed = self.tokens / (time.perf_counter() - self.started)
        self._reset()
        return {"loss": means, "tokens_per_second": round(speed)}

    def line(self) -> str:
        """Return the newest values in words."""
        parts = [f"{name} {values[-1]:.3f}" for name, values in self.losses.items()]
        speed = self.tokens / max(1e-9, time.perf_counter() - self.started)
        return f"{' '.join(parts)} · {speed:.0f} tok/s"


def _flat(line: Mapping[str, Any]) -> dict[str, float]:
    """Return numbers by dotted names, as trackers take them."""
    flat: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": number for key, number in value.items()}
        else:
            flat[name] = value
    return flat
