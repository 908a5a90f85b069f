"""ColPali and its kin: vectors, ids and scores of the stock classes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import visavis
from tests.parity.multi_vector_files import SAVE, Peer
from tests.parity.peers import TOLERANCE
from tests.parity.qwen2_vl_files import noise
from visavis.checkpoints.inspect import model_parts
from visavis.checkpoints.transformers.export import write_transformers
from visavis.errors import CheckpointError, InputError
from visavis.inputs import Prompt

pytestmark = pytest.mark.parity

QUERIES = ["Where is the cat?", "déjà  vu\n2", "x"]
IMAGES = [noise((30, 41), 1), noise((64, 20), 2), noise((33, 33), 3)]
Pair = tuple[visavis.Model, Peer]


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


@pytest.fixture(scope="module", params=SAVE)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp(request.param)
    peer = SAVE[request.param](folder)
    return load(folder), peer


def test_vectors_are_those_of_the_stock_class(pair: Pair) -> None:
    model, peer = pair
    items = [*QUERIES, *IMAGES]
    mixed = [items[i] for i in (3, 0, 4, 1, 2, 5)]
    found = model.embed_multi(mixed)
    for item, vectors in zip(mixed, found, strict=True):
        expected = peer.embed(item)
        assert vectors.dtype == np.float32 and vectors.shape == expected.shape
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        difference = abs(vectors - expected).max()
        print(f"{type(model).__name__} {str(item)[:20]}: {difference:.1e}")
        assert difference <= TOLERANCE
        alone = model.embed_multi(item)
        assert len(alone) == 1 and abs(alone[0] - vectors).max() <= 1e-6


def test_ids_are_those_of_the_processor(pair: Pair) -> None:
    model, peer = pair
    for item in (*QUERIES, *IMAGES):
        assert model.prepare(Prompt.of(item)).token_ids == peer.ids(item)
    document = model.prepare(Prompt.of("Where?"), document=True)
    query = model.prepare(Prompt.of("Where?"))
    assert len(document.token_ids) <= len(query.token_ids) - 10


def test_scores_are_those_of_the_processor(pair: Pair) -> None:
    model, peer = pair
    queries, documents = model.embed_multi(QUERIES), model.embed_multi(IMAGES)
    theirs = peer.processor.score_retrieval(
        [torch.from_numpy(one) for one in queries], [torch.from_numpy(one) for one in documents]
    )
    ours = [[visavis.maxsim(query, document) for document in documents] for query in queries]
    assert np.allclose(ours, theirs.numpy(), atol=TOLERANCE)
    assert np.ptp(ours, axis=1).min() > 0.01, "all images score alike"


def test_it_is_written_as_the_stock_class_reads_it(pair: Pair, tmp_path: Path) -> None:
    model, peer = pair
    assert not write_transformers(model, tmp_path).lost
    again = load(tmp_path)
    assert again.vlm.config == model.vlm.config and again.profile == model.profile
    assert again.processor == model.processor
    for item in (QUERIES[0], IMAGES[0]):
        assert (again.embed_multi(item)[0] == model.embed_multi(item)[0]).all()
    stock = type(peer.model).from_pretrained(tmp_path).eval()
    expected = Peer(stock, peer.processor).embed(IMAGES[0])
    assert abs(expected - peer.embed(IMAGES[0])).max() <= 1e-6
    processor = Peer(stock, type(peer.processor).from_pretrained(tmp_path))
    for item in (QUERIES[0], IMAGES[0]):
        assert processor.ids(item) == peer.ids(item)


def test_what_it_does_not_do_is_said(pair: Pair) -> None:
    model = pair[0]
    assert model.has_multi_vectors
    for call, message in {
        (lambda: model.embed("x")): "use embed_multi",
        (lambda: model.embedding_dim): "use embed_multi",
        (lambda: model.chat("x")): "writes no answers",
        (lambda: model.embed_multi([{"image": IMAGES[0], "text": "x"}])): "1 images, 0 videos",
        (lambda: model.embed_multi([{"image": IMAGES}])): "3 images, 0 videos and no text",
        (lambda: model.embed_multi(["x"], batch_tokens=0)): "batch_tokens is 0",
    }.items():
        with pytest.raises(InputError, match=message):
            call()
    assert model.embed_multi([]) == []


def test_a_special_token_that_is_typed_is_plain_text(pair: Pair) -> None:
    model, peer = pair
    augmented = peer.processor.query_augmentation_token
    ids = model.prepare(Prompt.of(f"a{augmented}b")).token_ids
    number = peer.processor.tokenizer.convert_tokens_to_ids(augmented)
    assert ids.count(number) == 10


def test_maxsim_of_matrices_only() -> None:
    one = np.eye(3, 4, dtype=np.float32)
    assert visavis.maxsim(one, one) == 3.0
    assert visavis.maxsim(one, one[:1]) == 1.0
    for query, document in ((one[0], one), (one[:0], one), (one, np.ones((2, 3), np.float32))):
        with pytest.raises(InputError, match="expected two matrices"):
            visavis.maxsim(query, document)


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "no width": (
        "config.json",
        lambda c: c.update(embedding_dim=0),
        "embedding_dim to 0, expected a positive whole number",
    ),
    "absurd width": ("config.json", lambda c: c.update(embedding_dim=2**40), "embedding_dim"),
    "another width": ("config.json", lambda c: c.update(embedding_dim=64), "expected \\(64,"),
    "another model within": (
        "config.json",
        lambda c: c["vlm_config"].update(model_type="llava"),
        "vlm_config.model_type to 'llava'",
    ),
    "nothing within": ("config.json", lambda c: c.update(vlm_config=[1]), "vlm_config"),
    "no place for the image": (
        "processor_config.json",
        lambda c: c.update(visual_prompt_prefix="<image><image><|image_pad|><|image_pad|>"),
        "once: that is where the image stands",
    ),
    "a prefix that is no text": (
        "processor_config.json",
        lambda c: c.update(query_prefix=7),
        "query_prefix to 7, expected a text",
    ),
    "no padding token": (
        "tokenizer_config.json",
        lambda c: [c.pop(name) for name in ("pad_token", "eos_token")],
        "names no padding token",
    ),
}


def text(**settings: Any) -> Callable[[dict[str, Any]], None]:
    """Return what changes the settings of the language model within."""
    return lambda config: config["vlm_config"]["text_config"].update(settings)


def whole(**settings: Any) -> Callable[[dict[str, Any]], None]:
    """Return what changes the settings of the model within."""
    return lambda config: config["vlm_config"].update(settings)


OTHERS: dict[tuple[str, str], tuple[Callable[[dict[str, Any]], Any], str]] = {
    ("colpali", "causal"): (text(use_bidirectional_attention=False), "expected true or null"),
    ("colpali", "another Gemma"): (text(model_type="gemma2"), "gemma2.*gemma"),
    ("colpali", "projection"): (whole(projection_dim=64), "projection_dim to 64, expected 32"),
    ("colpali", "placeholder"): (whole(image_token_index=1424), "expected 0 to 1423"),
    ("colmodernvbert", "fold"): (whole(pixel_shuffle_factor=3), "expected a divisor of 4"),
    ("colmodernvbert", "placeholder"): (whole(image_token_id=-1), "image_token_id to -1"),
    ("colmodernvbert", "layers"): (text(layer_types=["full_attention"]), "expected 5 of"),
    ("colmodernvbert", "many layers"): (text(num_hidden_layers=2**20), "at most 1000"),
    ("colmodernvbert", "heads"): (text(num_attention_heads=5), "parts 32 into even heads"),
    ("colmodernvbert", "another text"): (text(model_type="bert"), "expected 'modernbert'"),
    ("colmodernvbert", "stretch"): (
        text(rope_parameters={"full_attention": {"rope_type": "yarn"}}),
        "rope_type to 'yarn'",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    SAVE["colqwen2"](tmp_path)
    file, edit, message = DAMAGE[name]
    change(tmp_path / file, edit)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(("kind", "name"), OTHERS)
def test_what_the_model_within_cannot_be_is_named(kind: str, name: str, tmp_path: Path) -> None:
    SAVE[kind](tmp_path)
    edit, message = OTHERS[kind, name]
    change(tmp_path / "config.json", edit)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_older_files_of_modernbert_list_no_layers(tmp_path: Path) -> None:
    SAVE["colmodernvbert"](tmp_path)
    config = load(tmp_path).vlm.config

    def older(data: dict[str, Any]) -> None:
        inner = data["vlm_config"]["text_config"]
        del inner["layer_types"], inner["rope_parameters"]
        inner |= {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0}

    change(tmp_path / "config.json", older)
    assert load(tmp_path).vlm.config == config
    assert config.decoder.local_layers == (1, 2, 4) and config.decoder.local_window == 7


def test_inspect_shows_the_head(pair: Pair) -> None:
    parts = {part["part"]: part for part in model_parts(pair[0].vlm.config)}
    head = parts["multi-vector head"]
    assert head["details"] == "128 numbers for each token" and head["parameters"] == 33 * 128
