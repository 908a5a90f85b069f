"""Files of Qwen2.5-VL and Qwen3-VL: both generations, the time axis, damage, training, and written
again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import visavis
from tests.parity.peers import assert_close
from tests.parity.qwen2_vl_files import (
    IMAGE,
    VIDEO,
    noise,
    peer_inputs,
    save_qwen2_5_vl,
    save_qwen2_vl,
    save_qwen3_vl,
)
from visavis.checkpoints.transformers.export import write_transformers
from visavis.errors import CheckpointError
from visavis.model.image_input import ImageGrid
from visavis.model.rope import mrope_positions
from visavis.processing.qwen2_vl import Qwen2VLProcessor
from visavis.train.recipe import Recipe
from visavis.train.runner import run_recipe

pytestmark = pytest.mark.parity
SAVE = {
    "Qwen2-VL": save_qwen2_vl,
    "Qwen2.5-VL": save_qwen2_5_vl,
    "Qwen3-VL": save_qwen3_vl,
}
PROMPT: dict[str, Any] = {"image": noise((60, 41), 1), "text": "What is it?"}


def load(folder: Path) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def as_published(config: dict[str, Any]) -> None:
    """Bring Qwen2.5-VL's config.json to the form of 2025: text settings at the top."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    vision = config["vision_config"]
    vision.pop("rope_parameters")
    vision.update(model_type="qwen2_5_vl", in_chans=vision.pop("in_channels"))
    config.update(text | {"model_type": "qwen2_5_vl"})


def test_published_files_read_the_same(tmp_path: Path) -> None:
    save_qwen2_5_vl(tmp_path)
    model, weights = load(tmp_path), load_file(tmp_path / "model.safetensors")
    newer = {"visual.": "model.visual.", "model.": "model.language_model."}
    renamed = {}
    for name, tensor in weights.items():
        part = next((part for part in newer if name.startswith(part)), "")
        renamed[newer.get(part, "") + name.removeprefix(part)] = tensor
    save_file(renamed, tmp_path / "model.safetensors")
    edit(tmp_path / "config.json", as_published)
    again = load(tmp_path)
    assert again.vlm.config == model.vlm.config and again.processor == model.processor
    state = model.vlm.state_dict()
    assert all(torch.equal(state[name], one) for name, one in again.vlm.state_dict().items())


@pytest.mark.parametrize("interval", [0.5, 1.3, 4.0])
def test_positions_follow_the_seconds_of_a_video(interval: float) -> None:
    """Up to the end of the first video, from where on transformers 5 counts otherwise."""
    peer = save_qwen2_5_vl_class()
    time, height, width = 4, 8, 6
    count = time * height * width // 4
    types = [0] * 3 + [2] * count + [0] * 4
    theirs, _ = peer.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.int64),
        mm_token_type_ids=torch.tensor([types]),
        video_grid_thw=torch.tensor([[time, height, width]]),
        second_per_grid_ts=torch.tensor([interval]),
    )
    grid = ImageGrid(time, height, width, video=True, interval=interval)
    ours = mrope_positions(len(types), [(3, count)], [grid], 2, 2)
    assert torch.equal(ours[:, : 3 + count], theirs[:, 0, : 3 + count])
    after = int(ours[:, : 3 + count].max()) + 1
    assert ours[:, 3 + count :].tolist() == [[after, after + 1, after + 2, after + 3]] * 3


def save_qwen2_5_vl_class() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    from tests.parity.qwen2_vl_files import SIZES, WINDOWED

    with torch.device("meta"):
        return Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=SIZES, vision_config=WINDOWED))


@torch.no_grad()
def test_a_slow_video(tmp_path: Path) -> None:
    """Five frames of twenty: a pair stands for eight seconds of two, sixteen positions."""
    peer, model = save_qwen2_5_vl(tmp_path), load(tmp_path)
    frames = [noise((20, 33), seed) for seed in range(20)]
    trace = model.trace(
        visavis.Prompt.of([visavis.Video(frames, frames=5), visavis.Text("What happens?")])
    )
    assert model.processor is not None
    chosen = [frames[place] for place in (0, 4, 9, 14, 19)]
    patches, shape = Qwen2VLProcessor(model.processor).video_pixels(chosen)
    ids = trace.token_ids.tolist()
    inputs = peer_inputs(ids, [(torch.from_numpy(patches), shape)])
    start, count = trace.image_slots[0]
    grid = ImageGrid(shape.frames, shape.rows, shape.columns, video=True, interval=4.0)
    positions = mrope_positions(len(ids), [(start, count)], [grid], 2, 2)
    assert positions[0, start : start + count].unique().tolist() == [start, start + 8, start + 16]
    found = peer(**inputs, position_ids=positions[:, None])
    assert_close(torch.from_numpy(trace.logits), found.logits[0], "a slow video")


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "merger's width": (
        "config.json",
        lambda c: c["vision_config"].update(out_hidden_size=64),
        "vision_config.out_hidden_size to 64, expected 32",
    ),
    "heads": (
        "config.json",
        lambda c: c["vision_config"].update(num_heads=5),
        "hidden_size to 48, expected a multiple of 4 for each of 5 heads",
    ),
    "a window below a token": (
        "config.json",
        lambda c: c["vision_config"].update(window_size=7),
        "window_size to 7, expected at least 8",
    ),
    "a block that is not there": (
        "config.json",
        lambda c: c["vision_config"].update(fullatt_block_indexes=[1, 4]),
        r"fullatt_block_indexes to \[1, 4\], expected numbers of the 4 blocks",
    ),
    "a block twice": (
        "config.json",
        lambda c: c["vision_config"].update(fullatt_block_indexes=[1, 1]),
        "each once, ascending",
    ),
    "no list of blocks": (
        "config.json",
        lambda c: c["vision_config"].update(fullatt_block_indexes="all"),
        "fullatt_block_indexes to 'all'",
    ),
    "absurd depth": (
        "config.json",
        lambda c: c["vision_config"].update(depth=10**8),
        "depth to 100000000, expected at most 1000",
    ),
    "absurd width": (
        "config.json",
        lambda c: c["vision_config"].update(intermediate_size=10**12),
        "intermediate_size to 1000000000000, expected a positive whole number",
    ),
    "positions of a fraction": (
        "config.json",
        lambda c: c["vision_config"].update(tokens_per_second=0.5),
        "tokens_per_second to 0.5, expected a positive whole number",
    ),
    "placeholder": (
        "config.json",
        lambda c: c.update(image_token_id=-3),
        "image_token_id to -3, expected 0 to 263",
    ),
    "another member": (
        "config.json",
        lambda c: c.update(model_type="qwen2_7_vl"),
        "model_type 'qwen2_7_vl'.*did you mean 'qwen2",
    ),
    "patches of another tower": (
        "preprocessor_config.json",
        lambda c: c.update(patch_size=14),
        "patch_size to 14, expected 4, as the vision tower",
    ),
}


DAMAGE_3: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "more mergers than blocks": (
        "config.json",
        lambda c: c["text_config"].update(num_hidden_layers=1),
        "deepstack_visual_indexes to 2, expected at most 1 of them",
    ),
    "a merger after no block": (
        "config.json",
        lambda c: c["vision_config"].update(deepstack_visual_indexes=[-1, 2]),
        r"deepstack_visual_indexes to \[-1, 2\], expected numbers of the 4 blocks",
    ),
    "positions in no square": (
        "config.json",
        lambda c: c["vision_config"].update(num_position_embeddings=26),
        "num_position_embeddings to 26, expected a square",
    ),
    "absurd positions": (
        "config.json",
        lambda c: c["vision_config"].update(num_position_embeddings=10**14),
        "num_position_embeddings to 100000000000000, expected a positive whole number",
    ),
    "axes in blocks": (
        "config.json",
        lambda c: c["text_config"]["rope_parameters"].update(mrope_interleaved=False),
        "mrope_interleaved to False, expected true",
    ),
    "sections": (
        "config.json",
        lambda c: c["text_config"]["rope_parameters"].update(mrope_section=[4, 4, 4]),
        r"mrope_section to \[4, 4, 4\], expected three, 8 in all",
    ),
    "a model of experts": (
        "config.json",
        lambda c: c.update(model_type="qwen3_vl_moe"),
        "model_type 'qwen3_vl_moe'.*did you mean 'qwen3_vl'",
    ),
    "frames out of bounds": (
        "video_preprocessor_config.json",
        lambda c: c.update(min_frames=20),
        "min_frames to 20, expected at most 16",
    ),
    "frames as they are": (
        "video_preprocessor_config.json",
        lambda c: c.update(do_sample_frames=False),
        "do_sample_frames to False, expected true",
    ),
    "videos of other colours": (
        "video_preprocessor_config.json",
        lambda c: c.update(image_mean=[0.1, 0.2, 0.3]),
        r"image_mean to \[0.1, 0.2, 0.3\], expected .*, as of images",
    ),
}


@pytest.mark.parametrize("name", [*DAMAGE, *DAMAGE_3])
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    (save_qwen2_5_vl if name in DAMAGE else save_qwen3_vl)(tmp_path)
    file, change, message = (DAMAGE | DAMAGE_3)[name]
    edit(tmp_path / file, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("lost", ["visual.merger.ln_q.weight", "visual.blocks.2.mlp.up_proj.bias"])
def test_missing_and_misshapen_tensors_are_named(lost: str, tmp_path: Path) -> None:
    save_qwen2_5_vl(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith(lost))
    tensor = weights.pop(name)
    save_file(weights, path)
    with pytest.raises(CheckpointError, match=f"missing .*{lost}"):
        load(tmp_path)
    save_file(weights | {name: torch.cat((tensor, tensor))}, path)
    with pytest.raises(CheckpointError, match=rf"{lost} has shape .*, expected"):
        load(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("family", SAVE)
@pytest.mark.parametrize("tied", [False, True])
def test_written_again_in_their_own_layout(family: str, tied: bool, tmp_path: Path) -> None:
    """The folder loads here and in transformers, and all three give the same."""
    peer = SAVE[family](tmp_path / "in", tie_word_embeddings=tied)
    first, out = load(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    written = write_transformers(first, out)
    assert written.lost == []
    again = load(out)
    assert again.vlm.config == first.vlm.config and again.profile == first.profile
    assert again.processor is not None and first.processor is not None
    assert again.processor == first.processor
    state = first.vlm.state_dict()
    assert all(torch.equal(state[name], one) for name, one in again.vlm.state_dict().items())
    loaded = type(peer).from_pretrained(out).eval()
    trace = again.trace(PROMPT)
    patches, shape = Qwen2VLProcessor(again.processor).pixels(PROMPT["image"])
    ids = trace.token_ids.tolist()
    found = loaded(**peer_inputs(ids, [(torch.from_numpy(patches), shape)]))
    assert_close(torch.from_numpy(trace.logits), found.logits[0], "written and loaded by the peer")


@pytest.mark.parametrize("family", SAVE)
def test_lora_trains_and_is_written(family: str, tmp_path: Path) -> None:
    """A few steps of both objectives change what the model says, and the result is its kind."""
    SAVE[family](tmp_path / "base", max_position_embeddings=2048)
    shapes = {"format": "shapes", "path": "train"}
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "seed": 0,
            "model": {"base": str(tmp_path / "base"), "lora": {"rank": 4}},
            "data": {
                "told": shapes | {"options": {"as": "caption"}},
                "named": shapes | {"options": {"as": "name"}},
            },
            "stages": [
                {
                    "kind": "steps",
                    "name": "both",
                    "steps": 3,
                    "generative": {"sources": {"told": {}}, "batch": 4},
                    "contrastive": {"sources": {"named": {}}, "batch": 4},
                    "train": {"connector": 1.0e-3, "lora": 1.0e-3},
                }
            ],
            "precision": "f32",
            "trackers": [],
        }
    )
    base, trained = load(tmp_path / "base"), load(run_recipe(recipe, tmp_path, tmp_path / "out"))
    assert trained.vlm.config == base.vlm.config and trained.processor == base.processor
    logits = [torch.from_numpy(model.trace(PROMPT).logits) for model in (base, trained)]
    assert logits[1].isfinite().all() and not torch.allclose(*logits, atol=1e-4)
    assert (trained.trace(PROMPT).token_ids == base.trace(PROMPT).token_ids).all()
    assert {IMAGE, VIDEO} == {trained.vlm.config.image_token_id, trained.vlm.config.video_token_id}
