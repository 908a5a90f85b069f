"""TinyLLaVA's layouts, whole, against stock parts composed by hand: ids, logits, answers, vectors.

Each layout is loaded, asked with pictures and without, embedded in a batch of mixed lengths, and
decoded with a cache; the peer computes one prompt at a time without.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    GemmaConfig,
    LlamaConfig,
    PhiConfig,
    Qwen2Config,
    SiglipVisionConfig,
    StableLmConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import visavis
from tests.checkpoints import tinyllava_files as files
from tests.checkpoints.tinyllava_files import DINOV2, Peer
from tests.checkpoints.transformers_files import IMAGE_SIZE, TEXT, VISION, fast_tokenizer
from tests.fakes import picture
from tests.parity.peers import assert_close
from tests.parity.test_openelm import TINY, derived_from, random_state
from tests.parity.test_tinyllava_connectors import random_state as random_connector
from tests.parity.test_tinyllava_connectors import resampler, resampler_shapes
from visavis.checkpoints.tinyllava import config
from visavis.checkpoints.transformers.language_models import decoder_config

pytestmark = pytest.mark.parity

SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
CLIP = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE)
SIGLIP = SiglipImageProcessorPil(size=SQUARE)
PATCHES = (IMAGE_SIZE // VISION["patch_size"]) ** 2
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
QUESTION = "What is this?"


def clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(**VISION)


def siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(**VISION, vision_use_head=False)


def dino() -> Dinov2Config:
    return Dinov2Config(**DINOV2)


FAMILIES: dict[str, tuple[Callable[[], Peer], int]] = {  # the peer, and tokens of a picture
    "TinyLlama, CLIP": (lambda: Peer(LlamaConfig(**TEXT), clip()), PATCHES),
    "StableLM-2, SigLIP without its first patch": (
        lambda: Peer(StableLmConfig(**TEXT, use_qkv_bias=True), siglip()),
        PATCHES - 1,
    ),
    "Qwen2, tied, SigLIP without its first patch": (
        lambda: Peer(Qwen2Config(**TEXT, tie_word_embeddings=True), siglip()),
        PATCHES - 1,
    ),
    "Gemma, CLIP": (lambda: Peer(GemmaConfig(**TEXT, head_dim=8), clip()), PATCHES),
    "Phi-2, CLIP": (lambda: Peer(PhiConfig(**TEXT), clip()), PATCHES),
    "TinyLlama, DINOv2": (lambda: Peer(LlamaConfig(**TEXT), dino()), PATCHES),
    "TinyLlama, CLIP and DINOv2": (lambda: Peer(LlamaConfig(**TEXT), clip(), dino()), 2 * PATCHES),
}


def pixels(images: list[Image.Image], processor: Any) -> Tensor | None:
    return processor(images=images, return_tensors="pt")["pixel_values"] if images else None


def prompt_ids(tokens: int, images: int) -> list[int]:
    """Tokenise as TinyLLaVA does: piece by piece around the images, one <bos> in front."""
    tokenizer = fast_tokenizer()
    text = f"{SYSTEM} USER: " + "<image>\n" * images + f"{QUESTION} ASSISTANT:"
    pieces = [tokenizer(piece)["input_ids"] for piece in text.split("<image>")]
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [0] * tokens + piece[1:]
    return ids


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


@torch.no_grad()
def compare(
    model: visavis.Model,
    peer: Any,
    tokens: int,
    what: str,
    processor: Any = CLIP,
    before: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> None:
    """Compare ids and logits with a picture, the greedy answer, and a mixed batch's vectors."""
    images = [picture(1)]
    trace = model.trace({"image": images, "text": QUESTION})
    assert trace.token_ids.tolist() == prompt_ids(tokens, 1)
    [(start, length)] = trace.image_slots
    assert length == tokens
    slots = list(range(start, start + length))
    values = pixels([before(one) for one in images], processor)
    ids = torch.from_numpy(trace.token_ids)
    theirs = peer.logits(ids, slots, values)
    assert_close(torch.from_numpy(trace.logits), theirs, what)
    answer: list[int] = []
    for _ in range(6):  # without a cache
        following = peer.logits(
            torch.cat((ids, torch.tensor(answer, dtype=ids.dtype))), slots, values
        )[-1]
        answer.append(int(following.argmax()))
        if answer[-1] in model.specials.eot_ids:
            break
    wanted = fast_tokenizer().decode(answer, skip_special_tokens=True)
    assert model.chat(QUESTION, images=images, max_new_tokens=6).text == wanted
    items = [{"image": picture(2), "text": "red"}, "a longer text alone", {"image": picture(3)}]
    together = model.embed(items)
    alone = np.concatenate([model.embed([item]) for item in items])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_repository_of_each_family(name: str, tmp_path: Path) -> None:
    """Layout (d), one file."""
    make, tokens = FAMILIES[name]
    peer = make()
    settings = {}
    if "Qwen2" in name:
        settings["llm_model_name_or_path"] = "/checkpoints/Qwen2-0.5B"
    files.save_repository(tmp_path, peer, **settings)
    processor = SIGLIP if "SigLIP" in name else CLIP
    if name.endswith(", DINOv2"):
        files.write_json(tmp_path / "preprocessor_config.json", CLIP.to_dict())
    model = load(tmp_path)
    assert model.vlm.config.drop_first_token == ("SigLIP" in name)
    compare(model, peer, tokens, name, processor)


def test_a_finetuned_model_in_shards(tmp_path: Path) -> None:
    """Layout (b), and pictures that are padded."""
    peer = Peer()
    files.save_repository(tmp_path, peer, shards=3, image_aspect_ratio="pad")
    compare(load(tmp_path), peer, PATCHES, "shards", before=padded)


def padded(image: Image.Image) -> Image.Image:
    """Paste a picture into the middle of a square of the mean colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in CLIP.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def test_a_stage(tmp_path: Path) -> None:
    """Layout (a); which chat format it was trained with, no file says."""
    peer = Peer(Qwen2Config(**TEXT, tie_word_embeddings=True), siglip())
    files.save_stage(tmp_path, peer, llm_model_name_or_path="Qwen/Qwen2-0.5B")
    assert load(tmp_path).profile.chat_template == ""
    model = load(tmp_path, chat_template="tinyllava_qwen2_base")
    compare(model, peer, PATCHES - 1, "a stage", SIGLIP)


def test_a_lora_stage_is_merged(tmp_path: Path) -> None:
    """Layout (c): the base's linears under the names that PEFT leaves, the adapter at the root."""
    peer = Peer()
    linears = [n for n, m in peer.language_model.named_modules() if isinstance(m, nn.Linear)]
    targets = [f"language_model.{name}" for name in linears if name != "lm_head"]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    files.save_stage(tmp_path, peer, wrapped=set(targets))
    torch.manual_seed(0)
    wrapped: Any = get_peft_model(peer, settings)  # type: ignore[arg-type]
    wrapped.save_pretrained(tmp_path)
    model = load(tmp_path)
    compare(model, wrapped.base_model.model, PATCHES, "LoRA stage")
    assert model.profile.chat_template == "tinyllava_llama"


def test_openelm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layout (d); its language model is the re-derivation, transformers has none."""
    text = TINY | {"model_type": "openelm", "model_dim": TEXT["hidden_size"], "vocab_size": 264}
    decoder = decoder_config(text)
    peer, state = Peer(), random_state(decoder)
    files.save_repository(tmp_path, peer, text_config=text)
    replace_tensors(tmp_path, "language_model.", state)

    def logits(ids: Tensor, slots: list[int], values: Tensor) -> Tensor:
        x = state["transformer.token_embeddings.weight"][ids]
        x[slots] = peer.image_tokens(values).flatten(0, 1)
        return derived_from(state, x, list(decoder.num_heads), decoder.head_dim)[-1]  # type: ignore

    monkeypatch.setattr(peer, "logits", logits)
    compare(load(tmp_path), peer, PATCHES, "OpenELM")


def test_a_resampler(tmp_path: Path) -> None:
    """Layout (d); seven tokens, whatever the number of patches."""
    peer, state = Peer(), random_connector(resampler_shapes())
    files.save_repository(tmp_path, peer, connector_type="resampler", num_queries=7)
    replace_tensors(tmp_path, "connector._connector.", state)
    peer.connector.inner = [lambda batch: torch.stack([resampler(state, one) for one in batch])]
    compare(load(tmp_path), peer, 7, "resampler")


def replace_tensors(folder: Path, prefix: str, state: dict[str, Tensor]) -> None:
    """Put a part's tensors in place of those that are there."""
    path = folder / "model.safetensors"
    kept = {name: t for name, t in load_file(path).items() if not name.startswith(prefix)}
    save_file(kept | {prefix + name: tensor for name, tensor in state.items()}, path)


OLD: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (lambda: LlamaConfig(**TEXT), "tinyllava_llama"),
    "stablelm": (lambda: StableLmConfig(**TEXT, use_qkv_bias=True), "tinyllava_phi"),
    "phi": (lambda: PhiConfig(**TEXT), "tinyllava_phi"),
}


@pytest.mark.parametrize("kind", OLD)
def test_an_older_repository(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layout (e): SigLIP without its last block and with every patch; Phi's head has no bias."""
    make, turns = OLD[kind]
    peer = Peer(make(), SiglipVisionConfig(**VISION, vision_use_head=False))
    if kind == "phi":
        torch.nn.init.zeros_(peer.language_model.lm_head.bias)
    tower = siglip().to_dict() | {"model_type": "siglip_vision_model"}
    monkeypatch.setattr(config, "TOWERS", {"google/siglip-so400m-patch14-384": tower})
    names = {"norm_eps": 1e-5, "rope_pct": 0.25} if kind == "stablelm" else {}
    files.save_old(tmp_path, peer, mm_vision_tower="bczhou/TinyLLaVA-2.0B-SigLIP", **names)
    model = load(tmp_path)
    assert model.profile.chat_template == turns

    def every_patch(values: Tensor) -> Tensor:
        states = peer.vision_tower.inner[0](values, output_hidden_states=True).hidden_states
        return peer.connector(states[-2])  # of all blocks: what the last but one gives

    monkeypatch.setattr(peer, "image_tokens", every_patch)
    compare(model, peer, PATCHES, f"older, {kind}", SIGLIP, before=padded_grey)


def padded_grey(image: Image.Image) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
