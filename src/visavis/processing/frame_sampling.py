"""Which frames of a video a model is shown, and the text on their times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from visavis.errors import InputError
from visavis.processing.config import VideoConfig


def sample(total: int, rate: float, config: VideoConfig, asked: int | None = None) -> list[int]:
    """Return which of `total` frames to take, each at most once.

    Args:
        rate: frames per second of the video.
        asked: a number of frames that goes before the config's.
    """
    wanted = asked or config.frames
    if wanted > config.max_frames:
        raise InputError(
            f"{wanted} frames of a video, but this model takes at most {config.max_frames}; ask "
            "for fewer"
        )
    if config.sampling == "smolvlm":
        return _smolvlm_sample(total, rate, config.fps or 1.0, wanted, asked is not None)
    if config.sampling == "internvl":
        return _internvl_sample(total, min(wanted, total))
    if config.sampling == "qwen3-vl":
        return _qwen3_vl_sample(total, rate, config, asked)
    if asked is None and config.fps is not None:
        stepped = range(0, total, max(1, round(rate / config.fps)))
        if len(stepped) <= config.max_frames:
            return list(stepped)
        wanted = config.max_frames
    if total <= wanted:
        return list(range(total))
    return [int(index) for index in np.linspace(0, total - 1, wanted)]


def _smolvlm_sample(total: int, rate: float, fps: float, wanted: int, asked: bool) -> list[int]:
    """Return SmolVLM2's frames: `fps` a second and at most `wanted`, or that many if they are asked
    for; of videos much longer than that without their first and last second."""
    duration, first, last = total / rate, 0, total - 1
    if duration - 2 > wanted * fps:
        first, last = int(rate), min(int(total - rate), total - 1)
    number = wanted if asked else max(1, min(round(fps * duration), wanted))
    return sorted({int(place) for place in np.linspace(first, last, number)})


def _internvl_sample(total: int, wanted: int) -> list[int]:
    """Return the frames in the middle of `wanted` equal parts, as InternVL takes them."""
    places = total / wanted / 2 + np.arange(wanted) * (total / wanted)
    return [int(place) for place in places.astype(np.float32)]


def _qwen3_vl_sample(total: int, rate: float, config: VideoConfig, asked: int | None) -> list[int]:
    """Return Qwen3-VL's frames: `fps` a second, from the first to the last."""
    wanted = config.frames
    if config.fps is not None:
        wanted = max(int(total / rate * config.fps), config.min_frames, 1)
    wanted = min(asked or wanted, config.max_frames, total)
    return [int(index) for index in np.linspace(0, total - 1, wanted).round()]


def time_instruction(duration: float, times: Sequence[float]) -> str:
    """Return the text on the frames between video and question in LLaVA-Video's prompts."""
    listed = ",".join(f"{time:.2f}s" for time in times)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly "
        f"sampled from it. These frames are located at {listed}.Please answer the following "
        "questions related to this video."
    )
