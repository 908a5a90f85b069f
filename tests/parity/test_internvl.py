"""InternVL folders that transformers wrote, against transformers: tiles of the nearest aspect ratio
with a view of the whole, videos frame by frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.video_utils import VideoMetadata

import visavis
from tests.checkpoints.internvl_files import MOST, TILE, VARIANTS, Processor, save_internvl
from tests.fakes import picture
from tests.parity.peers import assert_close, peer_method
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.transformers.export import write_transformers
from visavis.processing.config import ImageProcessorConfig, RatioConfig, VideoConfig
from visavis.processing.frame_sampling import sample
from visavis.processing.internvl import InternVLProcessor

pytestmark = pytest.mark.parity

Loaded = tuple[Any, Processor, visavis.Model]
SIZES = [(20, 20), (32, 32), (90, 61), (30, 170), (300, 33), (1, 65), (64, 1), (64, 32), (128, 64)]
QUESTION = "What is\n\nthis?"


def load(folder: Path) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu")


@pytest.fixture(scope="module", params=VARIANTS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("internvl")
    peer, processor = save_internvl(folder, **VARIANTS[request.param])
    return peer, processor, load(folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("first")
    peer, processor = save_internvl(folder, **VARIANTS["qwen3, as published"])
    return peer, processor, load(folder)


def prompt_of(content: list[Any]) -> Any:
    found: list[Any] = []
    for one in content:
        if isinstance(one, list):
            found.append(visavis.Video(tuple(visavis.Image(frame) for frame in one)))
        else:
            found.append(visavis.Text(one) if isinstance(one, str) else visavis.Image(one))
    return found


@torch.no_grad()
def compare(loaded: Loaded, content: list[Any], what: str) -> None:
    """Compare ids, hidden states and logits of one prompt."""
    peer, processor, model = loaded
    inputs, trace = processor(content), model.trace(prompt_of(content))
    assert trace.token_ids.tolist() == inputs["input_ids"][0].tolist(), what
    found = peer(**inputs, output_hidden_states=True)
    assert_close(torch.from_numpy(trace.hidden), found.hidden_states[-1][0], f"{what}: hidden")
    assert_close(torch.from_numpy(trace.logits), found.logits[0], f"{what}: logits")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_many_shapes(size: tuple[int, int], first: Loaded) -> None:
    compare(first, [picture(1, size), QUESTION], f"{size}")


def test_text_images_and_videos(loaded: Loaded) -> None:
    one, two, three = picture(1, (90, 61)), picture(2, (30, 170)), picture(3, (33, 33))
    film = [picture(number, (50, 41)) for number in range(3)]
    for content in (
        ["Hello!"],
        [one, two, QUESTION],
        ["From ", one, " to", three, two, "?"],
        [film, QUESTION],
        [one, "then", film, "or", film[:1], three, "?"],
    ):
        compare(loaded, content, f"{len(content)} parts")


@torch.no_grad()
def test_answers_and_vectors_of_a_mixed_batch(loaded: Loaded) -> None:
    """Decoded with the cache; a batch gives each what it gets alone."""
    peer, processor, model = loaded
    contents: list[list[Any]] = [
        [picture(1, (90, 61)), "red"],
        ["a longer text alone"],
        [picture(2, (30, 170)), picture(3, (41, 40)), "?"],
    ]
    for content in contents:
        inputs = processor(content)
        ends = list(model.specials.eot_ids)
        ids = peer.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=ends)[0]
        rest = ids[inputs["input_ids"].shape[1] :]
        expected = processor.tokenizer.decode(rest, skip_special_tokens=True)
        reply = model.chat(content[-1], images=content[:-1], max_new_tokens=12)
        assert reply.text == expected
    items = [prompt_of(content) for content in contents]
    vectors = model.embed(items)
    assert np.allclose(vectors, np.concatenate([model.embed([one]) for one in items]), atol=1e-5)
    for content, vector in zip(contents, vectors, strict=True):
        inputs = processor(content, plain=True)
        last = peer(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        last = torch.nn.functional.normalize(last, dim=0)
        assert_close(torch.from_numpy(vector), last, f"vector of {content[-1]}")


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("most", [1, 4, MOST, 12])
@pytest.mark.parametrize("size", [*SIZES, (500, 400), (640, 90), (127, 251)], ids=str)
def test_pixels(size: tuple[int, int], most: int, first: Loaded) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    config = ImageProcessorConfig(TILE, "ratio", MEAN, STD, ratio=RatioConfig(1, most))
    assert ImageProcessorConfig.from_dict(config.to_dict()) == config
    ours, grid = InternVLProcessor(config).pixels(image)
    found = first[1].images([image], max_patches=most, return_tensors="np")["pixel_values"]
    assert ours.shape == found.shape and len(ours) == grid.views
    assert np.abs(ours - found).max() <= 1 / 255 / min(STD) + 1e-6  # one grey level


@pytest.mark.parametrize("total", [3, 8, 9, 100, 1789])
@pytest.mark.parametrize("frames", [1, 3, 8])
def test_frames_of_videos(total: int, frames: int) -> None:
    sample_frames = peer_method("internvl", "video_processing_internvl", "sample_frames")
    metadata = VideoMetadata(total, fps=24.0, duration=total / 24)
    config = VideoConfig(frames, sampling="internvl")
    if frames > total:
        assert sample(total, 24.0, config) == list(range(total))
        return
    expected = sample_frames(None, metadata, num_frames=frames, initial_shift=True)
    assert sample(total, 24.0, config) == expected.tolist()


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_written_again(name: str, tmp_path: Path) -> None:
    """The folder opens in transformers and here, with the same logits and ids."""
    peer, processor = save_internvl(tmp_path / "in", **VARIANTS[name])
    out, model = tmp_path / "out", load(tmp_path / "in")
    out.mkdir()
    written = write_transformers(load_checkpoint(tmp_path / "in", precision="f32"), out)
    assert not written.lost
    again = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    assert type(again) is type(peer)
    assert all(torch.equal(peer.state_dict()[name], t) for name, t in again.state_dict().items())
    ours = load(out)
    assert ours.vlm.config == model.vlm.config and ours.processor == model.processor
    assert ours.profile == model.profile
    opened = AutoTokenizer.from_pretrained(out)
    assert opened.start_image_token == "<img>" and opened.context_image_token == "<IMG_CONTEXT>"
    reader = Processor(opened)
    reader.images = AutoImageProcessor.from_pretrained(out, backend="pil")
    content = [picture(1, (90, 61)), [picture(2)], QUESTION]
    for key, value in processor(content).items():
        assert torch.equal(reader(content)[key], value)
    compare((again, reader, ours), content, "again")
