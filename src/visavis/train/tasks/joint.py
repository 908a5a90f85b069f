"""Several objectives in one step, on one model; each weighs what its own weight says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from visavis.train.tasks import Devices, Part, Task


class JointTask:
    """Objectives one after the other; gradients add up."""

    def __init__(self, parts: Sequence[Task]) -> None:
        self.parts = parts

    def step(self, trainee: nn.Module, devices: Devices, *, last: bool = True) -> list[Part]:
        done = []
        for number, part in enumerate(self.parts):
            final = last and number == len(self.parts) - 1
            done += part.step(trainee, devices, last=final)
        return done

    def state(self) -> dict[str, Any]:
        return {str(number): part.state() for number, part in enumerate(self.parts)}

    def restore(self, state: dict[str, Any]) -> None:
        for number, part in enumerate(self.parts):
            part.restore(state[str(number)])
