"""Small frames from all over a video, clips from any of its times, and the tags of its file."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from visavis.inputs import Video
from visavis.processing.media import name_of, open_media
from visavis.processing.video import (
    Clip,
    animation,
    check_clip,
    container,
    open_video,
    readable,
)


def scan(
    video: Video, *, spacing: float, whole: int, most: int, side: int
) -> tuple[list[float], np.ndarray, float]:
    """Return small frames from all over a video, to see where it changes.

    Args:
        spacing: seconds between frames of a video of at most `whole` frames. Of a longer one key
            frames are read, which costs one decoded frame each; encoders put one where a scene
            changes.
        most: frames to read at most.
        side: pixels; the frames are squeezed to a square.

    Returns:
        The time of each frame in seconds; the frames, uint8 [N, side, side, 3]; the duration.

    Raises:
        ImageError: the video cannot be read.
    """
    with open_video(video) as reader:
        if len(reader.times) <= whole:
            wanted = np.arange(0, reader.duration, max(spacing, reader.duration / most))
            indices = sorted({_shown_at(reader.times, time) for time in wanted.tolist()})
        else:
            keys = reader.key_frames()
            indices = [keys[i] for i in range(0, len(keys), -(-len(keys) // most))]
        small = [np.asarray(frame) for frame in reader.read(indices, side)]
        return [reader.times[index] for index in indices], np.stack(small), reader.duration


def clips_at(video: Video, groups: Iterable[Sequence[float]]) -> Iterator[Clip]:
    """Yield the frames shown at the times of each group, in seconds and in rising order over all
    groups. The file is opened once, and frames of one group are in memory.

    Raises:
        ImageError: the video cannot be read, or its frames are too large.
    """
    with open_video(video) as reader:
        wanted = [[_shown_at(reader.times, time) for time in times] for times in groups]
        check_clip(max(map(len, wanted), default=0), reader.size)
        frames = reader.read([index for indices in wanted for index in indices])
        for indices in wanted:
            shown = tuple(reader.times[index] for index in indices)
            yield Clip(tuple(islice(frames, len(indices))), shown, reader.duration)


def container_tags(video: Video) -> dict[str, str]:
    """Return the tags of a video file, such as `title` and `creation_time`; none of an animation.

    Raises:
        ImageError: the file cannot be read.
    """
    source = video.source
    assert isinstance(source, (Path, bytes))
    name = name_of(source, "video")
    with open_media(source, "video") as data:
        if animation(data) is not None:
            return {}
        with readable(name), container(data, name) as (opened, stream):
            return {**stream.metadata, **opened.metadata}


def _shown_at(times: Sequence[float], time: float) -> int:
    """Return which frame is shown at a time."""
    return max(0, bisect(times, time) - 1)
