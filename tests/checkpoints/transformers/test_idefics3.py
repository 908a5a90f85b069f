"""Idefics3 and SmolVLM folders that do not fit together, and adapters trained on one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import visavis
from tests.checkpoints.idefics3_files import save_idefics3
from tests.fakes import picture
from tests.train.test_export import recipe, write_talk
from visavis.errors import CheckpointError
from visavis.train.runner import run_recipe

CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "fold": (CONFIG, lambda c: c.update(scale_factor=4), "scale_factor to 4, expected a divisor"),
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
    "channels": (CONFIG, lambda c: c["vision_config"].update(num_channels=1), "expected 3"),
    "patches": (CONFIG, lambda c: c["vision_config"].update(patch_size=10**6), "patch_size"),
    "absurd positions": (
        CONFIG,
        lambda c: c["vision_config"].update(image_size=7 * 10**6),
        "position_embedding|image_size|belongs to another model",
    ),
    "language model": (
        CONFIG,
        lambda c: c["text_config"].update(model_type="lama"),
        "did you mean 'llama'",
    ),
    "type": (CONFIG, lambda c: c.update(model_type="smolvlm3"), "did you mean 'smolvlm'"),
    "another tower's tile": (
        PROCESSOR,
        lambda c: c.update(max_image_size={"longest_edge": 63}),
        "prepares pictures of 63 pixels, but its vision tower takes 42",
    ),
    "too many tiles": (
        PROCESSOR,
        lambda c: c.update(size={"longest_edge": 4000}),
        "size.longest_edge to 4000, expected at most 2688",
    ),
    "no size": (PROCESSOR, lambda c: c.update(size={"height": 4}), "longest_edge to None"),
    "splitting": (PROCESSOR, lambda c: c.update(do_image_splitting=2), "do_image_splitting to 2"),
    "another processor": (
        PROCESSOR,
        lambda c: c.update(image_processor_type="CLIPImageProcessor"),
        "image_processor_type to 'CLIPImageProcessor', expected Idefics3ImageProcessor or",
    ),
    "filter": (PROCESSOR, lambda c: c.update(resample=0), "resample to 0"),
    "frames": (
        PROCESSOR,
        lambda c: c.update(video_sampling={"max_frames": -1}),
        "num_frames to -1, expected a positive",
    ),
}


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smolvlm")
    save_idefics3(folder, smolvlm=True)
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
    name = "model.connector.modality_projection.proj.weight"
    save_file({key: t for key, t in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing {name}"):
        load(tmp_path)
    save_file({**tensors, name: tensors[name][:, 1:].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has shape \(32, 95\), expected \(32, 96\)"):
        load(tmp_path)
    (tmp_path / PROCESSOR).unlink()
    with pytest.raises(CheckpointError, match="says nowhere how pictures are resized"):
        load(tmp_path)


def test_the_video_settings_of_their_own_file(folder: Path, tmp_path: Path) -> None:
    copied(folder, tmp_path)
    shared = load(tmp_path).processor
    assert shared.split.video_edge == 126 and shared.video.frames == 6 and shared.video.fps == 2
    own = {"size": {"longest_edge": 84}, "num_frames": 3, "max_image_size": {"longest_edge": 42}}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(own))
    found = load(tmp_path).processor
    assert found.split.video_edge == 84 and found.video.frames == 3 and found.video.fps == 2


def test_adapters_are_trained(folder: Path, tmp_path: Path) -> None:
    write_talk(tmp_path, pictures=True)
    made = recipe(folder, lora={"rank": 4}, train={"lora": 0.05})
    trained = run_recipe(made, tmp_path, tmp_path / "out")
    item = {"image": picture(1), "text": "What is this?"}
    merged = load(trained).trace(item)
    assert abs(merged.logits - load(folder).trace(item).logits).max() > 0.01
    assert merged.token_ids.tolist() == load(folder).trace(item).token_ids.tolist()
    again = load(trained / "adapter", base=folder).trace(item)
    assert abs(again.logits - merged.logits).max() < 1e-4
