"""Connectors: as many tokens as their configs say, the committed nano's names, and no guessing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from visavis.errors import UnknownNameError
from visavis.model.config import (
    ConnectorConfig,
    DecoderConfig,
    MixtureConfig,
    ViTConfig,
    VLMConfig,
    to_dict,
    vlm_config_from_dict,
)
from visavis.model.connectors import CONNECTORS, build_connector, connector_tokens
from visavis.model.connectors.words import Words
from visavis.model.image_input import ImageInput
from visavis.model.image_tokens import select, tokens_per_view
from visavis.model.vlm import VLM

DECODER = DecoderConfig(40, 32, 1, 4, 2, 8, 48, 64)
KINDS = {
    "identity": (ConnectorConfig("identity", 24, 24), 16),
    "linear": (ConnectorConfig("linear", 24, 32), 16),
    "mlp": (ConnectorConfig("mlp", 24, 32, depth=3, shuffle=2, hidden_width=8), 4),
    "pooled": (ConnectorConfig("pooled", 24, 32, shuffle=2), 4),
    "mixture": (ConnectorConfig("mixture", 24, 32, depth=2), 32),
    "resampler": (ConnectorConfig("resampler", 24, 32, depth=2, num_queries=5), 5),
    "qformer": (ConnectorConfig("qformer", 24, 32, depth=3, num_queries=6, hidden_width=64), 6),
}


def vit(**changes: int | bool) -> ViTConfig:
    return ViTConfig(
        **{"image_size": 16, "patch_size": 4, "width": 24, "num_layers": 2, "num_heads": 2}
        | {"ffn_width": 24, "norm_eps": 1e-6}
        | changes,  # type: ignore[arg-type]
        activation="gelu",
    )


def test_every_kind_is_tried_here() -> None:
    apart = {"merger", "words"}  # Qwen2-VL's, with its tower; `words` reads more than features
    assert KINDS.keys() == CONNECTORS.keys() - apart


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_as_many_tokens_as_the_config_says(kind: str) -> None:
    config, expected = KINDS[kind]
    assert connector_tokens(config, 16) == expected
    connector = build_connector(config)
    features = torch.randn(2, 16, 24)
    tokens = connector(features)
    assert tokens.shape == (2, expected, config.out_width)
    torch.testing.assert_close(connector(features[1:]), tokens[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight(kind: str) -> None:
    connector = build_connector(KINDS[kind][0])
    features = torch.randn(2, 16, 24, requires_grad=True)
    (connector(features) * torch.randn_like(connector(features))).sum().backward()
    assert features.grad is not None and features.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in connector.parameters())


def test_an_unknown_kind_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown connector 'q-former'.*did you mean 'qform"):
        build_connector(ConnectorConfig("q-former", 4, 4))


def test_the_committed_connectors_names() -> None:
    """nano's weights are stored under these."""
    mlp = build_connector(ConnectorConfig("mlp", 4, 6, depth=2, input_norm=True))
    assert list(mlp.state_dict()) == [
        *("norm.weight", "norm.bias", "layers.0.weight", "layers.0.bias"),
        *("layers.2.weight", "layers.2.bias"),
    ]


@torch.no_grad()
def test_a_mixture_interleaves_two_towers_that_see_the_same() -> None:
    config = VLMConfig(
        DECODER,
        MixtureConfig(vit(), vit(patch_bias=True, layer_scale=True)),
        ConnectorConfig("mixture", 48, 32, depth=2),
        select_layer=-2,
    )
    vlm = VLM(config).eval()
    assert tokens_per_view(config) == 32
    pixels = torch.randn(1, 3, 16, 16)
    ((tokens, mean),) = vlm.see([ImageInput(pixels)])
    first = vlm.connector.first(vlm.tower.first(pixels, -2)[:, 1:])[0]  # type: ignore
    second = vlm.connector.second(vlm.tower.second(pixels, -2)[:, 1:])[0]  # type: ignore
    torch.testing.assert_close(tokens[0::2], first)
    torch.testing.assert_close(tokens[1::2], second)
    assert mean.shape == (48,)
    assert vlm_config_from_dict(to_dict(config)) == config


@torch.no_grad()
def test_only_those_that_were_trained_so_lose_a_patch() -> None:
    tower = vit(class_token=False)
    connector = ConnectorConfig("linear", 24, 32)
    kept = VLMConfig(DECODER, tower, connector)
    cut = VLMConfig(DECODER, tower, connector, drop_first_token=True)
    assert (tokens_per_view(kept), tokens_per_view(cut)) == (16, 15)
    hidden = torch.randn(2, 16, 24)
    assert torch.equal(select(hidden, kept), hidden)
    assert torch.equal(select(hidden, cut), hidden[:, 1:])


def test_building_without_numbers_does_not_import_the_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from visavis.model.config import ConnectorConfig\n"
        "from visavis.model.connectors import build_connector\n"
        "with torch.device('meta'):\n"
        "    build_connector(ConnectorConfig('resampler', 4, 8, num_queries=3))\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@torch.no_grad()
def test_the_nearest_words_are_spelled_before_the_patches() -> None:
    config = ConnectorConfig("words", 24, 32, shuffle=2, num_queries=5, num_words=4, word_width=3)
    connector = build_connector(config)
    assert isinstance(connector, Words)
    spelling = [[7, 1], [8, 9, 1], [10, 1], [11, 12, 13, 1]]
    for row, ids in enumerate(spelling):
        connector.word_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
    vectors = torch.eye(4, 3)
    vectors[3] = torch.tensor([0.6, 0.6, 0.5])
    connector.word_vectors.copy_(torch.nn.functional.normalize(vectors, dim=-1))
    images = torch.tensor([[0.1, 9.0, 0.2], [3.0, 0.1, 1.0], [1.0, 1.0, 1.0]])
    spelled = connector.spelled(images)
    assert spelled[0].tolist() == [8, 9, 1, 0, 0]  # the next word does not fit whole
    assert spelled[1].tolist() == [7, 1, 0, 0, 0]
    assert spelled[2].tolist() == [11, 12, 13, 1, 0]
    table = torch.randn(20, 32)
    tokens = connector(torch.randn(3, 16, 24), images, lambda ids: table[ids])
    assert tokens.shape == (3, connector_tokens(config, 16), 32) == (3, 5 + 4, 32)
    assert torch.equal(tokens[:, :5], table[spelled])
    assert not connector.word_vectors.requires_grad
    # with a margin, words much farther than the nearest are left out
    connector.config = replace(config, num_queries=9, word_margin=0.3)
    spelled = connector.spelled(images)
    assert spelled[0].tolist() == [8, 9, 1, 0, 0, 0, 0, 0, 0]
    assert spelled[2].tolist() == [11, 12, 13, 1, 0, 0, 0, 0, 0]
    connector.config = replace(config, num_queries=9, word_margin=0.4)
    assert connector.spelled(images)[0].tolist() == [8, 9, 1, 11, 12, 13, 1, 0, 0]
