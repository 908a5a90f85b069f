"""LLaVA-NeXT folders that transformers wrote, against transformers: pictures of many shapes in
tiles, the same ids, logits and answers out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

import visavis
from tests.checkpoints.anyres_files import LONG, NUM_PATCHES, save_next
from tests.checkpoints.transformers_files import VISION
from tests.fakes import picture
from tests.parity.peers import assert_close
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.checkpoints.transformers.weights import read, write
from visavis.errors import CheckpointError
from visavis.model.vlm import VLM

pytestmark = pytest.mark.parity

VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "vicuna": dict,
    "mistral, null window": lambda: {"text": MistralConfig(**LONG, sliding_window=None)},
    "qwen2, padded vocabulary": lambda: {"text": Qwen2Config(**LONG | {"vocab_size": 320})},
    "llama 3, siglip": lambda: {
        "text": LlamaConfig(**LONG, rope_theta=500000.0),  # type: ignore[call-arg]
        "vision": SiglipVisionConfig(**VISION, vision_use_head=False),
        "select": "full",
    },
    "several layers": lambda: {"layers": [-1, -3]},
}
SIZES = [(40, 30), (30, 70), (100, 33), (33, 100), (64, 64), (9, 9), (200, 90), (91, 200), (400, 7)]
QUESTION = "What is this?"


def load(folder: Path) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu")


def inputs_of(processor: Any, images: list[Image.Image], text: str = QUESTION) -> dict[str, Any]:
    """Return what the peer's own processor makes of a user's message."""
    content = [{"type": "image", "image": image} for image in images]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    rendered = processor.apply_chat_template([message], add_generation_prompt=True)
    return processor(text=rendered, images=images or None, return_tensors="pt")


@torch.no_grad()
def compare(model: visavis.Model, peer: Any, inputs: dict[str, Any], prompt: Any, what: str) -> int:
    """Compare ids, hidden states and logits of one prompt; return how many tokens it has."""
    trace = model.trace(prompt)
    assert trace.token_ids.tolist() == inputs["input_ids"][0].tolist(), what
    theirs = peer(**inputs, output_hidden_states=True)
    assert_close(torch.from_numpy(trace.hidden), theirs.hidden_states[-1][0], f"{what}: hidden")
    assert_close(torch.from_numpy(trace.logits), theirs.logits[0], f"{what}: logits")
    return len(trace.token_ids)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, visavis.Model]:
    folder = tmp_path_factory.mktemp("next")
    peer, processor = save_next(folder)
    return peer, processor, load(folder)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_of_many_shapes(size: tuple[int, int], loaded: tuple) -> None:
    """Both directions of unpadding, every canvas, and ties between canvases."""
    peer, processor, model = loaded
    images = [picture(1, size)]
    inputs = inputs_of(processor, images)
    compare(model, peer, inputs, {"image": images, "text": QUESTION}, f"{size}")


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_language_models_and_towers(name: str, tmp_path: Path) -> None:
    peer, processor = save_next(tmp_path, **VARIANTS[name]())
    model = load(tmp_path)
    images = [picture(1, (90, 61)), picture(2, (30, 70))]
    inputs = inputs_of(processor, images)
    compare(model, peer, inputs, {"image": images, "text": QUESTION}, name)
    ends = list(model.specials.eot_ids)
    found = peer.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=ends)[0]
    answer = processor.tokenizer.decode(
        found[inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    reply = model.chat(QUESTION, images=images, max_new_tokens=12)  # with a cache
    assert reply.text == answer
    assert reply.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_text_alone_and_many_pictures(loaded: tuple) -> None:
    peer, processor, model = loaded
    compare(model, peer, inputs_of(processor, []), QUESTION, "text alone")
    images = [picture(n, size) for n, size in enumerate(SIZES[:3])]
    inputs = inputs_of(processor, images)
    compare(model, peer, inputs, {"image": images, "text": QUESTION}, "three pictures, all tiled")


@torch.no_grad()
def test_vectors_of_a_mixed_batch_are_the_peers(loaded: tuple) -> None:
    peer, processor, model = loaded
    pictures = [picture(1, (90, 61)), picture(2, (30, 70)), picture(3, (33, 100))]
    items: list[Any] = [
        {"image": pictures[0], "text": "red"},
        "a longer text alone",
        {"image": pictures[1:]},
    ]
    vectors = model.embed(items)
    assert np.allclose(vectors, np.concatenate([model.embed([one]) for one in items]), atol=1e-5)
    texts = ["<image>red", "a longer text alone", "<image><image>"]
    for vector, text, images in zip(
        vectors, texts, [pictures[:1], None, pictures[1:]], strict=True
    ):
        inputs = processor(text=text, images=images, return_tensors="pt")
        last = peer(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        last = torch.nn.functional.normalize(last, dim=0)
        assert_close(torch.from_numpy(vector), last, f"vector of {text!r}")


def test_both_generations_of_names_are_the_same_model(tmp_path: Path) -> None:
    peer, _ = save_next(tmp_path / "peer")
    config, modules = peer.config.to_dict(), peer.state_dict()
    state = read(config, modules, where="modules")
    hub = write(config, state)
    assert "image_newline" in hub and "language_model.model.norm.weight" in hub
    assert hub.keys().isdisjoint(modules)
    again = read(config, hub, where="hub")
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    VLM(vlm_config(config)).load_state_dict(again)
    # The peer opens what we write.
    (tmp_path / "ours").mkdir()
    peer.config.save_pretrained(tmp_path / "ours")
    save_file(hub, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    reopened = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(reopened[name], tensor) for name, tensor in modules.items())


def test_a_folder_of_older_names_loads_as_is(tmp_path: Path) -> None:
    """As on the hub: tensors by their first names, rows of the vocabulary padded."""
    peer, processor = save_next(tmp_path, text=LlamaConfig(**LONG | {"vocab_size": 320}))
    config = json.loads((tmp_path / "config.json").read_text())
    hub = write(peer.config.to_dict(), read(peer.config.to_dict(), peer.state_dict(), where=""))
    save_file(hub, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"use_image_newline_parameter": True, "vocab_size": 320})
    )
    images = [picture(1, (90, 61))]
    inputs = inputs_of(processor, images)
    prompt = {"image": images, "text": QUESTION}
    assert compare(load(tmp_path), peer, inputs, prompt, "hub names") > 3 * NUM_PATCHES


def test_canvases_of_another_model_are_refused(tmp_path: Path) -> None:
    save_next(tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"image_grid_pinpoints": [[32, 32]]}))
    with pytest.raises(CheckpointError, match=r"canvases .*\(32, 64\).* image_grid_pinpoints \[\["):
        load(tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("vision_feature_select_strategy", "full"), ("vision_feature_layer", [-2, -9])],
)
def test_settings_we_do_not_have_are_refused(setting: str, value: Any, loaded: tuple) -> None:
    config = loaded[0].config.to_dict() | {setting: value}
    with pytest.raises(CheckpointError, match=setting):
        vlm_config(config)
