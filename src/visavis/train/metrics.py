"""Training metrics: mean losses, tokens per second, MFU and data stalls; their log and trackers.

The log is `log.jsonl`, a line per interval; a resumed run first removes the lines after its
checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from visavis.errors import TrainError
from visavis.model.quantized_linear import QuantizedLinear
from visavis.train.objectives import Part
from visavis.utils import progress_bars, write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.progress import TaskID


# Dense FLOP/s in bfloat16 and float16, from data sheets, by a part of the device's name.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
MEASURED = 768  # rows of the square product that a CPU's peak is measured with


class Meter:
    """Mean losses and tokens per second since the last `take`.

    Args:
        flops: useful operations per token (see `flops_per_token`).
        peak: operations per second of all processes, if known (see `peak_flops`).
    """

    def __init__(self, flops: float = 0.0, peak: float | None = None) -> None:
        self.flops, self.peak = flops, peak
        self._reset()

    def _reset(self) -> None:
        self.losses: dict[str, list[float]] = {}
        self.tokens = 0
        self.timed = 0  # tokens since `started`
        self.waited = 0.0  # seconds since then in which the model waited for data
        self.started = time.perf_counter()

    def add(self, parts: Sequence[Part]) -> None:
        """Count one step."""
        for part in parts:
            self.losses.setdefault(part.name, []).append(part.loss)
            self.tokens += part.tokens
            self.timed += part.tokens
            self.waited += part.waited

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.timed / self.seconds

    @property
    def seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self.started)

    @property
    def utilisation(self) -> float | None:
        """Share of the peak that useful operations take (MFU), if the peak is known."""
        return self.speed * self.flops / self.peak if self.peak else None

    def take(self) -> dict[str, Any]:
        """Return means and speed, and start over."""
        line: dict[str, Any] = {
            "loss": {name: sum(values) / len(values) for name, values in self.losses.items()},
            "tokens": self.tokens,
            "tokens_per_second": round(self.speed),
            "seconds": round(self.seconds, 3),
            "stall": round(self.waited / self.seconds, 4),  # of the first process
        }
        if self.utilisation is not None:
            line["mfu"] = round(self.utilisation, 4)
        self._reset()
        return line

    def line(self) -> str:
        """Return the newest values in words."""
        parts = [f"{name} {values[-1]:.3f}" for name, values in self.losses.items()]
        if self.utilisation is not None:
            parts.append(f"· {self.utilisation:.0%} MFU")
        return " ".join([*parts, f"· {self.speed:,.0f} tok/s"])

    def state(self) -> dict[str, Any]:
        """Return the counts; times are not kept."""
        return {"losses": self.losses, "tokens": self.tokens}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume counting where `state` was taken."""
        self._reset()
        self.losses, self.tokens = dict(state["losses"]), int(state["tokens"])


def flops_per_token(decoder: nn.Module) -> float:
    """Return the operations a trained token needs in the decoder's blocks, at least.

    Two per weight forward, two on the way back, two more per weight that is trained. Attention
    scores, the vocabulary, the vision tower and recomputation do not count.
    """
    blocks = decoder.get_submodule("blocks")
    weights = 0
    for module in blocks.modules():
        if isinstance(module, QuantizedLinear):
            weights += module.num_weights
        elif isinstance(size := getattr(module, "in_features", None), int):
            weights += size * int(getattr(module, "out_features", 0))
    trained = sum(p.numel() for p in blocks.parameters() if p.requires_grad and p.dim() == 2)
    return 4.0 * weights + 2.0 * trained


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the most operations per second: from a table, or measured on a CPU."""
    if device.type == "cpu":
        return _measured(dtype)
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _measured(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square matrix product, the best of four."""
    a = torch.ones(MEASURED, MEASURED, dtype=dtype)
    best = math.inf
    with torch.inference_mode():
        for _ in range(4):
            started = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - started)
    return 2 * MEASURED**3 / best


@dataclass(frozen=True)
class RunLog:
    """The lines of one stage in a run's log; other stages' lines stand in the same file."""

    path: Path
    stage: str

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Append a line; numbers that are not finite become null.

        Raises:
            TrainError: the disk is full.
        """
        kept = _finite({"stage": self.stage, **line})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(kept, allow_nan=False) + "\n")
        except OSError as error:
            raise TrainError(
                f"cannot write {self.path}: {error}. Free some space and run the same command "
                "again; it resumes from its last checkpoint."
            ) from error

    def rewind(self, step: int) -> None:
        """Take back the stage's lines after a step, and a last line that was cut off."""
        if not self.path.is_file():
            return
        kept = [
            one
            for one in read_log(self.path)
            if one.get("stage") != self.stage or one.get("step", math.inf) <= step
        ]
        text = "".join(json.dumps(one) + "\n" for one in kept)
        if text != self.path.read_text(encoding="utf-8"):
            with write_atomically(self.path) as temporary:
                temporary.write_text(text, encoding="utf-8")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a log."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            lines.append(json.loads(text))
        except ValueError:  # cut off when the run was killed
            continue
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def choose_trackers(names: Sequence[str], *, asked: bool) -> tuple[list[str], str]:
    """Return those that are installed, and a line about those that are not.

    Args:
        asked: whether somebody named them, so that a missing one is an error.

    Raises:
        TrainError: one that was asked for is not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing and asked:
        raise TrainError(
            f"the recipe asks for the tracker(s) {', '.join(missing)}, which cannot be imported; "
            f"install with `pip install {' '.join(missing)}`, or take them out of `trackers`."
        )
    note = f"no curves while it runs: `pip install {' '.join(missing)}` for them" if missing else ""
    return [name for name in names if name not in missing], note


def track(accelerator: Accelerator, name: str, step: int) -> None:
    """Start the accelerator's trackers for a stage, resuming after a step.

    Raises:
        TrainError: one of them does not start, such as without an account or a network.
    """
    accelerator.trackers = []
    settings = {"tensorboard": {"purge_step": step + 1}}  # what a killed run wrote beyond
    try:
        accelerator.init_trackers(name, init_kwargs=settings)
    except Exception as error:  # trackers raise errors of many types
        raise TrainError(
            f"a tracker did not start ({type(error).__name__}: {error}); set it up, or take it out "
            "of `trackers` in the recipe."
        ) from error


class Progress:
    """Call it with (stage, done, total, text); shows nothing when off."""

    def __init__(self, show: bool) -> None:
        self.bars = progress_bars("text", show=show)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def __call__(self, stage: str, done: int, total: int, text: str) -> None:
        if stage not in self.tasks:
            # what was done before this start does not count as speed
            self.tasks[stage] = self.bars.add_task(stage, total=total, completed=done, text=text)
        self.bars.update(self.tasks[stage], completed=done, total=total, text=text)
