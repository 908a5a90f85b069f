"""LLaVA-Video's sentence on times, and frames that are pooled, of checkpoints whose config says so.

The expected sentence and place are those of LLaVA-NeXT's own video demo.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, Qwen2Config

import visavis
from tests.checkpoints.llava_files import save_original, save_tower, tiny_peer
from tests.checkpoints.transformers_files import TEXT, VISION
from tests.fakes import picture
from visavis.checkpoints.llava.export import write_llava
from visavis.checkpoints.load import load_checkpoint
from visavis.errors import CheckpointError
from visavis.inputs import Message, Prompt, Text, Video
from visavis.model.vlm import ImageFeatures
from visavis.processing.images import ContentHasher

pytestmark = pytest.mark.parity

FRAMES = [picture(seed) for seed in range(6)]
CLIP = Video(FRAMES, frames=4)  # two pictures a second
SENTENCE = (
    "The video lasts for 3.00 seconds, and 4 frames are uniformly sampled from it. These frames "
    "are located at 0.00s,0.50s,1.50s,2.50s.Please answer the following questions related to this "
    "video."
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    peer = tiny_peer(Qwen2Config(**TEXT | {"max_position_embeddings": 1024}))
    save_original(tmp_path / "llava", peer, add_time_instruction=True)
    save_tower(tmp_path / "llava" / "vision_tower", peer)
    return tmp_path / "llava"


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


def texts_around_images(model: visavis.Model, prompt: Any) -> list[str]:
    trace = model.trace(prompt)
    ends = [0, *(start + count for start, count in trace.image_slots)]
    starts = [*(start for start, _ in trace.image_slots), len(trace.token_ids)]
    ids = trace.token_ids.tolist()
    return [model.tokenizer.decode(ids[a:b]) for a, b in zip(ends, starts, strict=True)]


def test_times_stand_between_a_video_and_its_question(folder: Path) -> None:
    model = load(folder)
    before, after = texts_around_images(model, {"video": CLIP, "text": "What is it?"})
    assert before.endswith("user\n")
    assert after.startswith(f"\n{SENTENCE}\nWhat is it?")
    # of each video, wherever it stands; of pictures none
    asked = Message("user", (CLIP, Text("And then?")))
    talk = Prompt((asked, Message("assistant", (Text("Nothing."),)), replace(asked)))
    assert [SENTENCE in text for text in texts_around_images(model, talk)] == [False, True, True]
    assert "video lasts" not in texts_around_images(model, {"image": FRAMES[0], "text": "?"})[1]
    item = model.encoder.item(Prompt.of(CLIP))
    assert "video lasts" not in model.tokenizer.decode(item.token_ids)


def test_both_ways(folder: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(folder, precision="f32", device="cpu")
    assert loaded.profile.video_times == "llava-video"
    written = write_llava(loaded, _made(tmp_path / "again"))
    assert written.lost == [] and load(tmp_path / "again").profile == loaded.profile
    as_other = load(folder, profile="llave")  # embeds otherwise, chats as before
    assert as_other.profile.video_times == "llava-video"


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def encoded(model: visavis.Model, item: Any) -> list[ImageFeatures]:
    """Return the features of an item's images and videos."""
    prompt = ContentHasher().identify(Prompt.of(item))
    return model.image_encoder.encode(model.encoder.item(prompt).images)


@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
def test_frames_of_a_flat_checkpoint_are_pooled_by_two(mode: str, tmp_path: Path) -> None:
    """Whatever its `mm_spatial_pool_stride`, and only where its config names a mode."""
    peer = tiny_peer(vision=CLIPVisionConfig(**VISION | {"image_size": 40}))
    size = {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}
    settings = {"mm_patch_merge_type": "flat", "mm_spatial_pool_stride": 4}
    for name, more in (("plain", {}), ("pooled", {"mm_spatial_pool_mode": mode})):
        save_original(tmp_path / name, peer, **settings, **more)
        save_tower(tmp_path / name / "vision_tower", peer)
        _resize(tmp_path / name / "vision_tower", size)
    plain, pooled = load(tmp_path / "plain"), load(tmp_path / "pooled")
    [(frames, _)], [(found, _)] = encoded(plain, CLIP), encoded(pooled, CLIP)
    grid = frames.view(4, 5, 5, -1).permute(0, 3, 1, 2)
    expected = {
        "bilinear": lambda: F.interpolate(grid, (3, 3), mode="bilinear"),
        "average": lambda: F.avg_pool2d(grid, 2),
        "max": lambda: F.max_pool2d(grid, 2),
    }[mode]()
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).flatten(0, 2))
    torch.testing.assert_close(encoded(plain, FRAMES[0]), encoded(pooled, FRAMES[0]))
    assert pooled.chat("What is it?", images=[CLIP], max_new_tokens=2).usage.prompt_tokens > 0
    loaded = load_checkpoint(tmp_path / "pooled", precision="f32", device="cpu")
    write_llava(loaded, _made(tmp_path / "again"))
    assert load(tmp_path / "again").vlm.config == pooled.vlm.config


def _resize(tower: Path, size: dict[str, Any]) -> None:
    path = tower / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | size))


def test_a_class_token_cannot_be_pooled(tmp_path: Path) -> None:
    peer = tiny_peer()
    save_original(tmp_path, peer, mm_spatial_pool_mode="max", mm_vision_select_feature="cls_patch")
    save_tower(tmp_path / "vision_tower", peer)
    with pytest.raises(CheckpointError, match=r"mm_vision_select_feature.*to pool frames"):
        load(tmp_path)
