"""What must hold for every decoder config: packed equals single, cached equals not cached."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from visavis.model.attention import SequenceLayout
from visavis.model.config import DecoderConfig
from visavis.model.decoder import Decoder
from visavis.model.kv_cache import KVCache

BASE = DecoderConfig(
    vocab_size=40,
    width=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_width=48,
    context_length=64,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "sliding window": {"sliding_window": 4},
    "norms of queries and keys": {"qk_norm": True},
    "parallel block, layer norm, part of the head rotates": {
        "parallel_block": True,
        "norm": "layer",
        "rope_fraction": 0.5,
        "gated": False,
        "activation": "gelu_tanh",
        "ffn_bias": True,
        "head_bias": True,
        "tied_head": False,
    },
    "sizes per layer": {
        "num_heads": (2, 4, 6),
        "num_kv_heads": (1, 2, 3),
        "ffn_width": (16, 24, 32),
    },
    "scaled embeddings, norms count from one": {
        "embedding_scale": 32**0.5,
        "norm_offset": 1.0,
        "activation": "gelu_tanh",
    },
}
LENGTHS = (1, 14, 6, 14)


def build(changes: dict[str, Any]) -> Decoder:
    torch.manual_seed(0)
    return Decoder(replace(BASE, **changes)).eval()


def ids(length: int) -> Tensor:
    return torch.randint(40, (length,), generator=torch.Generator().manual_seed(length))


def run(decoder: Decoder, token_ids: Tensor, **options: Any) -> dict[int, Tensor]:
    positions = torch.arange(len(token_ids))
    x = decoder.embed_tokens(token_ids)
    return decoder(x, positions, SequenceLayout((len(token_ids),)), **options)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_a_mixed_batch_equals_its_singles(changes: dict[str, Any]) -> None:
    decoder = build(changes)
    sequences = [ids(length) for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    x = decoder.embed_tokens(torch.cat(sequences))
    packed = decoder(x, positions, SequenceLayout(LENGTHS), range(4))
    for layer, hidden in packed.items():
        singles = torch.cat([run(decoder, one, layers=(layer,))[layer] for one in sequences])
        torch.testing.assert_close(hidden, singles, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@torch.no_grad()
def test_decode_with_a_cache_equals_decode_without(changes: dict[str, Any]) -> None:
    decoder = build(changes)
    token_ids = ids(30)
    expected = decoder.logits(run(decoder, token_ids)[-1])
    cache = KVCache(decoder.config, dtype=torch.float32, capacity=2)
    pieces = []
    for chunk in token_ids.split([9, 1, 1, 12, 1, 6]):
        positions = torch.arange(cache.length, cache.length + len(chunk))
        layout = SequenceLayout((len(chunk),), (cache,))
        hidden = decoder(decoder.embed_tokens(chunk), positions, layout)[-1]
        pieces.append(decoder.logits(hidden))
    assert cache.length == 30
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_each_switch_changes_the_output() -> None:
    """A switch that is read nowhere would pass every other test here."""
    plain = run(build({}), ids(12))[-1]
    for changes in (
        {"sliding_window": 4},
        {"qk_norm": True},
        {"parallel_block": True},
        {"rope_fraction": 0.5},
        {"rope_base": 500.0},
        {"activation": "gelu"},
        {"embedding_scale": 3.0},
        {"norm": "layer"},
    ):
        decoder = Decoder(replace(BASE, **changes)).eval()
        decoder.load_state_dict(build({}).state_dict(), strict=False)
        assert (run(decoder, ids(12))[-1] - plain).abs().max() > 1e-3, changes


@torch.no_grad()
def test_norm_weights_may_count_from_one() -> None:
    plain, shifted = build({}), build({"norm_offset": 1.0})
    torch.manual_seed(1)
    for name, parameter in plain.named_parameters():
        if "norm" in name:
            parameter.normal_()
    state = plain.state_dict()
    shifted.load_state_dict({k: v - 1 if "norm" in k else v for k, v in state.items()})
    torch.testing.assert_close(run(shifted, ids(9))[-1], run(plain, ids(9))[-1])


@pytest.mark.parametrize("rows", [slice(0, 32), slice(32, 48)], ids=["queries", "keys"])
@torch.no_grad()
def test_normed_heads_have_no_length_left(rows: slice) -> None:
    decoder = build({"qk_norm": True, "norm_eps": 1e-12})
    before = run(decoder, ids(9))[-1]
    for block in decoder.blocks:
        block.qkv.weight[rows] *= 10
    torch.testing.assert_close(run(decoder, ids(9))[-1], before, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_only_what_is_needed_for_the_named_layers_runs() -> None:
    decoder = build({})
    everything = run(decoder, ids(5), layers=range(4))
    assert torch.equal(everything[3], run(decoder, ids(5))[-1])
    assert torch.equal(everything[0], decoder.embed_tokens(ids(5)))
    for parameter in decoder.blocks[2].parameters():
        parameter.fill_(torch.nan)
    early = run(decoder, ids(5), layers=(1, 2))
    assert early.keys() == {1, 2}
    assert all(torch.equal(early[layer], everything[layer]) for layer in early)


@torch.no_grad()
def test_bfloat16_keeps_the_residual_stream_in_float32() -> None:
    decoder = build({})
    exact = run(decoder, ids(20))[-1]
    for module in decoder.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.to(torch.bfloat16)
    rough = run(decoder, ids(20))[-1]
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1
