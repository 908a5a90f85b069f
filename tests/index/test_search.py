"""Adding and finding with a real (tiny, random) model."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import visavis
from tests.fakes import picture, tiny_model, write_pictures, write_tiny_checkpoint
from visavis import Index
from visavis.errors import ImageError, InputError, StoreError
from visavis.index.adding import BATCH_ITEMS


class Counting:
    """The tiny model, counting what it has to embed."""

    def __init__(self, seed: int = 0) -> None:
        self.model = tiny_model(seed)
        self.num_embedded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def embed(self, items: Any) -> np.ndarray:
        self.num_embedded += len(items)
        return self.model.embed(items)


@pytest.fixture
def model() -> Counting:
    return Counting()


@pytest.fixture
def index(tmp_path: Path, model: Counting) -> Iterator[Index]:
    with Index(tmp_path / "test.idx", model) as opened:  # type: ignore[arg-type]
        yield opened


def test_a_picture_finds_itself(tmp_path: Path, index: Index) -> None:
    paths = write_pictures(tmp_path / "pictures", 5)
    report = index.add(tmp_path / "pictures")
    assert (report.added, report.failed, len(index)) == (5, [], 5)
    hits = index.search(paths[3], k=2)
    assert hits[0].source == str(paths[3])
    assert hits[0].score == pytest.approx(1, abs=1e-5)
    assert hits[0].score > hits[1].score


def test_scores_are_cosines_best_first(tmp_path: Path, index: Index) -> None:
    paths = write_pictures(tmp_path, 6)
    index.add(paths)
    model = tiny_model()
    expected = model.embed(paths) @ model.embed(["some words"])[0]
    hits = index.search("some words", k=6)
    assert [hit.score for hit in hits] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert hits[0].source == str(paths[int(np.argmax(expected))])
    assert len(index.search("some words", k=2)) == 2


def test_known_content_costs_nothing(tmp_path: Path, index: Index, model: Counting) -> None:
    paths = write_pictures(tmp_path / "pictures", 4)
    index.add(paths)
    assert model.num_embedded == 4
    report = index.add(str(tmp_path / "pictures"))
    assert (report.added, report.unchanged, model.num_embedded) == (0, 4, 4)
    paths[0].touch()  # another time, the same content
    assert index.add(paths[0]).unchanged == 1
    shutil.copy(paths[1], tmp_path / "copy.png")  # another place, the same content
    assert index.add(tmp_path / "copy.png").added == 1
    assert model.num_embedded == 4
    assert len(index) == 5


def test_a_changed_file_is_embedded_again(tmp_path: Path, index: Index, model: Counting) -> None:
    paths = write_pictures(tmp_path, 3)
    index.add(paths)
    picture(99, (60, 60)).save(paths[1])
    report = index.add(paths)
    assert (report.added, report.changed, report.unchanged) == (0, 1, 2)
    assert model.num_embedded == 4
    assert index.search(picture(99, (60, 60)), k=1)[0].source == str(paths[1])


def test_the_same_picture_twice_in_one_call(tmp_path: Path, index: Index, model: Counting) -> None:
    (path,) = write_pictures(tmp_path, 1)
    shutil.copy(path, tmp_path / "copy.png")
    report = index.add([path, str(path), tmp_path / "copy.png"])
    assert (report.added, model.num_embedded, len(index)) == (2, 1, 2)


def test_unreadable_pictures_are_reported_and_the_rest_added(tmp_path: Path, index: Index) -> None:
    folder = tmp_path / "pictures"
    write_pictures(folder, BATCH_ITEMS + 3)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "empty.jpg").touch()
    truncated = (folder / "picture-000.png").read_bytes()[:120]
    (folder / "truncated.png").write_bytes(truncated)
    report = index.add(folder)
    assert report.added == BATCH_ITEMS + 3
    assert sorted(Path(source).name for source, _ in report.failed) == [
        "broken.png",
        "empty.jpg",
        "truncated.png",
    ]
    assert all(Path(source).name in reason for source, reason in report.failed)
    assert len(index) == BATCH_ITEMS + 3


def test_a_missing_path_beside_good_ones(tmp_path: Path, index: Index) -> None:
    paths = write_pictures(tmp_path, 1)
    report = index.add([*paths, tmp_path / "nowhere.png"])
    assert report.added == 1
    assert report.failed[0][0].endswith("nowhere.png")
    assert "does not exist" in report.failed[0][1]


@pytest.mark.parametrize("what", ["missing", "no pictures", "only broken", "nothing"])
def test_nothing_usable_is_an_error(tmp_path: Path, index: Index, what: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("words")
    if what == "only broken":
        (folder / "broken.png").write_bytes(b"no picture")
    items: Any = {"missing": tmp_path / "nowhere", "nothing": []}.get(what, folder)
    with pytest.raises(InputError):
        index.add(items)
    assert not index.path.exists()


def test_texts_and_pictures_in_memory(index: Index) -> None:
    image = picture(3, (900, 600))
    report = index.add([{"text": "a red ball"}, image, {"image": image, "text": "with words"}])
    assert report.added == 3
    assert index.add([{"text": "a red ball"}, image]).unchanged == 2
    best = index.search("a red ball", k=1)[0]
    assert (best.source, best.preview()) == ("a red ball", "a red ball")
    found = index.search(image, k=1)[0].preview(100)
    assert isinstance(found, Image.Image)
    assert max(found.size) == 100


def test_a_source_of_ones_own(tmp_path: Path, index: Index) -> None:
    (path,) = write_pictures(tmp_path, 1)
    index.add([{"source": "page 7", "image": str(path), "text": "seven"}, {"text": "eight"}])
    hits = index.search({"image": path, "text": "seven"}, k=1)
    assert hits[0].source == "page 7"
    report = index.add({"source": "page 7", "text": "another seven"})
    assert (report.changed, len(index)) == (1, 2)


def test_filter_is_a_glob_on_the_source(tmp_path: Path, index: Index) -> None:
    write_pictures(tmp_path / "holiday", 3)
    write_pictures(tmp_path / "work", 3, first_seed=10)
    index.add([tmp_path / "holiday", tmp_path / "work"])
    hits = index.search("anything", filter="*/holiday/*")
    assert len(hits) == 3
    assert all("/holiday/" in hit.source for hit in hits)
    assert index.search("anything", filter="*.gif") == []


def test_previews_are_small_pictures(tmp_path: Path, index: Index) -> None:
    picture(1, (800, 400)).save(tmp_path / "wide.png")
    index.add(tmp_path / "wide.png")
    (hit,) = index.search("x")
    found = hit.preview(64)
    assert isinstance(found, Image.Image)
    assert found.size == (64, 32)
    (tmp_path / "wide.png").unlink()
    with pytest.raises(ImageError, match="does not exist"):
        hit.preview()


def test_prune_forgets_files_that_are_gone(tmp_path: Path, index: Index) -> None:
    paths = write_pictures(tmp_path, 3)
    index.add([*paths, {"text": "not a file"}])
    paths[1].unlink()
    assert index.prune() == [str(paths[1])]
    assert len(index) == 3
    assert str(paths[1]) not in {hit.source for hit in index.search("x")}


def test_paths_are_kept_absolute(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "here", 1)
    monkeypatch.chdir(tmp_path)
    index.add("here/picture-000.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert index.add("~/here").unchanged == 1
    assert index.search("x")[0].source == str(tmp_path / "here" / "picture-000.png")


def test_another_model_is_refused(tmp_path: Path, index: Index) -> None:
    index.add({"text": "hello"})
    with pytest.raises(StoreError, match=r"fingerprint.*cannot be compared"):
        Index(index.path, tiny_model(seed=1))


def test_two_open_at_once_see_each_other(tmp_path: Path, index: Index) -> None:
    index.add({"text": "one"})
    assert len(index.search("x")) == 1
    with Index(index.path, tiny_model()) as other:
        other.add({"text": "two"})
    assert len(index.search("x")) == 2


def test_searching_what_does_not_exist(tmp_path: Path) -> None:
    index = Index(tmp_path / "typo.idx", tiny_model())
    with pytest.raises(StoreError, match=r"no index file .*typo\.idx"):
        index.search("x")
    assert not (tmp_path / "typo.idx").exists()


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3"])
def test_k_is_a_positive_number(index: Index, k: Any) -> None:
    with pytest.raises(InputError, match="k is"):
        index.search("x", k=k)


@pytest.mark.parametrize("query", ["", "   ", None, 7, {"txt": "x"}, Path("/no/such.png")])
def test_queries_that_cannot_be_used(index: Index, query: Any) -> None:
    index.add({"text": "hello"})
    with pytest.raises(InputError):
        index.search(query)


def test_killed_while_adding_and_completed(tmp_path: Path) -> None:
    """kill -9 in the third batch: two are kept, and the same call does exactly the rest."""
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    total = 3 * BATCH_ITEMS + 5
    write_pictures(tmp_path / "pictures", total)
    code = f"""
import time
import visavis
model = visavis.load({str(checkpoint)!r}, precision="f32", device="cpu")
embed, calls = model.embed, []
def stuck_at_the_third(items):
    calls.append(1)
    if len(calls) == 3:
        print("third", flush=True)
        time.sleep(600)
    return embed(items)
model.embed = stuck_at_the_third
visavis.Index({str(tmp_path / "test.idx")!r}, model).add({str(tmp_path / "pictures")!r})
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline().strip() == "third"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    model = visavis.load(checkpoint, precision="f32", device="cpu")
    with Index(tmp_path / "test.idx", model) as index:
        assert len(index) == 2 * BATCH_ITEMS
        report = index.add(tmp_path / "pictures")
        assert (report.unchanged, report.added) == (2 * BATCH_ITEMS, total - 2 * BATCH_ITEMS)
        assert len(index) == total


def foreign_name(folder: Path, raw: bytes) -> Path:
    """Write an image under a name of any bytes."""
    path = Path(os.fsdecode(os.fsencode(folder) + b"/" + raw))
    picture(len(raw)).save(path)
    return path


@pytest.mark.parametrize("raw", [b"caf\xe9.png", b"\xff\xfe.png", b"\x83\x5c\x83g.png"])
def test_names_that_are_not_utf8_are_indexed_like_others(
    tmp_path: Path, index: Index, raw: bytes
) -> None:
    folder = tmp_path / "images"
    write_pictures(folder, 3)
    path = foreign_name(folder, raw)
    report = index.add(folder)
    assert (report.added, report.failed) == (4, [])
    assert index.search(path, k=1)[0].source == str(path)
    assert isinstance(index.search(path, k=1)[0].preview(), Image.Image)
    assert index.add(folder).unchanged == 4
    picture(77, (50, 50)).save(path)
    assert index.add(folder).changed == 1
    path.unlink()
    assert index.prune() == [str(path)]
    assert len(index) == 3


def test_folders_that_cannot_be_listed_are_reported_and_the_rest_added(
    tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that disappears between being seen and being listed, as on a network drive."""
    folder = tmp_path / "images"
    write_pictures(folder / "a", 2)
    write_pictures(folder / "gone", 2)
    write_pictures(folder / "z", 2)
    scandir = os.scandir

    def vanishing(path: Any) -> Any:
        if str(path).endswith("gone"):
            shutil.rmtree(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    report = index.add(folder)
    assert report.added + report.unchanged == 4
    ((source, reason),) = report.failed
    assert source == str(folder / "gone")
    assert "cannot be read (No such file" in reason


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="needs to be root")
def test_folders_without_rights_are_reported_and_the_rest_added(tmp_path: Path) -> None:
    """In a child process that is not root, as rights do not bind root."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own folders are closed to others
    try:
        write_pictures(folder / "open", 2)
        write_pictures(folder / "closed", 2)
        (folder / "closed").chmod(0)
        folder.chmod(0o755)
        script = (
            "import os, sys\n"
            "from visavis.processing.media import scan_media\n"
            "os.setuid(65534)\n"
            "scan = scan_media(sys.argv[1])\n"
            "assert [p.parent.name for p in scan.files] == ['open'] * 2, scan\n"
            "((path, reason),) = scan.unreadable\n"
            "assert path.name == 'closed' and 'Permission denied' in reason, scan\n"
        )
        child = subprocess.run([sys.executable, "-c", script, folder], capture_output=True)
        assert child.returncode == 0, child.stderr
    finally:
        shutil.rmtree(folder)


def test_files_left_out_are_counted_by_suffix_and_reason(tmp_path: Path, index: Index) -> None:
    folder = tmp_path / "images"
    write_pictures(folder, 2)
    for name in ("notes.txt", "b.txt", ".hidden.png", "Makefile", ".git/a.png", "c.TXT"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "elsewhere").symlink_to(tmp_path)
    (folder / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    report = index.add(folder)
    assert report.added == 2
    assert report.left_out == {
        (".txt", "not a supported suffix"): 3,
        ("", "not a supported suffix"): 1,
        (".png", "hidden"): 1,
        ("folder", "hidden"): 1,
        ("folder", "a link to a folder"): 1,
    }
    reasons = {Path(source).name: reason for source, reason in report.failed}
    assert "does not exist" in reasons["dangling.png"]
    assert "device or pipe" in reasons["pipe.png"]


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "b/" * 3000 + "c.png", "nul\0.png"])
def test_names_that_no_file_can_have(tmp_path: Path, index: Index, name: str) -> None:
    paths = write_pictures(tmp_path, 1)
    for item in (tmp_path / name, {"image": str(tmp_path / name)}):
        report = index.add([*paths, item])
        assert report.added + report.unchanged == 1
        assert len(report.failed) == 1


def test_times_that_no_calendar_has(tmp_path: Path, index: Index) -> None:
    (path,) = write_pictures(tmp_path, 1)
    try:
        os.utime(path, (0, 2**62 // 10**9 * 4))
    except OSError:
        pytest.skip("the file system refuses such times")
    assert index.add(path).added == 1
    assert index.add(path).unchanged == 1
