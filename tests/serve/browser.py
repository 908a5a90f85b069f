"""Headless Chromium for tests of the web page, through Playwright; skips with a reason without."""

from __future__ import annotations

import importlib.resources
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "VISAVIS_CHROMIUM"  # path of the browser; without it one on PATH
SCREENSHOTS = "VISAVIS_SCREENSHOTS"  # folder that screenshots are put into
NAMES = ("chromium", "chromium-browser", "google-chrome")
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}, "locale": "en-US"}
PHONE: dict[str, Any] = {
    "viewport": {"width": 390, "height": 844},
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
    "locale": "en-US",
}


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="browser tests: pip install 'visavis[clients]'"
    )
    path = os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no Chromium on PATH; install one, or set {VARIABLE}")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def page_at(browser: Any, address: str, **settings: Any) -> Iterator[Any]:
    """Yield the page at an address; what it logs as an error fails the test."""
    context = browser.new_context(**{**DESKTOP, **settings})
    context.set_default_timeout(60_000)
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: said.type == "error" and errors.append(said.text))
    page.expected_errors = 0  # failed requests, which the browser logs itself
    page.goto(address)
    yield page
    context.close()
    unexpected = [one for one in errors if "Failed to load resource" not in one]
    assert not unexpected, unexpected
    assert len(errors) - len(unexpected) <= page.expected_errors, errors


def until(page: Any, expression: str, seconds: float = 60) -> None:
    """Wait until a JavaScript expression is true. (Playwright's own function needs `eval`, which
    the page's content security policy forbids.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never true: {expression}"
        page.wait_for_timeout(30)


def axe_problems(page: Any) -> list[str]:
    """Return the violations of WCAG 2.1 A and AA, and of good practice, that axe finds."""
    script = importlib.resources.files("axe_playwright_python") / "axe.min.js"
    page.evaluate(script.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run({resultTypes: ['violations']})")
    return [
        f"{one['id']} ({one['impact']}): {one['help']}: {node['html'][:160]}"
        for one in found["violations"]
        for node in one["nodes"]
    ]


def screenshot(page: Any, name: str) -> None:
    """Store a screenshot in the folder that the environment variable names, if it is set."""
    folder = os.environ.get(SCREENSHOTS)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.wait_for_timeout(400)  # transitions
        page.screenshot(path=str(Path(folder) / f"{name}.png"))
