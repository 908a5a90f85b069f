"""A tiny checkpoint on disk and a way to run the program in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.fakes import write_tiny_checkpoint
from visavis.cli import app

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny checkpoint, as one would type it."""
    return str(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the program with these words, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()

    def run_words(*words: object, text: str | None = None) -> Result:
        return runner.invoke(app, [str(word) for word in words], input=text)

    return run_words
