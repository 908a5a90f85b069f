"""The connector's start: image tokens point to the words of captions; made class features."""

from __future__ import annotations

import torch

from tests.fakes import tiny_model
from visavis.checkpoints.efficientnet import Classifier
from visavis.data.datasets import Record
from visavis.train.closed_form_stages import (
    class_grids,
    class_shifts,
    content_words,
    fit_words,
    word_targets,
)


def test_content_words() -> None:
    record = Record("k", b"", caption="The photo shows a red Fox.", also=("animals, forest",))
    assert content_words(record) == ["red", "fox", "animals", "forest"]
    asked = Record("k", b"", questions=(("what?", "circle"), ("is it?", "yes"), ("?", "blue")))
    assert content_words(asked) == ["circle", "blue"]


def test_tokens_point_to_their_words() -> None:
    """Features that are noisy linear views of three things give tokens near those things' words."""
    model = tiny_model()
    embeddings = model.vlm.decoder.embed.weight.detach()
    words = ["fox", "tree", "house"]
    records = [Record(str(n), b"", caption=words[n % 3]) for n in range(600)]
    targets = word_targets(records, model.tokenizer, embeddings)
    generator = torch.Generator().manual_seed(0)
    causes = torch.eye(3)[torch.arange(600) % 3] + 0.2 * torch.randn(600, 3, generator=generator)
    means = causes @ torch.randn(3, 40, generator=generator) + 5
    weight, bias = fit_words(means[:500], targets[:500], embeddings)
    tokens = torch.nn.functional.linear(means[500:], weight, bias)
    centred = targets[:3] - targets[:3].mean(0)
    nearest = (tokens @ torch.nn.functional.normalize(centred, dim=1).T).argmax(1)
    assert (nearest == torch.arange(500, 600) % 3).float().mean() > 0.95
    assert 0.3 < tokens.std(0).mean() / embeddings.std() < 3


def test_made_features_belong_to_their_class() -> None:
    generator = torch.Generator().manual_seed(0)
    grids = torch.rand(10, 4, 32, generator=generator)
    means = torch.rand(500, 32, generator=generator)
    classifier = Classifier(torch.randn(10, 32, generator=generator), torch.zeros(10))
    shifts = class_shifts(classifier, means)
    made = class_grids(shifts, grids, means.mean(0), generator)
    assert made.shape == grids.shape and made.min() >= 0 and made.max() <= 6
    chosen = (made.mean(1) @ classifier.weight.T).argmax(1)
    assert (chosen == torch.arange(10)).float().mean() >= 0.8
