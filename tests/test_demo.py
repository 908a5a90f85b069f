"""The demo: its pictures are there and credited, its sheet is drawn well, the whole thing runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageDraw

import visavis
from tests.fakes import picture, tiny_model, write_tiny_checkpoint
from visavis.demo.made import SCENE_SECONDS, SCENES, TITLE, VIDEO, make_media
from visavis.demo.run import NUM_HITS, PICTURE_QUERY, TEXT_QUERIES, run_demo
from visavis.demo.samples import SAMPLES, Sample, copy_samples, credits_table
from visavis.demo.sheet import LABEL_WIDTH, MARGIN, TILE, SheetRow, _font, draw_sheet, fit, wrap
from visavis.errors import InputError
from visavis.index.filters import KINDS
from visavis.index.segments import segments
from visavis.inputs import Document
from visavis.processing.images import decode_image
from visavis.processing.pdf import page_text, pages

pytest.importorskip("skimage", reason="sample pictures: pip install 'visavis[demo]'")
pytest.importorskip("sklearn", reason="sample pictures: pip install 'visavis[demo]'")
pytest.importorskip("av", reason="the video: pip install 'visavis[demo]'")
pytest.importorskip("pypdfium2", reason="the document: pip install 'visavis[demo]'")
REPOSITORY = Path(__file__).parents[1]


def test_every_sample_is_where_the_table_says(tmp_path: Path) -> None:
    copied = copy_samples(tmp_path)
    assert len(copied) == len(SAMPLES) == len(set(copied))
    for path in copied:
        with Image.open(path) as opened:
            assert min(opened.size) >= 100
    assert (tmp_path / "CREDITS.md").read_text(encoding="utf-8") == credits_table()


def test_every_sample_has_its_credit_and_licence() -> None:
    for sample in SAMPLES:
        assert sample.credit and sample.licence, sample.name
    page = (REPOSITORY / "docs" / "sample-images.md").read_text(encoding="utf-8")
    assert credits_table() in page, "put credits_table() into that page"


def test_samples_that_are_not_installed_name_the_extra(tmp_path: Path) -> None:
    absent = Sample("x", "no_such_package", "x.png", "nobody", "none")
    with pytest.raises(InputError, match=r"visavis\[demo\]"):
        copy_samples(tmp_path, [absent])


def test_the_demo_indexes_searches_and_asks(tmp_path: Path) -> None:
    result = run_demo(tiny_model(), tmp_path, progress=False)
    kinds = {kind: result.index.count(f"kind:{kind}") for kind in KINDS}
    assert (kinds["image"], kinds["page"], kinds["text"]) == (len(SAMPLES), 2, 0)
    assert kinds["video"] == len(SCENES)
    assert [search.query for search in result.searches[:-1]] == list(TEXT_QUERIES)
    picture_search = result.searches[-1]
    assert isinstance(picture_search.query, Path)
    sources = [Path(hit.source).name for hit in picture_search.hits]
    assert PICTURE_QUERY not in sources and len(sources) == NUM_HITS
    assert result.reply.usage.completion_tokens > 0
    with Image.open(result.sheet_path) as sheet:
        assert sheet.size[1] > len(result.searches) * TILE[1]
    other = run_demo(tiny_model(1), tmp_path, progress=False)  # beside it, not instead of it
    assert len(other.index) == len(result.index) == sum(kinds.values())
    assert len(list(tmp_path.glob("*.idx"))) == 2


def test_the_document_has_a_page_of_text_and_a_scan(tmp_path: Path) -> None:
    document, video = make_media(tmp_path, copy_samples(tmp_path))
    text_page, scan = pages(Document(document))
    assert TITLE in page_text(text_page.source)["text"]
    assert page_text(scan.source)["text"].strip() == ""
    assert min(decode_image(scan).size) > 500
    found = segments(video)
    begins = [number * SCENE_SECONDS for number in range(len(SCENES))]
    assert [scene.begin_s for scene in found] == pytest.approx(begins, abs=1.1)
    before = document.read_bytes(), video.stat().st_mtime_ns
    make_media(tmp_path, copy_samples(tmp_path))
    assert before == (document.read_bytes(), video.stat().st_mtime_ns)


def test_nano_finds_what_is_asked_for(tmp_path: Path, nano_files: dict[str, Path]) -> None:
    """Every search of the demo has its image first, or second after the video that shows it, and
    the answer names the animal."""
    right = {
        "a cat": "cat.png",
        "a cup of coffee": "coffee.png",
        "a rocket launch at night": "rocket-launch.jpg",
        "an astronaut": "astronaut.png",
        "a flower": "flower.jpg",
        "old coins": "ancient-coins.png",
        "stars and galaxies in space": "galaxies.jpg",
    }
    result = run_demo(visavis.load("nano"), tmp_path, progress=False)
    found = {
        search.query: [Path(hit.item.path).name for hit in search.hits[:2]]
        for search in result.searches
        if search.query in TEXT_QUERIES
    }
    images = {query: [name for name in names if name != VIDEO] for query, names in found.items()}
    assert {query: names[0] for query, names in images.items()} == right
    assert set(right) == set(TEXT_QUERIES)
    assert "cat" in result.reply.text.lower(), result.reply.text


def test_a_text_only_model_is_refused(tmp_path: Path, nano_files: dict[str, Path]) -> None:
    model = visavis.load(nano_files["language_model"])
    with pytest.raises(InputError, match="reads only text"):
        run_demo(model, tmp_path, progress=False)


def test_nothing_on_the_sheet_overlaps() -> None:
    """What a row draws stays inside its own band and left of its neighbour, however long."""
    long = "an exceedingly long description that nobody would type, " * 4
    hits = [(long, -0.123, picture(i, (300, 90))) for i in range(4)]
    empty = draw_sheet("title", "words", [SheetRow("", []), SheetRow("", hits)])
    full = draw_sheet("title", "words", [SheetRow(long, []), SheetRow("", hits)])
    changed = ImageChops.difference(empty, full).getbbox()
    assert changed is not None
    left, top, right, bottom = changed
    assert left >= MARGIN and right <= MARGIN + LABEL_WIDTH
    assert bottom - top <= TILE[1]


def test_text_is_shortened_to_fit() -> None:
    draw = ImageDraw.Draw(Image.new("RGB", (10, 10)))
    font = _font(16)
    assert fit(draw, "short", font, 500) == "short"
    shortened = fit(draw, "a name that is too long for its place", font, 120)
    assert shortened.endswith("…") and draw.textlength(shortened, font) <= 120
    lines = wrap(draw, "one two three four five six seven", font, 90, max_lines=2)
    assert len(lines) == 2 and lines[1].endswith("…")
    assert all(draw.textlength(line, font) <= 90 for line in lines)
    assert wrap(draw, "Donaudampfschifffahrtsgesellschaft", font, 60, max_lines=3)[0][-1] == "…"


def test_the_command_as_json(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    words = ["demo", "--json", "-m", str(checkpoint), "-o", str(tmp_path / "out")]
    printed = subprocess.run(
        [sys.executable, "-m", "visavis", *words], capture_output=True, text=True, check=True
    ).stdout
    whole = json.loads(printed)
    assert whole["items"] > len(SAMPLES)
    assert Path(whole["contact_sheet"]).is_file()


def test_the_command_serves_its_page_until_ctrl_c(tmp_path: Path) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    words = ["demo", "-m", str(checkpoint), "-o", str(tmp_path / "out"), "--port", "0"]
    child = subprocess.Popen(
        [sys.executable, "-m", "visavis", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert child.stderr is not None
    line = child.stderr.readline()
    address = re.search(r"http://127\.0\.0\.1:\d+/", line)
    assert address, line
    with urllib.request.urlopen(address[0]) as response:
        assert b"<title>visavis</title>" in response.read()
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0, err
    assert "Traceback" not in err
    assert "a cup of coffee" in out and "contact-sheet.png" in out
