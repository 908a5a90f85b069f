"""The decoder against transformers' Llama: every hidden state and the logits, float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.parity.decoders import (
    BASE,
    assert_cached_equals_whole,
    assert_packed_equals_singles,
    assert_same_hidden_states,
    ours_of,
)
from tests.parity.peers import randomized
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.checkpoints.transformers.weights import read, write
from visavis.errors import CheckpointError
from visavis.model.vlm import VLM

pytestmark = pytest.mark.parity

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "grouped heads, untied": {},
    "tied": {"tie_word_embeddings": True},
    "one head per key head": {"num_key_value_heads": 4},
    "head size of its own": {"head_dim": 12},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "linear rope": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    },
}


def peer_and_ours(**changes: Any) -> tuple[LlamaForCausalLM, VLM]:
    peer = LlamaForCausalLM(LlamaConfig(**BASE | changes))
    randomized(peer)
    return peer, ours_of(peer)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@torch.no_grad()
def test_hidden_states_and_logits(changes: dict[str, Any]) -> None:
    peer, vlm = peer_and_ours(**changes)
    assert_same_hidden_states(peer, vlm, length=70)


@torch.no_grad()
def test_packed_sequences_equal_the_peers_singles() -> None:
    assert_packed_equals_singles(*peer_and_ours())


@torch.no_grad()
def test_decode_with_cache_equals_the_peers_without() -> None:
    assert_cached_equals_whole(*peer_and_ours(rope_parameters=LLAMA3))


@pytest.mark.parametrize("tied", [True, False])
def test_names_come_back(tied: bool) -> None:
    peer, vlm = peer_and_ours(tie_word_embeddings=tied, attention_bias=True)
    theirs = peer.state_dict()
    back = write(peer.config.to_dict(), vlm.state_dict())
    assert back.keys() == theirs.keys() - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(back[name], theirs[name]) for name in back)


def test_a_tied_head_that_differs_is_refused() -> None:
    peer, _ = peer_and_ours(tie_word_embeddings=False)
    config = peer.config.to_dict() | {"tie_word_embeddings": True}
    with pytest.raises(CheckpointError, match="lm_head.weight of its own"):
        read(config, peer.state_dict(), where="the peer")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model_type", "mamba"),
        ("hidden_act", "tanh"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_parameters", {"rope_type": "linear"}),
    ],
)
def test_settings_we_do_not_have_are_refused(setting: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"model_type|hidden_act|rope_type|factor"):
        vlm_config({"model_type": "llama"} | BASE | {setting: value})


def test_what_a_config_leaves_out_is_the_default_of_the_library() -> None:
    """Hub files of LLaVA 1.5 name little more than the model type of their Vicuna."""
    assert vlm_config({"model_type": "llama"}) == vlm_config(LlamaConfig().to_dict())
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    older = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": scaling}
    newer = LlamaConfig(rope_parameters=LLAMA3 | {"rope_theta": 5e5}).to_dict()
    assert vlm_config(older) == vlm_config(newer)
