"""Training checkpoints of a stage: written atomically, the newest few kept.

    out/<stage>/step-00000500.pt    trained tensors, optimizer moments, random states, sampler state

Tensors are saved whole, so a checkpoint can be resumed on another number of processes.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visavis.errors import TrainError
from visavis.train.distributed import Processes, share_of, whole
from visavis.train.gradcache import RandomState
from visavis.train.metrics import Meter
from visavis.train.objectives import Task
from visavis.utils import remove_unfinished, write_atomically

MOST_FREE = 5  # a state is so many times its trained tensors at most: moments, means, headroom


@dataclass
class State:
    """Everything that a step changes."""

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    task: Task
    meter: Meter
    scaler: torch.amp.GradScaler | None = None
    mean: dict[str, Tensor] = field(default_factory=dict)  # running means of the parameters
    step: int = 0


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        keep: how many of them stay.
        identity: of the data and settings; a checkpoint of another one is refused.
    """

    def __init__(self, folder: Path, processes: Processes, *, keep: int, identity: str) -> None:
        self.folder, self.processes = folder, processes
        self.keep, self.identity = keep, identity
        self.newest = -1  # step of the last one that was written or read
        if processes.is_main:
            for left in folder.glob(".step-*.pt.tmp*"):  # by a run that was killed while it wrote
                remove_unfinished(left)

    def save(self, state: State) -> Path:
        """Write a checkpoint in one rename, and drop those that are too old.

        Raises:
            TrainError: the disk is full; earlier checkpoints are as they were.
        """
        path = self.folder / f"step-{state.step:08d}.pt"
        content = self._content(state)
        problem = ""
        if self.processes.is_main:
            try:
                with write_atomically(path) as temporary:
                    torch.save(content, temporary)
                for old in found(self.folder)[: -self.keep]:
                    old.unlink()
            except (OSError, RuntimeError) as error:
                problem = self._unwritten(path, state, error)
        if self.processes.sum(bool(problem)):
            raise TrainError(problem or f"the first process could not write {path}; see above.")
        self.newest = state.step
        return path

    def _unwritten(self, path: Path, state: State, error: Exception) -> str:
        needed = sum(p.numel() * p.element_size() for p in state.parameters.values()) * MOST_FREE
        free = 0
        with suppress(OSError):
            free = shutil.disk_usage(self.folder).free
        before = found(self.folder)
        last = f"{before[-1]} is intact" if before else "there is none before it"
        return (
            f"the checkpoint {path} could not be written ({' '.join(str(error).split())}): the "
            f"disk has {free / 1e6:.0f} MB free, and up to {needed / 1e6:.0f} MB are needed. "
            f"Earlier checkpoints: {last}. Free some space, or raise a limit on file sizes, and "
            "run the same command again; it resumes from there."
        )

    def _content(self, state: State) -> dict[str, Any]:
        """Return the content to save, on the first process; all processes must call this."""
        main = self.processes.is_main
        moments = state.optimizer.state_dict()
        moments["state"] = {
            index: {name: _piece(value, main) for name, value in values.items()}
            for index, values in moments["state"].items()
        }
        return {
            "step": state.step,
            "identity": self.identity,
            "parameters": {name: _piece(p.detach(), main) for name, p in state.parameters.items()},
            "mean": {name: _piece(tensor, main) for name, tensor in state.mean.items()},
            "optimizer": moments,
            "scaler": state.scaler.state_dict() if state.scaler is not None else {},
            "random": self.processes.gathered(random_state()),
            "task": json.dumps(state.task.state()),
            "meter": json.dumps(state.meter.state()),
        }

    def restore(self, state: State) -> None:
        """Put the newest checkpoint into `state`, if there is one.

        Raises:
            TrainError: it is damaged, of other data or another recipe, or of other tensors.
        """
        paths = found(self.folder)
        if not paths:
            return
        content = self._read(paths[-1])
        self._check(paths[-1], content, state)
        with torch.no_grad():
            for name, parameter in state.parameters.items():
                parameter.copy_(share_of(content["parameters"][name], parameter))
        parameters = state.parameters
        state.mean = {name: share_of(t, parameters[name]) for name, t in content["mean"].items()}
        _restore_moments(state, content["optimizer"])
        if state.scaler is not None and content["scaler"]:
            state.scaler.load_state_dict(content["scaler"])
        state.task.restore(json.loads(content["task"]))
        state.meter.restore(json.loads(content["meter"]))
        state.step = self.newest = int(content["step"])
        states = content["random"]
        restore_random(states[self.processes.rank % len(states)])

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # whatever a damaged archive raises
            raise TrainError(
                f"the checkpoint {path} cannot be read ({type(error).__name__}: "
                f"{' '.join(str(error).split())[:200]}); the file is damaged. Delete it: the run "
                "resumes from the one before it, or restarts the stage."
            ) from error
        return content

    def _check(self, path: Path, content: Mapping[str, Any], state: State) -> None:
        if content["identity"] != self.identity:
            raise TrainError(
                f"{path} is of a run with the fingerprint {content['identity']!r}, this one has "
                f"{self.identity!r}: its data or recipe changed since. Use another output folder, "
                "or delete that one to start over."
            )
        saved = {name: tuple(tensor.shape) for name, tensor in content["parameters"].items()}
        own = {name: tuple(tensor.shape) for name, tensor in state.parameters.items()}
        if saved != own:
            name = next(n for n in sorted({*saved, *own}) if saved.get(n) != own.get(n))
            raise TrainError(
                f"{path} does not fit what this stage trains: {name} is "
                f"{saved.get(name, 'missing')} there, {own.get(name, 'not trained')} here. The "
                "recipe or the model changed since. Use another output folder, or delete the file."
            )


def found(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first."""
    return sorted(folder.glob("step-*.pt"))


def _piece(value: Any, kept: bool) -> Any:
    """Return a value in one piece; of sharded tensors, on the CPU and only where it is kept."""
    if not isinstance(value, Tensor):
        return value
    piece = whole(value)
    return piece if piece is value else piece.cpu() if kept else None


def _restore_moments(state: State, content: dict[str, Any]) -> None:
    own = [p for group in state.optimizer.param_groups for p in group["params"]]
    content["state"] = {
        index: {
            name: value if name == "step" else share_of(value, own[index])
            for name, value in values.items()
        }
        for index, values in content["state"].items()
    }
    state.optimizer.load_state_dict(content)


def random_state() -> dict[str, Any]:
    """Return where this process' random numbers stand."""
    now = RandomState()
    return {"torch": now.cpu, "cuda": now.cuda, "python": json.dumps(random.getstate())}


def restore_random(state: Mapping[str, Any]) -> None:
    """Draw the numbers that would have come after `state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
