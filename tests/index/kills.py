"""A program that changes an index until it is killed; what it has finished it says on stdout.

    python kills.py ROOT {add,migrate,watch} SEED

ROOT holds `a.idx` and the folder `images`. Runs without torch, so that it starts quickly: its
models are means of pixels, one of them with the channels the other way round.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visavis.index import Index, adding, coded_rows, migrate
from visavis.index.sqlite_store import SqliteStore
from visavis.index.watch import scan
from visavis.inputs import Prompt
from visavis.processing.images import decode_image


class PixelModel:
    """Embeds an image as the 4×4 means of its pixels.

    Args:
        is_other: the channels are the other way round.
    """

    embedding_dim = 48

    def __init__(self, is_other: bool = False) -> None:
        self.name = "other" if is_other else "pixels"
        self.fingerprint = f"fingerprint of {self.name}"
        self.step = -1 if is_other else 1

    def embed(self, items: Sequence[Any]) -> np.ndarray:
        return np.stack([self._one(Prompt.of(item)) for item in items])

    def _one(self, prompt: Prompt) -> np.ndarray:
        (visual,) = prompt.visuals
        small = decode_image(visual).resize((4, 4), Image.Resampling.BOX)
        numbers = np.asarray(small, np.float32)[..., :: self.step].reshape(-1) + 1
        unit: np.ndarray = numbers / np.linalg.norm(numbers)
        return unit


def say(*words: object) -> None:
    """Acknowledge something: the parent relies on it from now on."""
    print(*words, flush=True)


def write(folder: Path, random: np.random.Generator) -> list[Path]:
    """Write some new images under new or old names."""
    paths = [folder / f"{random.integers(0, 300):03}.png" for _ in range(6)]
    for path in paths:
        blocks = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        partial = path.with_suffix(".part")
        Image.fromarray(blocks).resize((8, 8)).save(partial, "PNG")
        partial.replace(path)
    return paths


def main() -> None:
    root, task, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    random = np.random.default_rng(seed)
    for module in (adding, migrate):
        vars(module)["BATCH_ITEMS"] = 3
    coded_rows.APPENDED = 8
    model: Any = PixelModel(SqliteStore(root / "a.idx").meta().get("model") == "other")
    while True:
        if task == "migrate":
            model = PixelModel(is_other=model.name == "pixels")
            report = migrate.migrate(SqliteStore(root / "a.idx"), model, drop=True)
            assert report.is_done
            say("model", model.name)
            continue
        with Index(root / "a.idx", model) as index:
            for _ in range(5):
                paths = write(root / "images", random)
                if task == "watch":
                    gone = paths[0]
                    gone.unlink()
                    scan(index, [root / "images"])
                    paths = [path for path in paths if path != gone]
                else:
                    index.add(paths)
                for path in paths:
                    say("has", path)


if __name__ == "__main__":
    main()
