"""The demo, step by step: sample images → index → searches → contact sheet → a question → page.

Uses the public API only. Results are returned; the command line prints them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from visavis.demo.made import make_media
from visavis.demo.samples import copy_samples
from visavis.demo.sheet import SheetRow, draw_sheet
from visavis.errors import InputError
from visavis.index import Hit, Index
from visavis.index.names import SourceName, clock
from visavis.utils import write_atomically

if TYPE_CHECKING:
    from visavis.api import Model
    from visavis.generate.streaming import Reply

TEXT_QUERIES = (
    "a cup of coffee",
    "a rocket launch at night",
    "a flower",
    "an astronaut",
    "stars and galaxies in space",
    "old coins",
    "a cat",
)
PICTURE_QUERY = "gravel.png"
QUESTION = "What is in this picture?"
ASKED_ABOUT = "cat.png"
NUM_HITS = 4
SHEET_NAME = "contact-sheet.png"


@dataclass(frozen=True)
class Search:
    """A query, a text or the path of an image, and its results."""

    query: str | Path
    hits: Sequence[Hit]

    @property
    def label(self) -> str:
        """The query in words."""
        return self.query if isinstance(self.query, str) else f"like {title(self.query)}"


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo; `reply` is None of a model that does not chat."""

    index: Index
    searches: Sequence[Search]
    index_seconds: float
    sheet_path: Path
    asked_about: Path
    reply: Reply | None


def run_demo(model: Model, folder: Path, *, progress: bool) -> DemoResult:
    """Index the sample images, search them and ask about one; files go into `folder`.

    Raises:
        InputError: the sample images are not installed, or `folder` cannot be written.
    """
    if not model.takes_images:
        raise InputError(
            f"the demo searches pictures, but {model.name} reads only text; use one with a vision "
            "tower, such as nano"
        )
    try:
        pictures = copy_samples(folder / "pictures")
        made = make_media(folder / "pictures", pictures)
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error}; name another --output") from error
    # A file per model: vectors of another model, or of other weights, cannot be compared.
    index = Index(folder / f"pictures-{model.fingerprint}.idx", model)
    started = time.perf_counter()
    index.add([*pictures, *made], segments=True, progress=progress)
    index_seconds = time.perf_counter() - started
    queries: list[str | Path] = [*TEXT_QUERIES]
    by_name = {path.name: path for path in pictures}
    if PICTURE_QUERY in by_name:
        queries.append(by_name[PICTURE_QUERY])
    searches = [Search(query, _search(index, query)) for query in queries]
    asked_about = by_name.get(ASKED_ABOUT, pictures[0])
    return DemoResult(
        index=index,
        searches=searches,
        index_seconds=index_seconds,
        sheet_path=_write_sheet(folder / SHEET_NAME, index, searches),
        asked_about=asked_about,
        reply=(
            model.chat(QUESTION, [asked_about], max_new_tokens=48)
            if model.vlm.config.has_decoder
            else None
        ),
    )


def title(source: str | Path) -> str:
    """Return "rocket launch" for ".../rocket-launch.jpg", with the page or time of an item."""
    named = SourceName.parse(str(source))
    words = Path(named.path).stem.replace("-", " ")
    if named.page is not None:
        return f"{words}, page {named.page}"
    return words if named.begin_s is None else f"{words}, {clock(named.begin_s)}"


def _search(index: Index, query: str | Path) -> list[Hit]:
    """Return the best hits, without the query image itself."""
    hits = index.search(query, k=NUM_HITS + 1, mode="vector")  # not by file names
    itself = str(query.absolute()) if isinstance(query, Path) else ""
    return [hit for hit in hits if hit.source != itself][:NUM_HITS]


def _write_sheet(path: Path, index: Index, searches: Sequence[Search]) -> Path:
    from PIL import Image

    from visavis.processing.images import decode_image

    rows = []
    for search in searches:
        shown = [(hit, hit.preview(512)) for hit in search.hits]
        hits = [(title(h.source), h.score, p) for h, p in shown if isinstance(p, Image.Image)]
        is_words = isinstance(search.query, str)
        picture = None if is_words else decode_image(search.query)
        rows.append(SheetRow(f"“{search.label}”" if is_words else search.label, hits, picture))
    subtitle = f"{len(index)} items · model {index.model.name} · cosine similarity, best first"
    sheet = draw_sheet("visavis: words and pictures in, pictures out", subtitle, rows)
    with write_atomically(path) as temporary:
        sheet.save(temporary, "PNG")
    return path
