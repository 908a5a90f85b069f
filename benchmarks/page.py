"""First paint, scrolling and search of the web page over an index of many items.

    python benchmarks/page.py [--items 100000]

Needs a Chromium and `pip install 'visavis[clients]'`. The items are real JPEG files, each with a
random vector; the model is nano. Times are those of the browser, from the start of the navigation.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import visavis
from tests.serve.browser import chromium, page_at, until
from tests.serve.serving import serving
from visavis.index.store import IndexRow, Stamp

BATCH = 5000
FILES = 500  # that the items share by links

PAINT = """() => {
  const [paint] = performance.getEntriesByName('first-contentful-paint');
  return paint ? paint.startTime : null;
}"""


def fill(index: visavis.Index, folder: Path, items: int) -> None:
    """Put items of random vectors into an index, each an image file."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(min(FILES, items)):
        blocks = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((640, 480), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.jpg")
    meta = {
        "model": index.model.name,
        "fingerprint": index.model.fingerprint,
        "dim": str(index.model.embedding_dim),
    }
    for start in range(0, items, BATCH):
        vectors = random.normal(size=(BATCH, index.model.embedding_dim)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        rows = []
        for number in range(start, min(start + BATCH, items)):
            path = folder / str(number // 1000) / f"image {number}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.hardlink_to(folder / f"{number % FILES}.jpg")
            rows.append(
                IndexRow(
                    source=str(path),
                    content=f"{number:032x}",
                    vector=vectors[number - start],
                    path=str(path),
                    found_text=f"image {number}",
                    stamp=Stamp(1, 1),
                )
            )
        index.store.put(rows, meta)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--items", type=int, default=100_000)
    items = parser.parse_args().items
    folder = Path(tempfile.mkdtemp())
    try:
        model = visavis.load("nano")
        with visavis.Index(folder / "many.idx", model) as index:
            fill(index, folder / "files", items)
        settings = {"indexes": {"many": folder / "many.idx"}}
        with serving(settings, models={"nano": model}) as (address, _), chromium() as browser:
            print(json.dumps(measured(browser, address, items), indent=1))
    finally:
        shutil.rmtree(folder)


def measured(browser: object, address: str, items: int) -> dict[str, object]:
    """Return the times in milliseconds."""
    found: dict[str, object] = {"items": items}
    for name in ("cold", "warm"):
        with page_at(browser, address) as page:
            begun = "performance.now()"
            until(page, f"document.querySelector('#status').textContent.includes('{items:,}')")
            found[f"{name}: items listed, ms"] = round(page.evaluate(begun))
            until(
                page,
                "[...document.querySelectorAll('.hit img')].slice(0, 8).every(one => one.complete)",
            )
            found[f"{name}: first images, ms"] = round(page.evaluate(begun))
            found[f"{name}: first contentful paint, ms"] = round(page.evaluate(PAINT))
            if name == "cold":
                continue
            started = time.perf_counter()
            page.locator("main").evaluate("main => main.scrollTo(0, main.scrollHeight / 2)")
            page.wait_for_timeout(50)
            until(page, "document.querySelectorAll('.hit').length > 8")
            found["jump to the middle, ms"] = round((time.perf_counter() - started) * 1000)
            found["elements of the grid"] = page.locator("#hits li").count()
            started = time.perf_counter()
            page.fill("#text", "a red car")
            page.press("#text", "Enter")
            page.locator("#status", has_text="red car").wait_for()
            found["search, ms"] = round((time.perf_counter() - started) * 1000)
    return found


if __name__ == "__main__":
    main()
