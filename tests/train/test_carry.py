"""Carrying: the head reads the retrieval map back exactly; what tokens said stays."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from visavis.train.carry import carry
from visavis.train.pair import Pair


def test_map_is_read_back_and_words_stay() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    folds, width, tokens_width, words, dim = 4, 24, 40, 10, 12
    weight = draw(tokens_width, words) @ draw(words, folds * width) * 0.1  # words use 10 of 40
    bias = draw(tokens_width)
    pair = Pair(draw(dim, width), draw(dim), draw(dim, 5), draw(dim))
    folded = draw(900, folds * width) + 1
    found = carry(weight, bias, folded, pair, room=20)
    before, after = folded @ weight.T + bias, folded @ found.connector_weight.T
    after = after + found.connector_bias

    # one picture is 9 tokens: the head's layer on their mean is the map of the mean feature
    mean = after.view(100, 9, -1).mean(1)
    read = F.linear(mean, found.head_weight, found.head_bias)
    patches = folded.view(100, 9 * folds, width).mean(1)
    assert torch.allclose(read, F.linear(patches, pair.image_weight, pair.image_bias), atol=1e-3)

    # in the directions the tokens used, nothing changed
    _, directions = torch.linalg.eigh(torch.cov(before.T))
    used = directions[:, -words:]
    assert torch.allclose((after - before) @ used, torch.zeros(900, words), atol=1e-3)
    assert (after - before).std() < 0.5 * before.std()
