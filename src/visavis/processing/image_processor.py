"""An image or video of a prompt to what a vision tower takes, by whichever rule its processor has.

Which rule is the processor's config; each lives in a file of its own. `grid_of` reads headers
only, `pixels_of` everything; both give the same shape. Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from visavis.errors import InputError
from visavis.inputs import Content, Image, Video
from visavis.model.image_input import ImageGrid
from visavis.processing import anyres, qwen2_vl
from visavis.processing.images import ImageProcessorConfig, decode_image, image_size, process_image
from visavis.processing.phi3v import phi3v_grid, phi3v_views
from visavis.processing.video import VideoConfig, describe_times, read_frames, survey


@dataclass(frozen=True)
class ImageReference:
    """One image or video of a prompt, not yet decoded.

    Args:
        grid: the views or patches that it will divide into.
        is_only_image: whether it is sized as the only image of its prompt.
    """

    visual: Image | Video
    grid: ImageGrid
    is_only_image: bool

    @property
    def content(self) -> Content:
        """What was read of it when its prompt was prepared."""
        assert self.visual.content is not None, "identify the prompt first"
        return self.visual.content

    @property
    def key(self) -> str:
        """The content key that its features are cached by."""
        return f"{self.content.hash}:{self.is_only_image}"


def depends_on_image_count(processor: ImageProcessorConfig | None) -> bool:
    """Return whether a picture is sized otherwise when its prompt holds another."""
    tiles = processor.tiles if processor is not None else None
    return tiles is not None and tiles.multi_image == "pad"


def grid_of(visual: Image | Video, processor: ImageProcessorConfig, alone: bool) -> ImageGrid:
    """Return how an image or video will divide into views.

    Args:
        alone: whether it is its prompt's only one.

    Raises:
        ImageError: it cannot be read.
        InputError: it is a video, and the model takes none.
    """
    if isinstance(visual, Video):
        num_frames, size = survey(visual, _frames_of(processor))
        if processor.patches is not None:
            return qwen2_vl.video_shape(num_frames, size, processor.patches)
        return ImageGrid(num_frames, video=True)
    if processor.patches is not None:
        return qwen2_vl.image_shape(_size(visual), processor.patches)
    if processor.hd is not None:
        return phi3v_grid(_size(visual), processor)
    if processor.tiles is not None:
        return anyres.image_shape(_size(visual), processor, alone)
    return ImageGrid()


def times_of(video: Video, processor: ImageProcessorConfig) -> str:
    """Return what LLaVA-Video's prompts say on the times of a video's frames.

    Raises:
        ImageError, InputError: see `grid_of`.
    """
    return describe_times(video, _frames_of(processor))


def pixels_of(
    visual: Image | Video, processor: ImageProcessorConfig, alone: bool
) -> tuple[np.ndarray, ImageGrid]:
    """Return an image's views or a video's frames, float32 [V, 3, S, S], and its shape.

    Raises:
        ImageError, InputError: see `grid_of`.
    """
    if isinstance(visual, Video):
        frames = read_frames(visual, _frames_of(processor)).frames
        if processor.patches is not None:
            return qwen2_vl.video_patches(frames, processor)
        views = np.stack([process_image(frame, processor) for frame in frames])
        return views, ImageGrid(len(frames), video=True)
    image = decode_image(visual)
    if processor.patches is not None:
        return qwen2_vl.image_patches(image, processor)
    if processor.hd is not None:
        return phi3v_views(image, processor)
    if processor.tiles is not None:
        return anyres.image_views(image, processor, alone)
    return process_image(image, processor)[None], ImageGrid()


def _size(image: Image) -> tuple[int, int]:
    known = image.content.size if image.content is not None else None
    return image_size(image) if known is None else known


def _frames_of(processor: ImageProcessorConfig) -> VideoConfig:
    if processor.hd is not None:
        raise InputError("this model takes no videos, only pictures: pass some frames as images")
    return processor.video or VideoConfig()
