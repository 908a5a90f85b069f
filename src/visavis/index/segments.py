"""Videos as segments that an index finds one by one: scenes, or pieces of one length.

    video ── small frames ──► where they change ──► [Segment(0, 7.5), Segment(7.5, 20), …]
    segment ── a few frames ──► Video, embedded as one item

A scene is cut where two frames a second apart differ much (mean absolute difference of 32×32 RGB
pixels), and more than neighbours in this video usually do. Scenes that are longer than LONGEST are
divided, and those shorter than SHORTEST belong to the one before.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from visavis.inputs import Image, Video
from visavis.processing.video_scan import clips_at, scan

SPACING = 1.0  # seconds between the compared frames
SHORTEST, LONGEST = 2.0, 20.0  # seconds of a segment
FRAMES = 4  # of a segment, embedded together
MAX_SEGMENTS = 2000  # of one video; SHORTEST grows above half an hour, LONGEST above 5 hours
WHOLE_FRAMES = 3000  # videos up to here are decoded whole, of longer ones only key frames
MAX_COMPARED = 2000  # frames
SIDE = 32  # pixels of the compared frames
CHANGE = 24.0  # least mean difference of a cut, of 255
UNUSUAL = 3.0  # times the median difference of the video


@dataclass(frozen=True)
class Segment:
    """A part of a video, in seconds from its start; `end_s` is not part of it."""

    begin_s: float
    end_s: float


def segments(path: Path) -> list[Segment]:
    """Return the segments of a video in order; together they are all of it.

    Raises:
        ImageError: it cannot be read as a video.
    """
    times, frames, duration = scan(
        Video(path), spacing=SPACING, whole=WHOLE_FRAMES, most=MAX_COMPARED, side=SIDE
    )
    least = 2 * duration / MAX_SEGMENTS  # half of the segments for cuts, half for divisions
    longest = max(LONGEST, least)
    bounds = [0.0, *_cuts(times, frames, duration), duration]
    bounds = _without_short(bounds, max(SHORTEST, least))
    return [
        Segment(round(begin, 3), round(end, 3))
        for first, last in pairwise(bounds)
        for begin, end in pairwise(_divided(first, last, longest))
    ]


def segment_video(path: Path, segment: Segment, frames: int = FRAMES) -> Video:
    """Return the video that is embedded of a segment, as `segment_videos` does of several.

    Raises:
        ImageError: it cannot be read as a video, or its frames are too large.
    """
    (video,) = segment_videos(path, [segment], frames)
    return video


def segment_image(path: Path, segment: Segment) -> Image:
    """Return the frame in the middle of a segment, for previews.

    Raises:
        ImageError: it cannot be read as a video, or its frames are too large.
    """
    middle = (segment.begin_s + segment.end_s) / 2
    (clip,) = clips_at(Video(path), [[middle]])
    return Image(clip.frames[0])


def segment_videos(path: Path, wanted: Sequence[Segment], frames: int = FRAMES) -> Generator[Video]:
    """Yield the video that is embedded of each segment: frames from the middles of its equal parts.
    The file is read once, and the frames of one segment are in memory.

    Raises:
        ImageError: it cannot be read as a video, or its frames are too large.
    """
    groups = []
    for segment in wanted:
        length = (segment.end_s - segment.begin_s) / frames
        groups.append([segment.begin_s + (number + 0.5) * length for number in range(frames)])
    for clip in clips_at(Video(path), groups):
        yield Video(tuple(map(Image, clip.frames)))


def _cuts(times: list[float], frames: np.ndarray, duration: float) -> list[float]:
    """Return the times of the frames that begin a new scene."""
    if len(times) < 2:
        return []
    values = frames.astype(np.float32).reshape(len(frames), -1)
    change = np.abs(np.diff(values, axis=0)).mean(1)  # [N - 1]
    least = max(CHANGE, UNUSUAL * float(np.median(change)))
    return [times[index + 1] for index in np.flatnonzero(change >= least).tolist()]


def _without_short(bounds: list[float], shortest: float) -> list[float]:
    """Leave out bounds that come too soon after another one or before the end."""
    kept = bounds[:1]
    for bound in bounds[1:-1]:
        if bound - kept[-1] >= shortest and bounds[-1] - bound >= shortest:
            kept.append(bound)
    return [*kept, bounds[-1]]


def _divided(first: float, last: float, longest: float) -> list[float]:
    count = max(1, int(np.ceil((last - first) / longest)))
    return [float(bound) for bound in np.linspace(first, last, count + 1)]
