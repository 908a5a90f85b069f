"""LLaVA-OneVision folders that transformers wrote, against transformers: tiles shrunk to so many
tokens, several pictures padded, videos pooled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, Qwen2Config
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import visavis
from tests.checkpoints.anyres_files import LONG, SQUARE, save_onevision
from tests.checkpoints.transformers_files import IMAGE_SIZE
from tests.fakes import picture
from tests.parity.peers import assert_close
from tests.parity.test_llava_next import QUESTION, compare, inputs_of, load
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.checkpoints.transformers.weights import read, write
from visavis.errors import CheckpointError

pytestmark = pytest.mark.parity

SIZES = [(20, 20), (40, 30), (30, 70), (120, 33), (33, 120), (128, 128), (120, 90), (90, 125)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, visavis.Model]:
    folder = tmp_path_factory.mktemp("onevision")
    peer, processor = save_onevision(folder, most=4)
    return peer, processor, load(folder)


def with_pictures(
    processor: Any, images: list[Image.Image], text: str = QUESTION
) -> dict[str, Any]:
    """Return what the peer's own processor makes of the pictures of one user."""
    if len(images) < 2:
        return inputs_of(processor, images, text)
    content = [{"type": "image"} for _ in images]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    rendered = processor.apply_chat_template([message], add_generation_prompt=True)
    return processor(text=rendered, images=[images], return_tensors="pt")


def frames_of(seed: int, num: int = 3) -> list[Image.Image]:
    return [picture(seed + number, (50, 41)) for number in range(num)]


def with_video(processor: Any, frames: list[Image.Image], text: str = QUESTION) -> dict[str, Any]:
    """Build what the peer's processor of videos would: frames squashed, four tokens pooled to one
    and one more at the end."""
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}
    rendered = processor.apply_chat_template([message], add_generation_prompt=True)
    side = IMAGE_SIZE // 8 // 2
    rendered = rendered.replace("<video>", "<video>" * (len(frames) * side * side + 1))
    images = processor.image_processor
    squash = SiglipImageProcessorPil(
        size=SQUARE, image_mean=images.image_mean, image_std=images.image_std, resample=3
    )
    pixels: Tensor = squash(images=frames, return_tensors="pt")["pixel_values"]
    inputs = processor.tokenizer(rendered, return_tensors="pt")
    return {**inputs, "pixel_values_videos": pixels[None]}


def answer_of(peer: Any, processor: Any, inputs: dict[str, Any], ends: Any) -> str:
    ids = peer.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=list(ends))[0]
    rest = ids[inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(rest, skip_special_tokens=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_of_many_shapes(size: tuple[int, int], loaded: tuple) -> None:
    """Both directions of unpadding; the largest shrink to the tokens of four tiles."""
    peer, processor, model = loaded
    images = [picture(1, size)]
    prompt = {"image": images, "text": QUESTION}
    length = compare(model, peer, with_pictures(processor, images), prompt, f"{size}")
    assert length < 60 + 16 + 1.21 * 4 * 16 + 16


@torch.no_grad()
def test_several_pictures_are_padded_and_answered(loaded: tuple) -> None:
    peer, processor, model = loaded
    images = [picture(1, (90, 61)), picture(2, (30, 70))]
    inputs = with_pictures(processor, images)
    assert inputs["batch_num_images"].tolist() == [2]
    compare(model, peer, inputs, {"image": images, "text": QUESTION}, "two pictures")
    reply = model.chat(QUESTION, images=images, max_new_tokens=12)
    assert reply.text == answer_of(peer, processor, inputs, model.specials.eot_ids)
    one = with_pictures(processor, images[:1])
    reply = model.chat(QUESTION, images=images[0], max_new_tokens=12)
    assert reply.text == answer_of(peer, processor, one, model.specials.eot_ids)


@torch.no_grad()
def test_videos(loaded: tuple) -> None:
    peer, processor, model = loaded
    for num in (1, 3):
        frames = frames_of(1, num)
        inputs = with_video(processor, frames)
        video = visavis.Video(tuple(visavis.Image(frame) for frame in frames))
        compare(model, peer, inputs, {"video": video, "text": QUESTION}, f"video of {num}")
        reply = model.chat(QUESTION, images=[video], max_new_tokens=12)
        assert reply.text == answer_of(peer, processor, inputs, model.specials.eot_ids)


def test_text_alone(loaded: tuple) -> None:
    peer, processor, model = loaded
    compare(model, peer, with_pictures(processor, []), QUESTION, "text alone")


@torch.no_grad()
def test_vectors_of_a_mixed_batch_are_the_peers(loaded: tuple) -> None:
    peer, processor, model = loaded
    first, second, third = picture(1, (90, 61)), picture(2, (30, 70)), picture(3, (33, 100))
    video = visavis.Video(tuple(visavis.Image(frame) for frame in frames_of(1)))
    items: list[Any] = [
        {"image": first, "text": "red"},
        "a longer text alone",
        {"image": [second, third]},
        {"video": video, "text": "what happens"},
    ]
    vectors = model.embed(items)
    assert np.allclose(vectors, np.concatenate([model.embed([one]) for one in items]), atol=1e-5)
    wanted = [
        processor(text="<image>red", images=[first], return_tensors="pt"),
        processor.tokenizer("a longer text alone", return_tensors="pt"),
        processor(text="<image><image>", images=[[second, third]], return_tensors="pt"),
    ]
    for vector, inputs in zip(vectors, wanted, strict=False):
        last = peer(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        last = torch.nn.functional.normalize(last, dim=0)
        assert_close(torch.from_numpy(vector), last, f"vector of {len(inputs['input_ids'][0])}")


def test_both_generations_of_names_are_the_same_model(tmp_path: Path) -> None:
    text = Qwen2Config(**LONG | {"vocab_size": 320}, tie_word_embeddings=True)  # as the 0.5B's
    peer, processor = save_onevision(tmp_path / "peer", text)
    config, modules = peer.config.to_dict(), peer.state_dict()
    state = read(config, modules, where="modules")
    hub = write(config, state)
    assert "image_newline" in hub and hub.keys().isdisjoint(modules)
    assert all(torch.equal(read(config, hub, where="hub")[name], t) for name, t in state.items())
    save_file(hub, tmp_path / "peer" / "model.safetensors", metadata={"format": "pt"})
    images = [picture(1, (90, 61))]
    prompt = {"image": images, "text": QUESTION}
    compare(load(tmp_path / "peer"), peer, with_pictures(processor, images), prompt, "hub names")
    reopened = LlavaOnevisionForConditionalGeneration.from_pretrained(tmp_path / "peer")
    assert all(torch.equal(reopened.state_dict()[name], t) for name, t in modules.items())


@pytest.mark.parametrize("aspect", ["anyres", "anyres_max_0", "pad"])
def test_other_aspects_are_refused(aspect: str, loaded: tuple) -> None:
    config = loaded[0].config.to_dict() | {"vision_aspect_ratio": aspect}
    with pytest.raises(CheckpointError, match="vision_aspect_ratio"):
        vlm_config(config)
