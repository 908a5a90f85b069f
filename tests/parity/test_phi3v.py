"""Phi-3.5-vision: a folder as published, loaded whole, against a plain re-derivation.

The language model and the tower of the peer are stock; tokenising, tiles, separators and
projection are written out from the published formulas (see `tests/checkpoints/phi3v_files.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import visavis
from tests.checkpoints.phi3v_files import published_inputs, save_phi3v, tiny_tower
from tests.fakes import picture
from tests.parity.peers import TOLERANCE, assert_close
from tests.processing.test_phi3v import reference
from visavis.checkpoints.phi3v import name_table, vlm_config
from visavis.checkpoints.weight_mapping import to_theirs
from visavis.cli import app
from visavis.errors import CheckpointError
from visavis.processing.phi3v import Phi3VProcessor

__all__ = ["tiny_tower"]  # a fixture, used by every test
pytestmark = pytest.mark.parity

SIZES = [(48, 36), (36, 48), (90, 20)]


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


def published(model: visavis.Model, image: Image.Image) -> tuple[torch.Tensor, int, int]:
    """Return a picture's views, rows and columns by the published rules."""
    assert model.processor is not None
    shape = Phi3VProcessor(model.processor).grid(image.size)
    return reference(image, model.processor), shape.rows, shape.columns


@torch.no_grad()
@pytest.mark.parametrize("num_crops", [1, 4, 16])
def test_a_prompt_with_a_picture(num_crops: int, tmp_path: Path) -> None:
    peer = save_phi3v(tmp_path, num_crops)
    model = load(tmp_path)
    for number, size in enumerate(SIZES):
        image = picture(number, size)
        trace = model.trace({"image": image, "text": "What is this?"})
        text = "<|user|>\n<|image_1|>\nWhat is this?<|end|>\n<|assistant|>\n"
        ids, embeddings = published_inputs(peer, text, [published(model, image)])
        assert trace.token_ids.tolist() == ids
        theirs = peer(inputs_embeds=embeddings, output_hidden_states=True)
        assert_close(torch.from_numpy(trace.hidden), theirs.hidden_states[-1][0], f"{size} hidden")
        assert_close(torch.from_numpy(trace.logits), theirs.logits[0], f"{size} logits")


@torch.no_grad()
def test_a_conversation_about_two_pictures(tmp_path: Path) -> None:
    peer = save_phi3v(tmp_path)
    model = load(tmp_path)
    first, second = picture(1, (48, 36)), picture(2, (30, 80))
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
    ]
    reply = model.chat("Which?", images=[first, second], history=history, max_new_tokens=6)
    text = (
        "<|system|>\nBe brief.<|end|>\n<|user|>\nHello.<|end|>\n<|assistant|>\nHi.<|end|>\n"
        "<|user|>\n<|image_1|>\n<|image_2|>\nWhich?<|end|>\n<|assistant|>\n"
    )
    pictures = [published(model, image) for image in (first, second)]
    ids, embeddings = published_inputs(peer, text, pictures)
    assert reply.usage.prompt_tokens == len(ids)
    answer: list[int] = []
    ends = model.specials.eot_ids
    while len(answer) < 6 and not (answer and answer[-1] in ends):
        answer.append(int(peer(inputs_embeds=embeddings).logits[0, -1].argmax()))
        token = peer.model.embed_tokens(torch.tensor([[answer[-1]]]))
        embeddings = torch.cat((embeddings, token), 1)
    kept = [number for number in answer if number not in ends]
    assert reply.text == model.tokenizer.decode(kept, skip_special_tokens=True)


@torch.no_grad()
def test_vectors_are_the_last_token_s(tmp_path: Path) -> None:
    """A mixed batch, packed, against the peer's single items."""
    peer = save_phi3v(tmp_path)
    model = load(tmp_path)
    image = picture(3, (36, 48))
    vectors = model.embed([{"image": image, "text": "Say it."}, "a cat", {"image": image}])
    for vector, text in zip(vectors, ("<|image_1|>Say it.", "a cat", "<|image_1|>"), strict=True):
        pictures = [published(model, image)] if "image" in text else []
        _, embeddings = published_inputs(peer, text, pictures)
        hidden = peer.model(inputs_embeds=embeddings).last_hidden_state[0, -1]
        assert_close(torch.from_numpy(vector), hidden / hidden.norm(), repr(text))


def test_every_tensor_has_its_published_name(tmp_path: Path) -> None:
    save_phi3v(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ours = vlm_config(config)
    state = load(tmp_path).vlm.state_dict()
    width = ours.tower.width if ours.tower else 0
    sizes = {"width": width, "q": 32, "kv": 32, "ffn": 48}
    written = to_theirs(state, name_table(config, ours), lambda _: sizes)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.vision_embed_tokens.wte.weight"]  # the token embeddings once more
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(written[name], tensor), name


def test_context_ends_where_other_frequencies_begin(tmp_path: Path) -> None:
    save_phi3v(tmp_path)
    assert load(tmp_path).context_length == 512


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("config", {"img_processor": {"model_name": "tiny/other"}}, "model_name"),
        ("config", {"embd_layer": {"use_hd_transform": False}}, "use_hd_transform"),
        ("config", {"rope_scaling": {"type": "yarn"}}, "rope_type"),
        ("config", {"embd_layer": {"hd_transform_order": "glb_sub"}}, "hd_transform_order"),
        ("config", {"img_processor": {"layer_idx": 9}}, "layer_idx"),
        ("config", {"img_processor": {"type_feature": "cls_patch"}}, "type_feature"),
        ("config", {"img_processor": {"image_dim_out": 1024}}, "image_dim_out"),
        ("preprocessor_config", {"image_processor_type": "CLIPImageProcessor"}, "Phi3VImage"),
        ("preprocessor_config", {"num_crops": 0}, "num_crops"),
    ],
)
def test_other_variants_are_refused(file: str, changes: Any, named: str, tmp_path: Path) -> None:
    save_phi3v(tmp_path)
    path = tmp_path / f"{file}.json"
    data = json.loads(path.read_text())
    for name, value in changes.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=named):
        load(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    save_phi3v(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.vision_embed_tokens.sub_GN"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing model\.vision_embed_tokens\.sub_GN"):
        load(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        load(tmp_path)


def test_tolerance_would_see_a_swapped_separator(tmp_path: Path) -> None:
    """The two marks differ in the model's output by far more than the tests allow."""
    save_phi3v(tmp_path)
    model = load(tmp_path)
    question = {"image": picture(1), "text": "What is this?"}
    before = model.trace(question).logits
    assert model.vlm.separators is not None
    marks = model.vlm.separators
    marks.line.data, marks.middle.data = marks.middle.data, marks.line.data
    model.image_encoder.cache = type(model.image_encoder.cache)()
    assert np.abs(model.trace(question).logits - before).max() > 100 * TOLERANCE


def test_inspect_names_what_is_missing(tmp_path: Path) -> None:
    save_phi3v(tmp_path)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert "Phi-3.5-vision" in shown.output and "missing" not in shown.output
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "missing lm_head.weight" in CliRunner().invoke(app, ["inspect", str(tmp_path)]).output
