"""The vision towers against transformers': every hidden state a connector may select, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.parity.peers import assert_close, randomized
from visavis.checkpoints.transformers.vision_models import vit_config
from visavis.checkpoints.transformers.weights import read_tower, write_tower
from visavis.model.vision.vit import ViT

pytestmark = pytest.mark.parity

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
PLAIN = SMALL | {"intermediate_size": 48}
PEERS: dict[str, Callable[[], PreTrainedModel]] = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**PLAIN)),
    "clip with gelu": lambda: CLIPVisionModel(CLIPVisionConfig(**PLAIN, hidden_act="gelu")),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**PLAIN)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL)),
    "dinov2 gated": lambda: Dinov2Model(Dinov2Config(**SMALL, use_swiglu_ffn=True)),
    "dinov2 with registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL)),
}
RESIZES = {"clip", "siglip"}  # only when asked to


def ours_of(peer: PreTrainedModel) -> ViT:
    config = peer.config.to_dict()
    tower = ViT(vit_config(config))
    tower.load_state_dict(read_tower(config, peer.state_dict(), where="the peer"))
    return tower.eval()


def pixels(size: int, num: int = 2) -> Tensor:
    return torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_hidden_states(name: str) -> None:
    peer = PEERS[name]()
    randomized(peer)
    tower = ours_of(peer)
    images = pixels(28)
    theirs = peer(images, output_hidden_states=True)
    assert len(theirs.hidden_states) == 4
    for layer, hidden in enumerate(theirs.hidden_states):
        assert_close(tower(images, layer), hidden, f"{name}: hidden state {layer}")
        assert_close(tower(images, layer - 4), hidden, f"{name}: hidden state {layer - 4}")
    # CLIP's final norm serves its pooled class token only.
    normed = tower.normed(images)
    if name.startswith("clip"):
        assert_close(normed[:, 0], theirs.pooler_output, f"{name}: pooled")
    else:
        assert_close(normed, theirs.last_hidden_state, f"{name}: after the final norm")


@pytest.mark.parametrize("size", [21, 42])
@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_positions_are_resized_for_other_sizes(name: str, size: int) -> None:
    peer = PEERS[name]()
    randomized(peer)
    images = pixels(size)
    options = {"interpolate_pos_encoding": True} if name.split()[0] in RESIZES else {}
    theirs = peer(images, output_hidden_states=True, **options)
    assert_close(ours_of(peer)(images), theirs.hidden_states[-1], f"{name} at {size} pixels")


@pytest.mark.parametrize("name", PEERS)
def test_names_come_back(name: str) -> None:
    peer = PEERS[name]()
    randomized(peer)
    tower = ours_of(peer)
    written = write_tower(peer.config.to_dict(), tower.state_dict())
    # The hub's spelling is written; both it and the peer's are read as the same tensors.
    again = read_tower(peer.config.to_dict(), written, where="what was written")
    assert again.keys() == tower.state_dict().keys()
    assert all(torch.equal(again[key], value) for key, value in tower.state_dict().items())


@torch.no_grad()
def test_a_tower_is_taken_out_of_a_whole_clip() -> None:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 32, "eos_token_id": 2, "bos_token_id": 1}
    peer = CLIPModel(CLIPConfig(vision_config=PLAIN, text_config=text))
    randomized(peer)
    tower = ours_of(peer)
    images = pixels(28)
    theirs = peer.vision_model(images, output_hidden_states=True)
    assert_close(tower(images, -2), theirs.hidden_states[-2], "tower of a CLIP")
