"""Images of any aspect ratio as squares of patches (EmbeddingGemma 2, Gemma 4).

    any size ── scale to the area of all tokens ──► sides that are multiples of 48 ──► patches

Both sides are rounded down; a side below one token becomes one. Patches that become one token stand
together, each patch [rows, columns, channels].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image as pil

from visavis.errors import ImageError
from visavis.model.image_input import ImageGrid
from visavis.processing.config import GemmaSizes
from visavis.processing.resize import FILTERS, ImageProcessor, normalise


class GemmaProcessor(ImageProcessor):
    """Patches of one image, as many as allowed."""

    needs_size = True

    @property
    def sizes(self) -> GemmaSizes:
        """Sizes of patches and tokens."""
        assert self.config.gemma is not None
        return self.config.gemma

    def grid(self, size: tuple[int, int], is_only_image: bool = True) -> ImageGrid:
        """Return the patches of an image, from its width and height alone.

        Raises:
            ImageError: it is too long and narrow.
        """
        rows, columns = token_grid(size, self.config.size, self.sizes.max_tokens)
        merge = self.sizes.merge
        return ImageGrid(1, rows * merge, columns * merge, size)

    def pixels(self, image: pil.Image, is_only_image: bool = True) -> tuple[np.ndarray, ImageGrid]:
        """Return the patches of a decoded (RGB) image, float32 [P, C], and their grid.

        Raises:
            ImageError: it is too long and narrow.
        """
        return self._cut(image), self.grid(image.size)

    def video_grid(self, frames: int, size: tuple[int, int]) -> ImageGrid:
        """Return the patches of a video, from its number of frames and the size of the first."""
        grid = self.grid(size)
        return ImageGrid(frames, grid.rows, grid.columns, size, video=True)

    def video_pixels(self, frames: Sequence[pil.Image]) -> tuple[np.ndarray, ImageGrid]:
        """Return the patches of decoded (RGB) frames, float32 [P, C], and their grid.

        Frames of other sizes than the first are resized to its size.
        """
        first = frames[0].size
        cut = [self._cut(one if one.size == first else one.resize(first)) for one in frames]
        return np.concatenate(cut), self.video_grid(len(frames), first)

    def _cut(self, image: pil.Image) -> np.ndarray:
        """Resize, normalise and cut an image."""
        merge, grid = self.sizes.merge, self.grid(image.size)
        patch = self.config.size // merge
        size = (grid.columns * patch, grid.rows * patch)
        resized = image if image.size == size else image.resize(size, FILTERS[self.config.resample])
        pixels = normalise(np.asarray(resized), self.config)  # [3, H, W]
        rows, columns = grid.rows // merge, grid.columns // merge
        cut = pixels.reshape(3, rows, merge, patch, columns, merge, patch)
        return cut.transpose(1, 4, 2, 5, 3, 6, 0).reshape(grid.rows * grid.columns, -1)


def token_grid(size: tuple[int, int], side: int, max_tokens: int) -> tuple[int, int]:
    """Return the rows and columns of tokens of an image of a width and height.

    Raises:
        ImageError: it is too long and narrow.
    """
    width, height = size
    factor = math.sqrt(max_tokens * side**2 / (width * height))
    rows, columns = (math.floor(factor * one / side) for one in (height, width))
    if not rows:
        rows, columns = 1, min(width // height, max_tokens)
    elif not columns:
        rows, columns = min(height // width, max_tokens), 1
    if not rows * columns <= max_tokens:
        raise ImageError(
            f"an image of {width} x {height} pixels is too long and narrow; cut it into parts"
        )
    return rows, columns
