"""One progress bar on stderr for a whole run: a line per stage. Knows no training."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import TaskID


class Progress:
    """Call it with (stage, done, total, text); shows nothing when off."""

    def __init__(self, show: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            disable=not show,
        )
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
