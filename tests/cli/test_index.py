"""`visavis index` beyond add and search: filters, modes, sheets, statistics, other models."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Run
from tests.fakes import write_pictures, write_tiny_checkpoint


@pytest.fixture
def index(run: Run, tiny: str, tmp_path: Path) -> Path:
    write_pictures(tmp_path / "images", 4)
    (tmp_path / "images" / "picture-001.png").rename(tmp_path / "images" / "red-car.png")
    (tmp_path / "images" / "notes.txt").write_text("x")
    words = ("index", "add", "p.idx", tmp_path / "images", "--set", "tag=a b", "-m", tiny)
    assert run(*words).exit_code == 0
    return tmp_path / "p.idx"


@pytest.mark.usefixtures("index")
def test_words_filters_and_a_sheet(run: Run, tiny: str, tmp_path: Path) -> None:
    words = ("index", "search", "p.idx", "red car", "-m", tiny)
    best, *rest = json.loads(run(*words, "--json").stdout)
    assert (Path(best["source"]).name, best["words"]) == ("red-car.png", ["red", "car"])
    assert best["kind"] == "image" and best["metadata"] == {"tag": "a b"} and len(rest) == 3
    shown = run(*words, "-k", 1, "--sheet", "sheet.png")
    assert "words: red, car; similarity" in shown.stdout
    assert Image.open(tmp_path / "sheet.png").size[0] > 300
    text = json.loads(run(*words, "--mode", "text", "--json").stdout)
    assert [hit["vector_score"] for hit in text] == [None]
    kept = run(*words, "--filter", "kind:image tag='a b'", "--offset", 3, "--json")
    assert len(json.loads(kept.stdout)) == 1
    assert json.loads(run(*words, "--filter", "kind:page", "--json").stdout) == []
    unlike = json.loads(run(*words, "--not", "car", "--json").stdout)
    assert not any(hit["words"] for hit in unlike)
    for options, message in (
        (("--mode", "fuzzy"), "unknown search mode"),
        (("--filter", "kinds:page"), "unknown filter 'kinds'"),
        (("--filter", "after:soon"), "expected a date"),
    ):
        refused = run(*words, *options)
        assert refused.exit_code == 2 and message in refused.stderr
    refused = run("index", "add", "p.idx", tmp_path / "images", "--set", "tag", "-m", tiny)
    assert refused.exit_code == 2 and "expected KEY=VALUE" in refused.stderr


def test_statistics_and_export(run: Run, index: Path, tmp_path: Path) -> None:
    found = json.loads(run("index", "stats", "p.idx", "--json").stdout)
    assert (found["items"], found["kinds"]) == (4, {"image": 4})
    assert found["left_out"] == [{"suffix": ".txt", "reason": "not a supported suffix", "files": 1}]
    shown = run("index", "stats", index).stdout
    assert "4 (4 image)" in shown and str(tmp_path / "images") in shown
    assert "left out: .txt" in shown
    run("index", "export", "p.idx", "out.jsonl", "--filter", "*car*")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1
    for words in (("stats",), ("export", "x.jsonl"), ("repair",), ("prune",)):
        missing = run("index", words[0], "absent.idx", *words[1:])
        assert missing.exit_code == 2 and "no index file absent.idx" in missing.stderr


@pytest.mark.usefixtures("index")
def test_another_model_and_repair(run: Run, tiny: str, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=3)
    (tmp_path / "images" / "red-car.png").unlink()
    refused = run("index", "migrate", "p.idx", "-m", other)
    assert refused.exit_code == 2 and "--drop" in refused.stderr
    assert run("index", "search", "p.idx", "x", "-m", tiny).exit_code == 0
    moved = json.loads(run("index", "migrate", "p.idx", "-m", other, "--drop", "--json").stdout)
    assert (moved["is_done"], moved["items"], moved["removed"]) == (True, 3, 1)
    assert run("index", "search", "p.idx", "x", "-m", other).exit_code == 0
    repaired = json.loads(run("index", "repair", "p.idx", "--json").stdout)
    assert (repaired["items"], repaired["lost"]) == (3, 0)
    assert len(json.loads(run("index", "search", "p.idx", "x", "-m", other, "--json").stdout)) == 3


@pytest.mark.usefixtures("index")
def test_watch_prints_each_round(
    run: Run, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from visavis.index import watch

    def stopped(index: object, folders: object, **options: object) -> object:
        event = threading.Event()
        for report in original(index, folders, stop=event, **options):  # type: ignore[arg-type]
            event.set()
            yield report

    pytest.importorskip("watchfiles")
    original = watch.watch
    monkeypatch.setattr(watch, "watch", stopped)
    write_pictures(tmp_path / "images", 1, first_seed=40)
    found = run("index", "watch", "p.idx", tmp_path / "images", "-m", tiny)
    assert found.stdout == "1 added, 0 changed, 0 removed; p.idx holds 5 items\n", found.output
