"""Atomic writes: processes that are killed, that write the same file, and that read meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from visavis import utils
from visavis.utils import temporary_folder, write_atomically, write_folder_atomically

# Writes OUT again and again, as a folder of files that all hold one number, or as one file.
WRITER = """
import sys
from pathlib import Path
from visavis.utils import write_atomically, write_folder_atomically
kind, out, start = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
for number in range(start, 10**9):
    if kind == "folder":
        with write_folder_atomically(out) as folder:
            for name in "abcd":
                (folder / name).write_text(f"{number}\\n" * 1000)
    else:
        with write_atomically(out) as file:
            file.write_text(f"{number}\\n" * 4000)
"""


def start_writer(kind: str, out: Path, number: int = 0) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WRITER, kind, str(out), str(number)]
    writer = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    return writer


def whole(out: Path) -> set[str]:
    """Return the numbers that OUT holds: one, if it is of one piece."""
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    assert len(files) == (4 if out.is_dir() else 1)
    numbers = {line for file in files for line in file.read_text().split("\n")}
    return numbers - {""}


def kill_writers(kind: str, out: Path, kills: int) -> None:
    """Kill writers at random moments; after each OUT is whole."""
    draw = random.Random(kills)
    for kill in range(kills):
        writer = start_writer(kind, out, kill * 10**5)
        while not out.exists():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert len(whole(out)) == 1


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_killed_writer_leaves_a_whole_output_and_its_rest_is_removed(
    tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    kill_writers(kind, out, kills=6)
    if kind == "folder":
        with write_folder_atomically(out) as folder:
            (folder / "a").write_text("last")
    else:
        with write_atomically(out) as file:
            file.write_text("last")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_many_kills(tmp_path: Path, kind: str) -> None:
    kill_writers(kind, tmp_path / "out", kills=200)
    with temporary_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged in one step on Linux")
def test_a_folder_is_there_at_every_moment(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writer = start_writer("folder", out)
    try:
        while not out.exists():
            time.sleep(0.001)
        changes, before = 0, 0
        while changes < 30:
            number = os.stat(out).st_ino  # raises in a moment without it
            changes, before = changes + (number != before), number
    finally:
        writer.kill()
        writer.communicate()


def test_without_an_exchange_folders_are_replaced_in_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "_exchange", lambda *_: False)
    out = tmp_path / "out"
    for text in ("one", "two"):
        with write_folder_atomically(out) as folder:
            (folder / "a").write_text(text)
        assert (out / "a").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Threads and processes alike: each has a folder of its own, and the last one wins."""
    out = tmp_path / "out"
    writers = [start_writer("file", out, number * 10**6) for number in range(2)]
    problems: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                with write_atomically(out) as file:
                    file.write_text(f"{number}\n" * 4000)
                assert len(whole(out)) == 1
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for writer in writers:
        assert writer.poll() is None, "it stopped with an error"
        writer.kill()
        writer.communicate()
    assert problems == []
    with write_atomically(out) as file:
        file.write_text("last")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_temporary_folder_in_use_stays(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "out") as first:
        (first / "kept").touch()
        with temporary_folder(tmp_path / "out") as second:
            assert second != first
        utils.remove_unfinished(first)
        assert (first / "kept").exists()
    assert list(tmp_path.iterdir()) == []


def test_what_is_at_the_place_stays_on_an_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with write_folder_atomically(out) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), write_folder_atomically(out) as folder:
        (folder / "a").write_text("new")
        raise KeyboardInterrupt
    assert (out / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_replaced_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "mine").touch()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with write_folder_atomically(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "mine").exists()
