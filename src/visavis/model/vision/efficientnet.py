"""EfficientNet-Lite 0-4 as a vision tower, the convolutional one.

From Tan & Le, "EfficientNet" (2019), in the "lite" form: no squeeze-and-excite, ReLU6, stem and
head not scaled. Batch norms are folded into the convolutions by the importer, so there are none
here. TensorFlow's "SAME" padding is kept: the weights were trained with it.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.config import EfficientNetConfig
from visavis.model.layers import Conv2d

# variant: width factor, depth factor, native image size
SCALES = {
    0: (1.0, 1.0, 224),
    1: (1.0, 1.1, 240),
    2: (1.1, 1.2, 260),
    3: (1.2, 1.4, 280),
    4: (1.4, 1.8, 300),
}
# repeats, kernel, stride, expansion, channels of each stage (EfficientNet-B0)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280


class SameConv(Conv2d):
    """A convolution padded so that the output is ceil(input / stride) on each side."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inside, outside, kernel, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel > 1:
            rows, columns = (
                max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
                for size in x.shape[-2:]
            )
            top, left = rows // 2, columns // 2
            x = F.pad(x, (left, columns - left, top, rows - top))
        return super().forward(x)


class InvertedBottleneck(nn.Module):
    """Expand, filter each channel, project; add the input where shapes allow."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inside * expansion
        self.expand = SameConv(inside, hidden, 1) if expansion > 1 else None
        self.depthwise = SameConv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = SameConv(hidden, outside, 1)
        self.residual = stride == 1 and inside == outside

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else F.relu6(self.expand(x))
        hidden = self.project(F.relu6(self.depthwise(hidden)))
        return x + hidden if self.residual else hidden


class EfficientNetLite(nn.Module):
    """Pixels [N, 3, S, S] to features [N, ceil(S / 32)², 1280], row by row."""

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.config = config
        width, depth, _ = SCALES[config.variant]
        self.stem = SameConv(3, STEM_CHANNELS, 3, 2)
        blocks: list[nn.Module] = []
        inside = STEM_CHANNELS
        for number, (repeats, kernel, stride, expansion, channels) in enumerate(STAGES):
            outside = round_channels(channels * width)
            first_or_last = number in (0, len(STAGES) - 1)
            for repeat in range(repeats if first_or_last else math.ceil(repeats * depth)):
                step = stride if repeat == 0 else 1
                blocks.append(InvertedBottleneck(inside, outside, kernel, step, expansion))
                inside = outside
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(inside, HEAD_CHANNELS, 1)

    def forward(self, pixels: Tensor, layer: int = -1) -> Tensor:
        assert layer == -1, "only the last feature map of EfficientNet-Lite is a hidden state"
        x = F.relu6(self.stem(pixels))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.head(x)).flatten(2).transpose(1, 2)  # [N, P, 1280]


def round_channels(channels: float) -> int:
    """Round to a multiple of 8, never more than 10 % down."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
