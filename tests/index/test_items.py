"""Videos and pages of documents in an index: named, found, shown and forgotten as pictures are."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as pil

from tests.fakes import picture, tiny_model, write_pictures
from tests.processing.test_pdf import RED, WHITE, pdf_bytes
from tests.processing.test_video import colour, encode
from visavis import Index
from visavis.errors import ImageError, InputError
from visavis.index.items import preview, shown_by, title, visual_of
from visavis.inputs import Document, Image, Page, Video

pytest.importorskip("av")
pytest.importorskip("pypdfium2")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index(tmp_path / "test.idx", tiny_model()) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, a video, a document of three pages, and one of each that cannot be read."""
    folder = tmp_path / "mixed"
    write_pictures(folder, 2)
    encode(folder / "clip.mp4", num=40)
    (folder / "paper.pdf").write_bytes(pdf_bytes(3))
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4")
    (folder / "broken.mov").write_bytes(b"no video")
    return folder


SOURCES = (
    *("clip.mp4", "paper.pdf#page=1", "paper.pdf#page=2", "paper.pdf#page=3"),
    *("picture-000.png", "picture-001.png"),
)


def test_a_folder_of_all_kinds(folder: Path, index: Index) -> None:
    report = index.add(folder)
    assert (report.added, len(index)) == (6, 6)
    assert sorted(Path(source).name for source, _ in report.failed) == ["broken.mov", "broken.pdf"]
    assert all(Path(source).name in reason for source, reason in report.failed)
    assert sorted(os.path.relpath(hit.source, folder) for hit in index.search("x")) == [*SOURCES]
    again = index.add(folder)
    assert (again.added, again.changed, again.unchanged) == (0, 0, 6)


def test_each_finds_itself(folder: Path, index: Index) -> None:
    index.add(folder)
    page = Image(Page(folder / "paper.pdf", 2))
    for query, name in ((folder / "clip.mp4", "clip.mp4"), (page, "paper.pdf#page=2")):
        (hit,) = index.search(query, k=1)
        assert hit.source == str(folder / name)
        assert hit.score == pytest.approx(1, abs=1e-5)
    assert len(index.search("x", filter="*.pdf#page=*")) == 3


def test_previews_are_a_frame_and_the_page(folder: Path, index: Index) -> None:
    index.add([folder / "clip.mp4", folder / "paper.pdf"])
    shown = {hit.source: hit.preview(100) for hit in index.search("x")}
    frame, page = (shown[str(folder / name)] for name in ("clip.mp4", "paper.pdf#page=3"))
    assert isinstance(frame, pil.Image) and isinstance(page, pil.Image)
    assert frame.size == (64, 48) and page.size == (100, 50)
    found, middle = frame.getpixel((32, 24)), colour(20)
    assert isinstance(found, tuple)
    assert max(abs(a - b) for a, b in zip(found, middle, strict=True)) < 20
    assert (page.getpixel((28, 25)), page.getpixel((32, 25))) == (RED, WHITE)
    (folder / "clip.mp4").unlink()
    with pytest.raises(ImageError, match="does not exist"):
        next(hit for hit in index.search("x") if "clip" in hit.source).preview()


def test_titles(folder: Path, index: Index) -> None:
    index.add([folder / "paper.pdf", folder / "clip.mp4", {"text": "some words"}])
    titles = [title(item) for item in index.items()]
    assert titles == [*(f"paper.pdf, page {n}" for n in (1, 2, 3)), "clip.mp4", "some words"]


def test_pages_and_files_that_are_gone(folder: Path, index: Index) -> None:
    index.add([folder / "paper.pdf", folder / "clip.mp4"])
    (folder / "paper.pdf").write_bytes(pdf_bytes(1))
    report = index.add(folder / "paper.pdf")
    assert (report.added, report.changed, report.removed) == (0, 1, 2)
    (folder / "clip.mp4").unlink()
    assert index.prune() == [str(folder / "clip.mp4")]
    (folder / "paper.pdf").write_bytes(b"damaged, but there")
    assert index.prune() == []


def test_items_that_are_named_by_their_files(folder: Path, index: Index) -> None:
    """What a name says completely is the same item however it is added; the rest is in memory."""
    clip, paper = folder / "clip.mp4", folder / "paper.pdf"
    index.add([clip, paper])
    for item in (Video(clip), {"video": str(clip)}, Image(Page(paper, 1))):
        assert index.add(item).unchanged == 1
    others: list[Any] = [Video(clip, frames=2), Document(paper, pages=(1, 2)), {"document": paper}]
    report = index.add([*others, {"video": clip, "text": "words"}, Video([picture(1), picture(2)])])
    assert (report.added, len(index)) == (5, 9)
    items = index.items()[4:]
    assert [item.is_file for item in items] == [False, False, True, False, False]
    assert items[2].source == str(paper) and visual_of(items[2]) == Document(paper)
    assert all(isinstance(preview(item), pil.Image) for item in items)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/a/b.png", Image("/a/b.png")),
        ("/a/b.MKV", Video("/a/b.MKV")),
        ("/a/b.PDF#page=12", Image(Page(Path("/a/b.PDF"), 12))),
        ("/a/b.pdf#page=0", Image("/a/b.pdf#page=0")),
        ("/a/b.png#page=1", Image("/a/b.png#page=1")),
    ],
)
def test_what_a_name_shows(name: str, shown: Any) -> None:
    assert shown_by(name) == shown


def test_a_package_that_is_not_installed(
    folder: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    report = index.add(folder)
    assert report.added == 3
    assert any("visavis[pdf]" in reason for _, reason in report.failed)
    with pytest.raises(InputError, match=r"visavis\[pdf\]"):
        index.add(folder / "paper.pdf")
