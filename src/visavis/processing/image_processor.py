"""Images and videos of a prompt to what a vision tower takes, by the sizing rule of its processor.

`grid_of` reads headers only, `pixels_of` everything; both give the same grid. Each rule is a class
in its own file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from visavis.inputs import Content, Image, Video
from visavis.model.image_input import ImageGrid
from visavis.processing.anyres import AnyresProcessor
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.gemma import GemmaProcessor
from visavis.processing.idefics3 import Idefics3Processor
from visavis.processing.images import decode_image, image_size
from visavis.processing.internvl import InternVLProcessor
from visavis.processing.naflex import NaFlexProcessor
from visavis.processing.phi3v import Phi3VProcessor
from visavis.processing.qwen2_vl import Qwen2VLProcessor
from visavis.processing.resize import ImageProcessor
from visavis.processing.video import frame_times, read_frames, survey


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
        """The content that was read when the prompt was prepared."""
        assert self.visual.content is not None, "identify the prompt first"
        return self.visual.content

    @property
    def key(self) -> str:
        """The content key that its features are cached by."""
        return f"{self.content.hash}:{self.is_only_image}"


def image_processor(config: ImageProcessorConfig) -> ImageProcessor:
    """Return the sizing rule of a config."""
    if config.tiles is not None:
        return AnyresProcessor(config)
    rules: dict[str, type[ImageProcessor]] = {
        "patches": Qwen2VLProcessor,
        "hd": Phi3VProcessor,
        "split": Idefics3Processor,
        "ratio": InternVLProcessor,
        "naflex": NaFlexProcessor,
        "gemma": GemmaProcessor,
    }
    return rules.get(config.resize, ImageProcessor)(config)


def grid_of(visual: Image | Video, config: ImageProcessorConfig, is_only_image: bool) -> ImageGrid:
    """Return how an image or video will divide into views.

    Args:
        is_only_image: whether it is its prompt's only one.

    Raises:
        ImageError: it cannot be read.
        InputError: it is a video, and the model takes none.
    """
    processor = image_processor(config)
    if isinstance(visual, Video):
        found = survey(visual, processor.video)
        grid = processor.video_grid(len(found.indices), found.size)
        if config.patches is None:
            return grid
        temporal = config.patches.temporal
        return replace(grid, interval=found.interval(temporal), times=found.times(temporal))
    if not processor.needs_size:
        return processor.grid((0, 0))
    known = visual.content.size if visual.content is not None else None
    return processor.grid(known or image_size(visual), is_only_image)


def times_of(video: Video, config: ImageProcessorConfig) -> tuple[tuple[float, ...], float]:
    """Return the times in seconds of the frames that a model is shown, and the video's duration.

    Raises:
        ImageError, InputError: see `grid_of`.
    """
    return frame_times(video, image_processor(config).video)


def pixels_of(
    visual: Image | Video, config: ImageProcessorConfig, is_only_image: bool
) -> tuple[np.ndarray, ImageGrid]:
    """Return an image's views or a video's frames, float32 [V, 3, S, S], and its grid.

    Raises:
        ImageError, InputError: see `grid_of`.
    """
    processor = image_processor(config)
    if isinstance(visual, Video):
        return processor.video_pixels(read_frames(visual, processor.video).frames)
    return processor.pixels(decode_image(visual), is_only_image)
