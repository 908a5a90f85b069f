"""Idefics3 and SmolVLM2 folders that transformers wrote, against transformers: tiles with their
places in words, a view of the whole, videos with their times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE, SmolVLMProcessor
from transformers.video_utils import VideoMetadata

import visavis
from tests.checkpoints.idefics3_files import (
    EDGE,
    TILE,
    inputs_of,
    save_idefics3,
    video_inputs,
)
from tests.fakes import picture
from tests.parity.peers import assert_close, peer_method
from visavis.checkpoints.gguf.reader import open_gguf
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.transformers.export import write_transformers
from visavis.model.vision.vit import position_buckets
from visavis.processing.config import ImageProcessorConfig, SplitConfig, VideoConfig
from visavis.processing.frame_sampling import sample
from visavis.processing.idefics3 import Idefics3Processor
from visavis.processing.tokenizer import build_tokenizer
from visavis.processing.visual_text import number_words

pytestmark = pytest.mark.parity

Loaded = tuple[Any, Any, visavis.Model]
VARIANTS: dict[str, dict[str, Any]] = {
    "idefics3": {},
    "smolvlm, tied, folds of 3": {"smolvlm": True, "tied": True, "scale": 3},
    "smolvlm, not cut": {"smolvlm": True, "do_image_splitting": False},
}
SIZES = [(20, 20), (126, 126), (90, 61), (30, 170), (300, 33), (1, 65), (64, 1), (43, 42)]
QUESTION = "What is\n\nthis?"


def load(folder: Path) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu")


@pytest.fixture(scope="module", params=VARIANTS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("idefics3")
    peer, processor = save_idefics3(folder, **VARIANTS[request.param])
    return peer, processor, load(folder)


def prompt_of(content: list[Any]) -> Any:
    return [visavis.Text(one) if isinstance(one, str) else visavis.Image(one) for one in content]


@torch.no_grad()
def compare(loaded: Loaded, inputs: dict[str, Any], prompt: Any, what: str) -> None:
    """Compare ids, hidden states and logits of one prompt."""
    peer, _, model = loaded
    trace = model.trace(prompt)
    assert trace.token_ids.tolist() == inputs["input_ids"][0].tolist(), what
    found = peer(**inputs, output_hidden_states=True)
    assert_close(torch.from_numpy(trace.hidden), found.hidden_states[-1][0], f"{what}: hidden")
    assert_close(torch.from_numpy(trace.logits), found.logits[0], f"{what}: logits")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_many_shapes(size: tuple[int, int], loaded: Loaded) -> None:
    content = [picture(1, size), QUESTION]
    compare(loaded, inputs_of(loaded[1], content), prompt_of(content), f"{size}")


def test_text_and_several_images(loaded: Loaded) -> None:
    one, two, three = picture(1, (90, 61)), picture(2, (30, 170)), picture(3, (33, 33))
    for content in (["Hello!"], [one, two, QUESTION], ["From ", one, " to", three, two, "?"]):
        compare(loaded, inputs_of(loaded[1], content), prompt_of(content), f"{len(content)} parts")


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
        inputs = inputs_of(processor, content)
        ends = list(model.specials.eot_ids)
        ids = peer.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=ends)[0]
        expected = processor.tokenizer.decode(
            ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        reply = model.chat(content[-1], images=content[:-1], max_new_tokens=12)
        assert reply.text == expected
    items = [prompt_of(content) for content in contents]
    vectors = model.embed(items)
    assert np.allclose(vectors, np.concatenate([model.embed([one]) for one in items]), atol=1e-5)
    for content, vector in zip(contents, vectors, strict=True):
        text = "".join(one if isinstance(one, str) else "<image>" for one in content)
        images = [one for one in content if not isinstance(one, str)]
        inputs = processor(text=text, images=[images] if images else None, return_tensors="pt")
        last = peer(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        last = torch.nn.functional.normalize(last, dim=0)
        assert_close(torch.from_numpy(vector), last, f"vector of {text}")


def frames_of(num: int) -> list[Image.Image]:
    return [picture(number, (50, 41)) for number in range(num)]


def test_videos(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor, model = loaded
    frames = frames_of(5)  # two a second
    video = visavis.Video(tuple(visavis.Image(frame) for frame in frames), frames=3)
    prompt = [visavis.Text("See"), video, visavis.Text(QUESTION)]
    if model.processor.split.video_edge == 0:
        with pytest.raises(visavis.VisavisError, match="takes no videos"):
            model.trace(prompt)
        return
    taken = [0, 2, 4]
    rule = processor.image_processor
    views = rule(
        [[frames[index] for index in taken]],
        size={"longest_edge": model.processor.split.video_edge},
        do_image_splitting=False,
        return_tensors="pt",
    )["pixel_values"][0]
    monkeypatch.setattr(processing_smolvlm, "num2words", {3: "three"}.get)
    metadata = VideoMetadata(5, fps=2, duration=2.5, frames_indices=taken)
    own = processing_smolvlm.SmolVLMProcessor.__new__(SmolVLMProcessor)
    for name in ("fake_image_token", "image_token", "global_image_tag", "image_seq_len"):
        value = getattr(processor, name)
        setattr(own, name.replace("image_tag", "image_token"), value)
    found = {"pixel_values": views[None], "video_metadata": [metadata]}
    expanded = own.replace_video_token(found, 0)
    parts = [{"type": "text", "text": "See"}, {"type": "video"}, {"type": "text", "text": QUESTION}]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": parts}],
        chat_template=DEFAULT_CHAT_TEMPLATE,
        add_generation_prompt=True,
    )
    inputs = video_inputs(processor, rendered, expanded, views)
    compare(loaded, inputs, prompt, "video")


def test_a_typed_placeholder_is_text(loaded: Loaded) -> None:
    _, processor, model = loaded
    typed = "<video> <image><row_1_col_1>"
    ids = model.trace([visavis.Image(picture(1)), visavis.Text(typed)]).token_ids.tolist()
    plain = processor.tokenizer.encode("a" + typed, split_special_tokens=True)[1:]
    assert any(ids[at : at + len(plain)] == plain for at in range(len(ids)))


CONFIG = ImageProcessorConfig(
    TILE, "split", (0.5,) * 3, (0.5,) * 3, resample="lanczos", split=SplitConfig(EDGE)
)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("size", [*SIZES, (500, 400), (640, 90), (127, 251)], ids=str)
def test_pixels(size: tuple[int, int], cut: bool, loaded: Loaded) -> None:
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )
    config = ImageProcessorConfig.from_dict(
        CONFIG.to_dict() | {"split": {"longest_edge": EDGE, "cut": cut}}
    )
    ours, grid = Idefics3Processor(config).pixels(image)
    rule = loaded[1].image_processor
    found = rule([[image]], do_image_splitting=cut, return_row_col_info=True, return_tensors="np")
    theirs = found["pixel_values"][0]
    assert (found["rows"][0][0], found["cols"][0][0]) == (grid.rows, grid.columns)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 2 / 255 + 1e-6  # one grey level of values in -1 to 1


@pytest.mark.parametrize("learned", [5, 25, 26, 27, 32, 41])
def test_positions_on_borders(learned: int) -> None:
    """The peer's float32 puts some patches into the position before their own."""
    peer = Idefics3VisionEmbeddings(
        Idefics3VisionConfig(image_size=learned, patch_size=1, hidden_size=1, num_attention_heads=1)
    )
    with torch.no_grad():
        peer.patch_embedding.weight.zero_()
        peer.patch_embedding.bias.zero_()
        peer.position_embedding.weight.copy_(torch.arange(learned**2)[:, None])
        for grid in {learned, 3, learned - 1}:
            mask = torch.ones(1, grid, grid, dtype=torch.bool)
            found = peer(torch.zeros(1, 3, grid, grid), mask)[0, :, 0]
            assert found.tolist() == position_buckets(learned, grid).tolist()
    own = list(range(learned**2))
    assert (position_buckets(learned, learned).tolist() != own) == (learned in (25, 41))


def test_a_tokenizer_that_joins_line_breaks(nano_files: dict[str, Path], tmp_path: Path) -> None:
    """Between tiles and whole two line breaks are one token of SmolLM2, and " You" is one."""
    tokens = build_tokenizer(open_gguf(nano_files["language_model"]).metadata)
    peer, processor = save_idefics3(tmp_path, smolvlm=True, tokens=tokens)
    assert len(tokens.encode("\n\n").ids) == 1
    model = load(tmp_path)
    content = [picture(1, (90, 61)), QUESTION, picture(2), "\n and?"]
    compare((peer, processor, model), inputs_of(processor, content), prompt_of(content), "joined")
    video = visavis.Video(tuple(visavis.Image(frame) for frame in frames_of(2)))
    ids = model.trace([video, visavis.Text("What?")]).token_ids
    text = processor.tokenizer.decode(ids).replace("<image>", "")
    around = "<fake_token_around_image>"
    assert text == (
        "<|im_start|>User: You are provided the following series of two frames from a 0:00:01 "
        f"[H:MM:SS] video.\n\nFrame from 00:00:{around}<global-img>{around}\nFrame from 00:00:"
        f"{around}<global-img>{around}\n\nWhat?<end_of_utterance>\nAssistant:"
    )
    assert processor.tokenizer(text)["input_ids"] == [
        one for one in ids if one != model.vlm.config.image_token_id
    ]


@pytest.mark.parametrize("seconds", [0.4, 3.0, 20.5, 90.0])
@pytest.mark.parametrize("rate", [5.0, 24.0, 29.97])
def test_frames_of_videos(seconds: float, rate: float) -> None:
    sample_frames = peer_method("smolvlm", "video_processing_smolvlm", "sample_frames")
    total = max(1, round(seconds * rate))
    metadata = VideoMetadata(total, fps=rate, duration=total / rate)
    expected = sample_frames(None, metadata, num_frames=8, fps=1)
    config = VideoConfig(8, fps=1, max_frames=8, sampling="smolvlm")
    assert sample(total, rate, config) == expected.tolist()


def test_numbers_in_words() -> None:
    words = {
        0: "zero",
        1: "one",
        13: "thirteen",
        20: "twenty",
        64: "sixty-four",
        100: "one hundred",
        128: "one hundred and twenty-eight",
        999: "nine hundred and ninety-nine",
    }
    assert {number: number_words(number) for number in words} == words


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_written_again(name: str, tmp_path: Path) -> None:
    """The folder opens in transformers and here, with the same logits and ids."""
    peer, processor = save_idefics3(tmp_path / "in", **VARIANTS[name])
    model = load(tmp_path / "in")
    source = load_checkpoint(tmp_path / "in", precision="f32", device="cpu")
    out = tmp_path / "out"
    out.mkdir()
    written = write_transformers(source, out)
    assert not written.lost
    again = AutoModelForImageTextToText.from_pretrained(out, dtype="auto")
    assert type(again) is type(peer)
    assert all(torch.equal(peer.state_dict()[name], t) for name, t in again.state_dict().items())
    content = [picture(1, (90, 61)), QUESTION]
    ours = load(out)
    assert ours.vlm.config == model.vlm.config and ours.processor == model.processor
    assert ours.profile == model.profile
    compare((again, processor, ours), inputs_of(processor, content), prompt_of(content), "again")
    if model.processor.split.video_edge == 0:
        opened = AutoProcessor.from_pretrained(out, backend="pil")
        found = inputs_of(opened, content)
        assert all(torch.equal(found[name], t) for name, t in inputs_of(processor, content).items())
