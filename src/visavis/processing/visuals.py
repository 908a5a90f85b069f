"""An image or video of a prompt to what a vision tower takes, by whichever rule its processor has.

Which rule is the processor's config; each lives in a file of its own. `shape_of` reads headers
only, `pixels_of` everything; both give the same shape. Knows no model.
"""

from __future__ import annotations

import numpy as np

from visavis.model.visual import Shape
from visavis.processing import patches
from visavis.processing.hd import hd_shape, hd_views
from visavis.processing.images import ImageProcessorConfig, decode_image, process_image
from visavis.prompt import Image, Video


def sized_by_company(processor: ImageProcessorConfig | None) -> bool:
    """Return whether a picture is sized otherwise when its prompt holds another."""
    return False


def shape_of(visual: Image | Video, processor: ImageProcessorConfig, alone: bool) -> Shape:
    """Return how an image or video will divide into views.

    Args:
        alone: whether it is its prompt's only one.

    Raises:
        ImageError: it cannot be read.
    """
    if processor.patches is not None:
        return patches.image_shape(decode_image(visual).size, processor.patches)
    if processor.hd is not None:
        return hd_shape(decode_image(visual).size, processor)
    return Shape()


def pixels_of(
    visual: Image | Video, processor: ImageProcessorConfig, alone: bool
) -> tuple[np.ndarray, Shape]:
    """Return an image's views or a video's frames, float32 [V, 3, S, S], and its shape.

    Raises:
        ImageError: it cannot be read.
    """
    if processor.patches is not None:
        return patches.image_patches(decode_image(visual), processor)
    if processor.hd is not None:
        return hd_views(decode_image(visual), processor)
    return process_image(decode_image(visual), processor)[None], Shape()
