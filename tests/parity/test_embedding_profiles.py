"""Embedders made of Qwen2-VL, by profile: the stock class's last hidden state of their prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import visavis
from tests.parity.peers import assert_close
from tests.parity.qwen2_vl_files import IMAGE, noise, peer_inputs, save_qwen2_vl
from visavis.processing.qwen2_vl import Qwen2VLProcessor

pytestmark = pytest.mark.parity

CHATML = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
IMAGE_SIZE = (30, 41)
INSTRUCTION = "Find an image that matches the given text."
# By profile: the prompts of an image, and of a text with an instruction; tokens of the image;
# whether positions have three axes.
PROMPTS: dict[str, tuple[str, str, int, bool]] = {
    "gme": (
        CHATML.format("You are a helpful assistant.", "<|vision_start|>[IMG]<|vision_end|>")
        + "<|endoftext|>",
        CHATML.format(INSTRUCTION, "a cat") + "<|endoftext|>",
        3168,  # 256 tokens of 28 x 28 pixels are 3136 of 8 x 8, and sides are rounded up
        True,
    ),
    "b3": ("[IMG]\n", f"{INSTRUCTION} a cat\n", 54, False),
    "unime-v2": ("[IMG] ", f"{INSTRUCTION} a cat", 25, False),
}
PROMPTS["ops-mm"] = PROMPTS["gme"]


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


@torch.no_grad()
@pytest.mark.parametrize("name", ["ops-mm", "b3", "unime-v2"])
def test_vectors_are_the_last_state_of_the_prompt(name: str, tmp_path: Path) -> None:
    peer = save_qwen2_vl(tmp_path, max_position_embeddings=8192)
    model = load(tmp_path, profile=name)
    of_image, of_text, count, grid = PROMPTS[name]
    image = noise(IMAGE_SIZE, 1)
    assert model.processor is not None
    pixels, shape = Qwen2VLProcessor(model.processor).pixels(image)
    assert shape.rows * shape.columns == 4 * count
    before, after = of_image.split("[IMG]")
    ids = model.tokenizer.encode(before, add_special_tokens=False).ids + [IMAGE] * count
    ids += model.tokenizer.encode(after, add_special_tokens=False).ids
    text_ids = model.tokenizer.encode(of_text, add_special_tokens=False).ids
    seen = peer_inputs(ids, [(torch.from_numpy(pixels), shape)], grid=grid)
    for item, instruction, inputs in (
        (image, None, seen),
        ("a cat", INSTRUCTION, peer_inputs(text_ids, [])),
    ):
        last = peer(**inputs, output_hidden_states=True).hidden_states[-1][0, -1]
        vector = torch.from_numpy(model.embed([item], instruction=instruction)[0])
        assert_close(vector, torch.nn.functional.normalize(last, dim=0), f"{name}: {item}")


def test_the_config_of_gme_says_how_it_embeds(tmp_path: Path) -> None:
    save_qwen2_vl(tmp_path)
    plain = load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_gme_qwen2vl.GmeQwen2VL"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, named = load(tmp_path), load(tmp_path, profile="gme")
    assert model.profile == named.profile and model.processor == named.processor
    assert model.fingerprint == named.fingerprint != plain.fingerprint
    assert model.profile.text_form and not plain.profile.text_form
    assert load(tmp_path, profile="plain").profile.text_form == ""
