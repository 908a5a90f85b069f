"""OpenELM against a plain re-derivation from its description: transformers has no class for it.

The re-derivation shares nothing with ours: explicit loops over heads, rotation by complex numbers,
keys cached before they are turned.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity.decoders import random_ids, stream
from tests.parity.peers import assert_close
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.checkpoints.transformers.weights import read, write
from visavis.errors import CheckpointError
from visavis.model.attention import SequenceLayout
from visavis.model.config import DecoderConfig
from visavis.model.kv_cache import KVCache
from visavis.model.vlm import VLM

pytestmark = pytest.mark.parity

RELEASED: dict[str, Any] = {
    "model_type": "openelm",
    "activation_fn_name": "swish",
    "ffn_dim_divisor": 256,
    "ffn_multipliers": [0.5, 4.0],
    "ffn_with_glu": True,
    "max_context_length": 2048,
    "normalization_layer_name": "rms_norm",
    "normalize_qk_projections": True,
    "num_gqa_groups": 4,
    "qkv_multipliers": [0.5, 1.0],
    "rope_freq_constant": 10000,
    "share_input_output_layers": True,
    "vocab_size": 32000,
}
# layers, width, head size, (heads, in so many layers), number of parameters: as published
SIZES: dict[str, tuple[int, int, int, list[tuple[int, int]], int]] = {
    "270M": (16, 1280, 64, [(12, 5), (16, 7), (20, 4)], 271_527_168),
    "450M": (20, 1536, 64, [(12, 3), (16, 7), (20, 6), (24, 4)], 457_179_136),
    "1.1B": (28, 2048, 64, [(16, 3), (20, 7), (24, 8), (28, 6), (32, 4)], 1_079_891_456),
    "3B": (36, 3072, 128, [(12, 4), (16, 14), (20, 12), (24, 6)], 3_036_647_424),
}
FFN_450M = [768, 1024, 1280, 1536, 1792, 2304, 2560, 2816, 3072, 3328]
FFN_450M += [3584, 3840, 4096, 4352, 4608, 5120, 5376, 5632, 5888, 6144]
TINY = RELEASED | {
    "num_transformer_layers": 3,
    "model_dim": 64,
    "head_dim": 8,
    "ffn_dim_divisor": 16,
    "vocab_size": 64,
}


def released(size: str) -> dict[str, Any]:
    layers, width, head_dim, _, _ = SIZES[size]
    return RELEASED | {
        "num_transformer_layers": layers,
        "model_dim": width,
        "head_dim": head_dim,
    }


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(size: str) -> None:
    config = vlm_config(released(size)).decoder
    heads = tuple(number for number, times in SIZES[size][3] for _ in range(times))
    assert config.num_heads == heads
    assert config.num_kv_heads == tuple(number // 4 for number in heads)
    if size == "450M":
        assert config.ffn_width == tuple(FFN_450M)
    with torch.device("meta"):
        decoder = VLM(vlm_config(released(size))).decoder
    assert sum(p.numel() for p in decoder.parameters()) == SIZES[size][4]


def test_saved_configs_list_every_layer() -> None:
    config = vlm_config(TINY).decoder
    listed = TINY | {
        "num_query_heads": list(config.num_heads),
        "num_kv_heads": list(config.num_kv_heads),
        "ffn_multipliers": [0.5, 2.25, 4.0],
    }
    assert vlm_config(listed).decoder == config


def random_state(config: DecoderConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def scale(width: int) -> Tensor:
        return 1 + 0.2 * torch.randn(width, generator=generator)

    state = {
        "transformer.token_embeddings.weight": matrix(config.vocab_size, config.width) * 8,
        "transformer.norm.weight": scale(config.width),
    }
    for layer in range(config.num_layers):
        heads = config.per_layer(config.num_heads, layer)
        all_heads = heads + 2 * config.per_layer(config.num_kv_heads, layer)
        ffn = config.per_layer(config.ffn_width, layer)
        parts = {
            "attn.qkv_proj": matrix(all_heads * config.head_dim, config.width),
            "attn.q_norm": scale(config.head_dim),
            "attn.k_norm": scale(config.head_dim),
            "attn.out_proj": matrix(config.width, heads * config.head_dim),
            "attn_norm": scale(config.width),
            "ffn_norm": scale(config.width),
            "ffn.proj_1": matrix(2 * ffn, config.width),
            "ffn.proj_2": matrix(config.width, ffn),
        }
        state |= {f"transformer.layers.{layer}.{name}.weight": t for name, t in parts.items()}
    return state


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, head_dim: int) -> Tensor:
    """Rotate [L, head_dim]: channel i with channel i + head_dim / 2, as one complex number."""
    half = head_dim // 2
    angles = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(half) / half)
    pairs = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), -1)


def derived(state: dict[str, Tensor], ids: Tensor, heads: list[int], head_dim: int) -> list[Tensor]:
    """Return every hidden state, the last after the final norm, and then the logits."""
    x = state["transformer.token_embeddings.weight"][ids]
    return derived_from(state, x, heads, head_dim)


def derived_from(
    state: dict[str, Tensor], x: Tensor, heads: list[int], head_dim: int
) -> list[Tensor]:
    """Return the same for embeddings [L, D]."""
    hidden = [x]
    for layer, num_heads in enumerate(heads):
        part = {
            name.split(f"layers.{layer}.")[1].removesuffix(".weight"): tensor
            for name, tensor in state.items()
            if f"layers.{layer}." in name
        }
        num_kv_heads = num_heads // 4
        every = (rms(x, part["attn_norm"]) @ part["attn.qkv_proj"].T).split(head_dim, -1)
        outputs = []
        for head in range(num_heads):
            key, value = num_heads + head // 4, num_heads + num_kv_heads + head // 4
            q = turned(rms(every[head], part["attn.q_norm"]), head_dim)
            k = turned(rms(every[key], part["attn.k_norm"]), head_dim)
            scores = q @ k.T / head_dim**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            outputs.append(scores.softmax(-1) @ every[value])
        x = x + torch.cat(outputs, -1) @ part["attn.out_proj"].T
        first, second = (rms(x, part["ffn_norm"]) @ part["ffn.proj_1"].T).chunk(2, -1)
        x = x + (first * first.sigmoid() * second) @ part["ffn.proj_2"].T
        hidden.append(x)
    hidden[-1] = rms(x, state["transformer.norm.weight"])
    return [*hidden, hidden[-1] @ state["transformer.token_embeddings.weight"].T]


@torch.no_grad()
def test_hidden_states_logits_batches_and_caches() -> None:
    config = vlm_config(TINY)
    decoder = config.decoder
    assert len(set(decoder.num_heads)) > 1 and len(set(decoder.ffn_width)) == 3
    state = random_state(decoder)
    vlm = VLM(config)
    vlm.load_state_dict(read(TINY, state, where="the test"))
    heads = list(decoder.num_heads)
    ids = random_ids(50)
    *expected, logits = derived(state, ids, heads, 8)
    ours = vlm(stream(ids), layers=range(4))
    for layer, hidden in enumerate(expected):
        assert_close(ours[layer], hidden, f"hidden state {layer}")
    assert_close(vlm.decoder.logits(ours[3]), logits, "logits")
    lengths = [1, 37, 5]
    sequences = [random_ids(length, seed=length) for length in lengths]
    packed = vlm.decoder.logits(vlm(stream(*sequences))[-1]).split(lengths)
    for found, one in zip(packed, sequences, strict=True):
        assert_close(found, derived(state, one, heads, 8)[-1], f"{len(one)} tokens, packed")
    cache = KVCache(decoder, dtype=torch.float32, capacity=8)
    pieces = []
    for chunk in ids.split([30, 1, 1, 7, 11]):
        positions = torch.arange(cache.length, cache.length + len(chunk))
        x = vlm.decoder.embed_tokens(chunk)
        pieces.append(vlm.decoder(x, positions, SequenceLayout((len(chunk),), (cache,)))[-1])
    assert_close(vlm.decoder.logits(torch.cat(pieces)), logits, "cached logits")


def test_names_come_back() -> None:
    state = random_state(vlm_config(TINY).decoder)
    back = write(TINY, read(TINY, state, where="the test"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"normalization_layer_name": "layer_norm"}, "normalization_layer_name"),
        ({"activation_fn_name": "tanh"}, "hidden_act"),
        ({"qkv_multipliers": [1.0, 2.0, 3.0, 4.0]}, "qkv_multipliers"),
        ({"ffn_multipliers": [0.5, "x"]}, "ffn_multipliers"),
        ({"num_query_heads": [4, 4]}, "num_query_heads"),
        ({"num_query_heads": [4, 4, 4], "num_kv_heads": [3, 1, 1]}, "num_kv_heads"),
        ({"num_transformer_layers": 10**8}, "num_hidden_layers"),
        ({"head_dim": 7}, "head_dim"),
    ],
)
def test_settings_we_do_not_have_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        vlm_config(TINY | settings)
