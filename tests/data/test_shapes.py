"""Drawn shapes: the same every time, splits apart, words that are true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from visavis.data.examples import ContrastiveExample, Conversation
from visavis.data.formats.synthetic import COLOURS, pairs
from visavis.data.sources import SourceConfig, open_data_source, source_fingerprint
from visavis.errors import TrainError
from visavis.inputs import Prompt
from visavis.processing.images import decode_image


def source(path: str = "train", cap: int | None = None, **options: Any) -> Any:
    recipe = SourceConfig(format="shapes", path=path, options=options, cap=cap)
    return open_data_source(recipe, Path(), name="made")


def shown(prompt: Prompt) -> np.ndarray:
    (picture,) = prompt.visuals
    return np.asarray(decode_image(picture)).astype(int)


def colour_at(pixels: np.ndarray, share: float) -> str:
    """Return the colour that most pixels of a column's neighbourhood have, the ground left out."""
    centre = round(pixels.shape[1] * share)
    near = pixels[:, centre - 10 : centre + 10].reshape(-1, 3)
    distances = {
        name: (np.abs(near - np.array(value)).max(1) < 30).sum() for name, value in COLOURS.items()
    }
    return max(distances, key=lambda name: distances[name])


def test_samples_are_the_same_every_time() -> None:
    one, other = source(**{"as": "find", "negatives": 2})[7], source(**{"as": "find"})[7]
    assert one.query == other.query and len(one.negatives) == 2
    assert np.array_equal(shown(one.target), shown(other.target))
    assert not np.array_equal(shown(one.target), shown(one.negatives[0]))


def test_splits_share_no_pair() -> None:
    train, test = set(pairs("train")), set(pairs("test"))
    assert len(train) + len(test) == 870 and not train & test
    assert {shape for pair in train for shape in pair} == {s for pair in test for s in pair}
    assert len(source("test", cap=5)) == 5


def test_captions_say_what_is_drawn() -> None:
    for sample in source(cap=30, **{"as": "name"}):
        words = sample.target.text.split()
        pixels = shown(sample.query)
        assert [colour_at(pixels, 0.25), colour_at(pixels, 0.75)] == [words[1], words[6]]


def test_every_kind_of_sample() -> None:
    chat, caption = source(**{"as": "chat"})[0], source(**{"as": "caption"})[0]
    assert isinstance(chat, Conversation) and isinstance(caption, Conversation)
    assert [message.role for message in chat.prompt.messages] == ["user", "assistant"] * 2
    wide = source(**{"as": "answer", "size": [96, 40]})[0]
    assert isinstance(wide, ContrastiveExample) and shown(wide.query).shape == (40, 96, 3)
    negatives = source(**{"as": "name", "negatives": 3})[0].negatives
    assert len({negative.text for negative in negatives}) == 3


def test_a_wrong_split_or_option_is_named() -> None:
    with pytest.raises(TrainError, match="'dev', expected one of train, test"):
        source("dev")
    with pytest.raises(TrainError, match="negatives"):
        source(**{"as": "find", "negatives": 9})


def test_fingerprints_tell_samples_apart() -> None:
    recipes = [
        SourceConfig(format="shapes", path=path, options={"as": kind})
        for path in ("train", "test")
        for kind in ("find", "name")
    ]
    assert len({source_fingerprint(recipe, Path()) for recipe in recipes}) == 4
