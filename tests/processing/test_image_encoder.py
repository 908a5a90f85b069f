"""How often a file is opened and hashed, from a path to a vector or an answer."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes import picture, tiny_model, write_pictures
from tests.processing.test_pdf import pdf_bytes
from visavis.api import Model
from visavis.index import Index
from visavis.inputs import Document, Image, Prompt
from visavis.processing.config import AnyresConfig
from visavis.processing.feature_cache import FeatureCache
from visavis.processing.images import ContentHasher
from visavis.train.data_loader import DataLoader
from visavis.train.feature_store import FeatureStore

_opened: list[str] = []  # of what the audit hook was told; a hook cannot be removed
_listening: list[bool] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _listening:
        _opened.append(str(arguments[0]))


sys.addaudithook(_hook)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Yield how often each file is opened meanwhile, by its name."""
    found: Counter[str] = Counter()
    _opened.clear()
    _listening.append(True)
    try:
        yield found
    finally:
        _listening.clear()
        found.update(Path(name).name for name in _opened)


class CountedHash:
    """A digest that counts the bytes it is given."""

    read = 0

    def __init__(self, *given: Any, **settings: Any) -> None:
        self.digest_of = hashlib.blake2b(*given, **settings)

    def update(self, data: bytes) -> None:
        CountedHash.read += len(data)
        self.digest_of.update(data)

    def digest(self) -> bytes:
        return self.digest_of.digest()

    def hexdigest(self) -> str:
        return self.digest_of.hexdigest()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> type[CountedHash]:
    library = type(sys)("hashlib")
    library.blake2b = CountedHash  # type: ignore[attr-defined]
    monkeypatch.setattr("visavis.processing.images.hashlib", library)
    CountedHash.read = 0
    return CountedHash


@pytest.fixture
def model() -> Iterator[Model]:
    """The shared tiny model without a cache of features."""
    model = tiny_model()
    model.image_encoder.cache, kept = FeatureCache(), model.image_encoder.cache
    yield model
    model.image_encoder.cache = kept


@pytest.fixture
def tiled(model: Model) -> Model:
    """The tiny model, with images cut into tiles by their size."""
    tiles = AnyresConfig(((32, 64), (64, 32), (64, 64)))
    assert model.processor is not None
    return replace(model, processor=replace(model.processor, tiles=tiles))


@pytest.mark.parametrize("kind", ["model", "tiled"])
def test_an_image_is_opened_twice_and_hashed_once(
    kind: str, tmp_path: Path, hashed: type[CountedHash], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(kind)
    first, second = write_pictures(tmp_path, 2)
    with counted() as opened:
        model.embed([first, {"image": first, "text": "again"}])
    assert opened[first.name] == 2 and hashed.read == first.stat().st_size
    hashed.read = 0
    with counted() as opened:
        model.chat("what is this?", [second], max_new_tokens=2)
    assert opened[second.name] == 2 and hashed.read == second.stat().st_size
    hashed.read = 0
    with counted() as opened:
        model.chat("and this?", [second], max_new_tokens=2)
    assert opened[second.name] == 1 and hashed.read == second.stat().st_size


def test_an_indexed_image_is_opened_three_times_and_hashed_once(
    tiled: Model, tmp_path: Path, hashed: type[CountedHash]
) -> None:
    paths = write_pictures(tmp_path / "images", 3)
    with Index(tmp_path / "index", tiled) as index, counted() as opened:
        assert index.add(tmp_path / "images").added == 3
    assert [opened[path.name] for path in paths] == [3, 3, 3]  # hash, date and place, pixels
    assert hashed.read == sum(path.stat().st_size for path in paths)


def test_a_document_is_hashed_once_for_all_its_pages(
    model: Model, tmp_path: Path, hashed: type[CountedHash]
) -> None:
    pytest.importorskip("pypdfium2")
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf_bytes(9) + b"%" * 100_000)
    size, most = path.stat().st_size, path.stat().st_size + 9 * 100  # and what names a page
    with Index(tmp_path / "index", model) as index:
        assert index.add(path).added == 9
    assert size <= hashed.read < most
    hashed.read = 0
    model.embed([Document(path)])
    assert size <= hashed.read < most


def test_training_reads_an_image_once_and_with_a_feature_store_twice(
    tiled: Model, model: Model, tmp_path: Path, hashed: type[CountedHash]
) -> None:
    (path,) = write_pictures(tmp_path, 1)
    for one, most in ((model, 1), (tiled, 2)):  # tiles: its size first
        loader, prompt = DataLoader(one.encoder), Prompt.of(path)
        with counted() as opened:
            loader.pack([prompt], [loader.item("a", prompt)], ids=["a"])
        assert opened[path.name] == most and hashed.read == 0
    assert model.processor is not None
    store = FeatureStore(tmp_path / "store", model.vlm, model.processor)
    with counted() as opened:
        store.get([Image(path)], ["a"])
    assert opened[path.name] == 2 and hashed.read == path.stat().st_size


def test_a_known_size_is_that_of_the_decoded_image(tmp_path: Path) -> None:
    hasher = ContentHasher()
    for suffix in ("png", "jpg", "tiff"):
        picture(1).save(tmp_path / f"a.{suffix}")
        (image,) = hasher.identify(Prompt.of(tmp_path / f"a.{suffix}")).visuals
        assert image.content is not None
        assert image.content.size == (None if suffix == "tiff" else (48, 36))
    (image,) = hasher.identify(Prompt.of(np.asarray(picture(1)))).visuals
    assert image.content is not None and image.content.size == (48, 36)
