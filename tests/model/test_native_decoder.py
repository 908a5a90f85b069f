"""The compiled kernels compute what the decoder's modules compute, and each token by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from visavis.checkpoints.quantize import unpack_linears
from visavis.model.attention import SequenceLayout
from visavis.model.config import DecoderConfig, VLMConfig
from visavis.model.decoder import Decoder, DeepStack
from visavis.model.image_input import ImageGrid
from visavis.model.kv_cache import KVCache
from visavis.model.native_decoder import NativeDecoder, can_run
from visavis.model.native_rows import OWN, NativeRows
from visavis.model.quantized_linear import (
    QuantizedEmbedding,
    QuantizedLinear,
    fill_rows,
    groups_of,
    quantize,
)
from visavis.model.rope import mrope_positions
from visavis.model.vlm import VLM
from visavis.native.library import native

pytestmark = pytest.mark.skipif(native() is None, reason="the kernels are not compiled here")

CONFIG = DecoderConfig(
    vocab_size=96,
    width=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_width=128,
    context_length=512,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"qkv_bias": True, "out_bias": True, "ffn_bias": True, "head_bias": True},
    "layer norm": {"norm": "layer"},
    "norms of queries and keys": {"qk_norm": True},
    "window": {"sliding_window": 4},
    "ungated": {"gated": False, "activation": "relu"},
    "parallel": {"parallel_block": True},
    "half of a head rotates": {"rope_fraction": 0.5, "activation": "gelu"},
    "offset": {"norm_offset": 1.0, "activation": "gelu_tanh", "embedding_scale": 8.0},
    "odd widths, one head": {
        "width": 50,
        "ffn_width": 37,
        "head_dim": 10,
        "num_heads": 1,
        "num_kv_heads": 1,
        "activation": "quick_gelu",
    },
    "wide heads": {"head_dim": 80, "num_kv_heads": 1},
    "layers differ": {"num_heads": (4, 2, 6), "num_kv_heads": (2, 1, 3), "ffn_width": (64, 96, 32)},
}


def random_decoder(dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    torch.manual_seed(0)
    vlm = VLM(VLMConfig(replace(CONFIG, **changes))).cast(dtype).eval().requires_grad_(False)
    for name, weight in vlm.decoder.named_parameters():
        if "norm" in name or "bias" in name:
            weight += 0.2 * torch.randn_like(weight)
    return vlm.decoder


def native_linear(
    linear: Any, bits: int, rank: int = 0, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """Return a linear packed for the kernels, its low-rank pair random."""
    rows = NativeRows(*linear.weight.shape, OWN[bits])  # type: ignore[call-arg]
    fill_rows(rows, 0, quantize(linear.weight.detach(), bits))
    inside, outside = linear.in_features, linear.out_features
    pair = (torch.randn(rank, inside) / 16, torch.randn(outside, rank) / 16) if rank else None
    return QuantizedLinear([rows], bias=linear.bias, low_rank=pair, dtype=dtype)


def packed_decoder(bits: int = 4, rank: int = 0, **changes: Any) -> Decoder:
    """Return a decoder packed for the kernels, and computed by them."""
    decoder = random_decoder(torch.bfloat16, tied_head=True, **changes)
    for block in decoder.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, native_linear(getattr(block, name), bits, rank))
    head = native_linear(decoder.head, 8)
    head.result = torch.float32
    decoder.head = head
    decoder.embed = QuantizedEmbedding(head.parts)
    decoder.compiled = NativeDecoder(decoder)
    return decoder


def new_cache(decoder: Decoder) -> KVCache:
    return KVCache(decoder.config, dtype=decoder.dtype, capacity=3)


def read(decoder: Decoder, ids: Tensor, cache: KVCache) -> Tensor:
    """Return the scores after each of some more tokens."""
    places = torch.arange(cache.length, cache.length + len(ids))
    hidden = decoder(decoder.embed_tokens(ids), places, SequenceLayout((len(ids),), (cache,)))[-1]
    return decoder.logits(hidden)


@pytest.mark.parametrize("variant", VARIANTS)
def test_passes_are_those_of_the_modules(variant: str) -> None:
    decoder = random_decoder(**VARIANTS[variant])
    assert can_run(decoder)
    compiled = NativeDecoder(decoder)
    slow, fast = new_cache(decoder), new_cache(decoder)
    with torch.inference_mode():
        for count in (7, 1, 3, 150, 1):
            x = decoder.embed_tokens(torch.randint(96, (count,)))
            places = torch.arange(slow.length, slow.length + count)
            expected = decoder(x, places, SequenceLayout((count,), (slow,)), (0, 2, -1))
            layout = SequenceLayout((count,), (fast,))
            assert compiled.takes(x, layout)
            found = compiled.forward(x, places, layout, (0, 2, -1))
            for layer, hidden in expected.items():
                assert (found[layer] - hidden).abs().max() < 1e-4
        x = decoder.embed_tokens(torch.tensor([5]))
        scores = compiled.scores(x, torch.tensor([fast.length]), (fast,))
        hidden = decoder(x, torch.tensor([slow.length]), SequenceLayout((1,), (slow,)))[-1]
        assert (scores - decoder.logits(hidden)).abs().max() < 1e-4
    assert fast.length == slow.length == 163


def test_sequences_without_caches_pass_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = random_decoder()
    compiled = NativeDecoder(decoder)
    monkeypatch.setattr("visavis.model.native_decoder.AT_A_TIME", 20)
    lengths = (4, 1, 33, 12, 7)
    x = decoder.embed_tokens(torch.randint(96, (sum(lengths),)))
    places = torch.cat([torch.arange(length) for length in lengths])
    expected = decoder(x, places, SequenceLayout(lengths), (1, -1))
    found = compiled.forward(x, places, SequenceLayout(lengths), (1, -1))
    assert all((found[layer] - expected[layer]).abs().max() < 1e-4 for layer in (1, -1))


def test_three_axes() -> None:
    decoder = random_decoder(mrope_sections=(2, 3, 3))
    places = mrope_positions(8, [(2, 4)], [ImageGrid(rows=4, columns=4)])
    x = torch.randn(8, 64)
    expected = decoder(x, places, SequenceLayout((8,)))[-1]
    found = NativeDecoder(decoder).forward(x, places, SequenceLayout((8,)), (-1,))[-1]
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("variant", ["plain", "biases", "parallel"])
@pytest.mark.parametrize(("bits", "rank"), [(4, 0), (8, 0), (4, 5)])
def test_integers_are_near_their_values(variant: str, bits: int, rank: int) -> None:
    """Activations are rounded to 8 bits: what the unpacked weights give in float32 is near."""
    decoder = packed_decoder(bits, rank, **VARIANTS[variant])
    ids = torch.randint(96, (40,))
    with torch.inference_mode():
        found = read(decoder, ids, new_cache(decoder))
        unpack_linears(decoder)
        assert decoder.compiled is None
        expected = read(decoder.float(), ids, KVCache(decoder.config, dtype=torch.float32))
    assert torch.cosine_similarity(found, expected).min() > 0.995


@pytest.mark.parametrize("rank", [0, 5])
def test_each_token_is_bitwise_what_it_is_alone(rank: int) -> None:
    """Alone, in one pass and in several, beside other sequences, from a copied cache."""
    decoder = packed_decoder(rank=rank)
    compiled = decoder.compiled
    assert compiled is not None
    ids = torch.randint(96, (150,))
    with torch.inference_mode():
        whole = read(decoder, ids, new_cache(decoder))
        cache = new_cache(decoder)
        one_by_one = torch.cat([read(decoder, one, cache) for one in ids.split(1)])
        assert torch.equal(one_by_one, whole)
        cache = new_cache(decoder)
        parts = torch.cat([read(decoder, part, cache) for part in ids.split([60, 2, 9, 79])])
        assert torch.equal(parts, whole)
        copy = cache.fork(77, 200)
        assert torch.equal(read(decoder, ids[77:], copy), whole[77:])
        # sixteen sequences grow by a token, each from another place
        caches = [cache.fork(place, place + 1) for place in range(100, 116)]
        x, places = decoder.embed_tokens(ids[100:116]), torch.arange(100, 116)
        assert torch.equal(compiled.scores(x, places, caches), whole[100:116])
        # a guess of three tokens
        ahead = cache.fork(50, 60)
        x = decoder.embed_tokens(ids[50:54])
        assert torch.equal(compiled.scores(x, torch.arange(50, 54), (ahead,)), whole[50:54])
        # beside others, without caches
        lengths = (20, 30, 100)
        stream = torch.cat((ids[:20], ids[:30], ids[:100]))
        places = torch.cat([torch.arange(length) for length in lengths])
        hidden = decoder(decoder.embed_tokens(stream), places, SequenceLayout(lengths))[-1]
        assert torch.equal(decoder.logits(hidden)[50:], whole[:100])
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(read(decoder, ids, new_cache(decoder)), whole)
        finally:
            torch.set_num_threads(before)


def test_no_number_is_no_number() -> None:
    """What is NaN makes NaN of what attends to it, and of nothing else."""
    decoder = packed_decoder()
    x = torch.randn(2, 64).repeat(2, 1)
    x[3, 5] = torch.nan
    with torch.inference_mode():
        hidden = decoder(x, torch.arange(2).repeat(2), SequenceLayout((2, 2)))[-1]
    assert hidden[3].isnan().all() and torch.equal(hidden[2], hidden[0])
    assert not hidden[:3].isnan().any()


def test_gradients_pass_the_modules() -> None:
    decoder = packed_decoder()
    x = torch.randn(4, 64, requires_grad=True)
    decoder(x, torch.arange(4), SequenceLayout((4,)))[-1].square().sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_what_the_kernels_cannot_read() -> None:
    assert can_run(random_decoder()) and can_run(random_decoder(torch.bfloat16))
    assert not can_run(random_decoder(torch.float16))
    decoder = packed_decoder()
    paged = SequenceLayout((1,), (new_cache(decoder),), paging=object())  # type: ignore[arg-type]
    assert decoder.compiled is not None
    assert not decoder.compiled.takes(torch.zeros(1, 64), paged)
    other = KVCache(decoder.config, dtype=torch.float32)
    assert not decoder.compiled.takes(torch.zeros(1, 64), SequenceLayout((1,), (other,)))


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_come_back(bits: int) -> None:
    groups = quantize(torch.randn(70, 96), bits)
    rows = NativeRows(70, 96, OWN[bits])
    fill_rows(rows, 0, groups)
    numbers = torch.tensor([69, 0, 5])
    again = groups_of(rows, numbers)
    assert again.bits == bits and torch.equal(again.codes, groups.codes[numbers])
    assert (again.values() - groups.values()[numbers]).abs().max() < 0.02
    with pytest.raises(IndexError, match="from 0 to 69"):
        rows.values(torch.tensor([70]))
    with pytest.raises(ValueError, match="cannot be Q4_K"):
        NativeRows(1, 96, "Q4_K")


def test_features_are_added_between_the_first_layers() -> None:
    """DeepStack: as the modules do it, before and after the last layer, whole and in parts."""
    positions = torch.tensor([1, 2, 5, 8])
    for count in (1, 3):
        features = tuple(torch.randn(len(positions), CONFIG.width) for _ in range(count))
        decoder = random_decoder(num_layers=3)
        x, places, layout = torch.randn(9, CONFIG.width), torch.arange(9), SequenceLayout((9,))
        deepstack = DeepStack(positions, features)
        expected = decoder(x, places, layout, range(4), deepstack)
        plain = decoder(x, places, layout)[-1]
        kernels = NativeDecoder(decoder)
        found = kernels.forward(x, places, layout, range(4), deepstack)
        for layer in range(4):
            assert torch.allclose(found[layer], expected[layer], atol=2e-5), layer
        assert not torch.allclose(expected[3], plain, atol=0.01)
        cache, parts = new_cache(decoder), []
        for rows in (slice(0, 3), slice(3, 9)):
            own = (positions >= rows.start) & (positions < rows.stop)
            part = DeepStack(positions[own] - rows.start, tuple(one[own] for one in features))
            layout = SequenceLayout((rows.stop - rows.start,), (cache,))
            parts.append(kernels.forward(x[rows], places[rows], layout, (-1,), part)[-1])
        assert torch.equal(torch.cat(parts), found[3])
