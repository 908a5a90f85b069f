"""Embedding index: add images, videos, pages and other items, and search them (`Index`).

    query ──► model.embed ──► cosine with every vector, exactly ──┐
         └──► words ──► full text of the items, BM25 ─────────────┴──► fused ranks ──► hits

Of the model it uses `embed`, `name`, `fingerprint` and `embedding_dim` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from visavis.errors import InputError, StoreError
from visavis.index.adding import Adder, AddReport, as_items
from visavis.index.files import Settings, checked_metadata
from visavis.index.filters import Filter
from visavis.index.items import preview
from visavis.index.open_store import open_store
from visavis.index.overview import prune
from visavis.index.rerank import RERANKED, Reranker
from visavis.index.store import StoredItem, VectorStore, WordMatch, check_meta
from visavis.index.words import FUSION_K, fuse, query_words
from visavis.inputs import Prompt
from visavis.utils import lookup

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    from visavis.api import Model
    from visavis.embedder import Embedder

MODES = {"hybrid": "words and vectors", "vector": "vectors only", "text": "words only"}
POOL = 200  # hits of vectors and of words whose ranks are fused
NEGATIVE_WEIGHT = 0.5


@dataclass(frozen=True)
class Hit:
    """One found item.

    Attributes:
        score: what hits are sorted by: the cosine of its vector and the query's; the fused rank
            score where words were found as well; BM25 in the mode "text". `late_score`, where
            there is one, comes before it.
        source: name of the item.
        vector_score: the cosine, in -1..1; None in the mode "text".
        words: words of the query that its text holds.
        late_score: the mean best cosine of the query's tokens, where hits were ranked again.
    """

    score: float
    source: str
    item: StoredItem = field(repr=False)
    vector_score: float | None = None
    words: tuple[str, ...] = ()
    late_score: float | None = None

    @property
    def why(self) -> str:
        """Why it was found, in one short line."""
        reasons = []
        if self.words:
            reasons.append(f"words: {', '.join(self.words)}")
        if self.vector_score is not None:
            reasons.append(f"similarity {self.vector_score:.3f}")
        if self.late_score is not None:
            reasons.append(f"late interaction {self.late_score:.3f}")
        return "; ".join(reasons)

    def is_weak(self, least: float) -> bool:
        """Return whether nothing but a cosine below `least` speaks for it."""
        return not self.words and self.vector_score is not None and self.vector_score < least

    def preview(self, size: int = 256) -> PILImage | str:
        """Return a preview, at most `size` pixels a side (of a video its middle frame), or
        the text of a text item."""
        return preview(self.item, size)


class Index:
    """A store of vectors that one model made, searchable by that model.

    Args:
        path: the index file, made by the first `add`; or the address of a PostgreSQL database
            with pgvector, `postgresql://user@host/database`.
        model: what embeds items and queries.

    Raises:
        StoreError: the store is damaged, not an index, or made by another model.
    """

    def __init__(self, path: str | Path, model: Model) -> None:
        self.model = model
        self.store: VectorStore = open_store(path)
        self._meta = {
            "model": model.name,
            "fingerprint": model.fingerprint,
            "dim": str(model.embedding_dim),
        }
        check_meta(self.store.name, self.store.meta(), self._meta)

    def __len__(self) -> int:
        return self.store.count()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The index file."""
        return Path(self.store.name)

    def close(self) -> None:
        """Close the store; everything added is in it already."""
        self.store.close()

    def add(
        self,
        paths_or_items: Any,
        *,
        progress: bool = False,
        ocr: bool = False,
        segments: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> AddReport:
        """Embed and keep items, skipping those whose content is known already.

        Interrupted, it keeps every finished batch; the same call again does only what is missing.

        Args:
            paths_or_items: one or a list of: paths (str or Path) of images, videos and PDF
                documents, each page of which is an item, or of folders, which are searched
                recursively; or items that `Prompt.of` takes, texts as dict(text=…). A dict may
                name its own `source`, which a later item of that name replaces, and `metadata`,
                `date` (Unix seconds) and `place`.
            progress: show a bar on stderr.
            ocr: recognise text in images and scanned pages, so that it is found by its words.
            segments: cut videos into segments, each of which is an item.
            metadata: of all files, for filters; None: files keep what they have.

        Raises:
            InputError: not one of the items can be used.
            StoreError: the index cannot be written.
        """
        items = as_items(paths_or_items)
        settings = Settings(ocr=ocr, segments=segments)
        adder = Adder(self.store, self.model, self._meta, settings, checked_metadata(metadata))
        report = adder.run(items, progress=progress)
        if report.is_useless:
            reason = report.failed[0][1]
            others = f" (and {len(report.failed) - 1} others)" if len(report.failed) > 1 else ""
            raise InputError(f"nothing could be indexed: {reason}{others}")
        return report

    def search(
        self,
        query: Any,
        k: int = 10,
        filter: Filter | str | None = None,
        *,
        mode: str = "hybrid",
        negative: str | None = None,
        offset: int = 0,
        rerank: Embedder | Reranker | None = None,
    ) -> list[Hit]:
        """Return the `k` best items, best first. Items of equal score are in the order in which
        they were added.

        Args:
            query: any input of `Prompt.of`: a str is text, a Path an image, video or document, a
                dict may hold both.
            k: at most this many hits.
            filter: conditions on items, see `Filter.parse`, or one glob on their sources.
            mode: "vector": by the cosine of item and query; "text": by the words of the query in
                captions, text found in files and file names; "hybrid": both ranks fused, or
                vectors alone where no item holds the words.
            negative: words whose meaning hits should not have.
            offset: number of hits to leave out, for the next page of a list.
            rerank: a model with a vector per token, by which the first 100 hits are ranked again;
                a `Reranker` remembers them for the next search.

        Raises:
            InputError: an argument cannot be used.
            StoreError: there is no index file yet.
            NonFiniteError: the query's vector, or one in the index, holds NaN or infinity.
        """
        _check_counts(k, offset)
        lookup("search mode", mode, MODES)
        self._must_exist()
        if rerank is not None:
            reranker = rerank if isinstance(rerank, Reranker) else Reranker(rerank)
            wanted = max(RERANKED, k + offset)
            hits = self.search(query, wanted, filter, mode=mode, negative=negative)
            return _ranked_again(hits, reranker, Prompt.of(query))[offset : offset + k]
        conditions = Filter.of(filter)
        prompt = Prompt.of(query)
        words = query_words(prompt.text) if mode != "vector" else ()
        matches = self._matches(words, negative, k + offset, conditions)
        if mode == "text":
            if not words:
                raise InputError("the query has no words to look for, expected some")
            return self._hits([(m.id, m.score) for m in matches], {}, matches, k, offset)
        vector = self._query_vector(prompt, negative)
        limit = max(k + offset, POOL if matches else 0)
        near = self.store.nearest(vector, limit, conditions)
        cosines = dict(near)
        ranked = near
        if matches:
            cosines |= self._missing_cosines(vector, matches, cosines)
            pool = [number for number, _ in near[:POOL]]
            fused = fuse(pool, [match.id for match in matches[:POOL]])
            shown = {number for number, _ in fused}
            rest = enumerate(near[POOL:], POOL + 1)
            ranked = fused + [
                (number, 1 / (FUSION_K + rank)) for rank, (number, _) in rest if number not in shown
            ]
        return self._hits(ranked, cosines, matches, k, offset)

    def similar(
        self,
        item_id: int,
        k: int = 10,
        filter: Filter | str | None = None,
        *,
        offset: int = 0,
        with_itself: bool = False,
    ) -> list[Hit]:
        """Return the items whose vectors are nearest to that of an item; nothing is embedded.

        Args:
            with_itself: the item is one of the hits.

        Raises:
            InputError: there is no such item.
        """
        _check_counts(k, offset)
        self._must_exist()
        vector = self.store.vectors([item_id]).get(item_id)
        if vector is None:
            raise InputError(f"the index has no item {item_id}")
        near = self.store.nearest(vector, k + offset + 1, Filter.of(filter))
        near = [one for one in near if with_itself or one[0] != item_id]
        return self._hits(near, dict(near), [], k, offset)

    def prune(self) -> list[str]:
        """Forget files that no longer exist, and pages that documents no longer have; return
        their sources."""
        self._must_exist()
        return prune(self.store)

    def item(self, item_id: int) -> StoredItem | None:
        """Return one item by its number, for servers that hand out numbers instead of paths."""
        return self.store.items([item_id]).get(item_id)

    def items(
        self, limit: int = 100, offset: int = 0, filter: Filter | str | None = None
    ) -> list[StoredItem]:
        """Return the items that were added first, for a page to show before anybody searches."""
        return self.store.first(limit, offset, Filter.of(filter)) if self.store.exists() else []

    def count(self, filter: Filter | str | None = None) -> int:
        """Return the number of items that match."""
        return self.store.count(Filter.of(filter)) if self.store.exists() else 0

    def _must_exist(self) -> None:
        if not self.store.exists():
            raise StoreError(
                f"there is no index file {self.store.name}; check the spelling, or make it with "
                "`visavis index add` or Index.add()"
            )

    # --- searching --------------------------------------------------------------------------------

    def _query_vector(self, prompt: Prompt, negative: str | None) -> np.ndarray:
        """Return the unit vector of a query, moved away from the negative words."""
        if negative is None or not negative.strip():
            vector: np.ndarray = self.model.embed([prompt])[0]
            return vector
        query, unwanted = self.model.embed([prompt, Prompt.of(negative)])
        moved = query - NEGATIVE_WEIGHT * unwanted
        unit: np.ndarray = moved / np.linalg.norm(moved)
        return unit

    def _matches(
        self, words: Sequence[str], negative: str | None, limit: int, filter: Filter | None
    ) -> list[WordMatch]:
        """Return the items that hold the words and none of the negative ones."""
        if not words:
            return []
        unwanted = query_words(negative or "")
        without = {
            match.id for word in unwanted for match in self.store.matching([word], 10**9, filter)
        }
        found = self.store.matching(words, max(limit, POOL) + len(without), filter)
        return [match for match in found if match.id not in without]

    def _missing_cosines(
        self, query: np.ndarray, matches: Sequence[WordMatch], known: Mapping[int, float]
    ) -> dict[int, float]:
        """Return the cosines of items that were found by their words alone."""
        missing = [match.id for match in matches[:POOL] if match.id not in known]
        return self.store.cosines(query, missing)

    def _hits(
        self,
        ranked: Sequence[tuple[int, float]],
        cosines: Mapping[int, float],
        matches: Sequence[WordMatch],
        k: int,
        offset: int,
    ) -> list[Hit]:
        """Return the hits of one page of the ranking; items that were removed meanwhile are left
        out."""
        shown = ranked[offset : offset + k]
        items = self.store.items([number for number, _ in shown])
        words = {match.id: match.words for match in matches}
        return [
            Hit(
                score,
                items[number].source,
                items[number],
                vector_score=cosines.get(number),
                words=words.get(number, ()),
            )
            for number, score in shown
            if number in items
        ]


def _ranked_again(hits: Sequence[Hit], reranker: Reranker, query: Prompt) -> list[Hit]:
    """Return hits with the first ones in the order of late interaction; those that cannot be read
    follow them."""
    first = hits[:RERANKED]
    scores = reranker.scores(query, [hit.item for hit in first])
    scored = [replace(hit, late_score=score) for hit, score in zip(first, scores, strict=True)]
    scored.sort(key=lambda hit: np.inf if hit.late_score is None else -hit.late_score)
    return [*scored, *hits[RERANKED:]]


def _check_counts(k: int, offset: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k is {k!r}, expected the number of hits wanted, at least 1")
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise InputError(f"offset is {offset!r}, expected the number of hits to leave out")
