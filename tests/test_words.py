"""The project's texts use the terms of the glossary in CONTRIBUTING.md, and name files that exist.

Read are help texts, headings of the documentation and docstrings of the package.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from visavis.cli import app

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "src" / "visavis"
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])

# Old words, each with what to write instead.
REFUSED = {
    r"\b(goes|go|went|going) on\b": "resume, continue",
    r"\bsaying\b|\b(is|are|was|were) said\b": "generate, decode, state",
    r"\bwhatever\b": "any",
    r"\b(has|have|had) not\b(?! been| yet)": "does not have",
    r"\bso many\b": "this many",
    r"\bas (you|it|often as you) likes?\b": "at any time",
    r"\bbrings? no(ne)?\b": "does not have",
    r"\bpictures?\b": "image",
    r"\b(what|whatever) [\w ]{1,30} becomes?\b": "image features, result",
    r"\bno words for\b": "cannot represent",
    r"\bchances\b": "probabilities",
    r"\bbegins? to speak\b|\bspeaking\b": "generating",
}
REFUSED_IN_DOCSTRINGS = REFUSED | {
    r"\bKnows (no|neither|nothing)\b": "leave it out, or say what must not be imported and why",
    r"\bReturn what\b": "name the thing that is returned",
    r"^What ": "a noun: the content of the module",
}


def old_words(text: str, refused: dict[str, str] = REFUSED) -> list[str]:
    """Return each refused word of a text with its replacement."""
    plain = re.sub(r"`[^`]*`", "", text)
    return [
        f"{found[0]!r}: write {instead}"
        for pattern, instead in refused.items()
        if (found := re.search(pattern, plain, re.IGNORECASE))
    ]


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text


def helps(command: object, name: str) -> Iterator[tuple[str, str]]:
    """Yield every help text of a command and of the commands in it."""
    yield name, getattr(command, "help", None) or ""
    for option in getattr(command, "params", ()):
        yield f"{name} {option.name}", getattr(option, "help", None) or ""
    for inner, one in getattr(command, "commands", {}).items():
        yield from helps(one, f"{name} {inner}")


def test_old_words_are_found() -> None:
    assert old_words("Stop it as you like: the same command goes on.")
    assert old_words("What a model becomes.") and old_words("A field that the config has not.")
    assert old_words("Knows no file.", REFUSED_IN_DOCSTRINGS) and not old_words("Knows no file.")
    assert not old_words("Safe to interrupt; rerun to resume. It has not been measured.")


def test_help_texts() -> None:
    found = dict(helps(typer.main.get_command(app), "visavis"))
    assert len(found) > 100
    wrong = {name: words for name, text in found.items() if (words := old_words(text))}
    assert wrong == {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_headings(page: Path) -> None:
    fenced = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    text = fenced.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert headings
    wrong = {heading: words for heading in headings if (words := old_words(heading))}
    assert wrong == {}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("part", sorted({part_of(path) for path in PACKAGE.rglob("*.py")}))
def test_docstrings(part: str) -> None:
    wrong = [
        f"{path.relative_to(REPOSITORY).as_posix()}:{line}: {'; '.join(words)}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if part_of(path) == part
        for line, text in docstrings(path)
        if (words := old_words(text, REFUSED_IN_DOCSTRINGS))
    ]
    assert wrong == []


# ---- file names ----------------------------------------------------------------------------------

NAMED = re.compile(r"`([\w./*-]+\.(?:py|md))`|`(recipes/[\w./*-]+\.yaml)`")
ROOTS = [REPOSITORY, PACKAGE, REPOSITORY / "docs", PACKAGE / "checkpoints"]


def missing_files(text: str, beside: Path) -> list[str]:
    """Return the Python files, pages and recipes that a text names and that do not exist."""
    names = [one or other for one, other in NAMED.findall(text)]
    return [n for n in names if not any(any(root.glob(n)) for root in [*ROOTS, beside])]


def test_missing_files_are_found() -> None:
    assert missing_files("`gone.py` and `api.py`, `tests/test_words.py`", PACKAGE) == ["gone.py"]
    assert missing_files("`recipes/llave-*.yaml`, `recipes/gone.yaml`", PACKAGE) == [
        "recipes/gone.yaml"
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    examples = set(re.findall(r"^\s*# example: (\S+)$", text, re.MULTILINE))
    assert [name for name in missing_files(text, page.parent) if name not in examples] == []
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_docstrings_name_files_that_exist() -> None:
    wrong = {
        f"{path.relative_to(REPOSITORY).as_posix()}:{line}": missing
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in docstrings(path)
        if (missing := missing_files(text, path.parent))
    }
    assert wrong == {}
