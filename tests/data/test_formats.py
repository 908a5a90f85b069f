"""The table of formats and its documentation name the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from visavis.data.formats import FORMATS
from visavis.data.sources import SourceConfig

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FORMATS)
def test_formats_and_their_options_are_documented(name: str) -> None:
    row = next((line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")), "")
    options = FORMATS[name].options.model_fields
    assert row, f"docs/data.md has no row of the format {name!r}"
    missing = [field.alias or key for key, field in options.items()]
    assert [option for option in missing if f"`{option}`" not in row] == []


def test_the_pages_recipe_is_one() -> None:
    text = PAGE.partition("```yaml\n")[2].partition("```")[0]
    for source in yaml.safe_load(text)["data"].values():
        found = SourceConfig.model_validate(source)
        FORMATS[found.format].options.model_validate(found.options)
