"""Words and vectors together: what is found by which, why, in which order, page by page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.fakes import picture, tiny_model, write_pictures
from tests.processing.test_pdf import pdf_bytes
from visavis import Index
from visavis.errors import InputError, UnknownNameError
from visavis.index import Filter
from visavis.index.sqlite_store import COMMON, SqliteStore
from visavis.index.store import IndexRow
from visavis.index.words import file_words, fuse, query_words


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index(tmp_path / "test.idx", tiny_model()) as opened:
        yield opened


NOTES = {
    "invoice": "Invoice 2041 of Acme for three red bicycles",
    "recipe": "A recipe: bread with seeds",
    "letter": "Dear Acme, the bicycles have arrived",
    "poem": "The sea, the sea",
}


@pytest.fixture
def notes(index: Index) -> Index:
    index.add([{"source": name, "text": text} for name, text in NOTES.items()])
    return index


def test_words_are_found_and_named(notes: Index) -> None:
    hit = notes.search("invoice 2041", k=1)[0]
    assert (hit.source, hit.words) == ("invoice", ("invoice", "2041"))
    assert hit.why.startswith("words: invoice, 2041; similarity ")
    # Stems: one bicycle finds bicycles.
    found = notes.search("bicycle from Acme", mode="text")
    assert [(one.source, one.words) for one in found] == [
        ("letter", ("bicycle", "acme")),
        ("invoice", ("bicycle", "acme")),
    ]
    assert all(one.vector_score is None and one.score > 0 for one in found)
    assert notes.search("zebra", mode="text") == []


def test_modes(notes: Index) -> None:
    vector = notes.search("invoice 2041", mode="vector")
    expected = tiny_model().embed(list(NOTES.values())) @ tiny_model().embed(["invoice 2041"])[0]
    assert [hit.score for hit in vector] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert all(hit.words == () and hit.score == hit.vector_score for hit in vector)
    assert notes.search("zebra") == notes.search("zebra", mode="vector")  # no item has the word
    hybrid = notes.search("invoice 2041")
    ranks = {hit.source: rank for rank, hit in enumerate(vector, 1)}
    for hit in hybrid:
        with_words = 1 / 61 if hit.words else 0
        assert hit.score == pytest.approx(1 / (60 + ranks[hit.source]) + with_words)
        assert hit.vector_score == pytest.approx(
            next(one.score for one in vector if one.source == hit.source), abs=1e-6
        )
    with pytest.raises(UnknownNameError, match="did you mean 'hybrid'"):
        notes.search("x", mode="hybrids")
    with pytest.raises(InputError, match="no words to look for"):
        notes.search(picture(1), mode="text")


def test_half_of_the_words_are_needed(notes: Index) -> None:
    assert not any(hit.words for hit in notes.search("seven purple bicycles"))
    assert any(hit.words for hit in notes.search("purple bicycles"))
    assert not any(hit.words for hit in notes.search("the with of a"))


def test_negative_words(notes: Index) -> None:
    model = tiny_model()
    hits = notes.search("bicycles", negative="invoice", k=4)
    assert not next(hit for hit in hits if hit.source == "invoice").words
    assert hits[0].source == "letter"
    moved = model.embed(["bicycles"])[0] - 0.5 * model.embed(["invoice"])[0]
    expected = model.embed(list(NOTES.values())) @ (moved / np.linalg.norm(moved))
    found = notes.search("bicycles", negative="invoice", mode="vector")
    assert [hit.score for hit in found] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert [hit.source for hit in notes.search("bicycles", negative="invoice", mode="text")] == [
        "letter"
    ]
    assert notes.search("sea", negative="  ") == notes.search("sea")


@pytest.mark.parametrize("mode", ["hybrid", "vector"])
def test_pages_of_hits_are_parts_of_one_list(index: Index, mode: str) -> None:
    index.add([{"source": f"{n:03}", "text": f"note {n} cat{n % 3}"} for n in range(60)])
    whole = index.search("note cat1", k=60, mode=mode)
    assert len({hit.source for hit in whole}) == 60
    paged = [
        hit
        for offset in range(0, 60, 7)
        for hit in index.search("note cat1", k=7, mode=mode, offset=offset)
    ]
    assert [hit.source for hit in paged] == [hit.source for hit in whole]
    assert index.search("note cat1", offset=60) == []
    with pytest.raises(InputError, match="offset is"):
        index.search("x", offset=-1)


def test_the_text_of_pages_and_file_names(tmp_path: Path, index: Index) -> None:
    write_pictures(tmp_path, 2)
    (tmp_path / "picture-000.png").rename(tmp_path / "RedBicycle_Paris2024.png")
    (tmp_path / "paper.pdf").write_bytes(pdf_bytes(2))
    index.add(tmp_path)
    assert index.search("bicycle paris", k=1)[0].words == ("bicycle", "paris")
    assert index.search("paris 2024", mode="text")[0].item.kind == "image"
    pages = index.search("paper", filter="kind:page")
    assert {hit.item.page for hit in pages} == {1, 2}
    assert all(hit.words == ("paper",) for hit in pages)


def test_filters_and_metadata(tmp_path: Path, index: Index) -> None:
    write_pictures(tmp_path / "a", 2)
    write_pictures(tmp_path / "b", 2, first_seed=5)
    index.add(tmp_path / "a", metadata={"tag": "old"})
    index.add([tmp_path / "b", {"text": "words", "metadata": {"tag": ["new", "old"]}, "date": 5}])
    assert len(index.search("x", filter="tag=old")) == 3
    assert len(index.search("x", filter=Filter(folder=str(tmp_path / "b")))) == 2
    assert [hit.source for hit in index.search("x", filter=Filter(before=100))] == ["words"]
    assert index.count("kind:image") == 4
    assert [item.source for item in index.items(filter="kind:text")] == ["words"]
    index.add(tmp_path)  # unchanged files keep what they have
    assert len(index.search("x", filter="tag=old kind:image")) == 2
    picture(99, (40, 40)).save(tmp_path / "a" / "picture-000.png")
    index.add(tmp_path)  # changed ones as well
    assert len(index.search("x", filter="tag=old kind:image")) == 2
    index.add(tmp_path / "a", metadata={"tag": "other"})
    assert index.count("tag=old kind:image") == 0 and index.count("tag=other") == 2
    with pytest.raises(InputError, match="JSON cannot hold"):
        index.add(tmp_path, metadata={"x": object()})


def test_similar_items_need_no_model(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    index.add([{"text": text} for text in NOTES.values()])
    expected = index.search(NOTES["letter"], mode="vector")
    item = expected[0].item
    monkeypatch.setattr(index, "model", None)
    found = index.similar(item.id, with_itself=True)
    assert [hit.source for hit in found] == [hit.source for hit in expected]
    assert index.similar(item.id, 2, offset=1) == found[2:4]
    with pytest.raises(InputError, match="no item 99"):
        index.similar(99)


def test_common_words_do_not_count(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "a.idx")
    vector = np.eye(4, dtype=np.float32)[0]
    total = COMMON + 200
    rows = [
        IndexRow(f"{n}", "same", vector, found_text="scan" + (f" page{n}" if n < 9 else ""))
        for n in range(total)
    ]
    store.put(rows, {"model": "m", "fingerprint": "f", "dim": "4"})
    (match,) = store.matching(["scan", "page3"], 10)
    assert (match.id, match.words) == (4, ("page3",))
    assert len(store.matching(["scan"], 10)) == 10  # unless there are no others


def test_words_of_names_and_queries() -> None:
    found = file_words("/photos/Summer2024/IMG_redCar.jpg")
    assert found == "Summer2024 Summer 2024 IMG redCar jpg red Car"
    assert query_words("The red-car and the CAR_park") == ("red", "car", "park")
    assert query_words("où est l'été") == ("où", "l", "été")
    assert query_words(" ".join(map(str, range(100)))) == ()
    assert '"' not in "".join(query_words('a "quoted" OR NEAR(x) * :'))


def test_fusion_is_that_of_the_paper() -> None:
    assert fuse([1, 2], [2, 3]) == [
        (2, pytest.approx(1 / 62 + 1 / 61)),
        (1, pytest.approx(1 / 61)),
        (3, pytest.approx(1 / 62)),
    ]
    equal = pytest.approx(1 / 61 + 1 / 62)
    assert fuse([5, 4], [4, 5]) == [(5, equal), (4, equal)]
    assert fuse([], []) == []


@pytest.mark.parametrize(
    "query", ['"', "'; DROP TABLE items", "a:b^c", "(", "-x", "☃ é", "x" * 300]
)
def test_queries_that_are_syntax_elsewhere(notes: Index, query: str) -> None:
    assert len(notes.search(query)) == 4
