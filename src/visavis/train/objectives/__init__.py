"""Training objectives: each adds the gradients of one step to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from visavis.data.examples import Conversation, Sample, estimated_tokens
from visavis.data.sampler import SourceSampler, dealt
from visavis.errors import TrainError

S = TypeVar("S", bound=Sample)


class Devices(Protocol):
    """The processes that train together, as an objective uses them."""

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
    """Result of one objective in a step: its mean loss and number of tokens.

    Args:
        waited: seconds in which the model waited for data.
    """

    name: str
    loss: float
    tokens: int
    ids: tuple[str, ...] = ()  # of the samples, for a message when the loss is not finite
    waited: float = 0.0


class Task(Protocol):
    """A training objective, as the loop uses it."""

    def step(self, trainee: nn.Module, devices: Devices, *, last: bool = True) -> list[Part]:
        """Add the gradients of one step.

        Args:
            last: whether no other objective follows in this step.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Return the state from which `restore` draws the same batches."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Resume where `state` was taken."""
        ...


def draw(
    sampler: SourceSampler,
    sources: Mapping[str, Sequence[Any]],
    kind: type[S],
    devices: Devices,
    *,
    batch: int,
    tokens_per_image: int,
) -> list[S]:
    """Draw the samples of a step; return those of this process, about as many tokens as others'.

    Args:
        sources: samples by the names that `sampler` draws.
        kind: what each of them must be.
        batch: samples of all processes together.

    Raises:
        TrainError: there are fewer samples than processes, or one is of the other kind.
    """
    name, other = "generative", "contrastive"
    what, expected = "conversations", "conversation"
    found = "a query with its target"
    if kind is not Conversation:
        name, other = other, name
        what, expected, found = "queries", found.removeprefix("a "), "a conversation"
    if batch < devices.world:
        raise TrainError(
            f"a step draws {batch} {what} for {devices.world} processes, expected at least one "
            f"each; raise `batch` under `{name}`."
        )
    samples = [sources[source][number] for source, number in sampler.batch(batch)]
    for sample in samples:
        if not isinstance(sample, kind):
            raise TrainError(
                f"the sample {sample.id!r} is {found}, expected a {expected}; name its source "
                f"under `{other}`."
            )
    if devices.world == 1:
        return samples
    sizes = [estimated_tokens(sample, tokens_per_image) for sample in samples]
    return [samples[i] for i in dealt(sizes, devices.world)[devices.rank]]
