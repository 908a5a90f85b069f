"""Sampling of batches from weighted data sources, determined by the seed and the number drawn.

Batches are drawn for all processes together and then dealt out, so that runs on any number of
processes see the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

DrawnExample = tuple[str, int]  # name of the source, number of the sample in it


@dataclass(frozen=True)
class SourceShare:
    """One source of a mixture.

    Args:
        size: how many samples it has.
        weight: share of blocks that come from it, relative to the others; None: as many as it
            has samples.
        block: how many samples in a row come from it once it is drawn, of all processes together
            (VLM2Vec's interleaved sub-batches); 0: one.
    """

    size: int
    weight: float | None = None
    block: int = 0


class SourceSampler:
    """Draws batches. Without weights each sample comes once an epoch, in one shuffled order; with
    weights each source is gone through in its own shuffled order, again and again."""

    def __init__(self, shares: Mapping[str, SourceShare], seed: int) -> None:
        self.shares = {name: share for name, share in shares.items() if share.size}
        self.seed = seed
        self.weighted = any(share.weight is not None for share in self.shares.values())
        self.drawn = dict.fromkeys(self.shares, 0)  # samples taken of each source
        self.blocks = 0  # blocks begun
        self.left: list[Any] = ["", 0]  # of the block being used: its source, samples to come
        self.orders: dict[str, tuple[int, list[int]]] = {}

    @property
    def size(self) -> int:
        """Samples of all sources."""
        return sum(share.size for share in self.shares.values())

    def batch(self, size: int) -> list[DrawnExample]:
        """Return the next samples, of all processes together."""
        return [self._next() for _ in range(size)]

    def _next(self) -> DrawnExample:
        if not self.left[1]:
            draw = random.Random(f"{self.seed}/{self.blocks}")
            names = list(self.shares)
            if self.weighted:
                weights = [self._weight(name) for name in names]
            else:  # what is left of each in this epoch
                round_now = self.blocks and sum(self.drawn.values()) // self.size
                weights = [
                    self.shares[name].size * (round_now + 1) - self.drawn[name] for name in names
                ]
            name = draw.choices(names, weights)[0]
            length = max(1, self.shares[name].block)
            if not self.weighted:
                length = min(length, int(weights[names.index(name)]))
            self.left = [name, length]
            self.blocks += 1
        name = self.left[0]
        self.left[1] -= 1
        number = self.drawn[name]
        self.drawn[name] += 1
        epoch, place = divmod(number, self.shares[name].size)
        return name, self._order(name, epoch)[place]

    def _weight(self, name: str) -> float:
        share = self.shares[name]
        return float(share.size) if share.weight is None else share.weight

    def _order(self, name: str, epoch: int) -> list[int]:
        if self.orders.get(name, (-1, []))[0] != epoch:
            order = list(range(self.shares[name].size))
            random.Random(f"{self.seed}/{name}/{epoch}").shuffle(order)
            self.orders[name] = (epoch, order)
        return self.orders[name][1]

    def all_samples(self) -> Iterator[tuple[bool, DrawnExample]]:
        """Yield every sample once, sources in turn, and whether it has been drawn; those that have
        not come first."""
        for drawn in (False, True):
            columns = []
            for name in self.shares:
                order, taken = self._order(name, 0), self.drawn[name]
                columns.append([(name, i) for i in (order[:taken] if drawn else order[taken:])])
            for row in zip_longest(*columns):
                yield from ((drawn, one) for one in row if one is not None)

    def state(self) -> dict[str, Any]:
        """Return the state that `restore` resumes from."""
        return {"drawn": dict(self.drawn), "blocks": self.blocks, "left": list(self.left)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume where `state` was taken."""
        self.drawn = dict(state["drawn"])
        self.blocks, self.left = state["blocks"], list(state["left"])


def dealt(sizes: Sequence[int], world: int) -> list[list[int]]:
    """Return which samples each process takes: about equal sums of sizes, counts within one.

    Longest first, in rows that run to and fro over the processes.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    hands: list[list[int]] = [[] for _ in range(world)]
    for place, index in enumerate(order):
        row, column = divmod(place, world)
        hands[column if row % 2 == 0 else world - 1 - column].append(index)
    return [sorted(hand) for hand in hands]
