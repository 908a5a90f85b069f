"""VLM2Vec's first version: DoRA adapters that PEFT wrote, on Phi-3.5-vision and LLaVA-NeXT.

Vectors are compared with the peer's under PEFT, of prompts in the form that MMEB's data have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import MistralConfig

import visavis
from tests.checkpoints.anyres_files import LONG, save_next
from tests.checkpoints.phi3v_files import SETTINGS, published_inputs, save_phi3v, tiny_tower
from tests.fakes import picture
from tests.parity.peers import assert_close
from tests.parity.test_adapters import adapted
from tests.parity.test_phi3v import published

pytest.importorskip("peft", reason="needs peft (visavis[dev])")
__all__ = ["tiny_tower"]  # a fixture, used by every test
pytestmark = pytest.mark.parity

# As published; they match the language model's linears, and the tower's attention too.
TARGETS = "qkv_proj o_proj gate_up_proj down_proj k_proj q_proj out_proj v_proj gate_proj up_proj"
DORA: dict[str, Any] = {"target_modules": TARGETS.split(), "use_dora": True}
INSTRUCTION = "Represent the given image with the following question:"


def load(folder: Path, base: Path) -> visavis.Model:
    return visavis.load(folder, base=base, profile="vlm2vec-v1", precision="f32", device="cpu")


@torch.no_grad()
def test_dora_on_phi3v(tmp_path: Path) -> None:
    """Tower and language model adapted; a mixed batch against single items."""
    peer = save_phi3v(tmp_path / "base", num_crops=16)
    plain = visavis.load(tmp_path / "base", precision="f32", device="cpu")
    adapter = adapted(peer, **DORA)
    changed = [name for name, _ in adapter.named_parameters() if "lora_A" in name]
    assert any("img_processor" in name for name in changed)
    adapter.save_pretrained(tmp_path / "adapter")
    model = load(tmp_path / "adapter", tmp_path / "base")
    assert model.processor is not None and model.processor.hd is not None
    assert model.processor.hd.num_crops == 4  # what it was trained with, whatever the base says
    image = picture(1, (48, 36))
    question = {"image": image, "text": "what is it?"}
    vectors = list(model.embed([question, {"image": image}], instruction=INSTRUCTION))
    texts = [f"<|image_1|>\n{INSTRUCTION} what is it?\n", f"<|image_1|>\n{INSTRUCTION}\n", "a cat"]
    vectors += list(model.embed(["a cat"]))
    for vector, text in zip(vectors, texts, strict=True):
        pictures = [published(model, image)] if "image_1" in text else []
        _, embeddings = published_inputs(peer, text, pictures)
        hidden = peer.model(inputs_embeds=embeddings).last_hidden_state[0, -1]
        assert_close(torch.from_numpy(vector), hidden / hidden.norm(), repr(text))
    assert abs(plain.embed(["a cat"])[0] - vectors[2]).max() > 0.01, "the adapter changes nothing"


@torch.no_grad()
@pytest.mark.parametrize("older_names", [False, True])
def test_dora_on_llava_next(older_names: bool, tmp_path: Path) -> None:
    """Pictures are squashed to a large square before they are tiled, as they were in training."""
    text = MistralConfig(**LONG, sliding_window=None)
    peer, processor = save_next(tmp_path / "base", text=text)
    adapter = adapted(peer, **DORA)
    adapter.save_pretrained(tmp_path / "adapter")
    if older_names:  # as transformers called its modules then
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = {older(name): tensor for name, tensor in load_file(path).items()}
        assert not any(".model.model.language_model." in name for name in tensors)
        save_file(tensors, path)
    model = load(tmp_path / "adapter", tmp_path / "base")
    image = picture(1, (90, 61))
    squashed = image.resize((1344, 1344), Image.Resampling.BICUBIC)
    items = [{"image": image, "text": "what is it?"}, {"image": image}]
    vectors = [*model.embed(items, instruction=INSTRUCTION), *model.embed(["a cat"])]
    texts = [f"<image>\n{INSTRUCTION} what is it?\n", f"<image>\n{INSTRUCTION}\n", "a cat"]
    for vector, text_ in zip(vectors, texts, strict=True):
        images = [squashed] if "<image>" in text_ else None
        inputs = processor(text=text_, images=images, return_tensors="pt")
        hidden = adapter(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        assert_close(torch.from_numpy(vector), hidden / hidden.norm(), repr(text_))


def older(name: str) -> str:
    """Return what an adapter's tensor was called when LLaVA's parts hung at the top."""
    head = "base_model.model.model."
    rest = name.removeprefix(head)
    rest = rest.replace("language_model.", "language_model.model.", 1)
    rest = rest.replace("vision_tower.encoder.", "vision_tower.vision_model.encoder.", 1)
    return f"base_model.model.{rest}"


@torch.no_grad()
def test_an_adapter_s_own_picture_processor_counts(tmp_path: Path) -> None:
    peer = save_phi3v(tmp_path / "base", num_crops=16)
    adapter = adapted(peer, target_modules=["qkv_proj"])
    adapter.save_pretrained(tmp_path / "adapter")
    own = (tmp_path / "base" / "preprocessor_config.json").read_text().replace("16", "2")
    (tmp_path / "adapter" / "preprocessor_config.json").write_text(own)
    settings: dict[str, Any] = {"precision": "f32", "device": "cpu"}
    model = visavis.load(tmp_path / "adapter", base=tmp_path / "base", **settings)
    assert model.processor is not None and model.processor.hd is not None
    assert model.processor.hd.num_crops == 2
    assert model.embedding_dim == SETTINGS["hidden_size"]
