"""Phi-3.5-vision's tiles and base view, against its published rules written out plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.fakes import picture
from visavis.errors import InputError
from visavis.model.image_tokens import count_phi3v_tokens
from visavis.processing.config import ImageProcessorConfig, Phi3VConfig
from visavis.processing.phi3v import Phi3VProcessor

SIDE = 28
SIZES = [(64, 48), (48, 64), (28, 28), (100, 33), (33, 100), (5, 2), (3, 70), (112, 28), (1, 1)]


def processor(num_crops: int, side: int = SIDE) -> ImageProcessorConfig:
    return ImageProcessorConfig(
        side,
        "hd",
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        resample="bilinear",
        hd=Phi3VConfig(num_crops),
    )


def reference(image: Image.Image, config: ImageProcessorConfig) -> torch.Tensor:
    """The canvas in Pillow's steps, the base view by PyTorch: float32 [V, 3, S, S]."""
    assert config.hd is not None
    side, limit = config.size, config.hd.num_crops
    turned = image.width < image.height
    if turned:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio = image.width / image.height
    scale = 1
    while scale * math.ceil(scale / ratio) <= limit:
        scale += 1
    width = (scale - 1) * side
    height = int(width / ratio)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    full = math.ceil(height / side) * side
    canvas = Image.new("RGB", (width, full), (255, 255, 255))
    canvas.paste(image, (0, int((full - height) / 2)))
    if turned:
        canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
    pixels = torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1).float() / 255
    pixels = (pixels - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[
        :, None, None
    ]
    base = F.interpolate(pixels[None], (side, side), mode="bicubic")
    rows, columns = canvas.height // side, canvas.width // side
    tiles = pixels.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4)
    return torch.cat((base, tiles.reshape(-1, 3, side, side)))


@pytest.mark.parametrize("num_crops", [1, 2, 4, 16])
@pytest.mark.parametrize("size", SIZES)
def test_views_are_the_published_ones(size: tuple[int, int], num_crops: int) -> None:
    image, config = picture(1, size), processor(num_crops)
    views, shape = Phi3VProcessor(config).pixels(image)
    theirs = reference(image, config).numpy()
    assert views.dtype == np.float32 and views.shape == theirs.shape
    assert np.abs(views - theirs).max() < 1e-5
    assert shape == Phi3VProcessor(config).grid(size)
    assert shape.views == len(views) and shape.rows * shape.columns <= num_crops


@pytest.mark.parametrize(
    ("size", "num_crops", "grid", "tokens"),
    [  # of the published model: pictures' size, rows x columns, image tokens by its own formula
        ((640, 480), 16, (3, 4), 1921),
        ((480, 640), 16, (4, 3), 1933),
        ((336, 336), 4, (2, 2), 757),
        ((1920, 1080), 16, (3, 5), 2353),
        ((1000, 100), 16, (1, 10), 1609),
    ],
)
def test_published_numbers(
    size: tuple[int, int], num_crops: int, grid: tuple[int, int], tokens: int
) -> None:
    shape = Phi3VProcessor(processor(num_crops, 336)).grid(size)
    rows, columns = grid
    assert tokens == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12
    assert (shape.rows, shape.columns) == grid
    assert count_phi3v_tokens(12, shape) == tokens


def test_extreme_pictures_have_a_line_of_tiles() -> None:
    assert Phi3VProcessor(processor(16)).grid((65535, 1)).columns == 16
    views, shape = Phi3VProcessor(processor(4)).pixels(picture(1, (1, 3000)))
    assert (shape.rows, shape.columns) == (4, 1) and np.isfinite(views).all()


def test_configs_come_back_from_json() -> None:
    config = processor(4)
    assert ImageProcessorConfig.from_dict(config.to_dict()) == config
    for broken, named in (({"hd": None}, "hd is None"), ({"resize": "pad"}, "resize='pad'")):
        with pytest.raises(InputError, match=named):
            ImageProcessorConfig.from_dict(config.to_dict() | broken)
    with pytest.raises(InputError, match="num_crops is 0"):
        Phi3VConfig(0)
    with pytest.raises(InputError, match="unknown key 'crops'"):
        Phi3VConfig.from_dict({"crops": 4})
