"""EmbeddingGemma 2 against transformers: ids, pixels, vectors of texts, images and both; export;
what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EmbeddingGemma2Model

import visavis
from tests.parity.embedding_gemma2_files import Peer
from tests.parity.peers import assert_close
from tests.pictures import scene
from visavis.checkpoints.native import write_native
from visavis.checkpoints.transformers.export import write_transformers
from visavis.errors import CheckpointError, InputError
from visavis.processing.image_processor import pixels_of

pytestmark = pytest.mark.parity

ITEMS: list[tuple[str, tuple[Any, ...]]] = [
    ("a cat", ()),
    ("", (scene(97, 61, 0),)),
    ("two dogs run over a green field, and nobody knows why", ()),
    ("a flower", (scene(30, 90, 1),)),
    ("both", (scene(64, 64, 2), scene(200, 40, 3))),
    ("", (scene(300, 9, 4),)),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Peer, visavis.Model]:
    folder = tmp_path_factory.mktemp("gemma") / "tiny"
    peer = Peer(folder)
    return folder, peer, visavis.load(folder, precision="f32")


def item(text: str, images: tuple[Any, ...]) -> visavis.Prompt:
    parts: list[Any] = [visavis.Image(one) for one in images]
    return visavis.Prompt.of([*parts, visavis.Text(text)] if text else parts)


def test_ids_and_vectors(made: tuple[Path, Peer, visavis.Model]) -> None:
    _, peer, ours = made
    items = [item(*one) for one in ITEMS]
    together = torch.from_numpy(ours.embed(items))
    for number, (text, images) in enumerate(ITEMS):
        vector, ids = peer.vector(text, images)
        assert list(ours.prepare(items[number]).token_ids) == ids
        assert_close(together[number], vector, f"item {number}")
        alone = ours.embed([items[number]])[0]
        assert np.abs(alone - together[number].numpy()).max() < 1e-6
    assert ours.embedding_dim == 24
    short = ours.embed(items, dim=8)
    cut = together[:, :8] / together[:, :8].norm(dim=1, keepdim=True)
    assert np.abs(short - cut.numpy()).max() < 1e-6


def test_pixels(made: tuple[Path, Peer, visavis.Model]) -> None:
    _, peer, ours = made
    assert ours.processor is not None
    for size in ((97, 61), (30, 90), (64, 64), (300, 9), (9, 300), (1000, 700), (3, 5)):
        image = scene(*size, 5)
        pixels, grid = pixels_of(visavis.Image(image), ours.processor, True)
        theirs = peer.images(images=[image], return_tensors="np")
        places = theirs["image_position_ids"][0]
        kept = places[:, 0] >= 0
        assert (places[kept].max(0) + 1).tolist() == [grid.columns, grid.rows]
        squares = (grid.rows // 2, 2, grid.columns // 2, 2)
        order = np.arange(grid.rows * grid.columns).reshape(squares).transpose(0, 2, 1, 3).ravel()
        levels = (pixels * 0.5 + 0.5) * 255
        assert np.abs(levels - theirs["pixel_values"][0][kept][order] * 255).max() <= 1


def test_instructions_are_tasks(made: tuple[Path, Peer, visavis.Model]) -> None:
    _, peer, ours = made
    found = torch.from_numpy(ours.embed(["a cat"], instruction="search result")[0])
    assert_close(found, peer.vector("task: search result | query: a cat")[0], "instruction")


def test_videos_are_frames_one_after_another(made: tuple[Path, Peer, visavis.Model]) -> None:
    ours = made[2]
    frames = [scene(64, 48, seed) for seed in range(3)]
    prepared = ours.prepare(visavis.Prompt.of([visavis.Video(frames)]))
    assert [count for _, count in prepared.image_slots] == [3 * 63]
    assert np.isfinite(ours.embed([visavis.Video(frames)])).all()


def test_export_comes_back_and_opens_in_the_peer(
    made: tuple[Path, Peer, visavis.Model], tmp_path: Path
) -> None:
    _, peer, ours = made
    items = [item(*one) for one in ITEMS]
    for write, name in ((write_transformers, "theirs"), (write_native, "ours")):
        (tmp_path / name).mkdir()
        write(ours, tmp_path / name)
        again = visavis.load(tmp_path / name, precision="f32")
        assert again.vlm.config == ours.vlm.config and again.processor == ours.processor
        assert again.profile == ours.profile
        assert np.array_equal(again.embed(items), ours.embed(items))
    opened = EmbeddingGemma2Model.from_pretrained(tmp_path / "theirs").state_dict()
    state = peer.model.state_dict()
    assert opened.keys() == state.keys()
    assert all(torch.equal(opened[name], tensor) for name, tensor in state.items())


def test_it_does_not_chat(made: tuple[Path, Peer, visavis.Model]) -> None:
    with pytest.raises(InputError, match="only embeds texts and images"):
        made[2].chat("Hello")


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("text_config", {"num_hidden_layers": 10**7}, "num_hidden_layers"),
        ("text_config", {"embedding_dim": 2**50}, "embedding_dim"),
        ("text_config", {"hidden_size_per_layer_input": 8}, "shape"),
        ("text_config", {"per_layer_config": {"1": 3}}, "1 to 3, expected an object"),
        ("text_config", {"attention_bias": True}, "attention_bias to True"),
        ("vision_config", {"use_clipped_linears": True}, "use_clipped_linears to True"),
        ("vision_config", {"standardize": True}, "standardize to True"),
        ("vision_config", {"pooling_kernel_size": 1000}, "pooling_kernel_size to 1000"),
        ("vision_config", {"position_embedding_size": 64}, "max_soft_tokens to 70"),
        ("vision_config", {"num_key_value_heads": 1}, "num_key_value_heads to 1"),
        ("", {"boi_token_id": 9999}, "tokens around an image"),
        ("", {"image_token_id": -1}, "image_token_id to -1"),
    ],
)
def test_settings_that_do_not_fit(
    part: str,
    changes: dict[str, Any],
    message: str,
    made: tuple[Path, Peer, visavis.Model],
    tmp_path: Path,
) -> None:
    shutil.copytree(made[0], tmp_path / "copy")
    path = tmp_path / "copy/config.json"
    config = json.loads(path.read_text())
    (config[part] if part else config).update(changes)
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        visavis.load(path.parent, precision="f32")
