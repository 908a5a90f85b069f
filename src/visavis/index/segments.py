"""Segments of videos, each of which is an item of an index."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from visavis.inputs import Image, Video
from visavis.processing.video import duration, read_between

SEGMENT_SECONDS = 10.0
SEGMENT_FRAMES = 4


@dataclass(frozen=True)
class Segment:
    """A part of a video, in seconds."""

    begin_s: float
    end_s: float


def segments(path: Path) -> list[Segment]:
    """Return the segments of a video, in order, without gaps.

    Raises:
        ImageError: the video cannot be read.
    """
    total = duration(Video(path))
    number = max(1, round(total / SEGMENT_SECONDS))
    edges = [round(total * i / number, 3) for i in range(number + 1)]
    return [Segment(begin, end) for begin, end in pairwise(edges)]


def segment_video(path: Path, segment: Segment) -> Video:
    """Return some frames of a segment as a video, as it is embedded.

    Raises:
        ImageError: the video cannot be read.
    """
    clip = read_between(Video(path), segment.begin_s, segment.end_s, SEGMENT_FRAMES)
    return Video(tuple(Image(frame) for frame in clip.frames))


def segment_image(path: Path, segment: Segment) -> Image:
    """Return the frame in the middle of a segment, for previews.

    Raises:
        ImageError: the video cannot be read.
    """
    return Image(read_between(Video(path), segment.begin_s, segment.end_s, 1).frames[0])
