"""A whole LLaVA folder, written by transformers, against transformers: pictures and text in,
the same ids, pixels, logits, answers and vectors out.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    GemmaConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    SiglipVisionConfig,
    StableLmConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import visavis
from tests.checkpoints.transformers_files import IMAGE_SIZE, TEXT, VISION, save_llava, save_qwen2
from tests.fakes import picture
from tests.parity.peers import assert_close

pytestmark = pytest.mark.parity

SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
PAD = LlavaImageProcessorPil(
    do_pad=True, size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE, do_center_crop=True
)
VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "clip, crop, qwen2": dict,
    "clip, pad, llama": lambda: {"image_processor": PAD, "text": LlamaConfig(**TEXT)},
    "siglip, squash, mistral": lambda: {
        "image_processor": SiglipImageProcessorPil(size=SQUARE),
        "vision": SiglipVisionConfig(**VISION),
        "text": MistralConfig(**TEXT, sliding_window=24),
        "select": "full",
    },
    "clip, larger before the crop, phi3": lambda: {
        "image_processor": CLIPImageProcessorPil(size={"shortest_edge": 37}, crop_size=SQUARE),
        "text": Phi3Config(**TEXT),
    },
    "clip, crop, gemma, tied": lambda: {"text": GemmaConfig(**TEXT, head_dim=8)},
    "clip, crop, stablelm": lambda: {"text": StableLmConfig(**TEXT, use_qkv_bias=True)},
    "clip, crop, qwen2, tied": lambda: {"text": Qwen2Config(**TEXT, tie_word_embeddings=True)},
}
QUESTION = "What is <image> here?"  # typed by a person: not a picture


def peer_inputs(
    processor: LlavaProcessor, text: str, images: list[Image.Image]
) -> dict[str, torch.Tensor]:
    """Return what the peer's own processor makes of a user's message."""
    content = [{"type": "image", "image": image} for image in images]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    rendered = processor.apply_chat_template([message], add_generation_prompt=True)
    return processor(text=rendered, images=images or None, return_tensors="pt")


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_same_ids_logits_and_answer(name: str, tmp_path: Path) -> None:
    peer, processor = save_llava(tmp_path, **VARIANTS[name]())
    model = visavis.load(tmp_path, precision="f32", device="cpu")
    images = [picture(1), picture(2, (30, 70))]
    inputs = peer_inputs(processor, "What is this?", images)
    trace = model.trace({"image": images, "text": "What is this?"})
    assert trace.token_ids.tolist() == inputs["input_ids"][0].tolist()
    theirs = peer(**inputs, output_hidden_states=True)
    assert_close(torch.from_numpy(trace.logits), theirs.logits[0], f"{name}: logits")
    last = theirs.hidden_states[-1][0]
    assert_close(torch.from_numpy(trace.hidden), last, f"{name}: last hidden state")
    ends = list(model.specials.eot_ids)
    ids = peer.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=ends)[0]
    answer = ids[inputs["input_ids"].shape[1] :]
    wanted = processor.tokenizer.decode(answer, skip_special_tokens=True)
    assert model.chat("What is this?", images=images, max_new_tokens=8).text == wanted


@pytest.fixture(scope="module")
def loaded(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, visavis.Model]:
    folder = tmp_path_factory.mktemp("llava")
    peer, processor = save_llava(folder)
    return peer, processor, visavis.load(folder, precision="f32", device="cpu")


@torch.no_grad()
def test_text_alone_and_history(loaded: tuple) -> None:
    peer, processor, model = loaded
    inputs = peer_inputs(processor, "Hello!", [])
    trace = model.trace("Hello!")
    assert trace.token_ids.tolist() == inputs["input_ids"][0].tolist()
    assert_close(torch.from_numpy(trace.logits), peer(**inputs).logits[0], "text alone")
    history = [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes?"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
    ]
    rendered = processor.apply_chat_template(history, add_generation_prompt=True)
    expected = processor(text=rendered, images=[picture(3)], return_tensors="pt")["input_ids"]
    earlier = [{"role": one["role"], "content": one["content"][0]["text"]} for one in history[:2]]
    prompt = visavis.Prompt.chat("And this?", [picture(3)], earlier)
    assert model.trace(prompt).token_ids.tolist() == expected[0].tolist()


@torch.no_grad()
def test_a_whole_answer(loaded: tuple) -> None:
    peer, processor, model = loaded
    inputs = peer_inputs(processor, "Name a colour.", [picture(4)])
    ends = list(model.specials.eot_ids)
    ids = peer.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=ends)[0]
    wanted = processor.tokenizer.decode(
        ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert wanted, "these weights say nothing: choose another question"
    assert model.chat("Name a colour.", images=[picture(4)], max_new_tokens=24).text == wanted


@torch.no_grad()
def test_vectors_are_the_peers_last_hidden_states(loaded: tuple) -> None:
    """Batched and mixed; items are embedded without a chat template, bos in front."""
    peer, _, model = loaded
    items = [{"image": picture(1), "text": "red"}, "a longer text alone", {"image": picture(2)}]
    vectors = model.embed(items)
    bos, image = [256], [259] * 16
    tokenizer = model.tokenizer
    sequences = [
        bos + image + tokenizer.encode("red", add_special_tokens=False).ids,
        tokenizer.encode("a longer text alone").ids,
        bos + image,
    ]
    pixels = [model_pixels(model, item) for item in items]
    for vector, ids, images in zip(vectors, sequences, pixels, strict=True):
        found = peer(input_ids=torch.tensor([ids]), pixel_values=images, output_hidden_states=True)
        last = torch.nn.functional.normalize(found.hidden_states[-1][0, -1], dim=0)
        assert_close(torch.from_numpy(vector), last, f"vector of {len(ids)} tokens")


def model_pixels(model: visavis.Model, item: Any) -> torch.Tensor | None:
    from visavis.processing.resize import process_image

    if not isinstance(item, dict):
        return None
    assert model.processor is not None
    return torch.from_numpy(process_image(item["image"], model.processor))[None]


def test_a_typed_placeholder_is_text(loaded: tuple) -> None:
    _, _, model = loaded
    trace = model.trace({"image": picture(1), "text": QUESTION})
    assert len(trace.image_slots) == 1 and trace.image_slots[0][1] == 16
    rest = [token for token in trace.token_ids.tolist() if token != 259]
    assert "What is <image> here?" in model.tokenizer.decode(rest, skip_special_tokens=False)


@torch.no_grad()
def test_text_only_folder(tmp_path: Path) -> None:
    peer = save_qwen2(tmp_path)
    model = visavis.load(tmp_path, precision="f32", device="cpu")
    trace = model.trace("Hello!")
    rendered = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    expected = model.tokenizer.encode(rendered, add_special_tokens=False).ids
    assert trace.token_ids.tolist() == expected
    theirs = peer(torch.tensor([expected])).logits[0]
    assert_close(torch.from_numpy(trace.logits), theirs, "logits of a text-only folder")
    assert model.chat("Hello!", max_new_tokens=4).usage.completion_tokens <= 4
    vectors = model.embed(["a", "b c"])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert not model.takes_images
