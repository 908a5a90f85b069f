"""InternVL folders that do not fit together, and adapters trained on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import visavis
from tests.checkpoints.internvl_files import VARIANTS, save_internvl
from tests.fakes import picture
from tests.train.test_export import recipe, write_talk
from visavis.errors import CheckpointError
from visavis.train.runner import run_recipe

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "original layout": (
        CONFIG,
        lambda c: c.update(model_type="internvl_chat"),
        "InternVL3_5-1B-HF for InternVL3_5-1B",
    ),
    "fold": (
        CONFIG,
        lambda c: c.update(downsample_ratio=0.3),
        "downsample_ratio to 0.3, expected 1 through a divisor of 8 patches",
    ),
    "placeholder": (
        CONFIG,
        lambda c: c.update(image_token_id=10**6),
        "image_token_id to 1000000, expected 0 to",
    ),
    "heads": (
        CONFIG,
        lambda c: c["vision_config"].update(num_attention_heads=5),
        "num_attention_heads to 5, expected a divisor of 24",
    ),
    "layers": (
        CONFIG,
        lambda c: c["vision_config"].update(num_hidden_layers=10**8),
        "num_hidden_layers to 100000000",
    ),
    "norm": (
        CONFIG,
        lambda c: c["vision_config"].update(norm_type="batch_norm"),
        "norm_type to 'batch_norm', expected layer_norm or rms_norm",
    ),
    "positions": (
        CONFIG,
        lambda c: c["vision_config"].update(use_absolute_position_embeddings=False),
        "use_absolute_position_embeddings to False, expected true",
    ),
    "not square": (
        CONFIG,
        lambda c: c["vision_config"].update(image_size=[32, 64]),
        "expected a square",
    ),
    "layer list": (
        CONFIG,
        lambda c: c.update(vision_feature_layer=[-1, -2]),
        "vision_feature_layer",
    ),
    "class token": (
        CONFIG,
        lambda c: c.update(vision_feature_select_strategy="full"),
        "expected 'default'",
    ),
    "projector": (CONFIG, lambda c: c.update(projector_hidden_act="relu"), "expected 'gelu'"),
    "language model": (
        CONFIG,
        lambda c: c["text_config"].update(model_type="qwen33"),
        "did you mean 'qwen3'",
    ),
    "another tower's tile": (
        PROCESSOR,
        lambda c: c.update(size={"height": 64, "width": 64}),
        "prepares pictures of 64 pixels, but its vision tower takes 32",
    ),
    "tiles": (PROCESSOR, lambda c: c.update(max_patches=10**6), "max_patches to 1000000"),
    "fewer than least": (
        PROCESSOR,
        lambda c: c.update(min_patches=8),
        "max_patches to 6, expected 8 to 64",
    ),
    "another processor": (
        PROCESSOR,
        lambda c: c.update(image_processor_type="CLIPImageProcessor"),
        "image_processor_type to 'CLIPImageProcessor', expected 'GotOcr2ImageProcessor'",
    ),
}


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("internvl")
    save_internvl(folder, **VARIANTS["qwen3, as published"])
    return folder


def copied(folder: Path, target: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("name", DAMAGE)
def test_what_does_not_fit_is_named(name: str, folder: Path, tmp_path: Path) -> None:
    file, change, message = DAMAGE[name]
    path = copied(folder, tmp_path) / file
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_missing_parts_are_named(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if key.endswith("layer.1.lambda_2"))
    save_file({key: t for key, t in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing vision_tower.encoder.layer.1.lambda_2"):
        load(tmp_path)
    save_file({**tensors, name: tensors[name][1:].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has shape \(23,\), expected \(24,\)"):
        load(tmp_path)


def test_the_video_settings_of_their_own_file(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    shared = load(tmp_path).processor
    assert shared is not None and shared.video is not None and shared.video.frames == 8
    image = json.loads((tmp_path / PROCESSOR).read_text())
    path = tmp_path / "video_preprocessor_config.json"
    path.write_text(json.dumps(image | {"num_frames": 3}))
    found = load(tmp_path).processor
    assert found is not None and found.video is not None and found.video.frames == 3
    path.write_text(json.dumps(image | {"size": {"height": 384, "width": 384}}))
    with pytest.raises(CheckpointError, match="size of videos to 384, expected 32, as of images"):
        load(tmp_path)


def test_adapters_are_trained(folder: Path, tmp_path: Path) -> None:
    write_talk(tmp_path, pictures=True)
    made = recipe(folder, lora={"rank": 4}, train={"lora": 0.05, "connector": 0.01})
    trained = run_recipe(made, tmp_path, tmp_path / "out")
    item = {"image": picture(1), "text": "What is this?"}
    merged = load(trained).trace(item)
    assert abs(merged.logits - load(folder).trace(item).logits).max() > 0.01
    assert merged.token_ids.tolist() == load(folder).trace(item).token_ids.tolist()
    again = load(trained / "adapter", base=folder).trace(item)
    assert abs(again.logits - merged.logits).max() < 1e-4
