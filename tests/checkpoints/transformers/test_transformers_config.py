"""A config.json gives a model of the sizes it states, or one clear error, for any values in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visavis.checkpoints.transformers.language_models import COMMON, FAMILIES
from visavis.checkpoints.transformers.language_models import DEFAULTS as OPENELM
from visavis.checkpoints.transformers.processor import processor_config
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.errors import CheckpointError
from visavis.model.vlm import VLM

NUMBERS = st.one_of(
    st.integers(-2, 300),
    st.sampled_from([2**27 - 1, 2**31, 2**63, 10**30]),
    st.floats(),
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.sampled_from(["", "gelu", "default", "rms_norm", "linear", "longrope", "clip_vision_model"]),
    st.lists(NUMBERS, max_size=4),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "height", "x"]), NUMBERS, max_size=2),
)
ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "llama3", "longrope", "yarn"])},
    optional=dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "short_factor", "rope_theta"), VALUES
    ),
)
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "vocab_size": 40,
}
SMALL_OPENELM = {"num_transformer_layers": 2, "model_dim": 32, "head_dim": 8, "vocab_size": 40}
DECODER_KEYS = sorted(
    {*COMMON, *SMALL, "sliding_window", "use_sliding_window", "max_window_layers"}
    | {"partial_rotary_factor", "rope_theta", "original_max_position_embeddings", "qk_layernorm"}
)
VISION_KEYS = [*SMALL, "image_size", "patch_size", "hidden_act", "layer_norm_eps", "model_type"]
OUTER_KEYS = [
    *("vision_feature_layer", "vision_feature_select_strategy", "image_token_index"),
    *("text_config", "vision_config", "projector_hidden_act", "tie_word_embeddings"),
]
PROCESSOR_KEYS = [
    *("size", "crop_size", "do_resize", "do_center_crop", "do_pad", "do_normalize"),
    *("image_mean", "image_std", "resample", "rescale_factor"),
]


def changes(keys: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(keys), VALUES, max_size=3)


FIELDS = {  # of config.json, and of our DecoderConfig
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_width",
    "vocab_size": "vocab_size",
}


def build_or_refuse(config: dict[str, Any]) -> None:
    """Build a model of the sizes that the config states; no other value may be accepted."""
    try:
        found = vlm_config(config)
    except CheckpointError as error:
        assert len(str(error)) > 40
        return
    with torch.device("meta"):
        VLM(found)
    text = config.get("text_config", config) or {}
    if config["model_type"] == "openelm":
        return
    for name, field in FIELDS.items():
        if (stated := text.get(name)) is None:  # the family's default
            continue
        assert type(stated) is int and stated > 0, f"{name} {stated!r} was accepted"
        assert getattr(found.decoder, field) == stated, f"{name} {stated!r} was not kept"


@pytest.mark.parametrize("kind", FAMILIES)
@settings(max_examples=60)
@given(data=st.data())
def test_language_models(kind: str, data: st.DataObject) -> None:
    config = {"model_type": kind} | SMALL | data.draw(changes(DECODER_KEYS))
    if data.draw(st.booleans()):
        config["rope_parameters"] = data.draw(ROPE)
    build_or_refuse(config)


@settings(max_examples=100)
@given(changes(sorted({*OPENELM, "num_query_heads", "num_kv_heads"})))
def test_openelm(changed: dict[str, Any]) -> None:
    build_or_refuse({"model_type": "openelm"} | SMALL_OPENELM | changed)


@settings(max_examples=150)
@given(
    changes(DECODER_KEYS),
    changes(VISION_KEYS),
    changes(OUTER_KEYS),
    st.sampled_from(["clip_vision_model", "siglip_vision_model", "dinov2"]),
)
def test_llava(
    text: dict[str, Any], vision: dict[str, Any], outer: dict[str, Any], tower: str
) -> None:
    small = {"model_type": tower, "image_size": 16, "patch_size": 4} | SMALL
    config = {"model_type": "llava", "image_token_index": 3, "text_config": SMALL | text}
    build_or_refuse(config | {"vision_config": small | vision} | outer)


@settings(max_examples=200)
@given(
    st.sampled_from(["CLIPImageProcessor", "SiglipImageProcessor", "LlavaImageProcessor"]),
    changes(PROCESSOR_KEYS),
)
def test_processors(kind: str, changed: dict[str, Any]) -> None:
    try:
        processor_config({"image_processor_type": kind} | changed)
    except CheckpointError as error:
        assert len(str(error)) > 40
