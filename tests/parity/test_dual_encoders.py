"""CLIP, SigLIP, SigLIP 2 and MetaCLIP 2 as dual encoders against transformers: ids, vectors,
pixels, probabilities; and back into transformers' layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer

import visavis
from tests.checkpoints.dual_encoder_files import KINDS, SIZE, Peer, save_dual_encoder
from tests.parity.peers import assert_close
from tests.pictures import scene
from visavis.checkpoints.transformers.export import write_transformers
from visavis.processing.image_processor import pixels_of

pytestmark = pytest.mark.parity

TEXTS = [
    "a photo of a cat",
    "What is it? It's a DOG, isn't it!",
    "two   dogs run\tover (a) green field",
    "x",
    "über naïve 你好 🙂",
    "...!?",
]
IMAGES = [scene(97, 61, 0), scene(40, 90, 1), scene(SIZE, SIZE, 2), scene(300, 30, 3)]


@dataclass
class Pair:
    folder: Path
    ours: visavis.Model
    peer: Peer


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def pair(kind: str) -> Pair:
        if kind not in made:
            folder = tmp_path_factory.mktemp("duals") / kind.replace(" ", "-")
            peer = save_dual_encoder(folder, kind)
            made[kind] = Pair(folder, visavis.load(folder, precision="f32"), peer)
        return made[kind]

    return pair


def ids(model: visavis.Model, text: str) -> list[int]:
    return list(model.prepare(visavis.Prompt.of(text)).token_ids)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_peer(kind: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(kind)
    for text in TEXTS:
        assert ids(pair.ours, text) == pair.peer.ids([text])[0].tolist(), text


@pytest.mark.parametrize("kind", KINDS)
def test_vectors(kind: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(kind)
    mixed: list[Any] = [part for both in zip(TEXTS, IMAGES, strict=False) for part in both]
    found = torch.from_numpy(pair.ours.embed(mixed))
    number = len(IMAGES)
    assert_close(found[0::2], pair.peer.texts(TEXTS[:number]), f"{kind}: texts")
    assert_close(found[1::2], pair.peer.images(IMAGES), f"{kind}: images")
    alone = np.concatenate([pair.ours.embed([one]) for one in mixed])
    assert np.abs(alone - found.numpy()).max() < 1e-6
    assert np.allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_probabilities(kind: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(kind)
    inputs = pair.peer.image_processor(images=IMAGES, return_tensors="pt")
    logits = pair.peer.model(input_ids=pair.peer.ids(TEXTS), **inputs).logits_per_image
    theirs = logits.sigmoid() if pair.peer.pads else logits.softmax(-1)
    assert_close(torch.from_numpy(pair.ours.classify(IMAGES, TEXTS)), theirs, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels(kind: str, pair_of: Callable[[str], Pair]) -> None:
    pair = pair_of(kind)
    processor = pair.ours.processor
    assert processor is not None
    for image in IMAGES:
        ours, grid = pixels_of(visavis.Image(image), processor, True)
        inputs = pair.peer.image_processor(images=[image], return_tensors="np")
        theirs = inputs["pixel_values"][0]
        if kind == "naflex":
            assert inputs["spatial_shapes"][0].tolist() == [grid.rows, grid.columns]
            theirs = theirs[: len(ours)]
        assert np.abs(ours.reshape(theirs.shape) - theirs).max() * min(processor.std) * 255 <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_export_comes_back_and_opens_in_the_peer(
    kind: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of(kind)
    write_transformers(pair.ours, tmp_path)
    again = visavis.load(tmp_path, precision="f32")
    assert again.vlm.config == pair.ours.vlm.config
    assert again.processor == pair.ours.processor
    state = pair.ours.vlm.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.vlm.state_dict().items())
    peer = Peer(AutoModel.from_pretrained(tmp_path).eval(), *_halves(tmp_path))
    assert type(peer.model) is type(pair.peer.model) or kind == "metaclip 2"
    assert_close(torch.from_numpy(again.embed(TEXTS)), peer.texts(TEXTS), "texts")
    assert_close(torch.from_numpy(again.embed(IMAGES)), peer.images(IMAGES), "images")


def _halves(folder: Path) -> tuple[Any, Any]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return tokenizer, AutoProcessor.from_pretrained(folder, backend="pil").image_processor


def test_native_folders_come_back(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    from visavis.checkpoints.native import write_native

    for kind in ("clip", "naflex"):
        pair, folder = pair_of(kind), tmp_path / kind
        folder.mkdir()
        write_native(pair.ours, folder)
        again = visavis.load(folder, precision="f32")
        items = [*TEXTS, *IMAGES]
        assert np.array_equal(again.embed(items), pair.ours.embed(items))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stands_on_the_side_that_the_tokenizer_names(
    side: str, pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("naflex")
    for file in pair.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["padding_side"] = side
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    peer = Peer(pair.peer.model, AutoTokenizer.from_pretrained(tmp_path), None)
    ours = visavis.load(tmp_path, precision="f32")
    assert ids(ours, "a Cat") == peer.ids(["a Cat"])[0].tolist()
    assert_close(torch.from_numpy(ours.embed(TEXTS)), peer.texts(TEXTS), side)


def test_siglip_2_writes_texts_in_lower_case_whatever_its_files_say(
    pair_of: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pair_of("naflex")
    for file in pair.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    words = json.loads((tmp_path / "tokenizer.json").read_text())
    words["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "GemmaTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    peer = Peer(pair.peer.model, AutoTokenizer.from_pretrained(tmp_path), None)
    ours = visavis.load(tmp_path, precision="f32")
    for text in TEXTS:
        assert ids(ours, text) == peer.ids([text])[0].tolist(), text


def test_videos_are_the_mean_of_their_frames(pair_of: Callable[[str], Pair]) -> None:
    for kind in ("clip", "naflex"):
        ours = pair_of(kind).ours
        frames = [scene(64, 48, seed) for seed in range(3)]
        found = ours.embed([visavis.Video(frames)])[0]
        mean = ours.embed(frames).mean(0)
        assert np.abs(found - mean / np.linalg.norm(mean)).max() < 1e-6
