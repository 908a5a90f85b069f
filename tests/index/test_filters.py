"""Filters as they are written, and what they let through."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import pytest

from visavis.errors import InputError
from visavis.index import Filter


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*/holiday/*", Filter(glob="*/holiday/*")),
        ("*/my photos/*", Filter(glob="*/my photos/*")),
        ("*.pdf#page=*", Filter(glob="*.pdf#page=*")),
        ("kind:page", Filter(kinds=("page",))),
        ("kind:page,video kind:text", Filter(kinds=("page", "video", "text"))),
        ("folder:'/my photos' tag=a", Filter(folder="/my photos", metadata=(("tag", "a"),))),
        ('note="red car" n=3', Filter(metadata=(("note", "red car"), ("n", "3")))),
        ("glob:*.png kind:image", Filter(kinds=("image",), glob="*.png")),
        ("after:2024", Filter(after=datetime(2024, 1, 1).timestamp())),
        ("before:2024-05", Filter(before=datetime(2024, 5, 1).timestamp())),
        ("after:2024-05-03T10:30", Filter(after=datetime(2024, 5, 3, 10, 30).timestamp())),
        ("after:2024-05-03T10:30+00:00", Filter(after=1714732200.0)),
        ("", Filter()),
    ],
)
def test_what_is_written(text: str, expected: Filter) -> None:
    assert Filter.parse(text) == expected
    assert Filter.of(text) == expected and Filter.of(expected) is expected
    assert Filter.of(None) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind:pages", r"kind is 'pages': did you mean 'page'"),
        ("kinds:page", r"unknown filter 'kinds': did you mean 'kind'"),
        ("kind:", r"kind: has no value"),
        ("after:yesterday", r"after is 'yesterday', expected a date such as 2024"),
        ("before:2024-13", r"before is '2024-13'"),
        ("before:99999-01-01", r"expected a date"),
        ("kind:page *.png", r"'\*\.png' is no filter; expected for example"),
        ("glob:*.a glob:*.b", r"glob: twice"),
        ("note='open", r"close its quotes"),
    ],
)
def test_what_cannot_be_used(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Filter.parse(text)


def test_folders_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Filter(folder="here/../there").folder == str(tmp_path / "there")
    assert Filter(folder="~/a").folder == "/home/somebody/a"
    assert Filter(folder="/").folder == os.sep


def test_what_is_let_through() -> None:
    item = {
        "source": "/a/b/c.pdf#page=3",
        "kind": "page",
        "path": "/a/b/c.pdf",
        "date": 100.0,
        "metadata": {"tag": ["x", 2], "done": True, "inner": {"a": 1}, "none": None},
    }
    for text in (
        "*", "*.pdf#*", "kind:page", "kind:image,page", "folder:/a", "folder:/a/b", "folder:/",
        "tag=x", "tag=2", "done=true", "tag=x tag=2",
    ):  # fmt: skip
        assert Filter.parse(text).matches(**item), text
    for text in (
        "*.png", "kind:image", "folder:/a/bb", "folder:/a/b/c.pdf/d", "tag=y", "done=True",
        "inner=1", "none=null", "absent=", "tag=x done=false",
    ):  # fmt: skip
        assert not Filter.parse(text).matches(**item), text
    assert Filter(after=100).matches(**item) and not Filter(before=100).matches(**item)
    assert not Filter(after=100.5).matches(**item) and Filter(before=100.5).matches(**item)
    undated = {**item, "date": None}
    assert not Filter(after=0).matches(**undated) and not Filter(before=1e9).matches(**undated)
