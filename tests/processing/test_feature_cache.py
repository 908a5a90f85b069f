"""What pictures became is found again by the next process, and by nobody else's model."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import visavis
from tests.fakes import picture, tiny_model, write_pictures, write_tiny_checkpoint
from visavis.api import Model
from visavis.errors import InputError
from visavis.processing.feature_cache import DiskFeatureCache, FeatureCache

FEATURES = (torch.arange(12.0).view(3, 4), torch.ones(4, dtype=torch.bfloat16))


def count_seen(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by how many pictures the tower sees in each call."""
    seen: list[int] = []
    see = model.vlm.see
    monkeypatch.setattr(model.vlm, "see", lambda some: seen.append(len(some)) or see(some))
    return seen


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    DiskFeatureCache(tmp_path, "one").put("a", FEATURES)
    found = DiskFeatureCache(tmp_path, "one").get("a")
    assert found is not None
    assert all(
        torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(found, FEATURES, strict=True)
    )
    assert DiskFeatureCache(tmp_path, "other").get("a") is None
    assert DiskFeatureCache(tmp_path, "one").get("b") is None


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "foreign"])
def test_a_damaged_file_is_a_miss_and_removed(tmp_path: Path, harm: str) -> None:
    folder = DiskFeatureCache(tmp_path, "one")
    folder.put("a", FEATURES)
    (path,) = files(tmp_path)
    data = path.read_bytes()
    flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
    harmed = {"cut": data[:-5], "flip": flipped, "empty": b"", "foreign": b"hello" * 20}
    path.write_bytes(harmed[harm])
    assert folder.get("a") is None and not files(tmp_path)
    folder.put("a", FEATURES)
    assert folder.get("a") is not None


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    folder = DiskFeatureCache(tmp_path, "one")
    for place, key in enumerate("abc"):
        folder.put(key, FEATURES)
        os.utime(folder._path(key), (place, place))
    size = folder.num_bytes // 3
    folder = DiskFeatureCache(tmp_path, "one", max_bytes=int(3.5 * size))
    assert folder.num_bytes == 3 * size
    assert folder.get("a") is not None  # used now
    folder.put("d", FEATURES)
    assert [key for key in "abcd" if folder.get(key)] == ["a", "c", "d"]
    assert folder.num_bytes == 3 * size == sum(path.stat().st_size for path in files(tmp_path))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="name another folder"):
        DiskFeatureCache(tmp_path / "file", "one")
    folder = DiskFeatureCache(tmp_path / "cache", "one")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("in the way")
    with pytest.warns(UserWarning, match="not kept"):
        folder.put("a", FEATURES)


def test_the_next_process_sees_no_picture_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, cache = write_tiny_checkpoint(tmp_path / "tiny"), tmp_path / "features"
    items = [{"image": path, "text": "what?"} for path in write_pictures(tmp_path / "p", 3)]
    plain = visavis.load(checkpoint, precision="f32", device="cpu")
    expected, said = plain.embed(items), plain.chat("what?", [picture(9)], max_new_tokens=6).text
    assert plain.image_encoder.cache.folder is None
    for turn, number in enumerate((4, 0)):
        model = visavis.load(checkpoint, precision="f32", device="cpu", image_cache=cache)
        seen = count_seen(model, monkeypatch)
        np.testing.assert_array_equal(model.embed(items), expected)
        assert model.chat("what?", [picture(9)], max_new_tokens=6).text == said
        assert sum(seen) == number, turn
    assert len(files(cache)) == 4
    other = visavis.load(checkpoint, precision="bf16", device="cpu", image_cache=cache)
    seen = count_seen(other, monkeypatch)
    other.embed(items)
    assert sum(seen) == 3 and len(files(cache)) == 7


def test_auto_is_a_folder_in_the_cache(tmp_path: Path, own_cache: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    visavis.load(checkpoint, device="cpu", image_cache="auto").embed([picture(1)])
    assert len(files(own_cache / "features")) == 1


def test_a_file_that_changes_is_another_picture(tmp_path: Path) -> None:
    model = tiny_model()
    model.image_encoder.cache = FeatureCache(
        folder=DiskFeatureCache(tmp_path / "cache", model.feature_fingerprint)
    )
    path = tmp_path / "picture.png"
    vectors, replies = [], []
    for seed in (1, 2, 1):
        picture(seed).save(path)
        vectors.append(model.embed([path])[0])
        replies.append(model.chat("what is this?", [path], max_new_tokens=6).text)
    assert len(files(tmp_path / "cache")) == 2
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3 and replies[0] == replies[2]
    model.image_encoder.cache = FeatureCache()
    np.testing.assert_array_equal(model.embed([picture(2)])[0], vectors[1])


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.image_encoder.cache = FeatureCache(
        folder=DiskFeatureCache(tmp_path / "cache", model.feature_fingerprint)
    )
    path = tmp_path / "picture.png"
    picture(1).save(path)
    see = model.vlm.see
    monkeypatch.setattr(model.vlm, "see", lambda some: (picture(2).save(path), see(some))[1])
    model.embed([path])
    assert not files(tmp_path / "cache") and not model.image_encoder.cache.entries
    model.image_encoder.cache = FeatureCache()
