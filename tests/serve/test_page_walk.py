"""A walk through the page with nano and the demo's items; its screenshots are those of the docs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import visavis
from tests.serve.browser import PHONE, chromium, page_at, screenshot, until
from tests.serve.serving import serving
from visavis.demo.made import make_media
from visavis.demo.run import TEXT_QUERIES
from visavis.demo.samples import copy_samples

pytest.importorskip("skimage", reason="sample images: pip install 'visavis[demo]'")
pytest.importorskip("sklearn", reason="sample images: pip install 'visavis[demo]'")
pytest.importorskip("av", reason="the video: pip install 'visavis[demo]'")
pytest.importorskip("pypdfium2", reason="the document: pip install 'visavis[demo]'")
pytestmark = pytest.mark.slow
WINDOW: dict[str, Any] = {"viewport": {"width": 1120, "height": 720}}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, nano_files: dict[str, Path]) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("walk")
    images = copy_samples(folder / "images")
    model = visavis.load("nano")
    with visavis.Index(folder / "nano.idx", model) as index:
        index.add([*images, *make_media(folder / "images", images)], segments=True)
    settings = {"indexes": {"default": folder / "nano.idx"}}
    with serving(settings, models={"nano": model}, examples=TEXT_QUERIES) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def find(page: Any, words: str) -> list[str]:
    page.fill("#text", words)
    page.press("#text", "Enter")
    page.locator("#status", has_text=words).wait_for()
    images_are_there(page)
    found: list[str] = page.locator(".hit .name").all_text_contents()
    return found


def images_are_there(page: Any) -> None:
    page.locator(".hit img").first.wait_for()
    until(page, "[...document.querySelectorAll('.hit img')].every(one => one.complete)")


def test_the_walk(browser: Any, address: str) -> None:
    with page_at(browser, address, **WINDOW) as page:
        images_are_there(page)
        screenshot(page, "walk-1-start")
        assert "coffee.png" in find(page, "a cup of coffee")[:2]
        screenshot(page, "walk-2-search")

        page.locator(".hit", has=page.get_by_text("coffee.png", exact=True)).click()
        page.get_by_role("button", name="Where it looked").click()
        page.locator("#legend", has_text="Bright").wait_for(timeout=300_000)
        screenshot(page, "walk-3-where")
        page.locator("#proposals button").first.click()
        page.locator(".turn.assistant", has_text="A").wait_for()
        screenshot(page, "walk-4-streaming")
        page.locator(".note").wait_for(timeout=300_000)
        assert "coffee" in page.locator(".turn.assistant").text_content()
        page.locator(".note").get_by_role("button", name="Where it looked").click()
        page.locator("#legend", has_text="Bright").wait_for(timeout=300_000)

        assert find(page, "peppermint tea invoice")[0] == "space-and-coffee.pdf, page 1"
        page.locator(".hit").first.click()
        assert "peppermint" in page.locator("#panel-why").text_content()
        until(page, "document.querySelector('#panel-image').naturalWidth > 0")
        screenshot(page, "walk-5-page")
        page.locator("#panel-found summary").click()
        assert "Invoice 4711" in page.locator("#panel-found-text").text_content()

        page.get_by_role("button", name="Videos").click()
        page.locator("#status", has_text="peppermint").wait_for()
        assert find(page, "a cat")[0].startswith("a-day-in-images.mp4")
        page.locator(".hit").first.click()
        page.locator("#panel-video").wait_for()
        until(page, "document.querySelector('#panel-video').readyState >= 2")
        screenshot(page, "walk-6-video")


def test_the_walk_on_a_phone_at_night_in_german(browser: Any, address: str) -> None:
    with page_at(browser, address, **PHONE, color_scheme="dark") as page:
        page.select_option("#language", "de")
        assert "flower.jpg" in find(page, "a flower")[:2]
        screenshot(page, "walk-7-phone")
        page.locator(".hit").first.click()
        page.get_by_role("button", name="Wo es hinsah").click()
        page.locator("#legend", has_text="Helle Teile").wait_for(timeout=300_000)
        screenshot(page, "walk-8-phone-where")
