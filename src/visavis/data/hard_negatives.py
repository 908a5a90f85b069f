"""Hard-negative mining for contrastive training.

    nearest      items near the query in a model's embedding space, within the margins
    labels       texts near the target's text: labels that are easily confused with it
    same image   targets of other samples with the same image
    random       any others, to fill up

Targets of the same query, of the same content or of the same group are never taken. Vectors are
kept on disk (`embedding_store.py`), so that an interrupted run is resumed. `mined_negatives.py`
writes the result.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

from visavis.data.corpus import Corpus, CorpusEntry
from visavis.data.embedding_store import EmbeddingStore
from visavis.data.knn import ExactSearch, FaissSearch, KNNSearch
from visavis.errors import InputError, VisavisError
from visavis.inputs import Prompt
from visavis.utils import track

BATCH = 128  # items that are embedded and kept together: what a crash may lose
QUERIES = 2048  # searched at a time
DRAWS = 20  # random items looked at for each that is wanted, at most


class Embedder(Protocol):
    """The part of `visavis.Model` that mining uses."""

    @property
    def embedding_dim(self) -> int: ...

    def embed(self, items: Any, *, instruction: str | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class Mining:
    """Which negatives are wanted. A score is a cosine, the positive's is the least of the query's
    targets; the rules hold for `nearest` and, where queries have vectors, for random ones.

    Args:
        nearest, labels, same_image: maximum number of each kind per example.
        total: fill up to this many with random ones; 0: none.
        relative_margin: only scores at least this share of the positive's below it (NV-Retriever's
            TopK-PercPos, de Souza P. Moreira et al. 2024); None: any.
        absolute_margin: only scores this much below the positive's (TopK-MarginPos); None: any.
        max_score, min_score: no scores above (TopK-Abs) or below; None: any.
        range_min: skip this many of the nearest that the rules allow.
        range_max: consider this many of the nearest items that are not targets.
        sampling_strategy: take the nearest ones ("top"), or draw among all that are left
            ("random").
        seed: random seed.
        use_faiss: search with FAISS.

    Margins, scores, ranges and sampling are named as in sentence-transformers'
    `mine_hard_negatives`.
    """

    nearest: int = 8
    labels: int = 0
    same_image: int = 0
    total: int = 0
    relative_margin: float | None = 0.05
    absolute_margin: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    range_min: int = 0
    range_max: int = 100
    sampling_strategy: Literal["top", "random"] = "top"
    seed: int = 0
    use_faiss: bool = False

    def __post_init__(self) -> None:
        counts = ("nearest", "labels", "same_image", "total", "range_min")
        problems = [
            f"{name} is {getattr(self, name)}" for name in counts if getattr(self, name) < 0
        ]
        if not (self.nearest or self.labels or self.same_image or self.total):
            problems.append("no negatives are wanted")
        if self.nearest and self.range_min + self.nearest > self.range_max:
            problems.append(
                f"range_max is {self.range_max}, less than the {self.range_min} to skip "
                f"(range_min) and {self.nearest} to take (nearest)"
            )
        margin = self.relative_margin
        if margin is not None and not 0 <= margin < 1:
            problems.append(f"relative_margin is {margin}, expected at least 0 and less than 1")
        if self.absolute_margin is not None and self.absolute_margin < 0:
            problems.append(f"absolute_margin is {self.absolute_margin}, expected 0 or more")
        if self.sampling_strategy not in ("top", "random"):
            problems.append(
                f"sampling_strategy is {self.sampling_strategy!r}, expected 'top' or 'random'"
            )
        if problems:
            raise InputError(f"negatives cannot be mined like this: {'; '.join(problems)}.")

    def allowed(self, scores: np.ndarray, positive: float) -> np.ndarray:
        """Return which scores the false-negative rules allow, bool as `scores`."""
        limit = np.inf if self.max_score is None else self.max_score
        if self.relative_margin is not None:  # a share of a negative score would be above it
            limit = min(limit, positive - abs(positive) * self.relative_margin)
        if self.absolute_margin is not None:
            limit = min(limit, positive - self.absolute_margin)
        least = -np.inf if self.min_score is None else self.min_score
        allowed: np.ndarray = np.isfinite(scores) & (scores <= limit) & (scores >= least)
        return allowed


@dataclass(frozen=True)
class Negative:
    """A mined item: its place in the corpus, its score if it has one, and why it was taken."""

    place: int
    score: float | None
    source: str


@dataclass
class MiningReport:
    """Counts of a mining run.

    Args:
        embedded, reused: vectors computed now, and found on disk.
        refused: of the nearest, how many the rules refused.
        short: samples with fewer negatives than `total`, or else than `nearest`.
        left_out: what could not be read or embedded, each with the reason.
    """

    samples: int = 0
    items: int = 0
    embedded: int = 0
    reused: int = 0
    refused: int = 0
    short: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    left_out: list[tuple[str, str]] = field(default_factory=list)


def mine(
    model: Embedder,
    corpus: Corpus,
    settings: Mining,
    store: EmbeddingStore,
    report: MiningReport,
    *,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Iterator[tuple[CorpusEntry, list[Negative]]]:
    """Yield each sample with its negatives, in order; the same for the same seed.

    Args:
        store: keeps vectors; must belong to the model.
        report: filled in while mining.

    Raises:
        InputError: not one sample can be used, or FAISS is wanted and not installed.
        StoreError: vectors cannot be kept.
    """
    run = _Run(model, corpus, settings, store, report, device, progress)
    report.left_out += corpus.left_out
    run.embed()
    entries = run.usable()
    if not entries:
        reason = report.left_out[0][1] if report.left_out else "there are none"
        raise InputError(f"not one sample can be used: {reason}")
    report.samples, report.items = len(entries), len(run.known)
    blocks = [entries[i : i + QUERIES] for i in range(0, len(entries), QUERIES)]
    sizes = [len(block) for block in blocks]
    for block in track(blocks, "mining", weights=sizes, show=progress):
        for entry, chosen in zip(block, run.mined(block), strict=True):
            report.short += len(chosen) < run.wanted
            report.sources.update(one.source for one in chosen)
            yield entry, chosen


@dataclass(frozen=True)
class _Wanted:
    """A vector that is to be computed."""

    key: str
    which: CorpusEntry | int
    prompt: Prompt


class _Run:
    """One call of `mine`: vectors first, then a block of samples at a time."""

    def __init__(
        self,
        model: Embedder,
        corpus: Corpus,
        settings: Mining,
        store: EmbeddingStore,
        report: MiningReport,
        device: torch.device | str,
        progress: bool,
    ) -> None:
        self.model, self.corpus, self.settings = model, corpus, settings
        self.store, self.report, self.device, self.progress = store, report, device, progress
        self.searches: dict[bool, tuple[KNNSearch, np.ndarray]] = {}
        self.known = np.zeros(0, np.int64)  # places of items that can be taken
        self.wanted = settings.total or settings.nearest or 1

    # --- vectors ----------------------------------------------------------------------------------

    def embed(self) -> None:
        """Compute the vectors that are wanted and not on disk."""
        corpus, items = self.corpus, self.corpus.items
        self.failed: set[str] = set()
        todo: dict[str, CorpusEntry | int] = {}  # a query's sample, or an item's place, by key
        if self.settings.nearest:
            todo |= {entry.query: entry for entry in corpus.entries}
        for place, key in enumerate(items.keys):
            if self.settings.nearest or (self.settings.labels and items.is_text[place]):
                todo[key] = place
        missing = [(key, which) for key, which in todo.items() if key not in self.store]
        self.report.reused = len(todo) - len(missing)
        batches = [missing[i : i + BATCH] for i in range(0, len(missing), BATCH)]
        weights = [len(batch) for batch in batches]
        for batch in track(batches, "embedding", weights=weights, show=self.progress):
            by_instruction: dict[str, list[_Wanted]] = {}
            for key, which in batch:
                make = corpus.prompt if isinstance(which, int) else corpus.query
                prompt, instruction = make(which)  # type: ignore[arg-type]
                by_instruction.setdefault(instruction, []).append(_Wanted(key, which, prompt))
            for instruction, wanted in by_instruction.items():
                self._embed(wanted, instruction)

    def _embed(self, wanted: Sequence[_Wanted], instruction: str) -> None:
        """Keep vectors of prompts; if one of them fails, find out which."""
        try:
            vectors = self._vectors([one.prompt for one in wanted], instruction)
        except VisavisError as error:
            if len(wanted) > 1:
                for one in wanted:
                    self._embed([one], instruction)
                return
            (one,) = wanted
            name = self.corpus.name(one.which) if isinstance(one.which, int) else one.which.id
            self.failed.add(one.key)
            self.report.left_out.append((name, str(error)))
            return
        self.store.add([one.key for one in wanted], vectors)
        self.report.embedded += len(wanted)

    def _vectors(self, prompts: Sequence[Prompt], instruction: str) -> np.ndarray:
        vectors = self.model.embed(list(prompts), instruction=instruction or None)
        if not np.isfinite(vectors).all():
            raise InputError("the model gives no numbers for it (NaN or infinite)")
        return vectors

    # --- samples ----------------------------------------------------------------------------------

    def usable(self) -> list[CorpusEntry]:
        """Return the samples whose query and target could be embedded."""
        keys = self.corpus.items.keys
        self.known = np.array([i for i, key in enumerate(keys) if key not in self.failed], np.int64)
        entries = [
            entry
            for entry in self.corpus.entries
            if entry.query not in self.failed and keys[entry.target] not in self.failed
        ]
        self.matrix = self.store.matrix()
        return entries

    def mined(self, block: Sequence[CorpusEntry]) -> Iterator[list[Negative]]:
        """Yield the negatives of each sample of a block."""
        settings, none = self.settings, [(np.zeros(0, np.int64), np.zeros(0))] * len(block)
        excluded = [self.corpus.excluded(entry) for entry in block]
        queries = self._rows([entry.query for entry in block]) if settings.nearest else None
        nearest = labels = none
        if queries is not None:
            nearest = self._search(queries, excluded, settings.range_max, texts=False)
        if settings.labels:
            keys = [self.corpus.items.keys[entry.target] for entry in block]
            is_text = self.corpus.items.is_text
            found = self._search(
                self._rows([k if k in self.store else "" for k in keys]),
                excluded,
                settings.labels,
                texts=True,
            )
            labels = [
                one if is_text[entry.target] else none[0]
                for entry, one in zip(block, found, strict=True)
            ]
        for i, entry in enumerate(block):
            query = None if queries is None else queries[i]
            yield self._chosen(entry, excluded[i], query, nearest[i], labels[i])

    def _chosen(
        self,
        entry: CorpusEntry,
        excluded: set[int],
        query: np.ndarray | None,
        nearest: tuple[np.ndarray, np.ndarray],
        labels: tuple[np.ndarray, np.ndarray],
    ) -> list[Negative]:
        settings, draw = self.settings, random.Random(f"{self.settings.seed}/{entry.id}")
        positive = self._positive(entry, query)
        chosen: dict[int, Negative] = {}

        def take(places: Sequence[int], scores: Sequence[float | None], source: str) -> None:
            for place, score in zip(places, scores, strict=True):
                chosen.setdefault(place, Negative(place, score, source))

        places, scores = nearest
        kept = settings.allowed(scores, positive)
        self.report.refused += int((np.isfinite(scores) & ~kept).sum())
        order = np.flatnonzero(kept)[settings.range_min :]
        if settings.sampling_strategy == "random" and len(order) > settings.nearest:
            order = np.array(sorted(draw.sample(order.tolist(), settings.nearest)))
        order = order[: settings.nearest]
        take(places[order].tolist(), scores[order].tolist(), "nearest")
        take(labels[0].tolist(), labels[1].tolist(), "labels")
        others = [
            place
            for place in self.corpus.by_pictures.get(entry.pictures, ())
            if place not in excluded and place not in chosen
        ]
        others = draw.sample(others, min(settings.same_image, len(others)))
        take(others, self._scores(query, others), "same image")
        if len(chosen) < settings.total:
            drawn, found = self._random(draw, excluded | chosen.keys(), query, positive)
            room = settings.total - len(chosen)
            take(drawn[:room], found[:room], "random")
        return list(chosen.values())

    def _random(
        self, draw: random.Random, excluded: set[int], query: np.ndarray | None, positive: float
    ) -> tuple[list[int], list[float | None]]:
        """Return random items that the rules allow, with their scores."""
        number = min(len(self.known), DRAWS * self.settings.total + len(excluded))
        places = [int(self.known[i]) for i in draw.sample(range(len(self.known)), number)]
        places = [place for place in places if place not in excluded]
        scores = self._scores(query, places)
        if query is None or not places:
            return places, scores
        kept = self.settings.allowed(np.array(scores, np.float32), positive)
        order = np.flatnonzero(kept).tolist()
        return [places[i] for i in order], [scores[i] for i in order]

    def _positive(self, entry: CorpusEntry, query: np.ndarray | None) -> float:
        scores = self._scores(query, sorted(self.corpus.by_query[entry.query]))
        return min((score for score in scores if score is not None), default=np.inf)

    def _scores(self, query: np.ndarray | None, places: Sequence[int]) -> list[float | None]:
        """Return the score of items that have a vector, None of others."""
        keys = [self.corpus.items.keys[place] for place in places]
        if query is None:
            return [None] * len(keys)
        numbers = [self.store.rows.get(key) for key in keys]
        there = [number for number in numbers if number is not None]
        found = iter((self.matrix[there] @ query).tolist() if there else [])
        return [None if number is None else next(found) for number in numbers]

    def _rows(self, keys: Sequence[str]) -> np.ndarray:
        """Return a vector for each key; zeros for "", which stands for none."""
        numbers = np.array([self.store.rows[key] if key else 0 for key in keys], np.int64)
        return np.array(self.matrix[numbers], np.float32)

    def _search(
        self, queries: np.ndarray, excluded: Sequence[set[int]], depth: int, *, texts: bool
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return places and scores of the best items of each query."""
        if texts not in self.searches:
            is_text = self.corpus.items.is_text
            places = np.array([p for p in self.known if is_text[p] or not texts], np.int64)
            rows = self.store.numbers([self.corpus.items.keys[place] for place in places])
            search: KNNSearch = (
                FaissSearch(self.matrix, rows)
                if self.settings.use_faiss
                else ExactSearch(self.matrix, rows, self.device)
            )
            self.searches[texts] = (search, places)
        search, places = self.searches[texts]
        columns = np.full(len(self.corpus.items), -1)  # of a place in what is searched
        columns[places] = np.arange(len(places))
        inside = [[c for c in columns[list(one)].tolist() if c >= 0] for one in excluded]
        found, scores = search(queries, inside, depth)
        return [(places[f[f >= 0]], s[f >= 0]) for f, s in zip(found, scores, strict=True)]
