"""LLaVA 1.6, NeXT and OneVision in their original layout against the formulas of their code, which
`anyres_reference.py` writes down again: views, tokens and logits of pictures and videos.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

import visavis
from tests.checkpoints.anyres_files import LONG, SQUARE
from tests.checkpoints.llava_files import save_original, save_tower, tiny_peer
from tests.checkpoints.transformers_files import IMAGE_SIZE, VISION, fast_tokenizer
from tests.fakes import picture
from tests.parity.anyres_reference import Original
from tests.parity.peers import assert_close
from tests.parity.test_llava_original import CLIP, SYSTEM

pytestmark = pytest.mark.parity

QUESTION = "What is this?"
ODD = VISION | {
    "patch_size": 10
}  # three patches a side and two pixels lost, as SigLIP's 27 and six
SIGLIP = SiglipImageProcessorPil(size=SQUARE, resample=3)
NEXT = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]  # width, height in tiles
FIRST_FOUR = [(wide, high) for wide in (1, 2) for high in (1, 2)]
UNPAD = {"mm_patch_merge_type": "spatial_unpad"}
VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "anyres, vicuna": lambda: {"aspect": "anyres", **UNPAD},
    "anyres_max_2, qwen2, siglip, range": lambda: {
        "aspect": "anyres_max_2",
        "image_grid_pinpoints": "(1x1),...,(2x2)",
        "grids": FIRST_FOUR,
        "text": Qwen2Config(**LONG, tie_word_embeddings=True),
        "vision": SiglipVisionConfig(**ODD, vision_use_head=False),
        **UNPAD,
    },
    "anyres, mistral, listed in text": lambda: {
        "aspect": "anyres",
        "image_grid_pinpoints": "[(32, 64), (64, 32), (64, 64), (96, 32), (32, 96)]",
        "text": MistralConfig(**LONG),
        **UNPAD,
    },
    "anyres, flat": lambda: {"aspect": "anyres"},
    "anyres, spatial": lambda: {"aspect": "anyres", "mm_patch_merge_type": "spatial"},
    "pad, newline": lambda: {"aspect": "pad", **UNPAD},
}
SIZES = [(40, 30), (30, 70), (100, 33), (33, 100), (64, 64), (9, 9), (200, 90), (91, 200)]


def save(
    folder: Path,
    aspect: str,
    *,
    grids: Any = NEXT,
    text: Any = None,
    vision: Any = None,
    **settings: Any,
) -> Original:
    """Write a folder; return what its code computes."""
    siglip = isinstance(vision, SiglipVisionConfig)
    peer = tiny_peer(
        text or LlamaConfig(**LONG),
        vision or CLIPVisionConfig(**ODD),
        select="full" if siglip else "default",
    )
    canvases = [(IMAGE_SIZE * wide, IMAGE_SIZE * high) for wide, high in grids]
    settings["image_aspect_ratio"] = aspect
    settings = {"image_grid_pinpoints": [list(one) for one in canvases]} | settings
    tensors = save_original(folder, peer, **settings)
    newline = torch.randn(32, generator=torch.Generator().manual_seed(5))
    if settings.get("mm_patch_merge_type") == "spatial_unpad":
        save_file(tensors | {"model.image_newline": newline}, folder / "model.safetensors")
    processor = SIGLIP if siglip else CLIP
    save_tower(folder / "vision_tower", peer, processor)
    return Original(peer, processor, newline, grids=canvases, **settings)


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


def compare(model: visavis.Model, reference: Original, prompt: Any, visuals: list[Any]) -> None:
    """Compare the logits of a prompt, whose images became `visuals` in the reference."""
    trace = model.trace(prompt)
    assert [length for _, length in trace.image_slots] == list(map(len, visuals))
    theirs = reference.logits(trace.token_ids.tolist(), trace.image_slots, visuals)
    assert_close(torch.from_numpy(trace.logits), theirs, f"{len(visuals)} of {trace.image_slots}")


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_pictures_of_many_shapes(name: str, tmp_path: Path) -> None:
    reference = save(tmp_path, **VARIANTS[name]())
    model = load(tmp_path, chat_template="vicuna_v1")
    for size in SIZES:
        image = picture(1, size)
        prompt = {"image": image, "text": QUESTION}
        compare(model, reference, prompt, [reference.image(image)])
    several = [picture(n, size) for n, size in enumerate(SIZES[:3])]
    found = [reference.image(image, alone=False) for image in several]
    compare(model, reference, {"image": several, "text": QUESTION}, found)


@torch.no_grad()
def test_ids_and_answer_are_those_of_the_original(tmp_path: Path) -> None:
    """Pieces around <image> tokenised one by one, a beginning only once; then greedy, uncached."""
    reference = save(tmp_path, **VARIANTS["anyres, vicuna"]())
    model = load(tmp_path, chat_template="vicuna_v1")
    images = [picture(1, (90, 61)), picture(2, (30, 70))]
    tokens = [reference.image(image) for image in images]
    tokenizer = fast_tokenizer()
    pieces = f"{SYSTEM} USER: <image>\n<image>\n{QUESTION} ASSISTANT:".split("<image>")
    ids, slots = list(tokenizer(pieces[0])["input_ids"]), []
    for piece, visual in zip(pieces[1:], tokens, strict=True):
        slots.append((len(ids), len(visual)))
        ids += [0] * len(visual) + tokenizer(piece)["input_ids"][1:]
    trace = model.trace({"image": images, "text": QUESTION})
    assert trace.token_ids.tolist() == ids and trace.image_slots == slots
    answer: list[int] = []
    while len(answer) < 8 and not (answer and answer[-1] in model.specials.eot_ids):
        answer.append(int(reference.logits([*ids, *answer], slots, tokens)[-1].argmax()))
    wanted = tokenizer.decode(answer, skip_special_tokens=True)
    assert model.chat(QUESTION, images=images, max_new_tokens=8).text == wanted


@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
@pytest.mark.parametrize("position", ["one_token", "grid", "frame", "no_token"])
@torch.no_grad()
def test_videos(position: str, mode: str, tmp_path: Path) -> None:
    places = {"mm_newline_position": position, "mm_spatial_pool_mode": mode}
    settings = VARIANTS["anyres_max_2, qwen2, siglip, range"]() | places
    reference = save(tmp_path, **settings, mm_spatial_pool_stride=4)  # a setting not looked at
    model = load(tmp_path)
    frames = [picture(number, (50, 41)) for number in range(3)]
    video = visavis.Video(tuple(map(visavis.Image, frames)))
    tokens = reference.video(frames)
    compare(model, reference, {"video": video, "text": QUESTION}, [tokens])
    image = picture(9, (90, 61))
    both = {"image": image, "video": video, "text": QUESTION}
    compare(model, reference, both, [reference.image(image, alone=False), tokens])
    assert model.chat(QUESTION, images=[video], max_new_tokens=2).usage.prompt_tokens > len(tokens)


def test_a_video_without_a_newline(tmp_path: Path) -> None:
    reference = save(tmp_path, "anyres", mm_patch_merge_type="spatial")
    frames = [picture(number, (32, 32)) for number in range(2)]
    video = visavis.Video(tuple(map(visavis.Image, frames)))
    prompt = {"video": video, "text": QUESTION}
    with torch.no_grad():
        compare(
            load(tmp_path, chat_template="vicuna_v1"), reference, prompt, [reference.video(frames)]
        )


@torch.no_grad()
def test_vectors_of_a_mixed_batch(tmp_path: Path) -> None:
    reference = save(tmp_path, **VARIANTS["anyres_max_2, qwen2, siglip, range"]())
    model = load(tmp_path)
    first, second, third = (picture(n, SIZES[n]) for n in (1, 2, 3))
    frames = [picture(number, (50, 41)) for number in range(2)]
    items: list[Any] = [
        {"image": first, "text": "red"},
        "a longer text alone",
        {"image": [second, third]},
        {"video": visavis.Video(tuple(map(visavis.Image, frames))), "text": "what happens"},
    ]
    vectors = model.embed(items)
    assert np.allclose(vectors, np.concatenate([model.embed([one]) for one in items]), atol=1e-5)
    bos = [256]
    red = fast_tokenizer()("red")["input_ids"][1:]
    tokens = reference.image(first)
    ids = [*bos, *[0] * len(tokens), *red]
    embeddings = reference.peer.get_input_embeddings()(torch.tensor(ids))
    embeddings[1 : 1 + len(tokens)] = tokens
    hidden = reference.peer.model.language_model(inputs_embeds=embeddings[None])
    last = torch.nn.functional.normalize(hidden.last_hidden_state[0, -1], dim=0)
    assert_close(torch.from_numpy(vectors[0]), last, "a picture and a word")
