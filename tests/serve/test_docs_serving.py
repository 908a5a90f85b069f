"""The blocks of docs/serving.md, run as they stand against a server; its lists against the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.fakes import picture, tiny_model
from tests.serve.serving import serving
from visavis.serve.app import API
from visavis.serve.config import Limits, make_config

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LIGHT = ("openai", "ollama")  # packages that the default tests have


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(models={"nano": tiny_model()}) as (address, _):
        yield address


def run(block: str, address: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    picture(1).save(folder / "cat.jpg")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    said: list[str] = []
    names = {"print": lambda *values: said.append(" ".join(map(str, values)))}
    exec(compile(block.replace("http://127.0.0.1:8484", address), "serving.md", "exec"), names)
    return "\n".join(said)


def package_of(block: str) -> str:
    return next(
        name
        for name in ("langchain_openai", "haystack", "cohere", "voyageai", "openai", "ollama")
        if name in block
    )


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            one,
            id=f"{number}-{package_of(one)}",
            marks=[] if package_of(one) in LIGHT else [pytest.mark.slow],
        )
        for number, one in enumerate(BLOCKS)
    ],
)
def test_each_block_runs(
    block: str, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(package_of(block))
    assert run(block, address, tmp_path, monkeypatch).strip()


def test_the_configuration_on_the_page_is_whole_and_right() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    settings = yaml.safe_load(block.replace('"sha256:…"', ""))
    config = make_config(settings)
    assert config.limits == Limits()  # the limits that are shown are the defaults
    assert set(settings) == set(type(config).model_fields)


def test_the_page_names_every_endpoint() -> None:
    missing = [
        one.path
        for one in API
        if one.path.partition("{")[0].rstrip("/") not in PAGE.replace("`", " ")
    ]
    assert not missing
