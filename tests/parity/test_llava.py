"""The whole against transformers' LLaVA: images amid text, and both generations of names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from tests.parity.peers import assert_close, randomized
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.checkpoints.transformers.weights import read, write
from visavis.errors import CheckpointError
from visavis.model.batch import PackedBatch
from visavis.model.image_input import ImageInput
from visavis.model.image_tokens import tokens_per_view
from visavis.model.vlm import VLM

pytestmark = pytest.mark.parity

IMAGE = 60  # the placeholder's id
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
}
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "clip, last but one, patches": {},
    "clip, last, with class token": {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "clip, counted from the front": {"vision_feature_layer": 1},
    "several layers, one of them twice": {"vision_feature_layer": [-2, 0, 3, -2]},
    "several layers of siglip": {
        "vision_config": SiglipVisionConfig(**VISION),
        "vision_feature_layer": [1, -1],
        "vision_feature_select_strategy": "full",
    },
    "siglip": {
        "vision_config": SiglipVisionConfig(**VISION),
        "vision_feature_select_strategy": "full",
    },
    "tied": {"tie_word_embeddings": True},
}


def build_peer(**changes: Any) -> LlavaForConditionalGeneration:
    text = LlamaConfig(**TEXT, tie_word_embeddings=changes.get("tie_word_embeddings", False))
    parts = {"vision_config": CLIPVisionConfig(**VISION), "text_config": text}
    peer = LlavaForConditionalGeneration(LlavaConfig(**parts | changes, image_token_index=IMAGE))
    randomized(peer)
    return peer


def build_ours(peer: LlavaForConditionalGeneration, tensors: dict[str, Tensor]) -> VLM:
    config = peer.config.to_dict()
    vlm = VLM(vlm_config(config))
    vlm.load_state_dict(read(config, tensors, where="the peer"))
    return vlm.eval()


def prompt(vlm: VLM, *parts: list[int] | str) -> Tensor:
    """Return ids in which every "image" is as many placeholders as it becomes tokens."""
    run = [IMAGE] * tokens_per_view(vlm.config)
    return torch.tensor([token for part in parts for token in (run if part == "image" else part)])


def pack(sequences: list[Tensor], pixels: Tensor) -> PackedBatch:
    token_ids = torch.cat(sequences)
    return PackedBatch(
        token_ids=token_ids,
        positions=torch.cat([torch.arange(len(ids)) for ids in sequences]),
        lengths=tuple(len(ids) for ids in sequences),
        image_positions=(token_ids == IMAGE).nonzero()[:, 0],
        visuals=tuple(ImageInput(one[None]) for one in pixels),
    )


def random_pixels(num: int) -> Tensor:
    return torch.randn(num, 3, 28, 28, generator=torch.Generator().manual_seed(num))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_logits_with_images_in_the_middle_of_text(changes: dict[str, Any]) -> None:
    peer = build_peer(**changes)
    vlm = build_ours(peer, peer.state_dict())
    ids = prompt(vlm, [1, 7, 9], "image", [5, 5, 20], "image", "image", [8, 2])
    pixels = random_pixels(3)
    ours = vlm.decoder.logits(vlm(pack([ids], pixels))[-1])
    theirs = peer(input_ids=ids[None], pixel_values=pixels).logits[0]
    assert_close(ours, theirs, "logits with three images")
    seen = vlm.see([ImageInput(one[None]) for one in pixels])
    tokens = torch.stack([tokens for tokens, _ in seen])
    assert_close(tokens, torch.stack(peer_image_tokens(peer, pixels)), "tokens")


def peer_image_tokens(peer: LlavaForConditionalGeneration, pixels: Tensor) -> list[Tensor]:
    features = peer.get_image_features(pixel_values=pixels)
    return list(features.pooler_output)


@torch.no_grad()
def test_packed_batch_of_mixed_prompts_equals_the_peers_singles() -> None:
    peer = build_peer()
    vlm = build_ours(peer, peer.state_dict())
    pixels = random_pixels(3)
    sequences = [
        prompt(vlm, [1, 7], "image", [5, 5], "image"),
        prompt(vlm, [4, 4, 4, 9, 11]),
        prompt(vlm, "image", [3]),
    ]
    owned = [pixels[:2], None, pixels[2:]]
    lengths = [len(ids) for ids in sequences]
    logits = vlm.decoder.logits(vlm(pack(sequences, pixels))[-1]).split(lengths)
    for ours, ids, images in zip(logits, sequences, owned, strict=True):
        theirs = peer(input_ids=ids[None], pixel_values=images).logits[0]
        assert_close(ours, theirs, f"{len(ids)} tokens of a packed batch")


@torch.no_grad()
def test_features_and_image_tokens_may_come_from_before() -> None:
    vlm = build_ours(peer := build_peer(), peer.state_dict())
    pixels = random_pixels(2)
    batch = pack([prompt(vlm, [1], "image", [5], "image", [7])], pixels)
    expected = vlm(batch)[-1]
    features = vlm.tower_features(pixels)
    batch.visuals, batch.features = (), features
    assert torch.equal(vlm(batch)[-1], expected)
    assert vlm.connector is not None
    batch.features, batch.image_tokens = None, vlm.connector(features).flatten(0, 1)
    assert torch.equal(vlm(batch)[-1], expected)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_both_generations_of_names_are_the_same_model(changes: dict[str, Any]) -> None:
    peer = build_peer(**changes)
    modules = peer.state_dict()  # model.language_model.layers..., lm_head
    vlm = build_ours(peer, modules)
    hub = write(peer.config.to_dict(), vlm.state_dict())  # language_model.model.layers...
    assert "language_model.model.norm.weight" in hub
    assert "vision_tower.vision_model.post_layernorm.weight" in hub
    assert hub.keys().isdisjoint(modules)
    again = build_ours(peer, hub).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in vlm.state_dict().items())


@torch.no_grad()
def test_files_go_both_ways(tmp_path: Path) -> None:
    """The peer opens what we write, and we read the file that the peer saves."""
    peer = build_peer()
    peer.save_pretrained(tmp_path / "peer")
    saved = load_file(tmp_path / "peer" / "model.safetensors")
    vlm = build_ours(peer, saved)
    ids, pixels = prompt(vlm, [1, 7], "image", [5]), random_pixels(1)
    expected = peer(input_ids=ids[None], pixel_values=pixels).logits[0]
    assert_close(vlm.decoder.logits(vlm(pack([ids], pixels))[-1]), expected, "the peer's file")
    peer.config.save_pretrained(tmp_path / "ours")
    tensors = write(peer.config.to_dict(), vlm.state_dict())
    save_file(tensors, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    reopened = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    logits = reopened(input_ids=ids[None], pixel_values=pixels).logits[0]
    assert_close(logits, expected, "our file in the peer")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("vision_feature_layer", [-2, -5]),
        ("vision_feature_layer", []),
        ("vision_feature_layer", [-2] * 1000),
        ("vision_feature_layer", [-2, True]),
        ("projector_hidden_act", "relu"),
        ("multimodal_projector_bias", False),
        ("vision_feature_select_strategy", "cls"),
        ("model_type", "video_llava"),
    ],
)
def test_settings_we_do_not_have_are_refused(setting: str, value: object) -> None:
    config = build_peer().config.to_dict() | {setting: value}
    with pytest.raises(CheckpointError, match=setting):
        vlm_config(config)


def test_dropping_the_first_token_of_a_tower_without_class_token_is_refused() -> None:
    config = build_peer(vision_config=SiglipVisionConfig(**VISION)).config.to_dict()
    with pytest.raises(CheckpointError, match="vision_feature_select_strategy"):
        vlm_config(config)
