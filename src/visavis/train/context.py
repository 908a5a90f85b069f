"""What all stages of a training run share: recipe, folders, model, encoder and data sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from visavis.checkpoints.checkpoint import Checkpoint
from visavis.data.examples import Sample
from visavis.data.sources import open_data_source
from visavis.processing.prompt_encoder import PromptEncoder
from visavis.train.feature_store import FeatureStore
from visavis.train.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

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
        """Return a source's samples; its index is read once."""
        if name not in self.opened:
            self.opened[name] = open_data_source(self.recipe.data[name], self.data, name=name)
        return self.opened[name]
