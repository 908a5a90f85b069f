"""The page on adding a connector, carried out: its example in whole models, saved and loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import visavis
from tests.fakes import byte_tokenizer, picture, tiny_config
from visavis.checkpoints.native import save_native
from visavis.model.config import ConnectorConfig
from visavis.model.connectors import CONNECTORS, connector_tokens
from visavis.model.image_tokens import tokens_per_view
from visavis.model.vlm import VLM
from visavis.processing.config import ImageProcessorConfig
from visavis.processing.prompt_config import PromptConfig
from visavis.train.recipe import ConnectorRecipe

PAGE = Path(__file__).parents[1] / "docs" / "add-a-connector.md"
MARK = r"<!-- executed by tests/test_docs_connector.py -->\n```python\n(.*?)```"
CONFIG = ConnectorConfig("pooled", in_width=24, out_width=32)


@pytest.fixture
def example(capsys: pytest.CaptureFixture[str]) -> Iterator[dict[str, Any]]:
    """What the example defines; afterwards its connector is unknown again."""
    (code,) = re.findall(MARK, PAGE.read_text("utf-8"), re.DOTALL)
    found: dict[str, Any] = {}
    try:
        exec(code, found)
        assert capsys.readouterr().out == "torch.Size([2, 4, 32])\n"
        yield found
    finally:
        CONNECTORS.pop("pooled", None)


@torch.no_grad()
def test_it_averages_squares_of_patches(example: dict[str, Any]) -> None:
    connector = example["connector"]
    features = torch.randn(2, 16, 24)
    image = features.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = connector.layer(F.avg_pool2d(image, 2).flatten(2).transpose(1, 2))
    torch.testing.assert_close(connector(features), expected)
    assert connector_tokens(CONFIG, 16) == 4


def test_models_have_it_and_keep_it(example: dict[str, Any], tmp_path: Path) -> None:
    config = replace(tiny_config(), connector=CONFIG)
    assert tokens_per_view(config) == 4
    vlm = VLM(config)
    save_native(
        tmp_path,
        name="pooled",
        config=config,
        tensors=vlm.state_dict(),
        profile=PromptConfig(chat_template="chatml-bare", pooling="head"),
        processor=ImageProcessorConfig(32, "squash", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    )
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    model = visavis.load(tmp_path, precision="f32", device="cpu")
    assert isinstance(model.vlm.connector, example["Pooled"])
    [(_, length)] = model.trace({"image": picture(1)}).image_slots
    assert length == 4
    assert model.embed([picture(1)]).shape == (1, 16)


def test_recipes_take_it(example: dict[str, Any]) -> None:
    assert ConnectorRecipe(kind="pooled").kind == "pooled"
    with pytest.raises(ValueError, match="no connector is called 'poled'.*did you mean 'pooled'"):
        ConnectorRecipe(kind="poled")
