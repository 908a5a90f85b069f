"""Whatever is wrong with the input: one clear line on stderr, exit code 2, nothing half-written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import Run
from tests.fakes import picture, write_pictures, write_tiny_checkpoint


def assert_one_line(result: object, *expected: str) -> None:
    exit_code, err = result.exit_code, result.stderr  # type: ignore[attr-defined]
    assert exit_code == 2, result.output  # type: ignore[attr-defined]
    assert err.count("\n") == 1, err
    assert err.startswith("visavis: error: ")
    for words in expected:
        assert words in err


def _truncated(path: Path) -> None:
    encoded = io.BytesIO()
    picture(1, (400, 300)).save(encoded, "JPEG")
    path.write_bytes(encoded.getvalue()[: len(encoded.getvalue()) // 2])


def _huge(path: Path) -> None:
    Image.new("1", (12_000, 9_000)).save(path, "PNG")  # 108 megapixels in a few kilobytes


BAD_PICTURES: dict[str, tuple[Callable[[Path], object], str]] = {
    "words.jpg": (lambda path: path.write_text("these are words"), "is not a picture"),
    "page.png": (lambda path: path.write_text("<!doctype html><p>404"), "a web page"),
    "truncated.jpg": (_truncated, "cannot be decoded"),
    "empty.jpg": (lambda path: path.touch(), "is empty (0 bytes)"),
    "huge.png": (_huge, "108.0 megapixels"),
    "missing.jpg": (lambda path: None, "does not exist"),
    "folder.jpg": (lambda path: path.mkdir(), "folder"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
@pytest.mark.parametrize("command", ["chat", "embed", "index add", "index search"])
def test_bad_picture(run: Run, tiny: str, tmp_path: Path, name: str, command: str) -> None:
    make, expected = BAD_PICTURES[name]
    path = tmp_path / name
    make(path)
    if command == "index search":
        run("index", "add", "p.idx", *write_pictures(tmp_path / "good", 1), "--model", tiny)
    before = {found.name for found in tmp_path.iterdir()}
    result = {
        "chat": lambda: run("chat", tiny, "What is it?", "--image", path),
        "embed": lambda: run("embed", tiny, "--image", path, "--output", "v.npy"),
        "index add": lambda: run("index", "add", "p.idx", path, "--model", tiny),
        "index search": lambda: run("index", "search", "p.idx", "-i", path, "--model", tiny),
    }[command]()
    if command == "index add":
        *left_out, last = result.stderr.splitlines(keepends=True)
        assert all(line.startswith("visavis: skipped: ") for line in left_out)
        assert last.startswith("visavis: error: nothing could be indexed")
        assert result.exit_code == 2
    else:
        assert_one_line(result)
    assert expected in result.stderr
    assert {found.name for found in tmp_path.iterdir()} == before


def _animated(path: Path) -> None:
    frames = [picture(seed) for seed in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)


def _exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(path, exif=exif)


ODD_PICTURES: dict[str, Callable[[Path], object]] = {
    "animated.gif": _animated,
    "cmyk.jpg": lambda path: picture(1).convert("CMYK").save(path),
    "16-bit.png": lambda path: Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path),
    "rotated.jpg": _exif,
    "palette.png": lambda path: picture(1).convert("P").save(path),
    "transparent.png": lambda path: picture(1).convert("RGBA").save(path),
}


@pytest.mark.parametrize("name", ODD_PICTURES)
def test_odd_pictures_are_welcome(run: Run, tiny: str, tmp_path: Path, name: str) -> None:
    ODD_PICTURES[name](tmp_path / name)
    result = run("chat", tiny, "What is it?", "-i", tmp_path / name, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output


def test_a_folder_with_nothing_usable(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("words")
    result = run("index", "add", "p.idx", tmp_path / "folder", "--model", tiny)
    assert_one_line(result, "holds no pictures")
    assert not (tmp_path / "p.idx").exists()


def test_empty_text(run: Run, tiny: str) -> None:
    assert_one_line(run("chat", tiny, "   "), "empty text")
    assert_one_line(run("chat", tiny, text=""), "empty text")
    assert_one_line(run("embed", tiny, "--text", ""), "empty text")
    assert_one_line(run("index", "search", "p.idx", " ", "-m", tiny), "nothing to search for")
    assert_one_line(run("embed", tiny), "nothing to embed")


def test_text_longer_than_the_context(run: Run, tiny: str) -> None:
    result = run("chat", tiny, "long " * 400)
    assert_one_line(result, "reads at most 511", "tokens")


def test_unknown_model_names_the_nearest(run: Run) -> None:
    assert_one_line(run("chat", "nanno", "hi"), "did you mean 'nano'")
    assert_one_line(run("inspect", "no/such/folder"), "no such file or folder")
    assert_one_line(run("fetch", "nanno"), "did you mean 'nano'")


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16, b"\x80\x02pickle"]
)
@pytest.mark.parametrize("command", ["chat", "inspect"])
def test_damaged_model_file(run: Run, tmp_path: Path, content: bytes, command: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    words = ("chat", path, "hi") if command == "chat" else ("inspect", path)
    assert_one_line(run(*words), "model.gguf")


def test_truncated_model_file(run: Run, tmp_path: Path, nano_files: dict[str, Path]) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(nano_files["language_model"].read_bytes()[:5_000_000])
    assert_one_line(run("inspect", path), "cut.gguf")


def test_damaged_model_folder(run: Run, tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert_one_line(run("chat", folder, "hi"), "model.safetensors")
    (folder / "visavis.json").write_text("{")
    assert_one_line(run("inspect", folder), "visavis.json")


def test_an_index_of_another_model(run: Run, tiny: str, tmp_path: Path) -> None:
    run("index", "add", "p.idx", *write_pictures(tmp_path, 1), "--model", tiny)
    other = write_tiny_checkpoint(tmp_path / "other", name="other", seed=1)
    result = run("index", "search", "p.idx", "words", "--model", other)
    assert_one_line(result, "'tiny'", "'other'", "cannot be compared")


def test_an_index_that_is_none(run: Run, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "p.idx").write_text("these are words " * 100)
    assert_one_line(run("index", "search", "p.idx", "words", "-m", tiny), "damaged")
    assert_one_line(run("index", "search", "typo.idx", "words", "-m", tiny), "typo.idx")
    assert_one_line(run("index", "prune", "typo.idx"), "typo.idx")


def test_a_folder_that_cannot_be_written(run: Run, tiny: str, tmp_path: Path) -> None:
    (path,) = write_pictures(tmp_path, 1)
    in_the_way = tmp_path / "file"
    in_the_way.touch()  # a file where a folder should be: not even root can write below it
    assert_one_line(run("index", "add", in_the_way / "p.idx", path, "-m", tiny), "cannot use")
    result = run("embed", tiny, "-t", "x", "-o", in_the_way / "v.npy")
    assert_one_line(result, "cannot write")
    assert_one_line(run("demo", "--no-serve", "-m", tiny, "-o", in_the_way / "d"), "cannot write")


@pytest.mark.parametrize(
    ("line", "expected"),
    [("{", "line 2 is not JSON"), ("7", "line 2 holds a int"), ('{"txt": "x"}', "'txt'")],
)
def test_bad_items(run: Run, tiny: str, tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "items.jsonl").write_text(f'"fine"\n{line}\n')
    assert_one_line(run("embed", tiny, "--items", "items.jsonl"), expected)


def test_settings_out_of_range(run: Run, tiny: str) -> None:
    assert_one_line(run("chat", tiny, "hi", "--max-new-tokens", 0), "max_new_tokens")
    assert_one_line(run("chat", tiny, "hi", "--temperature", -1), "temperature")
    assert_one_line(run("chat", tiny, "hi", "--precision", "f12"), "f12")
    assert_one_line(run("embed", tiny, "-t", "hi", "--dim", 9999), "dim")
    assert_one_line(run("embed", tiny, "-t", "hi", "-o", "v.txt"), ".npy")


def test_wrong_words_exit_2_too(run: Run) -> None:
    assert run("chat", "nano", "hi", "--imagge", "x.png").exit_code == 2
    assert run("nosuchcommand").exit_code == 2


def test_debug_shows_the_trace() -> None:
    """Through a real process; the switch may stand anywhere."""
    command = [sys.executable, "-m", "visavis", "embed", "nano", "--debug"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Traceback" in result.stderr and "InputError" in result.stderr


def test_json_stays_clean_when_something_is_left_out(run: Run, tiny: str, tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 1)
    (tmp_path / "bad.png").touch()
    words = ("index", "add", "p.idx", *paths, tmp_path / "bad.png", "-m", tiny, "--json")
    result = run(*words)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["failed"][0]["source"].endswith("bad.png")


DEVICES = {
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "dangling link": lambda path: path.symlink_to(path.parent / "nowhere"),
    "circular link": lambda path: path.symlink_to(path),
    "folder": lambda path: path.mkdir(),
}
PLACES = {  # where a file is expected: how it is given to the command line, {} its path
    "model.gguf": ["inspect", "{}"],
    "model": ["inspect", "{}"],
    "a.idx": ["index", "search", "{}", "cat", "--model", "MODEL"],
    "train.jsonl": ["data", "check", "{}"],
    "train.parquet": ["data", "check", "{}"],
    "train.tar": ["data", "check", "{}"],
    "a.png": ["embed", "MODEL", "--image", "{}"],
    "a.mp4": ["embed", "MODEL", "--video", "{}"],
    "a.pdf": ["embed", "MODEL", "--document", "{}"],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", DEVICES)
def test_what_is_no_file_is_refused_at_once(
    run: Run, tiny: str, tmp_path: Path, kind: str, place: str
) -> None:
    path = tmp_path / place
    DEVICES[kind](path)
    words = [{"{}": str(path), "MODEL": tiny}.get(word, word) for word in PLACES[place]]
    began = time.monotonic()
    result = run(*words)
    assert time.monotonic() - began < 60, "it waited, or read what never ends"
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
