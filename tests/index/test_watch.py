"""Following folders: bursts, moves, deletions, places that cannot be reached, kill -9."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import picture, write_pictures
from tests.index.kills import PixelModel
from visavis import Index
from visavis.index import watch as following
from visavis.index.watch import WatchReport, apply, is_reachable, scan, watch


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index(tmp_path / "test.idx", PixelModel()) as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "images" / "a", 3)
    write_pictures(tmp_path / "images" / "b", 2, first_seed=10)
    return tmp_path / "images"


def sources(index: Index) -> set[str]:
    return {item.source for item in index.items(1000)}


def files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*.png")}


def test_a_scan_adds_changes_and_removes(folder: Path, index: Index) -> None:
    assert vars(scan(index, [folder])) == vars(WatchReport(added=5))
    shutil.rmtree(folder / "b")
    picture(99).save(folder / "a" / "picture-000.png")
    index.add({"source": "not a file", "image": picture(7)})
    assert vars(scan(index, [folder])) == vars(WatchReport(changed=1, removed=2))
    assert sources(index) == {*files(folder), "not a file"}


def test_moves_embed_nothing(folder: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    scan(index, [folder])
    calls: list[int] = []
    monkeypatch.setattr(index.model, "embed", lambda items: calls.append(len(items)))
    (folder / "b").rename(folder / "c")
    report = apply(index, [folder], [folder / "b", folder / "c"])
    assert (report.added, report.removed, calls) == (2, 2, [])
    (folder / "a" / "picture-001.png").rename(folder / "moved.png")
    report = apply(index, [folder], [folder / "a" / "picture-001.png", folder / "moved.png"])
    assert (report.added, report.removed, calls) == (1, 1, [])
    assert sources(index) == files(folder)


def test_what_a_scan_would_not_find_is_left_alone(folder: Path, index: Index) -> None:
    scan(index, [folder])
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden").mkdir()
    names = [folder / "notes.txt", *write_pictures(folder / ".hidden", 1), folder / "nowhere.png"]
    (folder / "link").symlink_to(folder / "a")
    assert apply(index, [folder], [*names, folder / "link"]).is_empty
    assert sources(index) == files(folder) - {str(names[1])}
    (folder / "half.png").write_bytes(b"\x89PNG\r\n")
    report = apply(index, [folder], [folder / "half.png"])
    assert [source for source, _ in report.failed] == [str(folder / "half.png")]
    picture(5).save(folder / "half.png")
    assert apply(index, [folder], [folder / "half.png"]).added == 1


def test_a_drive_that_is_gone_keeps_its_items(folder: Path, index: Index, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_pictures(other, 2, first_seed=30)
    scan(index, [folder, other])
    shutil.move(folder, tmp_path / "away")
    assert scan(index, [folder, other]).is_empty
    folder.mkdir()  # an empty mount point
    assert not is_reachable(folder)
    (other / "picture-030.png").unlink()
    assert apply(index, [folder, other], [other / "picture-030.png", folder / "a"]).removed == 1
    assert len(index) == 6
    folder.rmdir()
    shutil.move(tmp_path / "away", folder)
    assert scan(index, [folder, other]).is_empty


class Follower:
    """A thread that follows folders; `until` waits for a state of the index."""

    def __init__(self, index: Index, folders: list[Path], **options: float) -> None:
        self.stop, self.reports = threading.Event(), list[WatchReport]()
        self.thread = threading.Thread(target=self._run, args=(index, folders, options))
        self.thread.start()

    def _run(self, index: Index, folders: list[Path], options: dict[str, float]) -> None:
        for report in watch(index, folders, stop=self.stop, **options):
            self.reports.append(report)

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive()

    @staticmethod
    def until(index: Index, wanted: set[str]) -> None:
        end = time.monotonic() + 120
        while sources(index) != wanted:
            assert time.monotonic() < end, sources(index) ^ wanted
            time.sleep(0.05)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("watchfiles")
    monkeypatch.setattr(following, "GATHERED_MS", 200)


@pytest.mark.usefixtures("quick")
def test_folders_are_followed(folder: Path, index: Index) -> None:
    with Follower(index, [folder], wait_s=1):
        Follower.until(index, files(folder))
        write_pictures(folder / "new" / "deep", 40, first_seed=100)  # a burst in new folders
        Follower.until(index, files(folder))
        (folder / "new").rename(folder / "renamed")
        shutil.rmtree(folder / "a")
        Follower.until(index, files(folder))
        os.replace(folder / "b" / "picture-010.png", folder / "b" / "picture-011.png")
        Follower.until(index, files(folder))
    assert index.search(picture(10), k=1)[0].source == str(folder / "b" / "picture-011.png")


@pytest.mark.usefixtures("quick")
def test_a_folder_that_comes_later_is_waited_for(folder: Path, index: Index) -> None:
    late = folder.parent / "late"
    with Follower(index, [folder, late], wait_s=0.5):
        Follower.until(index, files(folder))
        write_pictures(folder.parent / "prepared", 2, first_seed=50)
        (folder.parent / "prepared").rename(late)
        Follower.until(index, files(folder) | files(late))
        shutil.move(late, folder.parent / "away")
        write_pictures(folder / "more", 1, first_seed=70)
        expected = files(folder) | {
            str(late / path.name) for path in (folder.parent / "away").iterdir()
        }
        Follower.until(index, expected)


def test_the_package_is_named_where_it_is_missing(
    folder: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "watchfiles", None)
    with pytest.raises(Exception, match=r"visavis\[watch\]"):
        next(watch(index, [folder]))
