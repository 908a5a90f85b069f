"""Images of any aspect ratio as patches of a bounded number (SigLIP 2's NaFlex).

    any size ── scale ──► sides rounded up to multiples of the patch ──► patches [P, p * p * 3]

The scale is the largest one, by bisection as in the published code, whose patches are at most
`max_patches`. Patches are in reading order, each [rows, columns, channels].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image as pil

from visavis.model.image_input import ImageGrid
from visavis.processing.resize import FILTERS, ImageProcessor, normalise

PRECISION = 1e-5  # of the scale
LARGEST_SCALE = 100.0


class NaFlexProcessor(ImageProcessor):
    """Patches of one image, as many as allowed."""

    needs_size = True

    def grid(self, size: tuple[int, int], is_only_image: bool = True) -> ImageGrid:
        """Return the patches of an image, from its width and height alone."""
        rows, columns = self._patches(size)
        return ImageGrid(1, rows, columns, size)

    def pixels(self, image: pil.Image, is_only_image: bool = True) -> tuple[np.ndarray, ImageGrid]:
        """Return the patches of a decoded (RGB) image, float32 [P, C], and their grid."""
        return self._cut(image), self.grid(image.size)

    def video_grid(self, frames: int, size: tuple[int, int]) -> ImageGrid:
        """Return the patches of a video, from its number of frames and the size of the first."""
        rows, columns = self._patches(size)
        return ImageGrid(frames, rows, columns, size, video=True)

    def video_pixels(self, frames: Sequence[pil.Image]) -> tuple[np.ndarray, ImageGrid]:
        """Return the patches of decoded (RGB) frames, float32 [P, C], and their grid.

        Frames of other sizes than the first are resized to its size.
        """
        first = frames[0].size
        cut = [self._cut(one if one.size == first else one.resize(first)) for one in frames]
        return np.concatenate(cut), self.video_grid(len(frames), first)

    def _patches(self, size: tuple[int, int]) -> tuple[int, int]:
        assert self.config.naflex is not None
        return patch_grid(size, self.config.size, self.config.naflex.max_patches)

    def _cut(self, image: pil.Image) -> np.ndarray:
        """Resize, normalise and cut an image."""
        patch, (rows, columns) = self.config.size, self._patches(image.size)
        resized = image.resize((columns * patch, rows * patch), FILTERS[self.config.resample])
        pixels = normalise(np.asarray(resized), self.config)  # [3, H, W]
        cut = pixels.reshape(3, rows, patch, columns, patch).transpose(1, 3, 2, 4, 0)
        return cut.reshape(rows * columns, -1)


def patch_grid(size: tuple[int, int], patch: int, max_patches: int) -> tuple[int, int]:
    """Return the rows and columns of patches of an image of a width and height."""
    width, height = size

    def sides(scale: float) -> tuple[int, int]:
        return max(1, math.ceil(height * scale / patch)), max(1, math.ceil(width * scale / patch))

    least, most = PRECISION / 10, LARGEST_SCALE
    while most - least >= PRECISION:
        scale = (least + most) / 2
        rows, columns = sides(scale)
        if rows * columns <= max_patches:
            least = scale
        else:
            most = scale
    return sides(least)
