"""The tables of docs/evaluation.md are those of the registry of suites."""

from __future__ import annotations

import importlib.util
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_registry() -> None:
    spec = importlib.util.spec_from_file_location(
        "suite_tables", REPOSITORY / "dev/suite_tables.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text(encoding="utf-8")
    assert text.count("| VOC2007 |") == 1 and text.count("| miniature files |") > 140
    assert module.page(text) == text, "run python dev/suite_tables.py"
