"""The indexes that the server searches. They embed through the scheduler, like every request."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visavis.errors import InputError, StoreError
from visavis.index import AddReport, Index
from visavis.index import Hit as FoundHit
from visavis.index.items import preview, title, visual_of
from visavis.index.store import StoredItem
from visavis.inputs import Image, Prompt, Text, Visual
from visavis.serve.errors import ApiError

if TYPE_CHECKING:
    from visavis.serve.models import ServedModel

KEPT_IMAGES = 512  # encoded previews, some 20 kB each
IMAGE_SIZES = range(64, 2049)  # pixels, longer side


class ScheduledModel:
    """The model interface that an index needs; inputs are batched as requests' inputs are.

    Args:
        served: a loaded model.
    """

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.name, self.fingerprint = served.model.name, served.model.fingerprint
        self.embedding_dim, self.profile = served.model.embedding_dim, served.model.profile

    def embed(self, items: Sequence[Any]) -> np.ndarray:
        """Return one unit vector per item, float32 [N, D]; waits for them."""
        prepared = [self.served.model.prepare(Prompt.of(item)) for item in items]
        vectors: np.ndarray = self.served.submit_inputs(prepared).result()
        return vectors


@dataclass(frozen=True)
class _Preview:
    """A preview of an item; equal ones show the same."""

    source: str
    content: str
    size: int
    item: StoredItem = field(compare=False)

    def encode(self) -> bytes:
        return encoded_image(self.item, self.size)


class Indexes:
    """Indexes by name, opened on first use; methods block, so they run beside the event loop."""

    def __init__(self, paths: Mapping[str, str | Path]) -> None:
        self.paths = paths
        self._image = lru_cache(maxsize=KEPT_IMAGES)(_Preview.encode)
        self._opened: dict[str, Index] = {}

    def resolve(self, name: str | None) -> str:
        """Return the name of the index that a request means.

        Raises:
            ApiError: there is none (404).
        """
        if not self.paths:
            message = "this server has no index; start it with --index FILE"
            raise ApiError(404, message, code="index_not_found")
        if name is None:
            return next(iter(self.paths))
        if name not in self.paths:
            raise ApiError(
                404,
                f"there is no index {name[:100]!r}; this server has {', '.join(self.paths)}",
                code="index_not_found",
                param="index",
            )
        return name

    def open(self, name: str | None, served: ServedModel) -> Index:
        """Return an index that embeds with a model; opened again when the model was unloaded."""
        name = self.resolve(name)
        opened = self._opened.get(name)
        if opened is None or opened.model.served is not served:  # type: ignore[attr-defined]
            facade: Any = ScheduledModel(served)
            opened = self._opened[name] = Index(self.paths[name], facade)
        return opened

    @staticmethod
    def query(index: Index, text: str, image: Image | None, like: int | None) -> Prompt:
        """Return the prompt to search with: what is to be seen, then the words."""
        visual: Visual | None = image
        if like is not None:
            visual = visual_of(item_of(index, like))
            if visual is None:
                raise InputError(f"item {like} has no image")
        words = [Text(text)] if text.strip() else []
        return Prompt.of([*([visual] if visual is not None else []), *words])

    @staticmethod
    def search(index: Index, query: Prompt, k: int, **options: Any) -> list[FoundHit]:
        """Return the best items; none of an index that holds nothing yet.

        Args:
            options: see `Index.search`.
        """
        return index.search(query, k, **options) if len(index) else []

    def image(self, index: Index, item_id: int, size: int) -> bytes:
        """Return a JPEG of an item, `size` pixels on its longer side."""
        if size not in IMAGE_SIZES:
            raise InputError(
                f"size is {size}, expected {IMAGE_SIZES.start} to {IMAGE_SIZES.stop - 1} pixels"
            )
        item = item_of(index, item_id)
        return self._image(_Preview(item.source, item.content, size, item))

    def close(self) -> None:
        """Close all files."""
        for index in self._opened.values():
            index.close()


def add(index: Index, items: Sequence[Mapping[str, Any]]) -> AddReport:
    """Add items; those that cannot be used are listed in the report."""
    try:
        return index.add(items)
    except StoreError:
        raise
    except InputError as error:  # not one of them could be used
        return AddReport(failed=[(str(one["source"]), str(error)) for one in items])


def item_of(index: Index, item_id: int) -> StoredItem:
    """Return an item by its number.

    Raises:
        ApiError: there is none (404).
    """
    item = index.item(item_id) if 0 <= item_id < 2**63 else None
    if item is None:
        raise ApiError(404, f"the index has no item {item_id}", code="item_not_found")
    return item


def described(item: StoredItem, where: str) -> dict[str, Any]:
    """Return the description of an item for clients; `where` is the path of its images."""
    has_image = item.is_file or item.preview is not None
    return {
        "id": item.id,
        "name": title(item),
        "source": item.source,
        "kind": item.kind,
        "page": item.page,
        "begin_s": item.begin_s,
        "end_s": item.end_s,
        "date": item.date,
        "place": item.place,
        "text": item.text,
        "metadata": dict(item.metadata),
        "image": f"{where}/{item.id}/image?v={item.content[:8]}" if has_image else None,
    }


def described_hit(hit: FoundHit, where: str) -> dict[str, Any]:
    """Return the description of a hit for clients."""
    return {
        **described(hit.item, where),
        "score": hit.score,
        "vector_score": hit.vector_score,
        "words": list(hit.words),
        "why": hit.why,
    }


def encoded_image(item: StoredItem, size: int) -> bytes:
    """Return a JPEG of an item, `size` pixels on its longer side.

    Raises:
        ApiError: the item is a text (404).
        ImageError: its file is gone or no longer readable.
    """
    found = preview(item, size)
    if isinstance(found, str):
        raise ApiError(404, f"item {item.id} has no image", code="no_image")
    encoded = io.BytesIO()
    found.save(encoded, "JPEG", quality=85)
    return encoded.getvalue()
