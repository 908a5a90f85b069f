"""The configs of image processors, one class per sizing rule; saved with the weights.

    ImageProcessorConfig   square: squashed, cropped or padded to one square view (resize.py)
      tiles: AnyresConfig    LLaVA 1.6: a view of the whole and tiles of it (anyres.py)
      hd: Phi3VConfig        Phi-3.5-vision: a canvas of whole tiles (phi3v.py)
      ratio: RatioConfig     InternVL: tiles and a view of the whole (internvl.py)
      split: SplitConfig     Idefics3, SmolVLM: tiles and a view of the whole (idefics3.py)
      patches: Qwen2VLConfig Qwen2-VL: patches at any resolution (qwen2_vl.py)
      naflex: NaFlexSizes    SigLIP 2: patches of any aspect ratio (naflex.py)
      gemma: GemmaSizes      EmbeddingGemma 2: squares of patches of any aspect ratio (gemma.py)
      video: VideoConfig     which frames of a video are taken (video.py)

They describe sizes and switches and check them; they open and resize nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

from visavis.errors import InputError
from visavis.utils import suggest

Resize: TypeAlias = Literal[
    "squash", "crop", "pad", "patches", "hd", "split", "ratio", "naflex", "gemma"
]
Resample: TypeAlias = Literal["bicubic", "bilinear", "lanczos"]
Sampling: TypeAlias = Literal["even", "smolvlm", "internvl", "qwen3-vl"]
SAMPLINGS: tuple[str, ...] = get_args(Sampling)
MAX_PATCHES = 1 << 16
MAX_EDGE = 4096  # pixels that Idefics3 enlarges the longer side of an image to at most


@dataclass(frozen=True)
class _Config:
    """Base class of the configs below. `title` names one in errors."""

    title: ClassVar[str]

    @classmethod
    def check_keys(cls, values: Mapping[str, Any]) -> None:
        """Refuse keys that are no field."""
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                raise InputError(f"{cls.title} config: unknown key {key!r}; {suggest(key, names)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the config of plain JSON values; unknown keys are errors."""
        cls.check_keys(values)
        return cls(**values)


@dataclass(frozen=True)
class AnyresConfig(_Config):
    """Which canvases an image may be laid on.

    Args:
        grids: sides of each canvas in pixels, multiples of the tile, in the checkpoint's order.
        axes: whether these pairs are (width, height), as the original code reads them, or
            (height, width), as transformers does. Where several canvases are equally good the
            first is taken, so the two choose differently for many small images.
        multi_image: what becomes of an image that is not its prompt's only one: tiled as well,
            or padded to a square of the mean colour and seen whole only.
        square: side of the square that every image is squashed to first; 0: none.
    """

    title: ClassVar[str] = "tiles"
    grids: tuple[tuple[int, int], ...]
    axes: Literal["wh", "hw"] = "wh"
    multi_image: Literal["tile", "pad"] = "tile"
    square: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not self.grids or not all(
            len(grid) == 2 and all(type(side) is int and side > 0 for side in grid)
            for grid in self.grids
        ):
            problems.append(f"grids are {self.grids!r}, expected pairs of positive ints")
        if self.axes not in ("wh", "hw"):
            problems.append(f"axes is {self.axes!r}, expected wh or hw")
        if self.multi_image not in ("tile", "pad"):
            problems.append(f"multi_image is {self.multi_image!r}, expected tile or pad")
        if type(self.square) is not int or self.square < 0:
            problems.append(f"square is {self.square!r}, expected 0 or a positive int")
        if problems:
            raise InputError(f"tiles config: {'; '.join(problems)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the config of plain JSON values; unknown keys are errors."""
        grids = values.get("grids", ())
        listed = isinstance(grids, (list, tuple)) and all(
            isinstance(g, (list, tuple)) for g in grids
        )
        return super().from_dict({**values, "grids": tuple(map(tuple, grids)) if listed else grids})


@dataclass(frozen=True)
class Phi3VConfig(_Config):
    """How many tiles an image becomes at most; published: 4 for several images, 16 for one."""

    title: ClassVar[str] = "hd"
    num_crops: int = 16

    def __post_init__(self) -> None:
        number = self.num_crops
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"num_crops is {number!r}, expected a whole number of at least 1")


@dataclass(frozen=True)
class SplitConfig(_Config):
    """How Idefics3 and SmolVLM cut images.

    Args:
        longest_edge: pixels that the longer side of an image is resized to before it is cut.
        cut: whether it is cut; a view of the whole is all that is seen otherwise.
        video_edge: pixels that the longer side of a frame is resized to before it becomes one
            square view; 0: the model takes no videos.
    """

    title: ClassVar[str] = "split"
    longest_edge: int
    cut: bool = True
    video_edge: int = 0

    def __post_init__(self) -> None:
        problems = []
        for name, least in (("longest_edge", 1), ("video_edge", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= MAX_EDGE:
                problems.append(f"{name} is {value!r}, expected {least} to {MAX_EDGE}")
        cut: object = self.cut
        if not isinstance(cut, bool):
            problems.append(f"cut is {cut!r}, expected true or false")
        if problems:
            raise InputError(f"split config: {'; '.join(problems)}")


@dataclass(frozen=True)
class RatioConfig(_Config):
    """How many tiles an InternVL's image becomes at least and at most, a view of it aside."""

    title: ClassVar[str] = "ratio"
    min_tiles: int = 1
    max_tiles: int = 12

    def __post_init__(self) -> None:
        numbers = (self.min_tiles, self.max_tiles)
        if not all(type(n) is int for n in numbers) or not 1 <= numbers[0] <= numbers[1]:
            raise InputError(
                f"ratio config: {numbers[0]!r} to {numbers[1]!r} tiles, expected two whole numbers "
                "from 1 on"
            )


@dataclass(frozen=True)
class NaFlexSizes(_Config):
    """How many patches an image becomes at most; published: 256, at test time up to 1024."""

    title: ClassVar[str] = "naflex"
    max_patches: int = 256

    def __post_init__(self) -> None:
        number = self.max_patches
        if type(number) is not int or not 1 <= number <= MAX_PATCHES:
            raise InputError(
                f"naflex config: max_patches is {number!r}, expected 1 to {MAX_PATCHES}"
            )


@dataclass(frozen=True)
class GemmaSizes(_Config):
    """Side in patches of what becomes one token, and how many tokens an image becomes at most."""

    title: ClassVar[str] = "gemma"
    merge: int = 3
    max_tokens: int = 280

    def __post_init__(self) -> None:
        for name, most in (("merge", 64), ("max_tokens", MAX_PATCHES)):
            number = getattr(self, name)
            if type(number) is not int or not 1 <= number <= most:
                raise InputError(f"gemma config: {name} is {number!r}, expected 1 to {most}")


@dataclass(frozen=True)
class Qwen2VLConfig(_Config):
    """How images become patches.

    Args:
        patch: side of a patch in pixels.
        merge: side of the square of patches that become one token.
        temporal: frames in a patch.
        min_pixels, max_pixels: bounds of an image's area after resizing.
        video_min_pixels, video_max_pixels: the same of each frame; 0: as an image's.
        total_pixels: of a video of N groups of `temporal` frames, each frame has at most an Nth of
            this; 0: no such bound.
        whole_videos: these are bounds of the area of all frames of a video together (Qwen3-VL).
        extreme: what becomes of an image more than 200 times as long as wide: an error, or a
            square, as VLM2Vec does, which squashes images with a side below one token too.
        square: side of the square that every image is squashed to first; 0: none.
    """

    title: ClassVar[str] = "patches"
    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 3136
    max_pixels: int = 1003520
    video_min_pixels: int = 0
    video_max_pixels: int = 0
    whole_videos: bool = False
    total_pixels: int = 0
    extreme: Literal["refuse", "square"] = "refuse"
    square: int = 0

    def __post_init__(self) -> None:
        counts = dict.fromkeys(("patch", "merge", "temporal", "min_pixels", "max_pixels"), 1)
        counts |= dict.fromkeys(
            ("video_min_pixels", "video_max_pixels", "square", "total_pixels"), 0
        )
        problems = []
        for name, least in counts.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                problems.append(f"{name} is {value!r}, expected a whole number from {least} on")
        if self.extreme not in ("refuse", "square"):
            problems.append(f"extreme is {self.extreme!r}, expected refuse or square")
        if problems:
            raise InputError(f"patches config: {'; '.join(problems)}")
        for least, most in (self.bounds(0), self.bounds(self.temporal)):
            if least > most:
                raise InputError(
                    f"patches config: at least {least} and at most {most} pixels, expected room "
                    "between the two"
                )

    @property
    def factor(self) -> int:
        """Side in pixels of what becomes one token."""
        return self.patch * self.merge

    def bounds(self, frames: int) -> tuple[int, int]:
        """Return the smallest and largest area of an image, or of each of this many frames."""
        least, most = (self.video_min_pixels, self.video_max_pixels) if frames else (0, 0)
        least, most = least or self.min_pixels, most or self.max_pixels
        if frames and self.total_pixels:
            share = self.total_pixels * self.temporal // frames
            most = max(min(most, share), int(least * 1.05))
        return least, most


@dataclass(frozen=True)
class VideoConfig(_Config):
    """Which frames of a video a model is shown; saved with the weights.

    Args:
        frames: how many, spread evenly from the first to the last.
        fps: instead, how many for each second, evenly spread `max_frames` if those are more.
        max_frames: the most there can be, also of those that a prompt asks for.
        min_frames: the fewest of Qwen3-VL's sampling, where a video has them.
        sampling: how they are spread: from the first to the last, or as SmolVLM2, InternVL or
            Qwen3-VL do (video.py).
    """

    title: ClassVar[str] = "video"
    frames: int = 32
    fps: float | None = None
    max_frames: int = 128
    min_frames: int = 0
    sampling: Sampling = "even"

    def __post_init__(self) -> None:
        for name in ("frames", "max_frames", "min_frames"):
            value = getattr(self, name)
            if type(value) is not int or value < (name != "min_frames"):
                raise InputError(f"video config: {name} is {value!r}, expected a positive int")
        if self.sampling not in SAMPLINGS:
            raise InputError(
                f"video config: sampling is {self.sampling!r}, expected one of "
                f"{', '.join(SAMPLINGS)}"
            )
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise InputError(f"video config: fps is {self.fps!r}, expected a number above 0")
        if max(self.frames, self.min_frames) > self.max_frames:
            raise InputError(
                f"video config: {max(self.frames, self.min_frames)} frames, expected at most "
                f"max_frames={self.max_frames}"
            )


PARTS: dict[str, type[_Config]] = {  # fields of the whole that are configs of their own
    "patches": Qwen2VLConfig,
    "hd": Phi3VConfig,
    "naflex": NaFlexSizes,
    "split": SplitConfig,
    "ratio": RatioConfig,
    "gemma": GemmaSizes,
    "tiles": AnyresConfig,
    "video": VideoConfig,
}


@dataclass(frozen=True)
class ImageProcessorConfig(_Config):
    """How a vision tower wants its images; saved with the weights."""

    title: ClassVar[str] = "image processor"
    size: int  # pixels, side of the square the tower sees; of any resolution: of one token
    # squash: ignore aspect | crop: centre square | pad: to a square, mean colour | patches: any
    # size, see qwen2_vl.py | hd: tiles, see phi3v.py | split: tiles, see idefics3.py | ratio:
    # tiles, see internvl.py | naflex: patches, see naflex.py
    resize: Resize
    mean: tuple[float, float, float]  # RGB, of values in 0..1
    std: tuple[float, float, float]
    resample: Resample = "bicubic"
    crop_fraction: float = 1.0  # crop only: shortest edge becomes floor(size / crop_fraction)
    patches: Qwen2VLConfig | None = None
    hd: Phi3VConfig | None = None
    naflex: NaFlexSizes | None = None
    split: SplitConfig | None = None
    ratio: RatioConfig | None = None
    gemma: GemmaSizes | None = None  # any aspect ratio, see gemma.py
    tiles: AnyresConfig | None = None  # squash only: tiles beside the whole, see anyres.py
    video: VideoConfig | None = None  # which frames of a video are taken; None: VideoConfig()

    def __post_init__(self) -> None:
        problems = []
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            problems.append(f"size is {self.size!r}, expected a positive int")
        for name, value, known in (
            ("resize", self.resize, get_args(Resize)),
            ("resample", self.resample, get_args(Resample)),
        ):
            if value not in known:
                problems.append(f"{name} is {value!r}, expected one of {', '.join(known)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or (name == "std" and not all(v > 0 for v in values)):
                problems.append(f"{name} is {values!r}, expected three numbers (std above 0)")
        if not 0 < self.crop_fraction <= 1:
            problems.append(f"crop_fraction is {self.crop_fraction}, expected above 0, at most 1")
        elif self.crop_fraction != 1 and self.resize != "crop":
            problems.append(f"crop_fraction has no effect with resize={self.resize!r}")
        if (self.resize == "patches") != (self.patches is not None):
            problems.append(f"resize={self.resize!r}, but patches are {self.patches}")
        elif self.patches is not None and self.size != self.patches.factor:
            problems.append(f"size is {self.size}, but a token {self.patches.factor} pixels")
        for name in ("hd", "naflex", "split", "ratio", "gemma"):
            part = getattr(self, name)
            if (self.resize == name) != (part is not None):
                problems.append(f"resize={self.resize!r}, but {name} is {part}")
        if self.tiles is not None and self.resize != "squash":
            problems.append(f"tiles do not go with resize={self.resize!r}, only with 'squash'")
        elif (
            self.tiles is not None
            and not problems
            and any(side % self.size for grid in self.tiles.grids for side in grid)
        ):
            problems.append(f"sides of tiles.grids are not all multiples of size {self.size}")
        if problems:
            raise InputError(f"image processor config: {'; '.join(problems)}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the parts that it does not have."""
        values = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        if self.tiles is not None:
            values["tiles"]["grids"] = [list(grid) for grid in self.tiles.grids]
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return the config that `to_dict` wrote; unknown and missing keys are errors."""
        cls.check_keys(values)
        missing = [name for name in ("size", "resize", "mean", "std") if name not in values]
        if missing:
            raise InputError(f"image processor config: {', '.join(missing)} missing")
        tuples: dict[str, Any] = {n: tuple(map(float, values[n])) for n in ("mean", "std")}
        for name, part in PARTS.items():
            if values.get(name) is not None:
                tuples[name] = part.from_dict(values[name])
        return cls(**{**values, **tuples})


# How published embedding models size images and videos, by the name of their profile, where the
# config of their base model has other numbers.
ANYRES_SQUARES = {"vlm2vec-v1": 1344, "unime-v2": 1344}
PHI3V_CROPS = {"vlm2vec-v1": 4}
_AS_PICTURES = {"video_min_pixels": 0, "video_max_pixels": 0}
_QWEN3 = {
    "min_pixels": 4 * 32 * 32,
    "max_pixels": 1800 * 32 * 32,
    "video_min_pixels": 128 * 32 * 32,
    "video_max_pixels": 768 * 32 * 32,
    "total_pixels": 10 * 768 * 32 * 32,
    "whole_videos": False,
}
_VLM2VEC_V2 = {
    "min_pixels": 4 * 28 * 28,
    "max_pixels": 1280 * 28 * 28,
    "extreme": "square",
    **_AS_PICTURES,
}
_GME = {"min_pixels": 256 * 28 * 28, "max_pixels": 1280 * 28 * 28}
QWEN2_VL_SIZES: dict[str, dict[str, Any]] = {
    "vlm2vec-v1": {"square": 1344, **_AS_PICTURES},
    "vlm2vec-v2": _VLM2VEC_V2,
    "b3": _VLM2VEC_V2,
    "unime-v2": {"square": 1344},
    "gme": _GME,
    "ops-mm": _GME,
    "qwen3-vl-embedding": _QWEN3,
    "qwen3-vl-reranker": _QWEN3,
}
FRAMES = {
    "vlm2vec-v1": VideoConfig(frames=8),
    "vlm2vec-v2": VideoConfig(frames=8),
    "qwen3-vl-embedding": VideoConfig(32, 1.0, 64, 4, "qwen3-vl"),
    "qwen3-vl-reranker": VideoConfig(32, 1.0, 64, 4, "qwen3-vl"),
}


def sized_as(config: ImageProcessorConfig, profile: str) -> ImageProcessorConfig:
    """Return a config that sizes images and videos as the models of a profile were trained."""
    if config.patches and profile in QWEN2_VL_SIZES:
        sizes = replace(config.patches, **QWEN2_VL_SIZES[profile])
        config = replace(config, patches=sizes)
    if config.patches and profile in FRAMES:
        config = replace(config, video=FRAMES[profile])
    if config.tiles and profile in ANYRES_SQUARES:
        config = replace(config, tiles=replace(config.tiles, square=ANYRES_SQUARES[profile]))
    if config.hd and profile in PHI3V_CROPS:
        config = replace(config, hd=Phi3VConfig(PHI3V_CROPS[profile]))
    return config
