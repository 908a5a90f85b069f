"""Pairs of linear layers: they find a shared space, also through what standardising folds in."""

from __future__ import annotations

import torch

from visavis.train.closed_form_stages import PairSettings, fit_pair, stack_pairs


def made_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Two noisy linear views of the same hidden causes, far from standardised."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(300, 6, generator=generator)
    images = causes @ torch.randn(6, 20, generator=generator) * 5 + 100
    texts = causes @ torch.randn(6, 30, generator=generator) * 0.01 - 3
    return images, texts


def test_unseen_pairs_find_each_other() -> None:
    images, texts = made_pairs()
    settings = PairSettings(dim=16, epochs=60, batch=100, dropout=0.1, learning_rate=1e-2)
    pair = fit_pair(images[None, :200], texts[None, :200], settings)
    similarity = pair.texts(texts[200:]) @ pair.images(images[200:]).T
    ranks = (similarity > similarity.diag()[:, None]).sum(1)
    assert (ranks < 5).float().mean() > 0.9  # chance is 0.05
    again = fit_pair(images[None, :200], texts[None, :200], settings)
    assert torch.equal(again.image_weight, pair.image_weight)


def test_stacked_pairs_agree_with_their_mean() -> None:
    images, texts = made_pairs()
    pairs = [
        fit_pair(images[None], texts[None], PairSettings(dim=8, epochs=5, batch=100, seed=seed))
        for seed in (0, 1)
    ]
    stacked = stack_pairs(pairs)
    assert stacked.image_weight.shape == (16, 20)
    raw = [torch.nn.functional.linear(images, p.image_weight, p.image_bias) for p in pairs]
    expected = torch.nn.functional.normalize(torch.cat(raw, 1), dim=1)
    assert torch.allclose(stacked.images(images), expected, atol=1e-5)
