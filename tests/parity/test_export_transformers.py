"""What `write_transformers` writes, loaded by stock transformers: the same ids, pixels and logits.

Every model goes from a peer's folder through ours into a new folder that the peer's `Auto…`
classes open, offline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import visavis
from tests.checkpoints.anyres_files import save_next, save_onevision
from tests.checkpoints.llava_files import save_original, save_tower, tiny_peer
from tests.checkpoints.transformers_files import (
    CHATML,
    IMAGE_SIZE,
    TEXT,
    VISION,
    fast_tokenizer,
    save_llava,
)
from tests.fakes import picture, write_tiny_checkpoint
from tests.parity import test_gguf_families as gguf
from tests.parity.decoders import random_ids
from tests.parity.peers import assert_close, randomized
from tests.parity.test_decoder_families import CLASSES, VARIANTS
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.transformers.export import write_transformers
from visavis.errors import CheckpointError
from visavis.model.config import RopeScaling
from visavis.model.rope import Rope
from visavis.model.vlm import VLM

pytestmark = pytest.mark.parity

LLAMA_3_1 = RopeScaling("llama3", factor=8.0, original_context=8192)
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False},
    "llama, biases, tied": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "llama, llama3's rotary stretch": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    **VARIANTS,
}
CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), **CLASSES}


def exported(source: Path, out: Path) -> visavis.Model:
    """Convert a folder in float32; return the model that it was converted from."""
    loaded = load_checkpoint(source, precision="f32", device="cpu")
    out.mkdir()
    write_transformers(loaded, out)
    return visavis.Model.of(loaded)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_language_models(name: str, tmp_path: Path) -> None:
    config, model = CLASSES[name.split(",")[0]]
    peer = model(config(**TEXT | {"max_position_embeddings": 128} | FAMILIES[name]))
    randomized(peer).save_pretrained(tmp_path / "in")
    tokenizer = fast_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "in")
    ours = exported(tmp_path / "in", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.float32
    chat = [{"role": "user", "content": "Hello!"}]
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = written.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    trace = ours.trace("Hello!")
    assert trace.token_ids.tolist() == ids
    logits = again(torch.tensor([ids])).logits[0]
    assert_close(logits, peer(torch.tensor([ids])).logits[0], f"{name}: peer to peer")
    assert_close(torch.from_numpy(trace.logits), logits, f"{name}: ours to the written one")
    assert again.generation_config.eos_token_id == list(ours.specials.eot_ids)


LLAVAS: dict[str, Callable[[], dict[str, Any]]] = {
    "clip, crop, qwen2": dict,
    "clip, pad, llama": lambda: {
        "image_processor": LlavaImageProcessorPil(
            do_pad=True,
            size={"shortest_edge": IMAGE_SIZE},
            crop_size=SQUARE,
            do_center_crop=True,
        ),
        "text": LlamaConfig(**TEXT),
    },
    "siglip, squash, mistral": lambda: {
        "image_processor": SiglipImageProcessorPil(size=SQUARE),
        "vision": SiglipVisionConfig(**VISION),
        "text": MistralConfig(**TEXT, sliding_window=24),
        "select": "full",
    },
    "clip, larger before the crop, tied": lambda: {
        "image_processor": CLIPImageProcessorPil(size={"shortest_edge": 37}, crop_size=SQUARE),
        "text": Qwen2Config(**TEXT, tie_word_embeddings=True),
    },
}


@torch.no_grad()
def assert_written(folder: Path, ours: visavis.Model, what: str) -> None:
    """Compare a written folder, opened by the peer, with the model it was written from."""
    peer = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    processor = AutoProcessor.from_pretrained(folder)
    images = [picture(1), picture(2, (30, 70))]
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is this?"}]
    chat = [{"role": "user", "content": content}]
    rendered = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=rendered, images=images, return_tensors="pt")
    trace = ours.trace({"image": images, "text": "What is this?"})
    theirs = inputs["input_ids"][0].numpy()
    images_there = theirs == peer.config.image_token_id
    is_image = np.zeros(len(theirs), bool)
    for at, length in trace.image_slots:
        is_image[at : at + length] = True
    assert (images_there == is_image).all()
    assert (trace.token_ids == theirs)[~is_image].all()
    found = peer(**inputs).logits[0]
    rows = trace.logits.shape[1]  # a placeholder that was appended has rows of its own
    assert_close(torch.from_numpy(trace.logits), found[:, :rows], f"{what}: logits")
    if found.shape[1] > rows:
        assert (found[:, rows:] < found.max(1, keepdim=True)[0]).all()
    again = visavis.load(folder, precision="f32", device="cpu")
    read_again = again.trace({"image": images, "text": "What is this?"})
    assert read_again.token_ids.tolist() == theirs.tolist()


@pytest.mark.parametrize("name", LLAVAS)
def test_llavas(name: str, tmp_path: Path) -> None:
    save_llava(tmp_path / "in", **LLAVAS[name]())
    assert_written(tmp_path / "out", exported(tmp_path / "in", tmp_path / "out"), name)


@pytest.mark.parametrize("tied", [False, True])
def test_an_original_llava_gets_a_placeholder(tmp_path: Path, tied: bool) -> None:
    """Its tokenizer has no `<image>`: token, embedding rows to a multiple of 64, chat template."""
    text = {**TEXT, "vocab_size": 260, "tie_word_embeddings": tied}
    peer = tiny_peer(LlamaConfig(**text))
    save_original(tmp_path / "in", peer)
    save_tower(tmp_path / "in" / "vision_tower", peer)
    tokenizer = tmp_path / "in" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"<image>"', '"<pad>"'))
    ours = exported(tmp_path / "in", tmp_path / "out")
    assert_written(tmp_path / "out", ours, "original")
    config = visavis.load(tmp_path / "out", precision="f32").vlm.config
    assert config.decoder.vocab_size == 320 and config.image_token_id == 260


@torch.no_grad()
def test_a_gguf_file(tmp_path: Path, nano_files: dict[str, Path]) -> None:
    ours = exported(nano_files["language_model"], tmp_path / "out")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "Name 3 colours,  please: 1."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    trace = ours.trace(chat[0]["content"])
    assert trace.token_ids.tolist() == ids
    logits = peer(torch.tensor([ids])).logits[0]
    scale = logits.abs().max()  # thirty real layers, so logits of some twenty
    assert_close(torch.from_numpy(trace.logits) / scale, logits / scale, "SmolLM2 from GGUF")


@pytest.mark.parametrize("name", ["gemma", "llama"])
@torch.no_grad()
def test_what_gguf_spells_otherwise(name: str, tmp_path: Path) -> None:
    """Gemma's norms with 1 added, and Llama 3's stretch as a list of numbers."""
    peer = gguf.build_peer(name)
    loaded = load_checkpoint(gguf.write(tmp_path / "a.gguf", name, peer), precision="f32")
    if name == "llama":  # its file has no stretch, so one is put in: as GGUF has it, as a list
        plain = replace(loaded.vlm.config.decoder, rope_base=5e5)
        by_rule = Rope(replace(plain, rope_scaling=LLAMA_3_1)).frequencies
        divisors = tuple((Rope(plain).frequencies / by_rule).tolist())
        listed = replace(plain, rope_scaling=RopeScaling("factors", factors=divisors))
        vlm = VLM(replace(loaded.vlm.config, decoder=listed))
        vlm.load_state_dict(loaded.vlm.state_dict())
        loaded.vlm = vlm.requires_grad_(False)
    (tmp_path / "out").mkdir()
    write_transformers(loaded, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    rope = again.config.rope_parameters
    assert rope["rope_type"] == ("llama3" if name == "llama" else "default")
    ids = random_ids(60)
    ours = visavis.Model.of(loaded).trace(ids.tolist()).logits
    assert_close(torch.from_numpy(ours), again(ids[None]).logits[0], f"{name} from GGUF")


def test_what_no_class_has_is_named(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"embedding head.*--to native"):
        exported(folder, tmp_path / "out")


@torch.no_grad()
def test_llava_next(tmp_path: Path) -> None:
    save_next(tmp_path / "in")
    ours = exported(tmp_path / "in", tmp_path / "out")
    assert_written(tmp_path / "out", ours, "LLaVA-NeXT")


@torch.no_grad()
def test_llava_onevision(tmp_path: Path) -> None:
    """Its whole processor needs torchvision for videos, so the one that wrote the source asks."""
    _, processor = save_onevision(tmp_path / "in")
    ours = exported(tmp_path / "in", tmp_path / "out")
    peer = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    images = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert images.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints
    picked = picture(1, (90, 61))
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=rendered, images=[picked], return_tensors="pt")
    inputs["pixel_values"] = images(picked, return_tensors="pt")["pixel_values"]
    trace = ours.trace({"image": picked, "text": "What is this?"})
    assert trace.token_ids.tolist() == inputs["input_ids"][0].tolist()
    assert_close(torch.from_numpy(trace.logits), peer(**inputs).logits[0], "OneVision")
