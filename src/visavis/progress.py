"""A progress bar on stderr for long loops. Knows nothing of what is looped over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def track(
    items: Iterable[Item], description: str, *, weights: Sequence[int], show: bool
) -> Iterator[Item]:
    """Yield `items`, moving a bar by each item's weight; no bar when `show` is off."""
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=sum(weights))
        for item, weight in zip(items, weights, strict=True):
            yield item
            bar.advance(task, weight)
