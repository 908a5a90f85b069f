"""Decoded images at the size and scale a vision tower takes: the rule of one square view.

    PIL, RGB ── resize_image: squash, crop or pad ──► 8-bit square ── normalise ──► [3, S, S]

Neither JPEG draft decoding nor Pillow's `reducing_gap` is used: both were measured to move the
resized image by 2 to 13 grey levels. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import ClassVar

import numpy as np
from PIL import Image as pil

from visavis.model.image_input import ImageGrid
from visavis.processing.config import ImageProcessorConfig, VideoConfig
from visavis.processing.images import MAX_PIXELS

FILTERS = {
    "bicubic": pil.Resampling.BICUBIC,
    "bilinear": pil.Resampling.BILINEAR,
    "lanczos": pil.Resampling.LANCZOS,
}
_EXTREME_ASPECT = 16  # beyond it, cropping bounds its memory instead of resizing everything


class ImageProcessor:
    """Sizes every image to one square view; other rules are subclasses.

    Attributes:
        needs_size: whether the grid of an image depends on its width and height.
    """

    needs_size: ClassVar[bool] = False

    def __init__(self, config: ImageProcessorConfig) -> None:
        self.config = config

    @property
    def depends_on_image_count(self) -> bool:
        """Whether an image is sized differently when its prompt holds another."""
        return False

    @property
    def video(self) -> VideoConfig:
        """Which frames of a video are taken.

        Raises:
            InputError: the model takes no videos.
        """
        return self.config.video or VideoConfig()

    def grid(self, size: tuple[int, int], is_only_image: bool = True) -> ImageGrid:
        """Return how an image of a width and height divides into views or patches.

        Raises:
            ImageError: it is too long and narrow.
        """
        return ImageGrid()

    def pixels(self, image: pil.Image, is_only_image: bool = True) -> tuple[np.ndarray, ImageGrid]:
        """Return the views of a decoded (RGB) image, float32 [V, 3, S, S], or its patches [P, C],
        and its grid.

        Raises:
            ImageError: it is too long and narrow.
        """
        return process_image(image, self.config)[None], ImageGrid()

    def video_grid(self, frames: int, size: tuple[int, int]) -> ImageGrid:
        """Return how a video divides, from its number of frames and the size of the first."""
        return ImageGrid(frames, video=True)

    def video_pixels(self, frames: Sequence[pil.Image]) -> tuple[np.ndarray, ImageGrid]:
        """Return the views or patches of decoded (RGB) frames, and their grid."""
        views = np.stack([process_image(frame, self.config) for frame in frames])
        return views, ImageGrid(len(frames), video=True)


def process_image(image: pil.Image, config: ImageProcessorConfig) -> np.ndarray:
    """Return the vision tower's input, float32 [3, size, size], for a decoded (RGB) image."""
    return normalise(np.asarray(resize_image(image, config)), config)


def normalise(pixels: np.ndarray, config: ImageProcessorConfig) -> np.ndarray:
    """Return 8-bit RGB pixels [H, W, 3] normalised, float32 [3, H, W]."""
    levels = np.arange(256)[:, None] / 255
    table = ((levels - np.array(config.mean)) / np.array(config.std)).astype(np.float32)  # [256, 3]
    return np.stack([table[pixels[:, :, c], c] for c in range(3)])


def resize_image(image: pil.Image, config: ImageProcessorConfig) -> pil.Image:
    """Return the decoded (RGB) image at the tower's size, still 8-bit: what a cache may keep."""
    assert image.mode == "RGB", f"decode_image first: mode is {image.mode}"
    if config.resize == "crop":
        return _resize_and_crop(image, config)
    if config.resize == "pad" and image.width != image.height:
        return _pad_and_resize(image, config)
    return image.resize((config.size, config.size), FILTERS[config.resample])


def _resize_and_crop(image: pil.Image, config: ImageProcessorConfig) -> pil.Image:
    """Resize the shortest edge to `edge`, then cut the centre square."""
    size, resample = config.size, FILTERS[config.resample]
    edge = floor(size / config.crop_fraction)
    short = min(image.size)
    width, height = (int(edge * side / short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if max(image.size) <= _EXTREME_ASPECT * short:
        return image.resize((width, height), resample).crop((left, top, left + size, top + size))
    # Resize only what remains: a 1×65535 image would become 224 pixels by 15 million.
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min((left + size) * x, image.width), (top + size) * y)
    return image.resize((size, size), resample, box=(*box[:3], min(box[3], image.height)))


def _pad_and_resize(image: pil.Image, config: ImageProcessorConfig) -> pil.Image:
    """Centre the image on a square of the mean colour and resize that, without holding the whole
    square (13 GB for 65535×1). Pillow resizes a square along x first, then along y; rows of bare
    padding stay the mean colour along x, so only the image's own rows need that pass."""
    width, height = image.size
    if height > width and height * height > MAX_PIXELS:  # y before x: a few grey levels at edges
        flipped = _pad_and_resize(image.transpose(pil.Transpose.TRANSPOSE), config)
        return flipped.transpose(pil.Transpose.TRANSPOSE)
    size, side, resample = config.size, max(width, height), FILTERS[config.resample]
    colour = tuple(int(channel * 255) for channel in config.mean)
    if width < side:
        band = pil.new("RGB", (side, height), colour)
        band.paste(image, ((side - width) // 2, 0))
        image = band
    canvas = pil.new("RGB", (size, side), colour)
    canvas.paste(image.resize((size, height), resample), (0, (side - height) // 2))
    return canvas.resize((size, size), resample)
