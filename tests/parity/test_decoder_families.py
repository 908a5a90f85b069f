"""Every language-model family but Llama against its transformers class, float32.

Each variant is compared in hidden states and logits, as a packed batch of mixed lengths, and
decoding with a cache; and its names are written back.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from tests.parity.decoders import (
    BASE,
    assert_cached_equals_whole,
    assert_packed_equals_singles,
    assert_same_hidden_states,
    ours_of,
    random_ids,
    stream,
)
from tests.parity.peers import randomized
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.checkpoints.transformers.weights import read, write
from visavis.errors import CheckpointError

pytestmark = pytest.mark.parity

CLASSES: dict[str, Any] = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi": (PhiConfig, PhiForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "stablelm": (StableLmConfig, StableLmForCausalLM),
}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [2.0, 4.0, 6.0, 8.0],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mistral": {},
    "mistral, window of 8": {"sliding_window": 8},
    "mistral, no window, wide heads": {"sliding_window": None, "head_dim": 12},
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen2, window in all layers": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 0,
    },
    "qwen3": {"head_dim": 12},
    "qwen3, biases, tied": {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    "qwen3, biases, tied, one key head": {
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "num_key_value_heads": 1,
    },
    "phi": {},
    "phi, one head per key head": {"num_key_value_heads": 4},
    "phi, a quarter rotates": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5000.0,
            "partial_rotary_factor": 0.25,
        }
    },
    "phi3": {},
    "phi3, window of 8": {"sliding_window": 8},
    "phi3, longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    "phi3, half rotates, tied": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        "tie_word_embeddings": True,
    },
    "gemma": {"head_dim": 12},
    "gemma, one key head, biases": {
        "head_dim": 8,
        "num_key_value_heads": 1,
        "attention_bias": True,
    },
    "stablelm": {},
    "stablelm, biases": {"use_qkv_bias": True},
    "stablelm, parallel": {"use_parallel_residual": True},
}


def build_peer(name: str, **changes: Any) -> PreTrainedModel:
    config, model = CLASSES[name.split(",")[0]]
    peer = model(config(**BASE | SPECIALS | VARIANTS[name] | changes))
    randomized(peer)
    return peer


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_same_model(name: str) -> None:
    peer = build_peer(name)
    vlm = ours_of(peer)
    assert_same_hidden_states(peer, vlm)
    assert_packed_equals_singles(peer, vlm)
    assert_cached_equals_whole(peer, vlm)


@pytest.mark.parametrize("name", VARIANTS)
def test_names_come_back(name: str) -> None:
    peer = build_peer(name)
    theirs, config = peer.state_dict(), peer.config.to_dict()
    back = write(config, ours_of(peer).state_dict())
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    assert back.keys() == theirs.keys() - tied
    assert all(torch.equal(back[key], theirs[key]) for key in back)


@pytest.mark.parametrize("kind", CLASSES)
def test_what_a_config_leaves_out_is_the_default_of_the_library(kind: str) -> None:
    library = CLASSES[kind][0]().to_dict()
    assert vlm_config({"model_type": kind}) == vlm_config(library)


def test_null_is_not_the_default_where_it_means_none() -> None:
    found = vlm_config({"model_type": "mistral", "sliding_window": None}).decoder
    assert found.sliding_window == 0
    assert vlm_config(MistralConfig(sliding_window=None).to_dict()).decoder == found
    assert vlm_config({"model_type": "mistral"}).decoder.sliding_window == 4096


def test_older_spellings_of_rotary_settings() -> None:
    older = {"model_type": "stablelm", "partial_rotary_factor": 0.5, "rope_theta": 5e4}
    found = vlm_config(older).decoder
    assert (found.rope_fraction, found.rope_base) == (0.5, 5e4)
    assert vlm_config(StableLmConfig(**older).to_dict()).decoder == found
    su = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    phi = {"model_type": "phi3", "rope_scaling": su, "max_position_embeddings": 131072}
    # The peer wants the first context spelled out; so do the files on the hub.
    newer = Phi3Config(  # type: ignore[call-arg]
        rope_scaling=su | {"original_max_position_embeddings": 4096},
        max_position_embeddings=131072,
    )
    assert vlm_config(phi).decoder == vlm_config(newer.to_dict()).decoder


def test_gemmas_gelu_is_its_tanh_form() -> None:
    assert vlm_config({"model_type": "gemma", "hidden_act": "gelu"}) == vlm_config(
        GemmaConfig(hidden_act="gelu").to_dict()
    )


@torch.no_grad()
def test_longrope_ends_where_the_peer_changes_frequencies() -> None:
    """Beyond the first context the peer turns all positions otherwise, so we stop there."""
    peer = build_peer("phi3, longrope")
    vlm = ours_of(peer)
    assert vlm.config.decoder.context_length == 64
    assert_same_hidden_states(peer, vlm, length=64)
    longer = random_ids(65)
    ours = vlm.decoder.logits(vlm(stream(longer))[-1])
    assert (ours - peer(longer[None]).logits[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}, "max_window_layers"),
        ("mistral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "short_factor"),
        ("phi3", {"rope_scaling": {"type": "yarn"}}, "rope_type"),
        ("mistral", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_type"),
        ("mistral", {"hidden_size": -4}, "hidden_size"),
        ("mistral", {"num_attention_heads": "32"}, "num_attention_heads"),
        ("mistral", {"num_attention_heads": 30, "head_dim": 8}, "num_key_value_heads"),
        ("mistral", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("mistral", {"head_dim": 7}, "head_dim"),
        ("mistral", {"rope_parameters": [1]}, "rope_parameters"),
        ("phi4", {}, "model_type 'phi4'.*did you mean 'phi'"),
    ],
)
def test_settings_we_do_not_have_are_refused(kind: str, settings: dict, named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        vlm_config({"model_type": kind} | settings)


def test_tensors_of_another_family_are_named() -> None:
    peer = build_peer("qwen2")
    config = peer.config.to_dict() | {"model_type": "mistral"}
    with pytest.raises(CheckpointError, match=r"unexpected model\.layers\.0\.self_attn\.q_proj\.b"):
        read(config, peer.state_dict(), where="the peer")
