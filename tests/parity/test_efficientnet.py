"""EfficientNet-Lite2 with its real weights: against a plain forward with unfolded batch norms, and
against what is in a few photographs.

The plain forward is written from the paper's table and the file's own names; it shares no code with
the tower, so a wrong stride, padding, epsilon or fold shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tests.parity.peers import assert_close
from visavis.checkpoints.efficientnet import LITE2, Classifier, load_efficientnet
from visavis.errors import CheckpointError
from visavis.model.config import EfficientNetConfig
from visavis.model.vision.efficientnet import EfficientNetLite

pytestmark = pytest.mark.parity

Weights = dict[str, Tensor]

# First block of each stage of Lite2 and its stride; every other block has stride 1.
STRIDES = {1: 2, 4: 2, 7: 2, 15: 2}
SKIPS_NOTHING = {0, 1, 4, 7, 11, 15, 20}  # blocks that change the number of channels


@pytest.fixture(scope="module")
def weights(nano_files: dict[str, Path]) -> Weights:
    return torch.load(nano_files["vision_tower"], weights_only=True)


@pytest.fixture(scope="module")
def loaded(nano_files: dict[str, Path]) -> tuple[EfficientNetLite, Classifier]:
    state, classifier = load_efficientnet(nano_files["vision_tower"])
    tower = EfficientNetLite(LITE2)
    tower.load_state_dict(state)
    return tower.eval(), classifier


def same_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """TensorFlow's SAME: pad to ceil(size / stride) outputs, the odd pixel right and below."""
    kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
    outputs = (x.shape[-1] + stride - 1) // stride
    padding = max(0, (outputs - 1) * stride + kernel - x.shape[-1])
    before, after = padding // 2, padding - padding // 2
    x = F.pad(x, (before, after, before, after))
    return F.conv2d(x, weight, stride=stride, groups=groups)


def norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    statistics = (weights[f"{name}.running_mean"], weights[f"{name}.running_var"])
    return F.batch_norm(
        x, *statistics, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-3
    )


def plain_forward(pixels: Tensor, weights: Weights) -> Tensor:
    """Return the feature map [N, 1280, G, G]."""
    x = same_conv(pixels, weights["_conv_stem.weight"], 2)
    x = norm(x, weights, "_bn0").clamp(0, 6)
    for number in range(21):
        block = f"_blocks.{number}"
        y = x
        if number:
            y = F.conv2d(y, weights[f"{block}._expand_conv.weight"])
            y = norm(y, weights, f"{block}._bn0").clamp(0, 6)
        y = same_conv(y, weights[f"{block}._depthwise_conv.weight"], STRIDES.get(number, 1))
        y = norm(y, weights, f"{block}._bn1").clamp(0, 6)
        y = F.conv2d(y, weights[f"{block}._project_conv.weight"])
        y = norm(y, weights, f"{block}._bn2")
        x = y if number in SKIPS_NOTHING else x + y
    return norm(F.conv2d(x, weights["_conv_head.weight"]), weights, "_bn1").clamp(0, 6)


@pytest.mark.parametrize("size", [260, 97])
@torch.no_grad()
def test_features_equal_a_plain_forward(
    size: int, weights: Weights, loaded: tuple[EfficientNetLite, Classifier]
) -> None:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    theirs = plain_forward(pixels, weights)
    grid = -(-size // 32)
    assert theirs.shape == (2, 1280, grid, grid)
    ours = loaded[0](pixels)
    assert_close(ours, theirs.flatten(2).transpose(1, 2), f"features at {size} pixels")


def photo(name: str) -> np.ndarray:
    """Return a photograph that scikit-image or scikit-learn carries, uint8 [H, W, 3 or none]."""
    if name == "china.jpg":
        datasets = pytest.importorskip("sklearn.datasets", reason="needs visavis[demo]")
        return datasets.load_sample_image(name)
    data = pytest.importorskip("skimage.data", reason="needs visavis[demo]")
    return getattr(data, name)()


def prepared(array: np.ndarray) -> Tensor:
    """Return pixels [1, 3, 260, 260] as the weights were trained to see them."""
    image = Image.fromarray(array).convert("RGB")
    side = round(0.89 * min(image.size))  # 260 / (260 + 32) of the short side
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    image = image.resize((260, 260), Image.Resampling.BICUBIC)
    return torch.from_numpy((np.asarray(image, np.float32) - 127) / 128).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("name", "best", "top5"),
    [
        ("chelsea", 285, {281, 282, 285}),  # cats: tabby, tiger cat, Egyptian cat
        ("coffee", 967, {967, 968}),  # espresso, cup
        ("camera", 872, {872}),  # tripod
        ("china.jpg", 698, {698}),  # palace
    ],
)
@torch.no_grad()
def test_photographs_get_the_right_class(
    name: str, best: int, top5: set[int], loaded: tuple[EfficientNetLite, Classifier]
) -> None:
    tower, classifier = loaded
    features = tower(prepared(photo(name))).mean(1)  # [1, 1280]
    logits = features @ classifier.weight.T + classifier.bias
    found = logits[0].topk(5).indices.tolist()
    assert found[0] == best
    assert top5 <= set(found)


def test_another_variant_is_refused_by_name(nano_files: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"EfficientNet-Lite4 weights: missing"):
        load_efficientnet(nano_files["vision_tower"], EfficientNetConfig(4, 300))


def test_every_shape_is_checked(weights: Weights, tmp_path: Path) -> None:
    torch.save(weights | {"_blocks.3._bn2.bias": torch.zeros(23)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"_blocks.3._bn2.bias has shape \(23,\), expected"):
        load_efficientnet(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"_fc.bias": torch.zeros(1000)}, "missing _conv_stem.weight"),
        ([torch.zeros(1)], "holds a list"),
        ({"epoch": 3}, "holds a dict"),
        (b"not a pickle", "cannot read"),
    ],
)
def test_files_that_hold_something_else(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_efficientnet(path)


def test_code_in_the_pickle_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"_fc.bias": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="will not be run"):
        load_efficientnet(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


def test_truncated_file(nano_files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(nano_files["vision_tower"].read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_efficientnet(tmp_path / "cut.pth")
