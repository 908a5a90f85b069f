"""The embedding head against its formula, and the vectors a whole model gives."""

from __future__ import annotations

import torch
from torch import Tensor

from visavis.model.batch import PackedBatch
from visavis.model.config import DecoderConfig, HeadConfig, VLMConfig
from visavis.model.head import EmbeddingHead, mean_per_sequence
from visavis.model.vlm import VLM

LENGTHS = (3, 1, 5)
# text and image; one text token; image only
IS_IMAGE = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 1]).bool()


def hidden() -> Tensor:
    return torch.randn(9, 12, generator=torch.Generator().manual_seed(0))


def test_means_are_per_sequence_and_kind() -> None:
    x = hidden()
    mean, present = mean_per_sequence(x, LENGTHS, IS_IMAGE)
    torch.testing.assert_close(mean[0], x[1:3].mean(0))
    torch.testing.assert_close(mean[2], x[4:].mean(0))
    assert not mean[1].any()
    assert present[:, 0].tolist() == [1, 0, 1]


@torch.no_grad()
def test_equals_its_formula() -> None:
    head = EmbeddingHead(HeadConfig((1, 2), 5), width=6)
    for projection in (head.text, head.image):
        projection.bias.normal_()  # a kind that is absent must not leave its bias
    x = hidden()
    expected = torch.stack(
        [
            head.text(x[0]) + head.image(x[1:3].mean(0)),
            head.text(x[3]),
            head.image(x[4:].mean(0)),
        ]
    )
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(x, LENGTHS, IS_IMAGE), expected)


@torch.no_grad()
def test_a_model_pools_the_layers_its_config_names() -> None:
    decoder = DecoderConfig(40, 32, 3, 4, 2, 8, 48, 64)
    vlm = VLM(VLMConfig(decoder, head=HeadConfig((0, 2), 16))).eval()
    batch = PackedBatch(torch.arange(9), torch.tensor([0, 1, 2, 0, 0, 1, 2, 3, 4]), LENGTHS)
    vectors = vlm.embed(batch)
    assert vectors.shape == (3, 16)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    found = vlm(batch, (0, 2))
    chosen = torch.cat((found[0], found[2]), -1)
    none = torch.zeros(9, dtype=torch.bool)
    assert vlm.head is not None
    torch.testing.assert_close(vectors, vlm.head(chosen, LENGTHS, none))
