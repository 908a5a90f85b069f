"""Programs that draw curves while a run goes on: TensorBoard, Weights & Biases, trackio.

Each is an optional package that `accelerate` drives. Knows no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from visavis.errors import TrainError

if TYPE_CHECKING:
    from accelerate import Accelerator


def choose_trackers(names: Sequence[str], *, asked: bool) -> tuple[list[str], str]:
    """Return those that are installed, and a line about those that are not.

    Args:
        asked: whether somebody named them, so that a missing one is an error.

    Raises:
        TrainError: one that was asked for is not installed.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing and asked:
        raise TrainError(
            f"the recipe asks for the tracker(s) {', '.join(missing)}, which cannot be imported; "
            f"install with `pip install {' '.join(missing)}`, or take them out of `trackers`."
        )
    note = f"no curves while it runs: `pip install {' '.join(missing)}` for them" if missing else ""
    return [name for name in names if name not in missing], note


def track(accelerator: Accelerator, name: str, step: int) -> None:
    """Start the accelerator's trackers for a stage, going on after a step.

    Raises:
        TrainError: one of them does not start, such as without an account or a network.
    """
    accelerator.trackers = []
    settings = {"tensorboard": {"purge_step": step + 1}}  # what a killed run wrote beyond
    try:
        accelerator.init_trackers(name, init_kwargs=settings)
    except Exception as error:  # whatever their services raise
        raise TrainError(
            f"a tracker did not start ({type(error).__name__}: {error}); set it up, or take it out "
            "of `trackers` in the recipe."
        ) from error
