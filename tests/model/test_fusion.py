"""Views put together: token counts of the published models, and the same counts from features."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visavis.model.config import (
    ConnectorConfig,
    DecoderConfig,
    ImageLayoutConfig,
    ViTConfig,
    VLMConfig,
)
from visavis.model.image_input import ImageGrid
from visavis.model.image_tokens import count_tokens, image_area, pack_image_features

DECODER = DecoderConfig(
    vocab_size=40,
    width=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    ffn_width=8,
    context_length=64,
)
SPATIAL = ImageLayoutConfig("spatial", unpad=True, newline=True)
MAX_9 = ImageLayoutConfig("spatial", unpad=True, newline=True, max_tiles=9)


def config(side: int, merge: ImageLayoutConfig) -> VLMConfig:
    tower = ViTConfig(side * 2, 2, 8, 1, 2, 8, "gelu", 1e-6)
    return VLMConfig(DECODER, tower, ConnectorConfig("linear", 8, 8), merge=merge)


# Width, height, rows and columns of tiles, tokens: LLaVA 1.6 of 336 pixels, then OneVision.
COUNTS = [
    (24, SPATIAL, (100, 100), (2, 1), 1176),
    (24, SPATIAL, (400, 300), (1, 2), 1368),
    (24, SPATIAL, (640, 480), (2, 2), 2340),
    (24, SPATIAL, (480, 640), (2, 2), 2352),
    (24, SPATIAL, (899, 1024), (2, 2), 2640),
    (24, SPATIAL, (1920, 1080), (2, 2), 1948),
    (24, SPATIAL, (2000, 500), (1, 3), 1890),
    (27, MAX_9, (100, 100), (1, 1), 1485),
    (27, MAX_9, (400, 300), (1, 2), 1728),
    (27, MAX_9, (640, 480), (2, 2), 2929),
    (27, MAX_9, (899, 1024), (3, 3), 6561),
    (27, MAX_9, (1920, 1080), (3, 5), 7269),
    (27, MAX_9, (2000, 500), (2, 6), 7249),
    (27, MAX_9, (2000, 500), (1, 2), 1444),
]


@pytest.mark.parametrize(("side", "merge", "size", "tiles", "expected"), COUNTS)
def test_counts_of_published_models(
    side: int,
    merge: ImageLayoutConfig,
    size: tuple[int, int],
    tiles: tuple[int, int],
    expected: int,
) -> None:
    assert count_tokens(config(side, merge), ImageGrid(1, *tiles, size)) == expected


@pytest.mark.parametrize(
    ("newline", "expected"),
    [("one_token", 6273), ("grid", 6720), ("frame", 6304), ("no_token", 6272)],
)
def test_counts_of_a_video_of_32_frames(newline: str, expected: int) -> None:
    merge = ImageLayoutConfig("spatial", newline=True, video_pool=2, video_newline=newline)  # type: ignore[arg-type]
    assert count_tokens(config(27, merge), ImageGrid(frames=32, video=True)) == expected


@settings(deadline=None, max_examples=60)
@given(
    merge=st.builds(
        ImageLayoutConfig,
        kind=st.sampled_from(["flat", "spatial"]),
        unpad=st.booleans(),
        newline=st.booleans(),
        max_tiles=st.sampled_from([0, 1, 4]),
        round_unpad=st.booleans(),
        video_newline=st.sampled_from(["one_token", "grid", "frame", "no_token"]),
        video_pool=st.sampled_from([1, 2, 3]),
        video_pool_mode=st.sampled_from(["bilinear", "average", "max"]),
    ),
    side=st.integers(3, 6),
    tiles=st.sampled_from([(0, 0), (1, 1), (1, 2), (2, 1), (3, 2)]),
    size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    frames=st.integers(0, 3),
)
def test_features_give_as_many_tokens_as_were_counted(
    merge: ImageLayoutConfig, side: int, tiles: tuple[int, int], size: tuple[int, int], frames: int
) -> None:
    shape = ImageGrid(frames, size=size, video=True) if frames else ImageGrid(1, *tiles, size)
    tokens = torch.randn(shape.views, side * side, 8)
    newline = torch.randn(8) if merge.newline else None
    run = pack_image_features(tokens, shape, merge, newline)
    assert len(run) == count_tokens(config(side, merge), shape)
    assert torch.isfinite(run).all()


def test_tiles_come_back_as_rows_of_the_picture() -> None:
    shape = ImageGrid(1, 2, 2, (50, 50))
    tokens = torch.arange(5 * 4.0).view(5, 4, 1).expand(5, 4, 3)
    run = pack_image_features(tokens, shape, ImageLayoutConfig("spatial"), None)[:, 0]
    assert run.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11, 12, 13, 16, 17, 14, 15, 18, 19]


def test_padding_is_cut_from_both_ends() -> None:
    wide = ImageGrid(1, 2, 2, (400, 300))
    assert image_area(wide, 24, SPATIAL) == (6, 0, 36, 48)
    high = ImageGrid(1, 2, 2, (300, 400))
    assert image_area(high, 24, SPATIAL) == (0, 6, 48, 36)
