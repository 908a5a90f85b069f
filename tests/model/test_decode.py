"""The flattened decode step gives bit for bit what the modules give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from visavis.model.attention import SequenceLayout
from visavis.model.config import DecoderConfig, VLMConfig
from visavis.model.cpu_decode import FusedDecodeStep, can_flatten, is_row_by_row
from visavis.model.decoder import Decoder
from visavis.model.image_input import ImageGrid
from visavis.model.kv_cache import KVCache
from visavis.model.quantized_linear import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedRows,
    packed_kernels,
    quantize,
)
from visavis.model.rope import mrope_positions
from visavis.model.vlm import VLM
from visavis.train.lora import LoRALinear, add_lora, quantize_decoder
from visavis.train.recipe import LoraRecipe

CONFIG = DecoderConfig(
    vocab_size=96,
    width=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_width=128,
    context_length=64,
)


def packed(linear: torch.nn.Module, *bits: int) -> QuantizedLinear:
    """Return a linear's weight as integers, equal numbers of rows in each of the bits."""
    assert isinstance(linear, torch.nn.Linear)
    parts = linear.weight.detach().chunk(len(bits))
    rows = [QuantizedRows.of(quantize(part, b)) for part, b in zip(parts, bits, strict=True)]
    return QuantizedLinear(rows, bias=linear.bias)


def packed_decoder(config: DecoderConfig, bits: int) -> Decoder:
    decoder = Decoder(config).eval()
    for block in decoder.blocks:
        for name in ("out", "up", "down"):
            setattr(block, name, packed(getattr(block, name), bits))
        block.qkv = packed(block.qkv, 4, bits)
    head = packed(decoder.head, 8)
    head.result = torch.float32
    decoder.head = head  # type: ignore[assignment]
    decoder.embed = QuantizedEmbedding(head.parts)
    return decoder


@pytest.mark.parametrize("kind", ["int4", "int8", "int4 biases", "float32", "bfloat16", "biases"])
def test_flat_step_equals_modules(kind: str) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, qkv_bias=True, tied_head=False) if "biases" in kind else CONFIG
    if "int" in kind:
        decoder = packed_decoder(config, int(kind[3]))
    else:
        decoder = VLM(VLMConfig(config)).cast(getattr(torch, kind, torch.float32)).eval().decoder
    dtype = decoder.dtype
    slow = KVCache(config, dtype=dtype, capacity=2)
    fast = KVCache(config, dtype=dtype, capacity=2)
    step = FusedDecodeStep(decoder, fast)
    with torch.inference_mode(), packed_kernels():
        for position, token in enumerate([5, 17, 17, 80, 3]):
            x = decoder.embed_tokens(torch.tensor([token]))
            hidden = decoder(x, torch.tensor([position]), SequenceLayout((1,), (slow,)))[-1]
            assert torch.equal(step(token), decoder.logits(hidden)[0])
    assert fast.length == slow.length == 5


def test_flat_step_keeps_adapters() -> None:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).eval()
    add_lora(decoder, LoraRecipe(rank=4, targets=("qkv", "down")))
    quantize_decoder(decoder, "int8")  # the other linears
    for adapted in decoder.modules():
        if isinstance(adapted, LoRALinear):
            torch.nn.init.normal_(adapted.lora_b)
    slow, fast = (KVCache(CONFIG, dtype=torch.float32, capacity=2) for _ in range(2))
    step = FusedDecodeStep(decoder, fast)
    with torch.inference_mode(), packed_kernels():
        for position, token in enumerate([5, 17, 80]):
            x = decoder.embed_tokens(torch.tensor([token]))
            hidden = decoder(x, torch.tensor([position]), SequenceLayout((1,), (slow,)))[-1]
            assert torch.equal(step(token), decoder.logits(hidden)[0])


def test_after_an_image_on_three_axes() -> None:
    """A prompt of M-RoPE ends at a position below its length; what follows counts on from there."""
    torch.manual_seed(3)
    config = replace(CONFIG, mrope_sections=(2, 3, 3))
    decoder = Decoder(config).eval()
    prompt, read = torch.randn(8, 64), mrope_positions(8, [(2, 4)], [ImageGrid(rows=4, columns=4)])
    ahead = int(read.max()) + 1 - 8
    slow, fast = (KVCache(config, dtype=torch.float32, capacity=8) for _ in range(2))
    with torch.inference_mode():
        for cache in (slow, fast):
            decoder(prompt, read, SequenceLayout((8,), (cache,)))
        step = FusedDecodeStep(decoder, fast, ahead)
        for position, token in enumerate([5, 17, 80], start=8 + ahead):
            x = decoder.embed_tokens(torch.tensor([token]))
            axes = torch.tensor([[position]] * 3)
            with packed_kernels():
                hidden = decoder(x, axes, SequenceLayout((1,), (slow,)))[-1]
                assert torch.equal(step(token), decoder.logits(hidden)[0])
    assert ahead == -2


def test_other_switches_take_the_modules() -> None:
    for change in ({"norm": "layer"}, {"qk_norm": True}, {"sliding_window": 4}, {"gated": False}):
        assert not can_flatten(Decoder(replace(CONFIG, **change)))


@pytest.mark.parametrize("count", [2, 3, 4, 7])
@pytest.mark.parametrize("kind", ["int4", "int8", "int4 low rank", "int8 biases"])
def test_several_tokens_at_a_time_are_each_alone(kind: str, count: int) -> None:
    torch.manual_seed(4)
    config = replace(CONFIG, qkv_bias="biases" in kind)
    decoder = packed_decoder(config, int(kind[3]))
    if "low rank" in kind:
        up = decoder.blocks[0].up
        up.low, up.high = torch.randn(4, 64).bfloat16(), torch.randn(256, 4).bfloat16()
    alone, together = (
        FusedDecodeStep(decoder, KVCache(config, dtype=decoder.dtype, capacity=2)) for _ in range(2)
    )
    assert is_row_by_row(decoder) and not is_row_by_row(Decoder(CONFIG))
    with torch.inference_mode():
        for tokens in torch.randint(96, (5, count)).tolist():
            expected = torch.stack([alone(token) for token in tokens])
            assert torch.equal(together.several(tokens), expected)


def test_low_rank_pairs_in_float32_are_not_row_by_row() -> None:
    decoder = packed_decoder(CONFIG, 4)
    linear = decoder.blocks[2].down
    low_rank = (torch.zeros(4, 128), torch.zeros(64, 4))
    decoder.blocks[2].down = QuantizedLinear(linear.parts, dtype=torch.float32, low_rank=low_rank)
    assert not is_row_by_row(decoder)
