"""Input of a vision tower: the pixels of an image or video, and its grid.

The `ImageGrid` determines the number of image tokens before any pixel is decoded, and how the
tokens of views are arranged. Resizing is in `processing`, arranging in `image_tokens.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ImageGrid:
    """How an image or video divides into views or patches.

    Args:
        frames: 1 for an image, else the frames of a video (towers of any resolution: temporal
            patches, of two frames each).
        rows, columns: tiles beside the base view, 0 without tiling (towers of any resolution:
            patches).
        size: width and height of the upright original, where the tokens' layout depends on it.
        video: whether it is one; a video of one frame is still a video.
        interval: seconds from one temporal patch of a video to the next, on average.
        times: seconds at which each temporal patch of a video is shown, the mean of its frames.
    """

    frames: int = 1
    rows: int = 0
    columns: int = 0
    size: tuple[int, int] = (0, 0)
    video: bool = False
    interval: float = 1.0
    times: tuple[float, ...] = ()

    def split(self, number: int) -> list[ImageGrid]:
        """Return the grids of the runs that a prompt writes it in: itself, or each temporal patch
        of a video by itself."""
        assert number in (1, self.frames), f"{self} in {number} runs"
        return [self] if number == 1 else [replace(self, frames=1)] * number

    @property
    def views(self) -> int:
        """The square views of it for a tower of one resolution."""
        return self.frames if self.video else 1 + self.rows * self.columns


@dataclass(frozen=True)
class ImageInput:
    """Pixels of one image or video, ready for the tower.

    Args:
        pixels: float32 [V, 3, S, S], the base view and then tiles row by row, or frames; towers
            of any resolution: patches, float32 [P, C].
        shape: its layout.
    """

    pixels: Tensor
    shape: ImageGrid = ImageGrid()
