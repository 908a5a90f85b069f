"""State shared by all stages of a training run: recipe, folders, model, encoder, data sources."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from visavis.checkpoints.checkpoint import Checkpoint
from visavis.data.check import Problem, leave_out_bad_rows
from visavis.data.examples import Sample
from visavis.data.sources import open_data_source
from visavis.errors import TrainError
from visavis.processing.prompt_encoder import PromptEncoder
from visavis.train.feature_store import FeatureStore
from visavis.train.recipe import Recipe
from visavis.utils import write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator

MAX_LISTED = 3  # skipped rows in a warning; all of them are in the file
Report = Callable[[str, int, int, str], None]  # stage, done, total, a line


@dataclass
class TrainingRun:
    """The parts that every stage works on."""

    recipe: Recipe
    data: Path
    out: Path
    loaded: Checkpoint
    encoder: PromptEncoder
    accelerator: Accelerator
    features: FeatureStore | None
    report: Report
    opened: dict[str, Sequence[Sample]] = field(default_factory=dict)

    def source(self, name: str) -> Sequence[Sample]:
        """Return a source's samples; its index is read once.

        Raises:
            TrainError: it cannot be opened, or other rows are bad than when the run began.
        """
        if name not in self.opened:
            source = open_data_source(self.recipe.data[name], self.data, name=name)
            if self.recipe.bad_rows == "skip":
                self._skip(name, leave_out_bad_rows(source))
            self.opened[name] = source
        return self.opened[name]

    def _skip(self, name: str, problems: list[Problem]) -> None:
        """List rows that are left out in `skipped_rows.json`."""
        path = self.out / "skipped_rows.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found = [{"id": problem.id, "reason": problem.text} for problem in problems]
        if [row["id"] for row in known.get(name, found)] != [row["id"] for row in found]:
            raise TrainError(
                f"other rows of {name!r} cannot be used than when the run began ({len(found)} now, "
                f"{len(known[name])} in {path}); an image was added, removed or changed since. "
                "Start the run again in another folder."
            )
        if not self.accelerator.is_main_process:
            return
        if name not in known:
            with write_atomically(path) as temporary:
                content = json.dumps(known | {name: found}, indent=1) + "\n"
                temporary.write_text(content, encoding="utf-8")
        if problems:
            listed = "; ".join(f"{one.id!r}: {one.text}" for one in problems[:MAX_LISTED])
            warnings.warn(
                f"{len(problems)} rows of {name!r} are skipped, all listed in {path}: {listed}",
                stacklevel=2,
            )
