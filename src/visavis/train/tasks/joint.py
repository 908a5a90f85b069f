"""Several objectives in one step, on one set of weights: their gradients add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from visavis.model.vlm import VLM
from visavis.train.tasks import Task


class JointTask:
    """Runs its parts one after the other; memory is that of the largest."""

    def __init__(self, parts: Sequence[Task]) -> None:
        self.parts = parts

    def losses(self, vlm: VLM) -> Iterator[tuple[str, Tensor, int]]:
        for part in self.parts:
            yield from part.losses(vlm)

    def state(self) -> dict[str, Any]:
        return {str(number): part.state() for number, part in enumerate(self.parts)}

    def restore(self, state: dict[str, Any]) -> None:
        for number, part in enumerate(self.parts):
            part.restore(state[str(number)])
