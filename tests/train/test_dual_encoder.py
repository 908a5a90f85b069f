"""The maps of a dual encoder: they find a shared space from where they start, and stay there where
nothing is learned; texts and groups come from the records."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from visavis.data.datasets import Record
from visavis.train.dual_encoder import _texts, fit_maps, names_of
from visavis.train.recipe import HeadStage


def stage(**changes: float) -> HeadStage:
    small = {"epochs": 60, "batch": 100, "dropout": 0.1, "learning_rate": 1e-2, "members": 1}
    return HeadStage.model_validate(
        {"kind": "head", "name": "head", "sources": {"x": 1}, **small, **changes}
    )


def made_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy linear views of the same hidden causes: features far from standardised, unit texts."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(300, 6, generator=generator)
    features = causes @ torch.randn(6, 20, generator=generator) * 5 + 100
    texts = F.normalize(causes @ torch.randn(6, 30, generator=generator), dim=-1)
    return features, texts


def test_unseen_pairs_find_each_other() -> None:
    features, texts = made_pairs()
    start = F.normalize(torch.ones(200, 30), dim=-1)  # says nothing
    choices, groups = [[number] for number in range(200)], torch.arange(200)
    found = fit_maps(features[:200], start, texts, choices, groups, stage(), 0)
    again = fit_maps(features[:200], start, texts, choices, groups, stage(), 0)
    (weight, bias), (text_weight, text_bias) = found
    assert torch.equal(again[0][0], weight)
    images = start[:1] + F.linear(features[200:], weight, bias)
    queries = texts[200:] + F.linear(texts[200:], text_weight, text_bias)
    similarity = F.normalize(queries, dim=-1) @ F.normalize(images, dim=-1).T
    ranks = (similarity > similarity.diag()[:, None]).sum(1)
    assert (ranks < 5).float().mean() > 0.9  # chance is 0.05


def test_members_are_averaged() -> None:
    features, texts = made_pairs()
    start, groups = F.normalize(torch.ones(300, 30), dim=-1), torch.arange(300)
    choices = [[number] for number in range(300)]
    first, second = (
        fit_maps(features, start, texts, choices, groups, stage(epochs=5), seed) for seed in (0, 1)
    )
    both = fit_maps(features, start, texts, choices, groups, stage(epochs=5, members=2), 0)
    torch.testing.assert_close(both[0][0], (first[0][0] + second[0][0]) / 2)


def test_texts_and_groups_come_from_the_records() -> None:
    long = "A cat sits on a mat in a very large room. It is asleep. " * 2
    records = [
        Record("a", b"", caption="A photo of a cat", also=("cat",), label="cat"),
        Record("b", b"", caption="a photo of a kitten", label="cat"),
        Record("c", b"", caption=long, also=("printed under it",)),
    ]
    texts, groups = _texts(records)
    assert texts[0] == ["a photo of a cat", "cat"]
    assert texts[2] == [long.lower().strip(), "a cat sits on a mat in a very large room."]
    assert groups.tolist() == [0, 0, 1]
    tabby = Record("class-0", b"", also=("tabby, tabby cat: a cat with stripes",))
    assert names_of(tabby) == ["tabby", "tabby cat"]
