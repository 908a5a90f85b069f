"""Answers and vectors are the same with every cache on and off, cold and warm."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes import picture, tiny_model, write_pictures
from visavis.api import Model
from visavis.generate.prefix_cache import PrefixCache
from visavis.processing.feature_cache import DiskFeatureCache, FeatureCache


def ask(model: Model, paths: list[Path]) -> tuple[list[str], np.ndarray]:
    items: list[Any] = [
        "what is it, and what is it for?",
        {"image": paths[0], "text": "what is it?"},
        {"image": [paths[0], picture(7)], "text": "what is it, and what else?"},
        {"image": paths[0], "text": "what is it for?"},
    ]
    replies = [model.chat_many([item], max_new_tokens=7)[0] for item in items]
    replies += model.chat_many(items, max_new_tokens=7, max_sequences=3)
    replies += model.chat_many(items[:2], max_new_tokens=5, beams=3)
    return [reply.text for reply in replies], model.embed([*items, *paths])


@pytest.mark.parametrize(("read", "seen", "kept"), list(product((False, True), repeat=3)))
def test_caches_change_nothing(tmp_path: Path, read: bool, seen: bool, kept: bool) -> None:
    model, paths = tiny_model(), write_pictures(tmp_path, 2)
    model.prefixes, model.image_encoder.cache = None, FeatureCache(max_bytes=0)
    texts, vectors = ask(model, paths)
    for _ in range(2):
        folder = DiskFeatureCache(tmp_path / "kept", model.feature_fingerprint) if kept else None
        model.image_encoder.cache = FeatureCache(2**20 if seen else 0, folder=folder)
        model.prefixes = PrefixCache() if read else None
        for _ in range(2):
            again, found = ask(model, paths)
            assert again == texts
            np.testing.assert_allclose(found, vectors, atol=2e-6)
    assert not kept or len(list((tmp_path / "kept").iterdir())) == 3
