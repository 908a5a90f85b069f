"""The embedding head against its formula, and the vectors a whole model gives."""

from __future__ import annotations

import torch
from torch import Tensor

from visavis.model.batch import PackedBatch
from visavis.model.config import DecoderConfig, HeadConfig, VLMConfig
from visavis.model.embedding_head import EmbeddingHead, mean_per_group
from visavis.model.vlm import VLM

LENGTHS = (3, 1, 5)
# text and image; one text token; image only
IS_IMAGE = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 1]).bool()


def hidden() -> Tensor:
    return torch.randn(9, 12, generator=torch.Generator().manual_seed(0))


def pooled(x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    owners = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    text = mean_per_group(x[~IS_IMAGE], owners[~IS_IMAGE], 3)
    return text, mean_per_group(x[IS_IMAGE], owners[IS_IMAGE], 3)


def test_means_are_per_sequence_and_kind() -> None:
    x = hidden()
    _, (mean, present) = pooled(x)
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
    torch.testing.assert_close(head(*pooled(x)), expected)


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
    assert vlm.head is not None
    text = mean_per_group(chosen, batch.owners, 3)
    torch.testing.assert_close(vectors, vlm.head(text, (torch.zeros(3, 64), torch.zeros(3, 1))))


@torch.no_grad()
def test_selecting_sequences_keeps_their_images() -> None:
    batch = PackedBatch(
        token_ids=torch.arange(10),
        positions=torch.tensor([0, 1, 2, 0, 1, 0, 1, 2, 3, 4]),
        lengths=(3, 2, 5),
        image_positions=torch.tensor([1, 2, 5, 6, 8, 9]),
        image_tokens=torch.arange(3.0).repeat_interleave(2)[:, None].expand(6, 4),
        image_counts=(2, 2, 2),
        image_means=torch.arange(3.0)[:, None],
    )
    assert batch.image_owners.tolist() == [0, 2, 2]
    last = batch.select(torch.tensor([False, True, True]))
    assert last.token_ids.tolist() == [3, 4, 5, 6, 7, 8, 9]
    assert last.lengths == (2, 5)
    assert last.image_positions is not None and last.image_means is not None
    assert last.image_positions.tolist() == [2, 3, 5, 6]
    assert last.image_means[:, 0].tolist() == [1, 2]
    middle = batch.select(torch.tensor([False, True, False]))
    assert middle.positions.tolist() == [0, 1]
    assert middle.image_positions is None and middle.image_tokens is None
