"""Objectives: each adds the gradients of one step to a model. The loop knows none of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


class Devices(Protocol):
    """What an objective asks of the processes that train together."""

    @property
    def world(self) -> int:
        """How many there are."""
        ...

    @property
    def rank(self) -> int:
        """Which of them this is."""
        ...

    def backward(self, loss: Tensor, gradient: Tensor | None = None) -> None:
        """Go back from a loss, or from vectors with the gradient that a loss gave them."""
        ...

    def no_sync(self) -> AbstractContextManager[Any]:
        """Entered around every backward pass of a step but the last."""
        ...

    def passes(self, number: int) -> int:
        """Return how many passes through the model to make where `number` are needed."""
        ...

    def sum(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        ...


@dataclass(frozen=True)
class Part:
    """What one objective did in a step: its mean loss, and the tokens it read.

    Args:
        waited: seconds in which the model waited for data.
    """

    name: str
    loss: float
    tokens: int
    ids: tuple[str, ...] = ()  # of the samples, for a message when the loss is not finite
    waited: float = 0.0


class Task(Protocol):
    """What the loop asks of an objective."""

    def step(self, trainee: nn.Module, devices: Devices, *, last: bool = True) -> list[Part]:
        """Add the gradients of one step.

        Args:
            last: whether no other objective follows in this step.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to draw the same batches from here on."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        ...
