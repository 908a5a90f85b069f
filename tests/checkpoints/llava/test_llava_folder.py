"""LLaVA's original layout: what is found, what must be given, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import visavis
from tests.checkpoints.llava_files import save_original, save_tower, tiny_peer
from tests.fakes import picture
from visavis.checkpoints.llava.config import (
    KNOWN_TOWERS,
    known_tower,
    text_config,
    turns_of,
    vlm_config,
)
from visavis.errors import CheckpointError, InputError
from visavis.model.image_tokens import tokens_per_view


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    peer = tiny_peer()
    save_original(tmp_path, peer)
    save_tower(tmp_path / "vision_tower", peer)
    return tmp_path


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


def refusal(folder: Path, **settings: Any) -> str:
    with pytest.raises(CheckpointError) as raised:
        load(folder, **settings)
    return str(raised.value)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("image_aspect_ratio", "crop_split", "'square', 'pad', 'anyres' or 'anyres_max_N'"),
        ("mm_patch_merge_type", "spatial_maxpool2x2", "'flat', 'spatial' or 'spatial_unpad'"),
        ("mm_projector_type", "mlp2x_res2x_gelu", "'linear' or 'mlpNx_gelu'"),
        ("add_faster_video", True, "False"),
        ("mm_hidden_size", 1024, "the vision tower's 24"),
        ("mm_vision_select_layer", [-2, -5], "one number of 3 layers"),
        ("mm_vision_select_feature", "slicefour_patch", "'patch' or 'cls_patch'"),
        ("mm_newline_position", "grid", "'one_token' or 'no_token' without unpadding"),
        ("mm_spatial_pool_mode", "conv", "one of bilinear, average, max"),
        ("image_grid_pinpoints", None, "pairs of multiples of 32"),
        ("image_grid_pinpoints", [[32, 64], [48, 32]], "pairs of multiples of 32"),
        ("image_grid_pinpoints", [], "pairs of multiples of 32"),
        ("image_grid_pinpoints", "(1x1),...,(6x99)", "at most (64x64)"),
        ("image_grid_pinpoints", "open('x')", "pairs of multiples of 32"),
    ],
)
def test_settings_that_we_have_not_are_named(
    name: str, value: Any, expected: str, folder: Path
) -> None:
    tiled = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial"}
    of_tiles = name.startswith(("image_grid", "mm_newline", "mm_spatial"))
    edit_config(folder, **(tiled if of_tiles else {}) | {name: value})
    message = refusal(folder)
    assert f"sets {name} to {value!r}" in message and expected in message


def test_other_language_models_are_named(folder: Path) -> None:
    edit_config(folder, architectures=["LlavaMptForCausalLM"], model_type="llava_mpt")
    message = refusal(folder)
    assert "LlavaMptForCausalLM" in message and "LlavaLlamaForCausalLM" in message


def test_a_missing_tower_is_named(tmp_path: Path) -> None:
    peer = tiny_peer()
    save_original(tmp_path, peer, with_tower=False, mm_vision_tower="someone/tower")
    assert "lacks its settings" in (message := refusal(tmp_path))
    assert "someone/tower" in message and "vision_tower=" in message
    edit_config(tmp_path, mm_vision_tower="openai/clip-vit-large-patch14", mm_hidden_size=1024)
    assert "lacks its weights" in refusal(tmp_path)
    assert "has no config.json" in refusal(tmp_path, vision_tower=tmp_path.parent)


def test_a_known_tower_needs_no_folder() -> None:
    config = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 1024,
        "image_aspect_ratio": "pad",
    }
    vision, processor = KNOWN_TOWERS[config["mm_vision_tower"]]  # type: ignore[index]
    ours = vlm_config(config, text_config(config), vision)
    assert tokens_per_view(ours) == 576 and processor["size"] == {"shortest_edge": 336}
    siglip, _ = KNOWN_TOWERS["google/siglip-so400m-patch14-384"]
    ours = vlm_config(config | {"mm_hidden_size": 1152}, text_config(config), siglip)
    assert tokens_per_view(ours) == 729
    assert ours.tower is not None and ours.tower.num_layers == 26  # type: ignore[union-attr]


def test_a_known_tower_may_lie_in_a_folder_of_its_authors() -> None:
    config = {"mm_vision_tower": "/data/someone/siglip-so400m-patch14-384"}
    assert known_tower(config) == KNOWN_TOWERS["google/siglip-so400m-patch14-384"]
    assert known_tower({"mm_vision_tower": "/data/siglip"}) is None


@pytest.mark.parametrize(
    ("kind", "vocab_size", "aspect", "chat_template"),
    [
        ("Llama", 32000, "pad", "vicuna_v1"),
        ("Llama", 32064, "anyres", "vicuna_v1"),  # with padding
        ("Llama", 64000, "anyres", "chatml_direct"),  # Yi
        ("Llama", 128256, "anyres", "llava_llama_3"),
        ("Llama", 50000, "anyres", ""),  # none of those that were trained
        ("Llama", 32000, "anyres_max_9", ""),
        ("Mistral", 32000, "anyres", "mistral_instruct"),
        ("Qwen", 152064, "anyres", "qwen_1_5"),
        ("Qwen", 151936, "anyres_max_9", "qwen_1_5"),
    ],
)
def test_the_format_that_a_config_settles(
    kind: str, vocab_size: int, aspect: str, chat_template: str
) -> None:
    config = {
        "architectures": [f"Llava{kind}ForCausalLM"],
        "model_type": "llava",
        "vocab_size": vocab_size,
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": aspect,
        "mm_patch_merge_type": "flat" if aspect == "pad" else "spatial_unpad",
    }
    assert turns_of(config, text_config(config)) == chat_template


def test_a_projector_without_its_base_says_so(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.mm_projector.0.weight": torch.ones(2, 2)}, folder / "mm_projector.bin")
    edit_config(folder, _name_or_path="lmsys/vicuna-7b-v1.5")
    message = refusal(folder)
    assert "projector alone" in message and "base='…'" in message and "vicuna-7b" in message


def test_tokens_trained_with_a_projector_are_named(folder: Path) -> None:
    base = folder / "base"
    peer = tiny_peer()
    save_original(base, peer)
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": torch.ones(2, 2)}, folder / "mm_projector.bin")
    assert "model.embed_tokens.weight" in refusal(folder, base=base)


def test_parts_that_are_not_needed_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="base was given .* it is whole"):
        load(folder, base=tmp_path)
    with pytest.raises(InputError, match="vision_tower was given for"):
        load(Path("nano"), vision_tower=tmp_path)


def test_which_format_it_chats_in(folder: Path) -> None:
    """LLaVA 1.5's recipe settles it; else the model embeds, and chats once a format is named."""
    assert load(folder).profile.chat_template == "vicuna_v1"
    edit_config(folder, image_aspect_ratio=None)
    model = load(folder)
    assert model.embed([picture(1)]).shape == (1, 32)
    with pytest.raises(InputError, match="name its format.*chat_template=.*vicuna_v1"):
        model.chat("What is this?", images=[picture(1)])
    named = load(folder, chat_template="llava_v1")
    assert named.chat("What?", images=[picture(1)], max_new_tokens=2).usage.completion_tokens <= 2
    with pytest.raises(InputError, match="unknown chat template 'vicuna'.*vicuna_v1"):
        load(folder, chat_template="vicuna")


def test_the_tower_of_the_checkpoint_goes_before_its_folder(folder: Path) -> None:
    """It may have been trained there."""
    before = load(folder).embed([picture(1)])
    other = tiny_peer()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    save_tower(folder / "vision_tower", other)
    assert (load(folder).embed([picture(1)]) == before).all()
