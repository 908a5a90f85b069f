"""The flattened decode step gives bit for bit what the modules give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from visavis.model.attention import Layout
from visavis.model.config import DecoderConfig
from visavis.model.decode import FlatStep, can_flatten, is_row_by_row
from visavis.model.decoder import Decoder
from visavis.model.kv_cache import KVCache
from visavis.model.mrope import positions
from visavis.model.quantized import PackedLinear, packed_kernels
from visavis.model.visual import Shape
from visavis.train.lora import LoRALinear, add_lora
from visavis.train.qlora import quantize_decoder
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


def random_packed(linear: torch.nn.Linear, top_code: int) -> PackedLinear:
    out, inside = linear.weight.shape
    codes = torch.randint(0, top_code + 1, (out, inside), dtype=torch.uint8)
    codes[0, 0] = top_code
    scale = torch.rand(out, inside // 32) * 0.2 / top_code
    minimum = -scale * top_code / 2
    dense = codes.float().view(out, -1, 32) * scale[..., None] + minimum[..., None]
    return PackedLinear(codes, scale, minimum, dense.view(out, inside).bfloat16())


def packed_decoder(config: DecoderConfig) -> Decoder:
    decoder = Decoder(config).bfloat16().eval()
    for block in decoder.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, random_packed(getattr(block, name), 15))
    decoder.head = random_packed(decoder.head, 255)  # type: ignore[assignment]
    for module in decoder.modules():
        if type(module).__name__ == "Norm":
            module.float()
    return decoder


@pytest.mark.parametrize("kind", ["packed", "float32", "untied biases"])
def test_flat_step_equals_modules(kind: str) -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, qkv_bias=True, tied_head=False) if "biases" in kind else CONFIG
    decoder = packed_decoder(config) if kind == "packed" else Decoder(config).eval()
    dtype = decoder.dtype
    slow = KVCache(config, dtype=dtype, capacity=2)
    fast = KVCache(config, dtype=dtype, capacity=2)
    step = FlatStep(decoder, fast)
    with torch.inference_mode(), packed_kernels():
        for position, token in enumerate([5, 17, 17, 80, 3]):
            x = decoder.embed_tokens(torch.tensor([token]))
            hidden = decoder(x, torch.tensor([position]), Layout((1,), (slow,)))[-1]
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
    step = FlatStep(decoder, fast)
    with torch.inference_mode(), packed_kernels():
        for position, token in enumerate([5, 17, 80]):
            x = decoder.embed_tokens(torch.tensor([token]))
            hidden = decoder(x, torch.tensor([position]), Layout((1,), (slow,)))[-1]
            assert torch.equal(step(token), decoder.logits(hidden)[0])


@pytest.mark.parametrize("top_code", [15, 255])
def test_packed_product_is_the_dense_one(top_code: int) -> None:
    torch.manual_seed(1)
    packed = random_packed(torch.nn.Linear(64, 96, bias=False), top_code)
    x = torch.randn(3, 64).bfloat16()
    dense = packed(x).float()
    with packed_kernels():
        kernel = packed(x).float()
    assert (dense - kernel).abs().max() <= 0.02 * dense.abs().max()
    assert not torch.equal(dense, torch.zeros_like(dense))


def test_a_low_rank_pair_is_added_to_the_integers() -> None:
    torch.manual_seed(2)
    plain = random_packed(torch.nn.Linear(64, 96, bias=False), 15)
    low, high = torch.randn(4, 64).bfloat16() * 0.3, torch.randn(96, 4).bfloat16() * 0.3
    merged = plain.dense.float() + high.float() @ low.float()
    adapted = random_packed(torch.nn.Linear(64, 96, bias=False), 15)
    adapted.packed, adapted.scales = plain.packed, plain.scales
    adapted.low, adapted.high, adapted.dense = low, high, merged.bfloat16()
    x = torch.randn(1, 64).bfloat16()
    with packed_kernels():
        found = adapted(x).float()
    expected = torch.nn.functional.linear(x.float(), merged)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
    assert (found - plain(x).float()).abs().max() > 0.1 * expected.abs().max()


def test_after_an_image_on_three_axes() -> None:
    """A prompt of M-RoPE ends at a position below its length; what follows counts on from there."""
    torch.manual_seed(3)
    config = replace(CONFIG, mrope_sections=(2, 3, 3))
    decoder = Decoder(config).eval()
    prompt, read = torch.randn(8, 64), positions(8, [(2, 4)], [Shape(rows=4, columns=4)])
    ahead = int(read.max()) + 1 - 8
    slow, fast = (KVCache(config, dtype=torch.float32, capacity=8) for _ in range(2))
    with torch.inference_mode():
        for cache in (slow, fast):
            decoder(prompt, read, Layout((8,), (cache,)))
        step = FlatStep(decoder, fast, ahead)
        for position, token in enumerate([5, 17, 80], start=8 + ahead):
            x = decoder.embed_tokens(torch.tensor([token]))
            axes = torch.tensor([[position]] * 3)
            with packed_kernels():
                hidden = decoder(x, axes, Layout((1,), (slow,)))[-1]
                assert torch.equal(step(token), decoder.logits(hidden)[0])
    assert ahead == -2


def test_other_switches_take_the_modules() -> None:
    for change in ({"norm": "layer"}, {"qk_norm": True}, {"sliding_window": 4}, {"gated": False}):
        assert not can_flatten(Decoder(replace(CONFIG, **change)))


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_several_tokens_at_a_time_are_each_alone(count: int) -> None:
    torch.manual_seed(4)
    decoder = packed_decoder(CONFIG)
    alone, together = (
        FlatStep(decoder, KVCache(CONFIG, dtype=decoder.dtype, capacity=2)) for _ in range(2)
    )
    assert is_row_by_row(decoder) and not is_row_by_row(Decoder(CONFIG))
    with torch.inference_mode():
        for tokens in torch.randint(96, (5, count)).tolist():
            expected = torch.stack([alone(token) for token in tokens])
            assert torch.equal(together.several(tokens), expected)
