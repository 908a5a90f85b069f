"""TinyLLaVA's layouts: known parts without a network, what is refused, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, PhiConfig, Qwen2Config, SiglipVisionConfig

import visavis
from tests.checkpoints import tinyllava_files as files
from tests.checkpoints.tinyllava_files import DINOV2, Peer
from tests.checkpoints.transformers_files import TEXT, VISION
from tests.fakes import picture, tiny_model
from visavis.checkpoints.load import load_checkpoint
from visavis.checkpoints.tinyllava.config import (
    LANGUAGE_MODELS,
    TOWERS,
    image_processor,
    text_config,
    turns_of,
    vision_configs,
    vlm_config,
)
from visavis.checkpoints.tinyllava.export import config_json, write_tinyllava
from visavis.checkpoints.transformers.language_models import decoder_config
from visavis.checkpoints.transformers.processor import processor_config
from visavis.convert import convert
from visavis.convert.conversion import stored_precision
from visavis.errors import CheckpointError
from visavis.model.config import ImageLayoutConfig
from visavis.model.decoder import Decoder
from visavis.model.image_tokens import tokens_per_view
from visavis.model.vlm import VLM

# Published numbers of parameters.
NUM_PARAMETERS = {
    "apple/OpenELM-270M-Instruct": 271_527_168,
    "apple/OpenELM-450M-Instruct": 457_179_136,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "stabilityai/stablelm-2-zephyr-1_6b": 1_644_515_328,
    "Qwen/Qwen2-0.5B": 494_032_768,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "google/gemma-2b-it": 2_506_172_416,
    "microsoft/phi-2": 2_779_683_840,
}
SIGLIP = "google/siglip-so400m-patch14-384"
SIGLIP_HEAD = 15_238_352  # its attention pooling, which files hold and nothing needs
CLIP_B = "openai/clip-vit-base-patch16"


def named(llm: str, tower: str, connector: str = "mlp2x_gelu", **more: str) -> dict[str, str]:
    return {
        "model_type": "tinyllava",
        "llm_model_name_or_path": llm,
        "vision_model_name_or_path": tower,
        "connector_type": connector,
    } | more


def built(config: dict[str, str], pixels: int | None = None) -> VLM:
    with torch.device("meta"):
        return VLM(vlm_config(config, text_config(config), vision_configs(config), pixels))


@pytest.mark.parametrize("name", NUM_PARAMETERS)
def test_known_language_models_have_the_published_size(name: str) -> None:
    with torch.device("meta"):
        decoder = Decoder(decoder_config(LANGUAGE_MODELS[name]))
    assert sum(p.numel() for p in decoder.parameters()) == NUM_PARAMETERS[name]


@pytest.mark.parametrize(
    ("llm", "tower", "total", "tokens"),
    [
        ("microsoft/phi-2", SIGLIP, 3_217_417_280, 728),
        ("apple/OpenELM-450M-Instruct", SIGLIP, 889_536_576, 728),
        ("/mnt/checkpoints/OpenELM-450M-Instruct", CLIP_B, 546_520_576, 196),
    ],
)
def test_released_models_have_the_size_of_their_files(
    llm: str, tower: str, total: int, tokens: int
) -> None:
    vlm = built(named(llm, tower))
    found = sum(p.numel() for p in vlm.parameters())
    assert found + (SIGLIP_HEAD if tower == SIGLIP else 0) == total
    assert tokens_per_view(vlm.config) == tokens


@pytest.mark.parametrize(
    ("tower", "second", "connector", "pixels", "tokens"),
    [
        ("openai/clip-vit-large-patch14-336", "", "mlp2x_gelu", None, 576),
        ("facebook/dinov2-large", "", "linear", 224, 256),
        ("mof:openai/clip-vit-large-patch14", "mof:facebook/dinov2-large", "mof_mlp", None, 512),
        (SIGLIP, "", "resampler", None, 128),
        (SIGLIP, "", "qformer", None, 128),
    ],
)
def test_tokens_of_a_picture(
    tower: str, second: str, connector: str, pixels: int | None, tokens: int
) -> None:
    config = named("apple/OpenELM-270M", tower, connector, vision_model_name_or_path2=second)
    assert tokens_per_view(built(config, pixels).config) == tokens


def test_pictures_of_each_tower() -> None:
    sizes = {name: vision["model_type"] for name, vision in TOWERS.items()}
    assert set(sizes.values()) == {"clip_vision_model", "siglip_vision_model", "dinov2"}
    clip = processor_config(image_processor(TOWERS[CLIP_B], 224))
    siglip = processor_config(image_processor(TOWERS[SIGLIP], 384))
    dino = processor_config(image_processor(TOWERS["facebook/dinov2-base"], 224))
    assert (clip.resize, clip.size, clip.crop_fraction) == ("crop", 224, 1.0)
    assert (siglip.resize, siglip.size, siglip.mean) == ("squash", 384, (0.5, 0.5, 0.5))
    assert dino.resize == "crop" and round(dino.size / dino.crop_fraction) == 256
    assert dino.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("llm", "expected"),
    [
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllava_llama"),
        ("apple/OpenELM-450M-Instruct", "tinyllava_llama"),
        ("stabilityai/stablelm-2-zephyr-1_6b", "tinyllava_phi"),
        ("google/gemma-2b-it", "tinyllava_gemma"),
        ("Qwen/Qwen2.5-3B", "tinyllava_qwen2_base"),
        ("Qwen/Qwen2-0.5B-Instruct", "tinyllava_qwen2_instruct"),
    ],
)
def test_which_format_it_chats_in(llm: str, expected: str) -> None:
    config = named(llm, SIGLIP)
    assert turns_of(config, text_config(config)) == expected
    other = config | {"llm_model_name_or_path": "someone/qwen2"}
    assert turns_of(other, {"model_type": "qwen2"}) == ""


def load(folder: Path, **settings: Any) -> visavis.Model:
    return visavis.load(folder, precision="f32", device="cpu", **settings)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load(folder)
    return str(raised.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"connector_type": "mlp2x_relu"}, "connector_type to 'mlp2x_relu', expected 'identity'"),
        ({"connector_type": "mof_mlp"}, "mof_mlp with two towers alone"),
        ({"connector_type": "identity"}, "the widths differ"),
        ({"image_aspect_ratio": "anyres"}, "'square' or 'pad'"),
        ({"vision_feature_select_strategy": "cls"}, "'patch' or 'cls_patch'"),
        ({"vision_feature_layer": -9}, "one number of 3 layers"),
        ({"text_config": None}, "of the language model only that it is 'someone/model'"),
        ({"vision_config": None}, "of the vision tower only that it is 'someone/tower'"),
        ({"text_config": {"model_type": "mamba"}}, "model_type 'mamba'"),
    ],
)
def test_settings_that_we_have_not_are_named(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    files.save_repository(tmp_path, Peer(), **settings)
    assert expected in refusal(tmp_path)


def test_a_stage_without_a_part_says_so(tmp_path: Path) -> None:
    files.save_stage(tmp_path, Peer())
    (tmp_path / "connector").rename(tmp_path / "elsewhere")
    assert "lacks the folder connector" in refusal(tmp_path)


def test_an_older_resampler_is_another(tmp_path: Path) -> None:
    peer = Peer(vision=SiglipVisionConfig(**VISION, vision_use_head=False))
    files.save_old(tmp_path, peer, mm_vision_tower=SIGLIP, mm_projector_type="resampler")
    assert "mm_projector_type to 'resampler', expected one of identity, linear" in refusal(tmp_path)


def test_pictures_of_another_tower_are_refused(tmp_path: Path) -> None:
    files.save_repository(tmp_path, Peer())
    other = image_processor(TOWERS[CLIP_B], 224)
    files.write_json(tmp_path / "preprocessor_config.json", other)
    assert "224 pixels, but the vision tower takes 32" in refusal(tmp_path)


PEERS: dict[str, Callable[[], Peer]] = {
    "llama and clip": Peer,
    "phi and siglip": lambda: Peer(
        PhiConfig(**TEXT), SiglipVisionConfig(**VISION, vision_use_head=False)
    ),
    "tied qwen2 and two towers": lambda: Peer(
        Qwen2Config(**TEXT, tie_word_embeddings=True), None, Dinov2Config(**DINOV2)
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_what_is_written_is_read_as_the_same(name: str, tmp_path: Path) -> None:
    peer = PEERS[name]()
    files.save_repository(tmp_path / "from", peer, image_aspect_ratio="pad")
    settings = {"precision": "f32", "device": "cpu", "chat_template": "tinyllava_phi"}
    first = load_checkpoint(tmp_path / "from", **settings)  # type: ignore[arg-type]
    written = write_tinyllava(first, tmp_path / "to")
    assert written.lost == [] and all(path.is_file() for path in written.files)
    again = load_checkpoint(tmp_path / "to", precision="f32", device="cpu")
    assert again.vlm.config == first.vlm.config
    assert (again.profile, again.processor) == (first.profile, first.processor)
    assert again.specials == first.specials
    assert again.tokenizer.to_str() == first.tokenizer.to_str()
    state = again.vlm.state_dict()
    assert state.keys() == first.vlm.state_dict().keys()
    assert all(torch.equal(state[key], t) for key, t in first.vlm.state_dict().items())
    image = picture(1)
    assert (load(tmp_path / "to").embed([image]) == load(tmp_path / "from").embed([image])).all()


def test_a_stage_becomes_a_repository(tmp_path: Path) -> None:
    files.save_stage(tmp_path / "stage", Peer())
    assert stored_precision(tmp_path / "stage") == "f32"
    done = convert(
        tmp_path / "stage", tmp_path / "whole", to="tinyllava", chat_template="tinyllava_llama"
    )
    assert tmp_path / "whole" / "model.safetensors" in done.files
    assert load(tmp_path / "whole").profile.chat_template == "tinyllava_llama"
    convert(tmp_path / "stage", tmp_path / "unsaid", to="tinyllava")
    assert load(tmp_path / "unsaid").profile.chat_template == ""  # the format is not made up


def test_names_of_published_parts_are_written() -> None:
    vlm = built(named("apple/OpenELM-450M-Instruct", SIGLIP, "resampler"))
    data, text, _ = config_json(vlm.config)
    assert data["llm_model_name_or_path"] == "apple/OpenELM-450M"
    assert data["vision_model_name_or_path"] == SIGLIP
    assert text["ffn_multipliers"] == [0.5, 4.0] and data["num_queries"] == 128
    assert json.loads(json.dumps(data)) == data


def test_what_it_has_no_words_for_is_named() -> None:
    tiny, config = tiny_model().vlm.config, built(named("apple/OpenELM-270M", CLIP_B)).config
    assert config.connector is not None
    for changed, expected in (
        (tiny, "embedding head cannot be written"),
        (replace(tiny, head=None), "no CLIP, SigLIP or DINOv2"),
        (replace(config, tower=None, connector=None), "vision tower .none. cannot"),
        (replace(config, merge=ImageLayoutConfig(kind="spatial")), "way from tower to tokens"),
        (replace(config, connector=replace(config.connector, shuffle=2)), "way from tower"),
    ):
        with pytest.raises(CheckpointError, match=expected):
            config_json(changed)
