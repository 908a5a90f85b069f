"""LLaVA-OneVision-1.5 against the model as its description says, see `onevision15_files.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import visavis
from tests.checkpoints.onevision15_files import PROCESSOR, Peer, save_onevision15
from tests.fakes import picture
from tests.parity.peers import assert_close
from tests.train.test_export import recipe, write_talk
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.transformers.export import write_transformers
from visavis.errors import CheckpointError
from visavis.processing.qwen2_vl import Qwen2VLProcessor
from visavis.train.runner import run_recipe

pytestmark = pytest.mark.parity

Loaded = tuple[Peer, visavis.Model]
SIZES = [(20, 20), (90, 61), (30, 170), (300, 33), (8, 1000)]
QUESTION = "What is\n\nthis?"
CONTENTS: list[list[Any]] = [
    [picture(1, (90, 61)), "red"],
    ["a longer text alone"],
    [picture(2, (30, 170)), picture(3, (41, 40)), "?"],
]


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


@pytest.fixture(scope="module", params=[False, True], ids=["", "tied"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("onevision15")
    return save_onevision15(folder, tied=request.param), load(folder)


def prompt_of(content: list[Any]) -> Any:
    found: list[Any] = []
    for one in content:
        if isinstance(one, list):
            found.append(visavis.Video(tuple(visavis.Image(frame) for frame in one)))
        else:
            found.append(visavis.Text(one) if isinstance(one, str) else visavis.Image(one))
    return found


@torch.no_grad()
def compare(loaded: Loaded, content: list[Any], what: str) -> None:
    """Compare ids, hidden states and logits of one prompt."""
    peer, model = loaded
    ids, embeddings = peer.inputs(content)
    trace = model.trace(prompt_of(content))
    assert trace.token_ids.tolist() == ids, what
    found = peer.language_model(inputs_embeds=embeddings[None], output_hidden_states=True)
    assert_close(torch.from_numpy(trace.hidden), found.hidden_states[-1][0], f"{what}: hidden")
    assert_close(torch.from_numpy(trace.logits), found.logits[0], f"{what}: logits")


def test_text_images_and_videos(loaded: Loaded) -> None:
    one, two, three = picture(1, (90, 61)), picture(2, (30, 170)), picture(3, (33, 33))
    film = [picture(number, (50, 41)) for number in range(3)]
    for content in (
        ["Hello!"],
        *[[picture(1, size), QUESTION] for size in SIZES],
        ["From ", one, " to", three, two, "?"],
        [film, QUESTION],
        [one, "then", film, "or", film[:1], three, "?"],
    ):
        compare(loaded, content, f"{len(content)} parts")


@torch.no_grad()
def test_answers_and_vectors_of_a_mixed_batch(loaded: Loaded) -> None:
    """Decoded with the cache; a batch gives each what it gets alone."""
    peer, model = loaded
    for content in CONTENTS:
        _, embeddings = peer.inputs(content)
        ids = peer.language_model.generate(
            inputs_embeds=embeddings[None],
            attention_mask=torch.ones(1, len(embeddings), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=list(model.specials.eot_ids),
        )[0]
        expected = model.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        reply = model.chat(content[-1], images=content[:-1], max_new_tokens=12)
        assert reply.text == expected
    items = [prompt_of(content) for content in CONTENTS]
    vectors = model.embed(items)
    assert np.allclose(vectors, np.concatenate([model.embed([one]) for one in items]), atol=1e-5)
    for content, vector in zip(CONTENTS, vectors, strict=True):
        _, embeddings = peer.inputs(content, plain=True)
        found = peer.language_model(inputs_embeds=embeddings[None], output_hidden_states=True)
        last = torch.nn.functional.normalize(found.hidden_states[-1][0, -1], dim=0)
        assert_close(torch.from_numpy(vector), last, f"vector of {content[-1]}")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels(size: tuple[int, int], loaded: Loaded) -> None:
    processor = loaded[1].processor
    assert processor is not None
    ours, grid = Qwen2VLProcessor(processor).pixels(picture(1, size))
    found = PROCESSOR(images=[picture(1, size)], return_tensors="np")
    assert found["image_grid_thw"].tolist() == [[grid.frames, grid.rows, grid.columns]]
    assert np.abs(ours - found["pixel_values"]).max() <= 1 / 255 / 0.26


@pytest.mark.parametrize("tied", [False, True])
def test_written_again(tied: bool, tmp_path: Path) -> None:
    """The folder has the names of the hub and loads to the same model; both kinds of names do."""
    peer, out = save_onevision15(tmp_path / "in", tied=tied), tmp_path / "out"
    model = load(tmp_path / "in")
    out.mkdir()
    assert not write_transformers(load_checkpoint(tmp_path / "in", precision="f32"), out).lost
    written = load_file(out / "model.safetensors")
    assert written.keys() == peer.tensors().keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in peer.tensors().items())
    again = load(out)
    assert again.vlm.config == model.vlm.config and again.profile == model.profile
    item = prompt_of([picture(1, (90, 61)), QUESTION])
    assert (again.trace(item).logits == model.trace(item).logits).all()
    newer = {"visual.": "model.visual.", "model.": "model.language_model."}
    renamed = {}
    for name, tensor in written.items():
        part = next((part for part in newer if name.startswith(part)), "")
        renamed[newer.get(part, "") + name.removeprefix(part)] = tensor
    save_file(renamed, out / "model.safetensors")
    assert (load(out).trace(item).logits == model.trace(item).logits).all()


CONFIG, IMAGES = "config.json", "preprocessor_config.json"
DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "tower": (
        CONFIG,
        lambda c: c["vision_config"].update(model_type="siglip_vision_model"),
        "vision_config.model_type to 'siglip_vision_model', expected 'rice_vit'",
    ),
    "two frames a patch": (
        CONFIG,
        lambda c: c["vision_config"].update(temporal_patch_size=2),
        "temporal_patch_size to 2, expected 1",
    ),
    "language model": (
        CONFIG,
        lambda c: c["text_config"].update(model_type="llama"),
        "text_config.model_type to 'llama', expected 'LLaVAOneVision1_5_text'",
    ),
    "heads": (
        CONFIG,
        lambda c: c["vision_config"].update(num_heads=5),
        "expected a multiple of 4 for each of 5 heads",
    ),
    "layers": (CONFIG, lambda c: c["vision_config"].update(depth=10**7), "depth to 10000000"),
    "merger": (
        CONFIG,
        lambda c: c["vision_config"].update(text_hidden_size=64),
        "vision_config.text_hidden_size to 64, expected 32",
    ),
    "stretch": (
        CONFIG,
        lambda c: c["text_config"].update(rope_scaling={"type": "yarn"}),
        "rope_type to 'yarn', expected 'default'",
    ),
    "placeholder": (CONFIG, lambda c: c.update(image_token_id=999), "image_token_id to 999"),
    "the next generation": (
        CONFIG,
        lambda c: c.update(model_type="llavaonevision2"),
        "model_type 'llavaonevision2'",
    ),
    "another processor's patches": (
        IMAGES,
        lambda c: c.update(temporal_patch_size=2),
        "temporal_patch_size to 2, expected 1, as the vision tower",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    save_onevision15(tmp_path)
    file, change, message = DAMAGE[name]
    data = json.loads((tmp_path / file).read_text())
    change(data)
    (tmp_path / file).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    save_onevision15(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["visual.class_pos_emb"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing visual\.class_pos_emb"):
        load(tmp_path)


def test_adapters_are_trained(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_onevision15(base)
    write_talk(tmp_path, pictures=True)
    made = recipe(base, lora={"rank": 4}, train={"lora": 0.05})
    trained = run_recipe(made, tmp_path, tmp_path / "out")
    item = {"image": picture(1), "text": "What is this?"}
    merged = load(trained).trace(item)
    assert abs(merged.logits - load(base).trace(item).logits).max() > 0.01
    again = load(trained / "adapter", base=base).trace(item)
    assert abs(again.logits - merged.logits).max() < 1e-4
