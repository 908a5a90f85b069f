"""Hard negatives: what is near and what must never be taken, for texts and pictures alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.data_files import opened, write_lines
from tests.fakes import picture, tiny_model, write_pictures
from visavis.data import hard_negatives, knn
from visavis.data.corpus import Corpus
from visavis.data.embedding_store import EmbeddingStore
from visavis.data.examples import ContrastiveExample, Conversation, Sample
from visavis.data.hard_negatives import Mining, MiningReport, Negative, mine
from visavis.data.mined_negatives import read_corpus, to_item, write_mined
from visavis.errors import InputError, StoreError
from visavis.inputs import Image, Prompt, Stored, Text, Video


class Table:
    """Stands in for a model: a unit vector for each text, told or made up."""

    def __init__(self, vectors: dict[str, Sequence[float]] | None = None, dim: int = 8) -> None:
        self.vectors = dict(vectors or {})
        self.embedding_dim = dim
        self.asked: list[str] = []

    def vector(self, text: str) -> np.ndarray:
        if text not in self.vectors:
            seed = sum(byte * 31**i for i, byte in enumerate(text.encode())) % 2**32
            self.vectors[text] = np.random.default_rng(seed).normal(size=self.embedding_dim)
        vector = np.asarray(self.vectors[text], np.float32)
        return vector / np.linalg.norm(vector)

    def embed(self, items: Any, *, instruction: str | None = None) -> np.ndarray:
        texts = [prompt.text for prompt in items]
        if any("broken" in text for text in texts):
            raise InputError("it is broken")
        self.asked += texts
        return np.stack([self.vector(text) for text in texts])


def match(id: Any, query: str, target: str, **fields: Any) -> ContrastiveExample:
    return ContrastiveExample(str(id), Prompt.of(query), Prompt.of(target), **fields)


def mined(
    samples: Sequence[Sample],
    settings: Mining,
    folder: Path,
    model: Any = None,
    others: Sequence[Prompt] = (),
) -> tuple[dict[str, list[Negative]], Corpus, MiningReport]:
    model = model or Table()
    corpus, report = Corpus(samples, others), MiningReport()
    with EmbeddingStore(folder / "vectors", model.embedding_dim) as store:
        found = {one.id: each for one, each in mine(model, corpus, settings, store, report)}
    return found, corpus, report


def texts(found: Sequence[Negative], corpus: Corpus) -> list[str]:
    return [corpus.prompt(one.place)[0].text for one in found]


# ---- which are near ------------------------------------------------------------------------------


def test_search_in_blocks_finds_what_sorting_everything_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(knn, "BLOCK", 7)
    draw = np.random.default_rng(0)
    matrix = draw.normal(size=(60, 5)).astype(np.float32)
    rows = draw.permutation(60)[:40]
    queries = draw.normal(size=(9, 5)).astype(np.float32)
    excluded = [draw.permutation(40)[: number * 4].tolist() for number in range(9)]
    places, scores = knn.ExactSearch(matrix, rows)(queries, excluded, 12)
    for line, query in enumerate(queries):
        kept = [i for i in range(40) if i not in excluded[line]]
        best = sorted(kept, key=lambda i: -float(matrix[rows[i]] @ query))[:12]
        assert places[line, : len(best)].tolist() == best
        np.testing.assert_allclose(scores[line, : len(best)], matrix[rows[best]] @ query, rtol=1e-5)
        assert (places[line, len(best) :] == -1).all()


def test_faiss_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss", reason="FAISS is optional and not installed")
    draw = np.random.default_rng(0)
    matrix = draw.normal(size=(500, 16)).astype(np.float32)
    excluded = [[int(i) for i in draw.permutation(500)[:number]] for number in range(20)]
    ours = knn.ExactSearch(matrix, np.arange(500))(matrix[:20], excluded, 10)
    theirs = knn.FaissSearch(matrix, np.arange(500))(matrix[:20], excluded, 10)
    assert (ours[0] == theirs[0]).all()
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4)
    monkeypatch.setattr(knn, "FLAT_UP_TO", 100)
    cells = knn.FaissSearch(matrix, np.arange(500))(matrix[:20], excluded, 10)
    assert (cells[0] == ours[0]).mean() > 0.7


# ---- which may be taken --------------------------------------------------------------------------


def test_false_negatives_are_never_taken(tmp_path: Path) -> None:
    """Same content, another target of the same query, same group, negatives it has already."""
    samples = [
        match(1, "q", "right"),
        match(2, "q", "right too"),
        match(3, "r", "right"),
        match(4, "s", "of my group", group="g"),
        match(5, "t", "also mine", group="g"),
        match(6, "u", "other", negatives=(Prompt.of("right"),)),
    ]
    settings = Mining(nearest=10, total=10, relative_margin=None, range_max=10)
    found, corpus, report = mined(samples, settings, tmp_path)
    everything = {"right", "right too", "of my group", "also mine", "other"}
    left = {id: everything - set(texts(each, corpus)) for id, each in found.items()}
    assert left["1"] == left["2"] == {"right", "right too"}
    assert left["3"] == {"right"}
    assert left["4"] == left["5"] == {"of my group", "also mine"}
    assert left["6"] == {"right", "other"}
    assert (report.samples, report.items, report.short) == (6, 5, 6)


def test_rules_hold_for_scores_below_zero_too() -> None:
    scores = np.array([0.9, 0.5, -0.39, -0.41, -0.5, -np.inf])
    assert Mining(relative_margin=0.05).allowed(scores, -0.4).tolist() == [
        *[False] * 4,
        True,
        False,
    ]
    assert Mining(relative_margin=None, absolute_margin=0.05).allowed(scores, 0.96).tolist() == [
        True
    ] * 5 + [False]
    assert Mining(relative_margin=0.5, max_score=0.4).allowed(scores, 0.9).sum() == 3
    assert Mining(relative_margin=None, min_score=-0.4).allowed(scores, 0.9).sum() == 3


def test_window_and_draw(tmp_path: Path) -> None:
    angles = np.linspace(0.1, 1.5, 20)
    table = {f"t{i:02}": (np.cos(a), np.sin(a)) for i, a in enumerate(angles)}
    samples = [match(0, "q", "t19")] + [match(i + 1, f"q{i}", f"t{i:02}") for i in range(19)]
    model = Table({"q": (1, 0), **table}, dim=2)
    only = [samples[0]]
    others = [one.target for one in samples[1:] if isinstance(one, ContrastiveExample)]
    base = {"relative_margin": None, "nearest": 4, "range_min": 3, "range_max": 10}
    found, corpus, _ = mined(only, Mining(**base), tmp_path, model, others)
    assert texts(found["0"], corpus) == ["t03", "t04", "t05", "t06"]
    drawn = Mining(**base, sampling_strategy="random", seed=1)
    found, corpus, report = mined(only, drawn, tmp_path, model, others)
    chosen = texts(found["0"], corpus)
    assert chosen == sorted(chosen) and set(chosen) <= {f"t{i:02}" for i in range(3, 10)}
    assert report.embedded == 0 and report.reused == 21
    again, corpus, _ = mined(only, drawn, tmp_path, model, others)
    assert texts(again["0"], corpus) == chosen
    seeds = {
        tuple(
            texts(
                mined(
                    only,
                    Mining(**base, sampling_strategy="random", seed=s),
                    tmp_path,
                    model,
                    others,
                )[0]["0"],
                corpus,
            )
        )
        for s in range(8)
    }
    assert len(seeds) > 1


def test_labels_same_image_and_random(tmp_path: Path) -> None:
    """A picture with three questions; the answers near the right one; the rest at random."""
    shown = Image(picture(0))
    other = Image(picture(1))

    def ask(id: int, image: Image, text: str, answer: str) -> ContrastiveExample:
        return ContrastiveExample(str(id), Prompt.of([image, Text(text)]), Prompt.of(answer))

    samples = [
        ask(0, shown, "left?", "cup"),
        ask(1, shown, "right?", "mug"),
        ask(2, shown, "left?", "beaker"),  # true for the first as well
        ask(3, shown, "middle?", "plate"),
        ask(4, other, "left?", "tumbler"),
        *(ask(10 + i, other, f"{i}?", f"thing {i}") for i in range(5)),
    ]
    table = {"cup": (1, 0, 0), "tumbler": (0.9, 0.1, 0), "mug": (0.5, 0.5, 0)}
    model = Table({**table, **{f"thing {i}": (0, 1, i) for i in range(5)}}, dim=3)
    settings = Mining(nearest=0, labels=1, same_image=5, total=6)
    found, corpus, report = mined(samples, settings, tmp_path, model)
    by_source = {
        source: {corpus.prompt(one.place)[0].text for one in group}
        for source, group in itertools.groupby(found["0"], key=lambda one: one.source)
    }
    assert by_source["labels"] == {"tumbler"}
    assert by_source["same image"] == {"mug", "plate"}
    assert len(by_source["random"]) == 3 and not by_source["random"] & {"cup", "beaker"}
    assert [one.score for one in found["0"]][1:] == [None] * 5  # queries are not embedded
    assert report.sources["labels"] == 10
    assert set(model.asked) == {text for text in model.asked if "?" not in text}


def test_random_ones_keep_the_rules(tmp_path: Path) -> None:
    table = {"q": (1, 0), "yes": (0.8, 0.6), "near": (1, 0.01), "far": (0, 1)}
    samples = [match(1, "q", "yes")]
    others = [Prompt.of("near"), Prompt.of("far")]
    settings = Mining(nearest=1, total=3, range_min=1, range_max=2)
    found, corpus, report = mined(samples, settings, tmp_path, Table(table, dim=2), others)
    assert texts(found["1"], corpus) == ["far"] and found["1"][0].source == "random"
    assert (report.refused, report.short) == (1, 1)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(InputError, match="no negatives are wanted"):
        Mining(nearest=0)
    with pytest.raises(
        InputError, match="range_min is -1.*relative_margin is 2.*absolute_margin is -1"
    ) as error:
        Mining(range_min=-1, relative_margin=2, absolute_margin=-1)
    assert str(error.value).count(";") == 2
    with pytest.raises(
        InputError, match="range_max is 10, less than the 5 to skip .* and 8 to take"
    ):
        Mining(range_min=5, range_max=10)


def test_conversations_and_what_is_broken_are_left_out(tmp_path: Path) -> None:
    samples: list[Sample] = [
        match(1, "q", "a"),
        Conversation("talk", Prompt.of("hi")),
        match(2, "broken", "b"),
        match(3, "r", "broken too"),
        ContrastiveExample("4", Prompt.of(Path("nowhere.png")), Prompt.of("c")),
        match(5, "s", "d"),
    ]
    settings = Mining(nearest=3, relative_margin=None)
    found, _, report = mined(samples, settings, tmp_path)
    assert list(found) == ["1", "5"]
    reasons = dict(report.left_out)
    assert "conversation" in reasons["talk"] and "does not exist" in reasons["4"]
    assert reasons["2"] == reasons["the target of 3"] == "it is broken"
    with pytest.raises(InputError, match="not one sample can be used: it is broken"):
        mined(samples[2:4], settings, tmp_path)


# ---- vectors on disk -----------------------------------------------------------------------------


def test_vectors_survive_a_crash_in_the_middle(tmp_path: Path) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    with EmbeddingStore(tmp_path, 3) as store:
        store.add(["a", "b"], rows[:2])
        store.add(["c", "d"], rows[2:])
        with pytest.raises(StoreError, match="another process is using"):
            EmbeddingStore(tmp_path, 3).__enter__()
    data, keys = tmp_path / "vectors.f32", tmp_path / "keys"
    data.write_bytes(data.read_bytes() + b"half")
    keys.write_text(keys.read_text() + "hal")
    with EmbeddingStore(tmp_path, 3) as store:
        assert store.rows == {"a": 0, "b": 1, "c": 2, "d": 3}
        store.add(["e"], rows[:1])
        np.testing.assert_array_equal(store.matrix()[store.numbers(["d", "e"])], rows[[3, 0]])
    data.write_bytes(data.read_bytes()[:30])  # keys of rows that are gone
    with EmbeddingStore(tmp_path, 3) as store:
        assert list(store.rows) == ["a", "b"] and len(store.matrix()) == 2


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hard_negatives, "BATCH", 4)
    samples = [match(i, f"q{i}", f"t{i}") for i in range(10)]
    settings = Mining(nearest=2, relative_margin=None, sampling_strategy="random")
    whole, _, _ = mined(samples, settings, tmp_path / "whole")

    class Stopped(Table):
        def embed(self, items: Any, *, instruction: str | None = None) -> np.ndarray:
            if len(self.asked) >= 8:
                raise KeyboardInterrupt
            return super().embed(items)

    with pytest.raises(KeyboardInterrupt):
        mined(samples, settings, tmp_path, Stopped())
    found, _, report = mined(samples, settings, tmp_path)
    assert (report.reused, report.embedded) == (8, 12)
    assert found == whole


# ---- pictures ------------------------------------------------------------------------------------


def test_pictures_are_mined_and_joined(tmp_path: Path) -> None:
    """Texts look for pictures; what is written is what a recipe's source reads again."""
    data = tmp_path / "data"
    paths = write_pictures(data / "set/pictures", 6)
    twin = paths[0].with_name("twin.png")
    twin.write_bytes(paths[0].read_bytes())
    rows = [
        {"id": i, "query": f"number {i}", "positives": [{"image": f"pictures/{path.name}"}]}
        for i, path in enumerate([*paths, twin])
    ]
    write_lines(data / "set/pairs.jsonl", rows)
    source = opened(data, "pairs", "set/pairs.jsonl")
    model = tiny_model()
    settings = Mining(nearest=3, relative_margin=None)
    corpus, report = Corpus(source), MiningReport()
    out = data / "mined/negatives.jsonl"
    with EmbeddingStore(tmp_path / "vectors", model.embedding_dim) as store:
        write_mined(out, corpus, mine(model, corpus, settings, store, report))
    assert (report.samples, report.items) == (7, 6)
    joined = opened(data, "pairs", "set/pairs.jsonl", negatives="mined/negatives.jsonl")
    vectors = model.embed([f"number {i}" for i in range(7)]) @ model.embed(paths).T
    for number, sample in enumerate(joined):
        assert isinstance(sample, ContrastiveExample)
        right = number if number < 6 else 0
        best = [i for i in np.argsort(-vectors[number]) if i != right][:3]
        assert [one.visuals[0].source for one in sample.negatives] == [paths[i] for i in best]
        model.embed(list(sample.negatives))


def test_pictures_that_are_no_files_are_written_once(tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path / "pictures", 1)
    files = tmp_path / "out-files"
    stored = Prompt.of(Image(Stored("in a tar", path.read_bytes)))
    item = to_item(stored, files)
    assert item == to_item(stored, files) and len(list(files.iterdir())) == 1
    assert (tmp_path / item["image"]).read_bytes() == path.read_bytes()
    drawn = to_item(Prompt.of([Image(picture(5)), Text("that")]), files)
    assert list(drawn) == ["image", "text"] and drawn["image"].endswith(".png")
    frames = to_item(Prompt.of(Video((Image(path), Image(picture(5))))), files)
    assert frames == {"video": ["pictures/picture-000.png", drawn["image"]]}
    with pytest.raises(InputError, match="an order that a line cannot say"):
        to_item(Prompt.of([Text("a"), Image(picture(5)), Text("b")]), files)


def test_a_corpus_adds_items(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "corpus.jsonl", [{"id": 1, "text": "x"}, {"text": "y"}])
    items = read_corpus(path)
    samples = [match(1, "q", "a"), match(2, "r", "x")]
    found, corpus, _ = mined(
        samples, Mining(nearest=5, relative_margin=None), tmp_path, others=items
    )
    assert set(texts(found["1"], corpus)) == {"x", "y"}
    assert set(texts(found["2"], corpus)) == {"a", "y"}
    write_lines(path, [{"id": 1, "words": "x"}])
    with pytest.raises(InputError, match=r"corpus\.jsonl, record 1: an item has the key 'words'"):
        read_corpus(path)
