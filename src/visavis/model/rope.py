"""Rotary position embeddings (RoPE, Su et al. 2021), half-split, context scaling, M-RoPE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visavis.model.config import DecoderConfig, RopeScaling
from visavis.model.image_input import ImageGrid


class Rope:
    """Tables of cosines and sines that grow with the largest position seen."""

    def __init__(self, config: DecoderConfig) -> None:
        self.dim = config.rotary_dim
        self.axes = frequency_axes(config.mrope_sections, config.mrope_interleaved)
        # on the CPU even when the model around it is built on the meta device
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device="cpu") / self.dim
        self.frequencies = scaled(1.0 / config.rope_base**exponent, config.rope_scaling)
        self.magnitude = config.rope_scaling.magnitude if config.rope_scaling else 1.0
        self.tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin, each [T, 1, rotary_dim].

        Args:
            positions: int64 [T], or [3, T] (time, height, width) for M-RoPE.
        """
        if positions.dim() == 2:
            return self._sectioned(positions, dtype)
        cos, sin = self.table(int(positions.max()) + 1, positions.device, dtype)
        return cos[positions], sin[positions]

    def table(self, needed: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and signed sin of positions 0 to at least `needed` - 1."""
        found = self.tables.get((device, dtype))
        if found is None or found[0].shape[0] < needed:
            size = 1 << max(9, math.ceil(math.log2(needed)))
            angles = torch.arange(size, device="cpu")[:, None] * self.frequencies  # [size, dim / 2]
            cos, sin = signed_tables(angles, self.magnitude)
            found = (cos.to(device, dtype), sin.to(device, dtype))
            self.tables[device, dtype] = found
        return found

    def _sectioned(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Each frequency follows the position of its own axis (Qwen2-VL)."""
        axis = self.axes.to(positions.device)
        angles = positions[axis].T * self.frequencies.to(positions.device)  # [T, dim / 2]
        cos, sin = signed_tables(angles, self.magnitude)
        return cos.to(dtype), sin.to(dtype)


def frequency_axes(sections: Sequence[int], interleaved: bool) -> Tensor:
    """Return the axis (time, height, width) that each frequency follows, int64 [dim / 2]: one block
    of frequencies after another; interleaved (Qwen3-VL) time, height, width, time, … as far as
    each of the last two has frequencies, and time in the rest."""
    axes = [axis for axis, count in enumerate(sections) for _ in range(count)]
    if interleaved:
        axes = [0] * len(axes)
        for axis in (1, 2):
            for place in range(axis, min(3 * sections[axis], len(axes)), 3):
                axes[place] = axis
    return torch.tensor(axes, dtype=torch.int64, device="cpu")


def signed_tables(angles: Tensor, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return cos [T, 1, dim] and sin [T, 1, dim] whose first half is negated."""
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `rotary_dim` channels of x [T, heads, head_dim]."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        first, rest = x.split((dim, x.shape[-1] - dim), -1)
        return torch.cat((rotate(first, cos, sin), rest), -1)
    return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)


def scaled(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Stretch frequencies [dim / 2] for longer contexts; `llama3` follows Llama 3.1's rule."""
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "factors":
        return frequencies / torch.tensor(scaling.factors, device="cpu")
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((scaling.original_context / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def mrope_positions(
    length: int,
    slots: Sequence[tuple[int, int]],
    shapes: Sequence[ImageGrid],
    merge: int = 2,
    tokens_per_second: int = 0,
) -> Tensor:
    """Return the positions of one sequence, int64 [3, L]; the next token's is their maximum + 1.

    Args:
        length: tokens of the sequence, L.
        slots: (start, number of tokens) of each image or video.
        shapes: their temporal patches, and rows and columns of patches.
        merge: side of the square of patches that become one token.
        tokens_per_second: positions that a second of a video takes; 0: a temporal patch takes one.
    """
    pieces: list[Tensor] = []
    at = following = 0  # in the sequence; the next free position
    pairs = zip(slots, shapes, strict=True)
    for (start, count), shape in sorted(pairs, key=lambda pair: pair[0]):
        pieces.append(_text_positions(start - at, following))
        following += start - at
        step = tokens_per_second * shape.interval if tokens_per_second and shape.video else 1.0
        axes = (
            (torch.arange(shape.frames) * step).long(),
            torch.arange(shape.rows // merge),
            torch.arange(shape.columns // merge),
        )
        grid = torch.cartesian_prod(*axes).T  # [3, n]
        assert grid.shape[1] == count, f"{shape} has {grid.shape[1]} tokens, its slot {count}"
        pieces.append(grid + following)
        following += int(grid.max()) + 1
        at = start + count
    pieces.append(_text_positions(length - at, following))
    return torch.cat(pieces, 1)


def _text_positions(length: int, first: int) -> Tensor:
    return torch.arange(first, first + length).expand(3, -1)
