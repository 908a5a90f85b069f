"""Which parts of an image match a query: the covered parts that cost similarity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import visavis
from tests.fakes import picture, tiny_model
from visavis.index.relevance import BATCH, CELLS, WINDOW, grid_of, relevance


class RedSum:
    """An embedder whose vector is the share of red in an image, so that losses are known."""

    def __init__(self) -> None:
        self.batches = 0

    def embed(self, items: Sequence[Any]) -> np.ndarray:
        if not isinstance(items[0], Image.Image):
            return np.array([[1.0]])
        self.batches += 1
        return np.array([[np.asarray(item, float)[..., 0].mean() / 255] for item in items])


def test_the_part_that_matters_has_all_the_relevance() -> None:
    image = Image.new("RGB", (160, 160))
    image.paste((255, 0, 0), (80, 40, 100, 60))  # one cell of 8 × 8: row 2, column 4
    found = relevance(RedSum(), image, "red")
    assert found is not None
    assert found.score == pytest.approx(1 / 64, abs=1e-3)
    assert np.unravel_index(found.cells.argmax(), found.cells.shape) == (2, 4)
    reached = found.cells > found.cells.max() / 100
    rows, columns = np.nonzero(reached)  # windows that cover the cell reach one cell further
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 3, 3, 5)


def test_it_is_the_mean_loss_of_the_windows_over_a_cell() -> None:
    model, image = tiny_model(), picture(3, (64, 48))
    found = relevance(model, image, "some words")
    assert found is not None
    rows, columns = found.cells.shape
    assert (rows, columns) == (6, 8)
    target = model.embed(["some words"])[0]
    grey = tuple(round(value) for value in np.asarray(image, float).mean((0, 1)))
    losses = []
    for row in (2, 3):  # those of the cell in row 3, column 0, which lies at the edge
        covered = image.copy()
        covered.paste(grey, (0, row * 8, 2 * 8, (row + 2) * 8))
        losses.append(found.score - float(model.embed([covered])[0] @ target))
    assert found.cells[3, 0] == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((100, 100), (8, 8)), ((200, 100), (4, 8)), ((10, 4000), (8, 2)), ((1, 1), (8, 8))],
)
def test_cells_are_nearly_square(size: tuple[int, int], grid: tuple[int, int]) -> None:
    assert grid_of(*size) == grid
    assert min(grid) >= WINDOW and max(grid) == CELLS
    found = relevance(RedSum(), Image.new("RGB", size, (200, 0, 0)), "red")
    assert found is not None and found.cells.shape == grid
    assert np.isfinite(found.cells).all()


def test_it_ends_when_it_is_no_longer_wanted() -> None:
    model = RedSum()
    answers = iter([True, True, False])
    assert relevance(model, picture(1), "x", wanted=lambda: next(answers)) is None
    assert model.batches == 2 and BATCH * 2 < 49


def test_nano_looks_at_the_half_that_shows_the_words(nano_files: dict[str, Path]) -> None:
    skimage = pytest.importorskip("skimage", reason="sample images: pip install 'visavis[demo]'")
    folder = Path(skimage.__file__).parent / "data"
    halves = []
    for name in ("chelsea.png", "coffee.png"):
        with Image.open(folder / name) as opened:
            halves.append(opened.convert("RGB").resize((224, 224)))
    image = Image.new("RGB", (448, 224))
    for number, half in enumerate(halves):
        image.paste(half, (224 * number, 0))
    model = visavis.load("nano")
    shares = []
    for words in ("a cat", "a cup of coffee"):
        found = relevance(model, image, words)
        assert found is not None
        cells = found.cells.clip(0)
        shares.append(cells[:, :4].sum() / cells.sum())
    assert shares[0] > 0.7 and shares[1] < 0.3, shares
