"""LLaVA's original layout against transformers: the same weights under the original names give the
same logits, ids as LLaVA makes them and pictures padded as it pads them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import visavis
from tests.checkpoints.llava_files import (
    SQUARE,
    original_names,
    save_original,
    save_tower,
    tiny_peer,
)
from tests.checkpoints.transformers_files import IMAGE_SIZE, TEXT, VISION, fast_tokenizer
from tests.fakes import picture
from tests.parity.peers import assert_close, randomized

pytestmark = pytest.mark.parity

QUESTION = "What is this?"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
NUM_PATCHES = (IMAGE_SIZE // VISION["patch_size"]) ** 2
CLIP = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE)


def padded(image: Image.Image) -> Image.Image:
    """Paste a picture into the middle of a square of CLIP's mean colour, as LLaVA 1.5 does."""
    side = max(image.size)
    colour = tuple(int(mean * 255) for mean in CLIP.image_mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def pixels(images: list[Image.Image], processor: Any = CLIP) -> torch.Tensor:
    return processor(images=images, return_tensors="pt")["pixel_values"]


def vicuna_ids(images: int, tokenizer: Any) -> list[int]:
    """Tokenise as LLaVA does: piece by piece around the images, one <bos> in front."""
    text = f"{SYSTEM} USER: " + "<image>\n" * images + f"{QUESTION} ASSISTANT:"
    pieces = [tokenizer(piece)["input_ids"] for piece in text.split("<image>")]
    bos = tokenizer.bos_token_id
    assert all(piece[0] == bos for piece in pieces)
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids += [0] * NUM_PATCHES + piece[1:]
    return ids


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


@torch.no_grad()
def compare(model: visavis.Model, peer: Any, values: torch.Tensor, images: Any, what: str) -> None:
    """Compare the logits of one prompt with its pictures."""
    trace = model.trace({"image": images, "text": QUESTION})
    inputs = {"input_ids": torch.from_numpy(trace.token_ids)[None], "pixel_values": values}
    # Another id stands where the peer looks for its placeholder.
    slots = [at + k for at, length in trace.image_slots for k in range(length)]
    inputs["input_ids"][0, slots] = peer.config.image_token_id
    assert_close(torch.from_numpy(trace.logits), peer(**inputs).logits[0], what)


@torch.no_grad()
def test_llava_1_5_gives_the_same_ids_logits_and_answer(tmp_path: Path) -> None:
    peer = tiny_peer()
    save_original(tmp_path, peer)
    save_tower(tmp_path / "vision_tower", peer)
    model = load(tmp_path)
    images = [picture(1), picture(2, (30, 70))]
    trace = model.trace({"image": images, "text": QUESTION})
    assert trace.token_ids.tolist() == vicuna_ids(2, fast_tokenizer())
    values = pixels([padded(image) for image in images])
    compare(model, peer, values, images, "LLaVA 1.5")
    ids = torch.from_numpy(trace.token_ids)[None]
    ends = list(model.specials.eot_ids)
    found = peer.generate(
        input_ids=ids, pixel_values=values, max_new_tokens=8, do_sample=False, eos_token_id=ends
    )
    answer = fast_tokenizer().decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    assert model.chat(QUESTION, images=images, max_new_tokens=8).text == answer
    vectors = model.embed([{"image": images[0], "text": "red"}, "text alone"])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "square, mistral, layer -1": lambda: {
        "peer": tiny_peer(MistralConfig(**TEXT), layer=-1),
        "settings": {"image_aspect_ratio": "square"},
    },
    "no aspect, qwen2 tied, class token kept": lambda: {
        "peer": tiny_peer(Qwen2Config(**TEXT, tie_word_embeddings=True), select="full"),
        "settings": {"image_aspect_ratio": None, "mm_vision_select_feature": "cls_patch"},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_settings(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]()
    peer = variant["peer"]
    save_original(tmp_path, peer, **variant["settings"])
    save_tower(tmp_path / "vision_tower", peer)
    image = picture(1)
    compare(load(tmp_path), peer, pixels([image]), [image], name)


def test_a_linear_projector(tmp_path: Path) -> None:
    """LLaVA 1.0; its peer has an MLP, made linear by hand: W2 (W1 x) with GELU taken out."""
    peer = tiny_peer()
    projector = peer.model.multi_modal_projector
    projector.act = torch.nn.Identity()
    tensors = save_original(
        tmp_path,
        peer,
        mm_projector_type="linear",
        image_aspect_ratio=None,
        model_type="llava_llama",
        architectures=None,
    )
    first, second = projector.linear_1, projector.linear_2
    kept = {name: t for name, t in tensors.items() if "mm_projector" not in name}
    kept["model.mm_projector.weight"] = (second.weight @ first.weight).detach()
    kept["model.mm_projector.bias"] = (second.weight @ first.bias + second.bias).detach()
    save_file(kept, tmp_path / "model.safetensors")
    save_tower(tmp_path / "vision_tower", peer)
    image = picture(1)
    model = load(tmp_path, chat_template="llava_v1")
    compare(model, peer, pixels([image]), [image], "LLaVA 1.0, linear")


def test_the_towers_last_block_is_cut_off_siglip(tmp_path: Path) -> None:
    """26 of 27 blocks: with the tower in the checkpoint or in a folder of its own."""
    vision = SiglipVisionConfig(**VISION, vision_use_head=False)
    peer = tiny_peer(vision=vision, layer=-2, select="full")
    processor = SiglipImageProcessorPil(size=SQUARE)
    image = picture(1)
    for with_tower in (True, False):
        folder = tmp_path / str(with_tower)
        save_original(folder, peer, with_tower=with_tower, image_aspect_ratio="square")
        save_tower(folder / "vision_tower", peer, processor)
        compare(load(folder), peer, pixels([image], processor), [image], f"SigLIP {with_tower}")


def test_a_tower_in_its_own_folder(tmp_path: Path) -> None:
    peer = tiny_peer(vision=CLIPVisionConfig(**VISION))
    save_original(tmp_path / "llava", peer, with_tower=False, mm_vision_tower="openai/clip")
    save_tower(tmp_path / "tower", peer)
    image = picture(1)
    model = load(tmp_path / "llava", vision_tower=tmp_path / "tower")
    compare(model, peer, pixels([padded(image)]), [image], "tower of its own")


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model."])
def test_a_first_stage_on_its_base(prefix: str, tmp_path: Path) -> None:
    peer = tiny_peer()
    tensors = original_names(peer)
    language_model = LlamaForCausalLM(LlamaConfig(**TEXT))
    randomized(language_model)
    own = {n: t for n, t in tensors.items() if n.startswith(("model.layers", "model.norm"))}
    own |= {n: tensors[n] for n in ("model.embed_tokens.weight", "lm_head.weight")}
    language_model.load_state_dict(own)
    language_model.save_pretrained(tmp_path / "base")
    fast_tokenizer().save_pretrained(tmp_path / "base")
    stage = tmp_path / "stage"
    save_original(stage, peer, with_words=False)
    (stage / "model.safetensors").unlink()
    projector = {
        prefix + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
        if "mm_projector" in name
    }
    torch.save(projector, stage / "mm_projector.bin")
    save_tower(tmp_path / "tower", peer)
    model = load(
        stage, base=tmp_path / "base", vision_tower=tmp_path / "tower", chat_template="vicuna_v1"
    )
    image = picture(1)
    compare(model, peer, pixels([padded(image)]), [image], "first stage")
