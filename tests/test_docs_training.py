"""The page on training: its commands run, its recipe is valid, its table names every recipe."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from visavis.cli import app
from visavis.train.recipe import read_recipe

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs" / "training.md").read_text("utf-8")


def block(mark: str, language: str) -> str:
    found = re.findall(rf"<!-- {re.escape(mark)} -->\n```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == 1, f"the page has {len(found)} blocks that are {mark}"
    return str(found[0])


def run_block(mark: str) -> None:
    for line in block(mark, "bash").splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "visavis"
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        assert result.stdout.strip(), f"{line} printed nothing"


@pytest.fixture
def folder(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipes").symlink_to(REPOSITORY / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_parts_are_composed_planned_trained_and_used(folder: Path) -> None:
    run_block("executed by tests/test_docs_training.py")
    assert (folder / "out" / "report.html").is_file()


@pytest.mark.slow
def test_the_first_commands(folder: Path) -> None:
    run_block("executed by tests/test_docs_training.py (slow)")


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(block("validated by tests/test_docs_training.py", "yaml"))
    assert [stage.name for stage in read_recipe(path).stages] == ["align", "both"]


def test_every_recipe_is_in_the_page() -> None:
    for path in (REPOSITORY / "recipes").glob("*.yaml"):
        last = path.stem.rpartition("-")[2]
        assert f"`{path.stem}`" in PAGE or f"`-{last}`" in PAGE, path.stem


def test_every_file_it_names_exists() -> None:
    for name in re.findall(r"recipes/([\w.-]+\.yaml)", PAGE):
        assert (REPOSITORY / "recipes" / name).is_file(), name
    for name in re.findall(r"`((?:train|data)/[\w/]+\.py)`", PAGE):
        assert (REPOSITORY / "src" / "visavis" / name).is_file(), name
    for name in re.findall(r"\]\(([\w-]+\.md)", PAGE):
        assert (REPOSITORY / "docs" / name).is_file(), name
