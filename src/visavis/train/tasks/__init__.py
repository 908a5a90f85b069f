"""Objectives: each turns a model into losses of one step. The loop knows none of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from visavis.model.vlm import VLM


class Task(Protocol):
    """What the loop asks of an objective."""

    def losses(self, vlm: VLM) -> Iterator[tuple[str, Tensor, int]]:
        """Yield (name, loss, tokens) parts of one step; each is differentiated at once."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs to draw the same batches from here on."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        ...
