"""The training loop: gradients, optimiser, schedule, checkpoints, log. Knows no objective.

A checkpoint holds the trained tensors, the optimiser, the task's drawing state and the step, and
is replaced in one rename; a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visavis.errors import TrainError
from visavis.files import write_atomically
from visavis.model.vlm import VLM
from visavis.train.tasks import Task

MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class LoopSettings:
    """Numbers of one stage of gradient steps.

    Args:
        learning_rates: peak rate per group of parameters.
        save_every: steps between checkpoints.
        log_every: steps between log lines; losses are means since the last one.
    """

    steps: int
    learning_rates: Mapping[str, float]
    weight_decay: float = 0.0
    warmup_steps: int = 20
    save_every: int = 50
    log_every: int = 10
    stop_after: int | None = None  # end (with a checkpoint) after this step; for tests and tuning


def train_loop(
    vlm: VLM,
    task: Task,
    groups: Mapping[str, Sequence[nn.Parameter]],
    settings: LoopSettings,
    *,
    checkpoint: Path,
    log: Callable[[dict[str, Any]], None],
    report: Callable[[int, str], None] = lambda step, text: None,
) -> None:
    """Take gradient steps until the stage is done, from its checkpoint if there is one.

    Args:
        groups: parameters by group, as `freeze.trainable_groups` returns them.
        log: given one dict per `log_every` steps.
        report: told the step and a line for the progress bar.

    Raises:
        TrainError: a loss is not finite, or the checkpoint is of another stage.
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": list(parameters), "peak": settings.learning_rates[name]}
            for name, parameters in groups.items()
        ],
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    everything = [parameter for parameters in groups.values() for parameter in parameters]
    step = restore(checkpoint, everything, optimizer, task)
    meter = Meter()
    vlm.train()
    while step < settings.steps and step != settings.stop_after:
        rate = schedule(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        for name, loss, tokens in task.losses(vlm):
            value = float(loss.detach())
            if not value == value or abs(value) == float("inf"):
                raise TrainError(
                    f"the {name} loss is {value} at step {step}; the learning rate is probably "
                    f"too high. The last checkpoint is {checkpoint}: lower the rate and run again."
                )
            loss.backward()
            meter.add(name, value, tokens)
        # Apart: a connector's gradients are a hundred times those of adapters.
        norms = {
            name: float(nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM))
            for name, parameters in groups.items()
        }
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        report(step, meter.line())
        if step % settings.log_every == 0 or step == settings.steps:
            log(
                {
                    "step": step,
                    "rate": round(rate, 4),
                    "norm": {name: round(norm, 3) for name, norm in norms.items()},
                    **meter.take(),
                }
            )
        if step % settings.save_every == 0:
            save(checkpoint, everything, optimizer, task, step)
    save(checkpoint, everything, optimizer, task, step)
    vlm.eval()


def schedule(step: int, settings: LoopSettings) -> float:
    """Return the share of the peak rate: linear up, then linear down to zero."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    left = (settings.steps - step) / max(1, settings.steps - settings.warmup_steps)
    return max(0.0, left)


def save(
    path: Path,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    task: Task,
    step: int,
) -> None:
    """Write a checkpoint in one rename."""
    state = {
        "step": step,
        "parameters": [parameter.detach() for parameter in parameters],
        "optimizer": optimizer.state_dict(),
        "task": json.dumps(task.state()),
    }
    with write_atomically(path) as temporary:
        torch.save(state, temporary)


def restore(
    path: Path,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    task: Task,
) -> int:
    """Load a checkpoint if there is one; return the step it was taken at.

    Raises:
        TrainError: it holds other tensors than this stage trains.
    """
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True, map_location="cpu")
    stored = state["parameters"]
    if [tensor.shape for tensor in stored] != [parameter.shape for parameter in parameters]:
        raise TrainError(
            f"{path} holds {len(stored)} tensors that do not fit the {len(parameters)} this stage "
            "trains; the recipe was changed since. Use another output folder, or delete the file."
        )
    with torch.no_grad():
        for parameter, tensor in zip(parameters, stored, strict=True):
            parameter.copy_(tensor)
    optimizer.load_state_dict(state["optimizer"])
    task.restore(_untuple(json.loads(state["task"])))
    return int(state["step"])


def _untuple(state: Any) -> Any:
    """JSON turns the tuples of `random.Random.getstate()` into lists; turn them back."""
    if isinstance(state, dict):
        return {key: _untuple(value) for key, value in state.items()}
    if isinstance(state, list) and len(state) == 3 and isinstance(state[1], list):
        return (state[0], tuple(state[1]), state[2])
    return state


class Meter:
    """Mean losses and tokens per second since the last `take`."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.tokens = 0
        self.started = time.perf_counter()

    def add(self, name: str, value: float, tokens: int) -> None:
        """Count one part of a step."""
        self.sums.setdefault(name, []).append(value)
        self.tokens += tokens

    def take(self) -> dict[str, float]:
        """Return means and speed, and start over."""
        found = {name: round(sum(v) / len(v), 4) for name, v in self.sums.items()}
        speed = self.tokens / (time.perf_counter() - self.started)
        self._reset()
        return {**found, "tokens_per_second": round(speed)}

    def line(self) -> str:
        """Return the newest values in words."""
        parts = [f"{name} {values[-1]:.3f}" for name, values in self.sums.items()]
        speed = self.tokens / max(1e-9, time.perf_counter() - self.started)
        return f"{' '.join(parts)} · {speed:.0f} tok/s"
