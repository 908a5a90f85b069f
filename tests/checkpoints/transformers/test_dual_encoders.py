"""What people do with a dual encoder: embed, index, search, serve; and what is refused, from a chat
to hostile configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import visavis
from tests.checkpoints.dual_encoder_files import save_dual_encoder
from tests.fakes import picture, write_pictures
from tests.serve.serving import client_of, data_uri, serving
from visavis.errors import CheckpointError, ContextLengthError, InputError
from visavis.index import Index
from visavis.processing.prompt_encoder import PromptEncoder

BOTH = {"image": picture(1), "text": "red"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("siglip") / "tiny-siglip"
    save_dual_encoder(folder, "siglip")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> visavis.Model:
    return visavis.load(folder, precision="f32")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of the folder with settings of config.json changed."""

    def copy(part: str = "", **changes: Any) -> Path:
        shutil.copytree(folder, tmp_path / "copy")
        path = tmp_path / "copy/config.json"
        config = json.loads(path.read_text())
        (config[part] if part else config).update(changes)
        path.write_text(json.dumps(config))
        return path.parent

    return copy


@pytest.mark.parametrize(
    "ask",
    [
        lambda model: model.chat("What is this?", [picture(1)]),
        lambda model: model.chat_many(["Hello"]),
        lambda model: model.trace("Hello"),
    ],
)
def test_it_does_not_chat(ask: Callable[[visavis.Model], Any], model: visavis.Model) -> None:
    with pytest.raises(InputError, match="only embeds texts and images"):
        ask(model)
    assert not model.encoder.can_chat


def test_a_text_and_an_image_in_one_item_are_refused(model: visavis.Model) -> None:
    with pytest.raises(InputError, match="Embed them apart; add the two vectors"):
        model.embed([BOTH])


def test_several_images_of_one_item_are_their_mean(model: visavis.Model) -> None:
    images = [picture(seed) for seed in range(60)]  # more than a text may have tokens
    mean = model.embed(images).mean(0)
    found = model.embed([visavis.Prompt.of([*map(visavis.Image, images)])])[0]
    assert np.abs(found - mean / np.linalg.norm(mean)).max() < 1e-6


def test_instructions_are_left_out_as_none_was_trained(model: visavis.Model) -> None:
    items = ["red", picture(1)]
    assert np.array_equal(model.embed(items, instruction="Find it"), model.embed(items))


def test_long_texts_are_refused_and_not_cut(model: visavis.Model) -> None:
    assert model.embed(["a" * 47]).shape == (1, model.embedding_dim)
    with pytest.raises(ContextLengthError, match="49 tokens .* reads at most 48"):
        model.embed(["a" * 48])


def test_integers_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="'int8' makes integers of a language model's matrices"):
        visavis.load(folder, precision="int8")


def test_half_precision_is_near(folder: Path, model: visavis.Model) -> None:
    items: list[Any] = ["a red thing", picture(1)]
    half = visavis.load(folder, precision="bf16").embed(items)
    assert (half * model.embed(items)).sum(1).min() > 0.99


def test_probabilities_need_a_scale(model: visavis.Model, tiny_model: visavis.Model) -> None:
    found = model.classify([picture(1), picture(2)], ["red", "green", "blue"])
    assert found.shape == (2, 3) and ((found > 0) & (found < 1)).all()
    with pytest.raises(InputError, match="has no scale that makes probabilities"):
        tiny_model.classify([picture(1)], ["red"])


@pytest.fixture
def tiny_model() -> visavis.Model:
    from tests.fakes import tiny_model

    return tiny_model()


def test_index_and_search(model: visavis.Model, tmp_path: Path) -> None:
    paths = write_pictures(tmp_path, 5)
    index = Index(tmp_path / "pictures.idx", model)
    index.add(paths)
    (hit, *_) = index.search(paths[2], k=3)
    assert hit.source == str(paths[2]) and hit.score > 0.999
    scores = model.embed(["red"]) @ model.embed(paths).T
    assert [one.source for one in index.search("red", k=1)] == [str(paths[scores.argmax()])]


def test_served(model: visavis.Model) -> None:
    with serving(models={"siglip": model}) as (address, _), client_of(address) as client:
        body = {"input": ["red", {"image": data_uri(picture(1))}]}
        response = client.post("/v1/embeddings", json=body)
        assert response.status_code == 200, response.text
        vectors = np.array([one["embedding"] for one in response.json()["data"]])
        assert np.abs(vectors - model.embed(["red", picture(1)])).max() < 1e-6
        ask = {"messages": [{"role": "user", "content": "Hello"}]}
        refused = client.post("/v1/chat/completions", json=ask)
        assert refused.status_code == 400 and "only embeds" in refused.text
        assert client.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"vocab_size": 2**60}, "vocab_size to 1152921504606846976"),
        ("text_config", {"num_hidden_layers": 10**6}, "num_hidden_layers to 1000000"),
        ("text_config", {"max_position_embeddings": 2**40}, "max_position_embeddings"),
        ("text_config", {"max_position_embeddings": 2**26}, "shape"),
        ("text_config", {"num_attention_heads": 5}, "num_attention_heads to 5"),
        ("text_config", {"projection_size": 25}, "projection_size to 25, expected 24"),
        ("text_config", {"hidden_act": "mish"}, "hidden_act to 'mish'"),
        ("vision_config", {"vision_use_head": False}, "vision_use_head to False"),
        ("vision_config", {"image_size": 64}, "prepares pictures of 32 pixels"),
        ("vision_config", {"num_channels": 4}, "num_channels to 4"),
        ("", {"vision_config": "x"}, "vision_config to 'x', expected an object"),
        ("", {"model_type": "altclip"}, "did you mean 'clip'"),
        ("", {"model_type": "siglip2"}, "image_processor_type"),
    ],
)
def test_settings_that_do_not_fit(
    part: str, changes: dict[str, Any], message: str, broken: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=message):
        visavis.load(broken(part, **changes), precision="f32")


def test_tensors_that_do_not_fit(broken: Callable[..., Path]) -> None:
    place = broken() / "model.safetensors"
    tensors = load_file(place)
    tensors["logit_scale"] = tensors["logit_scale"].repeat(2)
    tensors["text_model.head.weight"] = tensors["text_model.head.weight"][:, :-1].contiguous()
    del tensors["vision_model.head.probe"]
    save_file(tensors, place)
    with pytest.raises(CheckpointError) as caught:
        visavis.load(place.parent)
    for expected in ("logit_scale has shape (2,)", "text_model.head.weight has shape"):
        assert expected in str(caught.value)
    assert "missing vision_model.head.probe" in str(caught.value)


def test_the_tokenizer_of_another_model(tmp_path: Path) -> None:
    save_dual_encoder(tmp_path / "clip", "clip")
    path = tmp_path / "clip/config.json"
    config = json.loads(path.read_text())
    config["text_config"]["eos_token_id"] = 5
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="vector is taken at the token 5"):
        visavis.load(path.parent)


def test_naflex_counts_are_bounded(tmp_path: Path) -> None:
    save_dual_encoder(tmp_path / "naflex", "naflex")
    path = tmp_path / "naflex/preprocessor_config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"max_num_patches": 10**9}, "max_num_patches to 1000000000"),
        ({"patch_size": 16}, "patch_size to 16, expected 8"),
    ):
        path.write_text(json.dumps(config | changes))
        with pytest.raises(CheckpointError, match=message):
            visavis.load(path.parent)


def test_a_spiece_model_of_another_kind(tmp_path: Path) -> None:
    save_dual_encoder(tmp_path / "siglip", "siglip spiece")
    path = tmp_path / "siglip/spiece.model"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="as SigLIP's tokenizer"):
        visavis.load(path.parent)


def test_encoders_of_chat_models_still_leave_room_for_an_answer(tiny_model: visavis.Model) -> None:
    encoder: PromptEncoder = tiny_model.encoder
    assert encoder.can_chat or encoder.config.has_decoder
    with pytest.raises(ContextLengthError, match=f"at most {tiny_model.context_length - 1}"):
        tiny_model.embed(["a" * tiny_model.context_length])
