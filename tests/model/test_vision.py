"""From tower to stream: selection, pixel shuffle, connector shapes, splicing and its one error."""

from __future__ import annotations

import pytest
import torch

from visavis.errors import InputError
from visavis.model.batch import PackedBatch
from visavis.model.config import (
    ConnectorConfig,
    DecoderConfig,
    EfficientNetConfig,
    TowerConfig,
    ViTConfig,
    VLMConfig,
)
from visavis.model.connectors.mlp import MLP, pixel_shuffle
from visavis.model.image_input import ImageInput
from visavis.model.image_tokens import merge_image_features, tokens_per_view
from visavis.model.vlm import VLM

DECODER = DecoderConfig(40, 32, 1, 4, 2, 8, 48, 64)


def vit(**changes: object) -> ViTConfig:
    fields = {
        "image_size": 20,
        "patch_size": 4,
        "width": 16,
        "num_layers": 2,
        "num_heads": 2,
        "ffn_width": 24,
        "activation": "gelu",
        "norm_eps": 1e-6,
    }
    return ViTConfig(**(fields | changes))  # type: ignore[arg-type]


def test_pixel_shuffle_puts_neighbours_side_by_side() -> None:
    # 4 x 4 patches numbered row by row, one channel
    features = torch.arange(16.0).view(1, 16, 1)
    folded = pixel_shuffle(features, 2)
    assert folded[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_pixel_shuffle_keeps_channels_together() -> None:
    features = torch.arange(32.0).view(1, 16, 2)
    assert pixel_shuffle(features, 2)[0, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


def test_pixel_shuffle_fills_an_uneven_grid_with_zeros() -> None:
    features = torch.arange(1.0, 10.0).view(1, 9, 1)
    folded = pixel_shuffle(features, 2)
    assert folded[0].tolist() == [[1, 2, 4, 5], [3, 0, 6, 0], [7, 8, 0, 0], [9, 0, 0, 0]]


@pytest.mark.parametrize(
    ("tower", "connector", "select_feature", "expected"),
    [
        (vit(), {"kind": "linear"}, "patch", 25),
        (vit(), {"kind": "mlp", "depth": 2}, "class_patch", 26),
        (vit(num_registers=3), {"kind": "mlp", "depth": 3}, "patch", 25),
        (vit(num_registers=3), {"kind": "mlp", "depth": 3}, "class_patch", 29),
        (vit(class_token=False), {"kind": "mlp", "depth": 2, "shuffle": 2}, "patch", 9),
        (
            EfficientNetConfig(0, 80),
            {"kind": "mlp", "depth": 2, "shuffle": 2, "hidden_width": 8, "input_norm": True},
            "patch",
            4,
        ),
    ],
)
@torch.no_grad()
def test_an_image_becomes_as_many_tokens_as_the_config_says(
    tower: TowerConfig, connector: dict[str, object], select_feature: str, expected: int
) -> None:
    parts = ConnectorConfig(in_width=tower.width, out_width=32, **connector)  # type: ignore[arg-type]
    config = VLMConfig(
        DECODER,
        tower,
        parts,
        select_feature=select_feature,  # type: ignore[arg-type]
    )
    assert tokens_per_view(config) == expected
    pixels = torch.randn(2, 1, 3, tower.image_size, tower.image_size)
    tokens = torch.stack([t for t, _ in VLM(config).see([ImageInput(one) for one in pixels])])
    assert tokens.shape == (2, expected, 32)


def test_patches_leave_class_and_register_tokens_behind() -> None:
    connector = ConnectorConfig("linear", 16, 32)
    vlm = VLM(VLMConfig(DECODER, vit(num_registers=3), connector))
    pixels = torch.randn(1, 3, 20, 20)
    assert vlm.tower is not None
    assert torch.equal(vlm.tower_features(pixels), vlm.tower(pixels)[:, 4:])


def test_a_linear_connector_has_one_layer_and_an_mlp_gelu_between() -> None:
    assert len(MLP(ConnectorConfig("linear", 4, 6)).layers) == 1
    mlp = MLP(ConnectorConfig("mlp", 4, 6, depth=3, hidden_width=5))
    shapes = [tuple(p.shape) for p in mlp.parameters() if p.dim() == 2]
    assert shapes == [(5, 4), (5, 5), (6, 5)]
    assert [type(layer).__name__ for layer in mlp.layers] == ["Linear", "GELU"] * 2 + ["Linear"]


def test_splice_writes_images_in_order_and_nothing_else() -> None:
    embeddings = torch.zeros(7, 2)
    images = torch.tensor([[1.0, 1], [2, 2], [3, 3], [4, 4]])
    spliced = merge_image_features(embeddings, images, torch.tensor([1, 2, 4, 5]))
    assert spliced[:, 0].tolist() == [0, 1, 2, 0, 3, 4, 0]
    assert not embeddings.any()  # training must not write into a leaf's result


@pytest.mark.parametrize("num_positions", [3, 5, 0])
def test_a_wrong_number_of_placeholders_is_refused(num_positions: int) -> None:
    images = torch.ones(4, 4)
    message = f"{num_positions} image placeholders but its images give 4 image tokens"
    with pytest.raises(InputError, match=message):
        merge_image_features(torch.zeros(9, 4), images, torch.arange(num_positions))


def test_the_model_refuses_it_too() -> None:
    vlm = VLM(VLMConfig(DECODER, vit(), ConnectorConfig("linear", 16, 32), image_token_id=39))
    token_ids = torch.tensor([1] + [39] * 25 + [2])
    batch = PackedBatch(
        token_ids,
        torch.arange(27),
        (27,),
        image_positions=torch.arange(1, 26),
        visuals=tuple(ImageInput(one[None]) for one in torch.randn(2, 3, 20, 20)),
    )
    with pytest.raises(InputError, match="25 image placeholders but its images give 50"):
        vlm(batch)


@torch.no_grad()
def test_a_mixed_batch_equals_its_singles() -> None:
    vlm = VLM(VLMConfig(DECODER, vit(), ConnectorConfig("mlp", 16, 32, depth=2))).eval()
    pixels = torch.randn(2, 3, 20, 20)
    picture = torch.arange(25)

    def batch(lengths: tuple[int, ...], starts: list[int], images: torch.Tensor) -> PackedBatch:
        return PackedBatch(
            token_ids=torch.arange(sum(lengths)) % 7,
            positions=torch.cat([torch.arange(n) for n in lengths]),
            lengths=lengths,
            image_positions=torch.cat([picture + start for start in starts]),
            visuals=tuple(ImageInput(one[None]) for one in images),
        )

    # 28 tokens with a picture at 2, 35 tokens (a multiple of 7) with one at 5
    together = vlm(batch((28, 35), [2, 33], pixels))[-1]
    first = vlm(batch((28,), [2], pixels[:1]))[-1]
    second = vlm(batch((35,), [5], pixels[1:]))[-1]
    torch.testing.assert_close(together, torch.cat((first, second)), atol=1e-5, rtol=1e-4)
