"""How an image or video is written in a prompt, where text stands among its placeholders.

    Idefics3, SmolVLM   tiles row by row, each after its place, then the whole image:
        <fake_token_around_image><row_1_col_1> P … <fake_token_around_image><row_1_col_2> P …\\n
        \\n<fake_token_around_image><global-img> P … <fake_token_around_image>
      a video: how many frames of how long a video, then each frame after its time
    InternVL            <img> P … </img>, of a video for each frame in a line of its own
    Qwen3-VL            a video: for each pair of frames its time, <0.3 seconds>, and
                        <|vision_start|> P … <|vision_end|>

P stands for placeholders. Knows grids and times; opens no file and no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from visavis.errors import InputError
from visavis.inputs import Prompt, Video
from visavis.model.image_input import ImageGrid

VIDEO = "<video>"  # what chat templates write for a video
AROUND, WHOLE = "<fake_token_around_image>", "<global-img>"
START, END = "<img>", "</img>"
QWEN_MARKS = ("<|vision_start|>", "<|vision_end|>")
ROUNDING = 1e-6  # seconds; times are multiples of a frame's duration that floats cannot hold
UNITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

Run = tuple[int, int]  # token id of an image or video, and how often it stands there
Times = tuple[Sequence[float], float]  # seconds of a video's frames, and how long it is


@dataclass(frozen=True)
class VisualText:
    """An image or video as text and runs of placeholders in turn.

    Args:
        texts: what stands before the first run, between two, and after the last.
        counts: placeholders of each run; one less than there are texts.
        marks: texts that templates write before and after a placeholder, and that `texts` hold.
    """

    texts: tuple[str, ...]
    counts: tuple[int, ...]
    marks: tuple[str, str] = ("", "")

    @classmethod
    def plain(cls, count: int) -> VisualText:
        """Return one run without text."""
        return cls(("", ""), (count,))

    def join(self, runs: Sequence[str]) -> str:
        """Return the whole as text, with a text for each run."""
        pieces = [text + run for text, run in zip(self.texts[:-1], runs, strict=True)]
        return "".join([*pieces, self.texts[-1]])


def idefics3_text(grid: ImageGrid, count: int, times: Times | None) -> VisualText:
    """Return how Idefics3 and SmolVLM write an image or video."""
    each = count // grid.views
    if times is not None:
        return _idefics3_video(each, *times)
    texts = [
        ("\n" if not column and row else "") + f"{AROUND}<row_{row + 1}_col_{column + 1}>"
        for row in range(grid.rows)
        for column in range(grid.columns)
    ]
    gap = "\n\n" if texts else ""
    return VisualText((*texts, f"{gap}{AROUND}{WHOLE}", AROUND), (each,) * grid.views)


def _idefics3_video(each: int, seconds: Sequence[float], duration: float) -> VisualText:
    whole = timedelta(seconds=int(duration + ROUNDING))
    texts = [
        f"You are provided the following series of {number_words(len(seconds))} frames from a "
        f"{whole} [H:MM:SS] video.\n"
    ]
    for time in seconds:
        minute, second = divmod(int(time + ROUNDING), 60)
        texts[-1] += f"\nFrame from {minute:02d}:{second:02d}:{AROUND}{WHOLE}"
        texts.append(AROUND)
    texts[-1] += "\n\n"
    return VisualText(tuple(texts), (each,) * len(seconds))


def internvl_text(grid: ImageGrid, count: int, times: Times | None) -> VisualText:
    """Return how InternVL writes an image or video."""
    if not grid.video:
        return VisualText((START, END), (count,))
    starts = [f"Frame{number + 1}: {START}" for number in range(grid.frames)]
    texts = (starts[0], *(f"{END}\n{start}" for start in starts[1:]), END)
    return VisualText(texts, (count // grid.frames,) * grid.frames)


def qwen3_vl_text(grid: ImageGrid, count: int, times: Times | None) -> VisualText:
    """Return how Qwen3-VL writes an image or video."""
    if not grid.video:
        return VisualText.plain(count)
    start, end = QWEN_MARKS
    starts = [f"<{time:.1f} seconds>{start}" for time in grid.times]
    texts = (starts[0], *(f"{end}{one}" for one in starts[1:]), end)
    return VisualText(texts, (count // grid.frames,) * grid.frames, QWEN_MARKS)


STYLES: dict[str, Callable[[ImageGrid, int, Times | None], VisualText]] = {
    "idefics3": idefics3_text,
    "internvl": internvl_text,
    "qwen3-vl": qwen3_vl_text,
}


def number_words(number: int) -> str:
    """Return a number below 1000 in English words: 121 is "one hundred and twenty-one"."""
    if not 0 <= number < 1000:
        raise InputError(f"{number} frames of a video, expected fewer than 1000; ask for fewer")
    hundreds, rest = divmod(number, 100)
    below = (
        UNITS[rest]
        if rest < 20
        else TENS[rest // 10 - 2] + f"-{UNITS[rest % 10]}" * (rest % 10 > 0)
    )
    if not hundreds:
        return below
    return f"{UNITS[hundreds]} hundred" + (f" and {below}" if rest else "")


@dataclass(frozen=True)
class Visuals:
    """How the images and videos of a prompt are written, and all their runs, in order."""

    texts: tuple[VisualText, ...]
    is_video: tuple[bool, ...]
    runs: tuple[Run, ...]
    written: bool  # with text among the placeholders


def visuals_of(
    prompt: Prompt, image_token_id: int, video_token_id: int, counts: Sequence[int | VisualText]
) -> Visuals:
    """Return how the images and videos of a prompt are written.

    Args:
        counts: of each the number of its placeholders, or how it is written with text among them.

    Raises:
        InputError: there are more or fewer than images and videos.
    """
    visuals = prompt.visuals
    if len(visuals) != len(counts):
        raise InputError(
            f"the messages hold {len(visuals)} images but sizes of {len(counts)} were given; "
            "expected one size per image, in order"
        )
    texts = tuple(VisualText.plain(one) if isinstance(one, int) else one for one in counts)
    is_video = tuple(isinstance(one, Video) for one in visuals)
    apart = video_token_id >= 0  # from images
    ids = [video_token_id if apart and filmed else image_token_id for filmed in is_video]
    runs = [(id, count) for id, text in zip(ids, texts, strict=True) for count in text.counts]
    written = any(isinstance(one, VisualText) for one in counts)
    return Visuals(texts, is_video, tuple(runs), written)


def write_out(
    rendered: str, learned: Sequence[bool], image: str, video: str, visuals: Visuals
) -> tuple[str, list[bool], int]:
    """Return a rendered prompt with all text of its images and videos written out.

    Args:
        rendered: with one placeholder for each image and video.
        learned: for each of its characters whether it is; empty: none.
        image: the placeholder of an image, which becomes that of each run.
        video: that of a video where the model has one; empty: templates write `VIDEO`, and runs
            are an image's.

    Returns:
        the text, the stretched mask, and how many placeholders were found where an image or
        video of that kind was expected.
    """
    pieces: list[str] = []
    mask: list[bool] = []
    at = found = 0
    for match in re.finditer(f"{re.escape(image)}|{re.escape(video or VIDEO)}", rendered):
        if found == len(visuals.texts) or (match[0] != image) != visuals.is_video[found]:
            break
        layout = visuals.texts[found]
        run = video if video and visuals.is_video[found] else image
        written = layout.join([run] * len(layout.counts))
        (before, after), start, end = layout.marks, *match.span()
        if rendered.endswith(before, at, start) and rendered.startswith(after, end):
            start, end = start - len(before), end + len(after)
        pieces += [rendered[at:start], written]
        mask += [*learned[at:start], *list(learned[match.start() :][:1]) * len(written)]
        at, found = end, found + 1
    return "".join([*pieces, rendered[at:]]), [*mask, *learned[at:]], found
