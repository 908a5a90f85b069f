"""The web page in headless Chromium, over a real server with a tiny model."""

from __future__ import annotations

import base64
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import picture, tiny_model, write_pictures
from tests.serve.browser import DESKTOP, PHONE, axe_problems, chromium, page_at, screenshot, until
from tests.serve.serving import png, serving
from visavis import Index
from visavis.demo.made import make_document, make_video
from visavis.generate.streaming import Answer

pytest.importorskip("av", reason="the index holds a video: pip install 'visavis[video]'")
pytest.importorskip("pypdfium2", reason="the index holds a document: pip install 'visavis[pdf]'")
pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror=alert(1)>.png"
OLD = 981_000_000  # 2001-02-01
NUM_IMAGES = 40
NUM_ITEMS = NUM_IMAGES + 2 + 1 + 1  # two pages, a video, a text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browsed")
    for path in write_pictures(folder / "old", 10):
        os.utime(path, (OLD, OLD))
    (folder / "old" / "picture-009.png").rename(folder / "old" / HOSTILE)
    write_pictures(folder / "new", NUM_IMAGES - 10, first_seed=10)
    samples = dict.fromkeys(("rocket launch", "cat"), folder / "new" / "picture-010.png")
    samples["coffee"] = samples["cat"]
    (folder / "media").mkdir()
    make_document(folder / "media" / "report.pdf", samples)
    make_video(folder / "media" / "film.mp4", samples)
    write_pictures(folder / "allowed" / "more", 20, first_seed=100)
    (folder / "allowed" / "more" / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    path = folder / "test.idx"
    with Index(path, tiny_model()) as index:
        added = [folder / name for name in ("old", "new", "media")]
        index.add([*added, {"text": "a note about coffee"}], segments=True)
        assert len(index) == NUM_ITEMS
    settings = {"indexes": {"default": path}, "allow_folders": [folder / "allowed"]}
    with serving(settings, examples=["a cat"]) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with page_at(browser, address) as opened:
        status_has(opened, "items in the index")
        yield opened


def status_has(page: Any, words: str) -> None:
    page.locator("#status", has_text=words).wait_for()


def search(page: Any, words: str) -> None:
    page.fill("#text", words)
    page.press("#text", "Enter")
    status_has(page, words)


def names(page: Any) -> list[str]:
    found: list[str] = page.locator(".hit .name").all_text_contents()
    return found


def focused(page: Any) -> str:
    return str(page.evaluate("document.activeElement.closest('li')?.dataset.at ?? ''"))


def open_item(page: Any, name: str) -> None:
    page.locator(".hit", has=page.get_by_text(name, exact=True)).click()
    page.locator("#panel-name", has_text=name).wait_for()


def give_files(page: Any, event: str, target: str, *images: int) -> None:
    """Drop or paste images onto an element, as a browser does for files."""
    files = [base64.b64encode(png(picture(seed))).decode() for seed in images]
    page.evaluate(
        """([kind, target, files]) => {
          const data = new DataTransfer();
          files.forEach((file, i) => data.items.add(new File(
            [Uint8Array.from(atob(file), (c) => c.charCodeAt(0))], `given-${i}.png`,
            {type: "image/png"})));
          const options = {bubbles: true, cancelable: true};
          const made = kind === "paste"
            ? new ClipboardEvent("paste", {...options, clipboardData: data})
            : new DragEvent(kind, {...options, dataTransfer: data});
          document.querySelector(target).dispatchEvent(made);
        }""",
        [event, target, files],
    )


def test_only_rows_near_the_screen_are_in_the_document(page: Any) -> None:
    status_has(page, f"{NUM_ITEMS} items in the index")
    count = page.locator("#hits li").count()
    assert 10 <= count < NUM_ITEMS
    page.locator("main").evaluate("main => main.scrollTo(0, main.scrollHeight)")
    page.locator(f"#hits li[aria-posinset='{NUM_ITEMS}'] .hit").wait_for()
    assert page.locator("#hits li").count() < NUM_ITEMS
    assert page.locator("#hits li").first.get_attribute("aria-setsize") == str(NUM_ITEMS)


def test_nothing_moves_while_images_arrive(browser: Any, address: str) -> None:
    with page_at(browser, "about:blank") as page:
        page.add_init_script(
            "window.shifts = 0; new PerformanceObserver(list => list.getEntries().forEach(one => {"
            "if (!one.hadRecentInput) window.shifts += one.value}))"
            ".observe({type: 'layout-shift', buffered: true})"
        )
        page.goto(address)
        until(page, "[...document.querySelectorAll('.hit img')].some(i => i.complete)")
        page.locator("#kinds button").first.wait_for()
        page.wait_for_timeout(300)
        assert page.evaluate("window.shifts") < 0.05


def test_search_and_open_with_keys_alone(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("some words")
    page.keyboard.press("Enter")
    status_has(page, "some words")
    assert page.locator(".hit .score").first.text_content()
    page.locator("#hits .hit").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    columns = int(focused(page)) - 1
    assert columns >= 2
    page.keyboard.press("End")
    assert focused(page) == str(NUM_ITEMS - 1)
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.locator("#panel").wait_for()
    assert page.evaluate("document.activeElement.id") == "panel-name"
    page.keyboard.press("Escape")
    page.locator("#panel").wait_for(state="hidden")
    assert focused(page) == "0"
    page.keyboard.press("?")
    page.locator("#help dt").first.wait_for()
    page.keyboard.press("Escape")
    page.locator("#help").wait_for(state="hidden")


def test_filters(page: Any, folder: Path) -> None:
    page.get_by_role("button", name="Pages").click()
    status_has(page, "2 items with these filters")
    assert sorted(names(page)) == ["report.pdf, page 1", "report.pdf, page 2"]
    page.get_by_role("button", name="All").click()
    page.get_by_role("button", name="Filters").click()
    page.fill("#before", "2001-12-31")
    status_has(page, "10 items with these filters")
    search(page, "words")
    assert len(names(page)) == 10
    page.get_by_role("button", name="Clear").click()
    page.fill("#folder", str(folder / "media"))
    page.press("#folder", "Enter")
    until(page, "document.querySelectorAll('.hit .name').length === 3")
    page.fill("#negative", "report")
    page.press("#negative", "Enter")
    status_has(page, "without “report”")
    assert page.locator("#filter-count").text_content() == "2"
    page.fill("#folder", "/nowhere")
    page.press("#folder", "Enter")
    status_has(page, "Nothing found for")
    assert not names(page)
    screenshot(page, "no-hits")


def test_pages_and_videos_open_at_their_place(page: Any) -> None:
    search(page, "old coins and espressos")
    open_item(page, "report.pdf, page 1")
    assert "espressos" in page.locator("#panel-why").text_content()
    assert str(page.get_attribute("#panel-open", "href")).endswith("/file#page=1")
    page.locator("#panel-found summary").click()
    assert "Invoice 4711" in page.locator("#panel-found-text").text_content()
    page.get_by_role("button", name="Videos").click()
    until(page, "document.querySelectorAll('.hit .name').length === 1")
    page.locator(".hit").click()
    page.locator("#panel-video").wait_for()
    assert "#t=0" in page.get_attribute("#panel-video", "src")
    until(page, "document.querySelector('#panel-video').readyState >= 1")
    assert page.evaluate("document.querySelector('#panel-video').duration") == pytest.approx(
        12, 0.1
    )


def test_more_like_this(page: Any) -> None:
    open_item(page, "picture-003.png")
    page.get_by_role("button", name="More like this").click()
    status_has(page, "like picture-003.png")
    assert page.locator("#chip-name").text_content() == "picture-003.png"
    until(page, "!document.querySelector('.hits.waiting')")
    assert "picture-003.png" not in names(page)
    assert page.locator("#panel-next").is_hidden()  # the panel's item is one of another list


def test_where_it_looked(page: Any) -> None:
    search(page, "some words")
    page.locator(".hit:has(img)").first.click()
    page.get_by_role("button", name="Where it looked").click()
    page.locator("#legend", has_text="“some words”").filter(has_not_text="Looking").wait_for()
    told = page.locator("#legend").text_content()
    if "Bright" in told:
        image, heat = (page.locator(name).bounding_box() for name in ("#panel-image", "#heat"))
        assert heat["x"] >= image["x"] - 1 and heat["y"] >= image["y"] - 1
        assert heat["width"] <= image["width"] + 1 and heat["height"] <= image["height"] + 1
    page.get_by_role("button", name="Where it looked").click()
    page.locator("#heat").wait_for(state="hidden")


def test_chat_streams_stops_and_copies(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    update = Answer.update

    def slowed(self: Answer) -> Any:
        time.sleep(0.03)
        return update(self)

    monkeypatch.setattr(Answer, "update", slowed)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    open_item(page, "picture-001.png")
    page.fill("#question", "What is it?")
    page.press("#question", "Enter")
    until(page, "document.querySelector('.turn.assistant')?.textContent.length > 3")
    page.get_by_role("button", name="Stop").last.click()
    page.locator(".turn.assistant:not(.thinking)").wait_for()
    stopped = page.locator(".turn.assistant").text_content()
    monkeypatch.setattr(Answer, "update", update)
    page.wait_for_timeout(200)
    assert page.locator(".turn.assistant").text_content() == stopped
    page.locator("#send", has_text="Ask").wait_for()
    page.fill("#question", "And now?")
    page.press("#question", "Enter")
    page.locator(".note").wait_for()
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    answer = page.locator(".turn.assistant").last.text_content()
    assert page.evaluate("navigator.clipboard.readText()") == answer.strip()


def test_several_images_in_a_question(page: Any) -> None:
    open_item(page, "picture-001.png")
    images = [
        {"name": f"{seed}.png", "mimeType": "image/png", "buffer": png(picture(seed))}
        for seed in (5, 6)
    ]
    page.locator("#chat-file").set_input_files(images)
    assert page.locator("#attached img").count() == 2
    page.get_by_role("button", name="Remove the image: 5.png").click()
    page.fill("#question", "What differs?")
    page.press("#question", "Enter")
    page.locator(".note").wait_for()
    expected = tiny_model().chat("What differs?", [picture(1), picture(6)])
    assert page.locator(".turn.assistant").text_content() == expected.text.lstrip()
    assert page.locator(".turn.user img").count() == 1


def test_drop_to_search_drop_to_ask_and_paste(page: Any) -> None:
    give_files(page, "dragenter", "body", 3)
    page.locator("#drop").wait_for()
    screenshot(page, "drop")
    give_files(page, "drop", "[data-drop=search]", 3)
    status_has(page, "given-0.png")
    page.locator(".hit .score", has_text="1.00").wait_for()
    assert names(page)[0] == "picture-003.png"
    give_files(page, "drop", "[data-drop=ask]", 4, 5)
    page.locator("#panel-name", has_text="given-0.png").wait_for()
    assert page.locator("#attached li").count() == 1
    give_files(page, "paste", "#question", 6)
    assert page.locator("#attached li").count() == 2
    page.keyboard.press("Escape")
    give_files(page, "paste", "body", 7)
    until(page, "document.querySelector('.hit .name').textContent === 'picture-007.png'")


def test_ask_about_a_dropped_video(page: Any, folder: Path) -> None:
    film = base64.b64encode((folder / "media" / "film.mp4").read_bytes()).decode()
    page.evaluate(
        """(film) => {
          const data = new DataTransfer();
          const bytes = Uint8Array.from(atob(film), (c) => c.charCodeAt(0));
          data.items.add(new File([bytes], "film.mp4", {type: "video/mp4"}));
          const options = {bubbles: true, cancelable: true, dataTransfer: data};
          document.querySelector("[data-drop=ask]").dispatchEvent(new DragEvent("drop", options));
        }""",
        film,
    )
    page.locator("#panel-name", has_text="film.mp4").wait_for()
    until(page, "document.querySelector('#panel-video').readyState >= 1")
    page.fill("#question", "What happens?")
    page.press("#question", "Enter")
    page.locator(".note").wait_for()
    expected = tiny_model().chat("What happens?", [folder / "media" / "film.mp4"])
    assert page.locator(".turn.assistant").text_content() == expected.text.lstrip()


def test_names_are_text(page: Any) -> None:
    page.locator(".hit .name", has_text=HOSTILE).wait_for()
    open_item(page, HOSTILE)
    assert page.locator("img[src=x]").count() == 0


def test_a_folder_is_added_with_its_progress(browser: Any, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "growing.idx"
    allowed = shutil.copytree(folder / "allowed", tmp_path / "allowed")
    (tmp_path / "allowed" / "outside").symlink_to(folder / "old")
    settings = {"indexes": {"default": path}, "allow_folders": [allowed]}
    with serving(settings) as (address, _), page_at(browser, address) as page:
        status_has(page, "The index is empty")
        screenshot(page, "empty")
        page.expected_errors = 2
        page.get_by_role("button", name="Add a folder").click()
        page.fill("#folder-path", "../../etc")
        page.locator("#folder-form .primary").click()
        page.locator("#folder-error", has_text="outside of the allowed folder").wait_for()
        page.fill("#folder-path", "more")
        page.locator("#folder-form .primary").click()
        page.locator(
            "#adding-text", has_text="20 added, 0 changed, 0 known, 1 unreadable"
        ).wait_for()
        status_has(page, "20 items in the index")
        page.locator("#adding summary").click()
        page.locator("#adding-list li", has_text="broken.png").wait_for()
        screenshot(page, "added")


def test_english_and_german(browser: Any, address: str) -> None:
    with page_at(browser, address, locale="de-AT") as page:
        status_has(page, f"{NUM_ITEMS} Einträge im Index")
        assert page.get_attribute("html", "lang") == "de"
        open_item(page, "picture-002.png")
        assert page.get_by_role("button", name="Mehr davon").count() == 1
        page.select_option("#language", "en")
        status_has(page, f"{NUM_ITEMS} items in the index")
        assert page.get_by_role("button", name="More like this").count() == 1
        page.reload()
        status_has(page, f"{NUM_ITEMS} items in the index")
    with page_at(browser, address, locale="fr-FR") as page:
        status_has(page, "items in the index")


def test_errors_are_told(page: Any) -> None:
    page.expected_errors = 2
    page.locator("#file").set_input_files(
        {"name": "x.png", "mimeType": "image/png", "buffer": b"no image"}
    )
    page.locator("#error:not([hidden])").wait_for()
    assert page.locator("#chip").is_hidden()
    page.context.set_offline(True)
    page.fill("#text", "words")
    page.press("#text", "Enter")
    page.locator("#error", has_text="The server does not answer").wait_for()
    screenshot(page, "error")
    page.context.set_offline(False)
    search(page, "words")
    assert page.locator("#error").is_hidden()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({**DESKTOP, "locale": "de-DE"}, "desktop-light"),
        ({**DESKTOP, "color_scheme": "dark"}, "desktop-dark"),
        ({**PHONE, "color_scheme": "dark"}, "phone-dark"),
        ({**PHONE}, "phone-light"),
    ],
)
def test_axe_finds_nothing(browser: Any, address: str, settings: Any, name: str) -> None:
    with page_at(browser, address, **settings) as page:
        page.locator(".hit img").first.wait_for()
        page.locator("#kinds button").first.wait_for()
        page.locator("#more-filters").click()
        assert axe_problems(page) == []
        screenshot(page, f"{name}-filters")
        page.locator("#more-filters").click()
        page.fill("#text", "some words")
        page.press("#text", "Enter")
        page.locator(".hit .score").first.wait_for()
        page.locator(".hit:has(img)").first.click()
        page.locator("#proposals button").first.click()
        page.locator(".note").wait_for()
        assert axe_problems(page) == []
        screenshot(page, f"{name}-panel")
        page.locator("#panel-close").click()
        page.locator("#help-open").click()
        assert axe_problems(page) == []
        screenshot(page, f"{name}-keys")


def test_axe_sees_what_is_wrong(page: Any) -> None:
    page.evaluate("document.querySelector('#question').removeAttribute('aria-label')")
    page.evaluate("document.querySelector('#question').removeAttribute('placeholder')")
    page.evaluate("document.querySelector('.status').style.color = '#ddd'")
    open_item(page, "picture-001.png")
    problems = " ".join(axe_problems(page))
    assert "color-contrast" in problems and "label" in problems


def test_nothing_is_wider_than_a_phone(browser: Any, address: str) -> None:
    narrow = {**PHONE, "viewport": {"width": 320, "height": 640}, "locale": "de-DE"}
    with page_at(browser, address, **narrow) as page:
        page.locator(".hit img").first.wait_for()
        page.locator("#more-filters").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        page.locator(".hit:has(img)").first.click()
        page.locator("#panel-name").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320
        screenshot(page, "phone-narrow")
