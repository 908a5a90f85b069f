"""Adapters: nothing changes when added; merged, written and read again they are the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.fakes import tiny_config
from visavis.checkpoints.low_rank import merge
from visavis.model.batch import PackedBatch
from visavis.model.vlm import VLM
from visavis.train.lora import (
    LoRALinear,
    QLoRALinear,
    add_lora,
    merged_state,
    native_pairs,
    quantize_decoder,
)
from visavis.train.recipe import LoraRecipe


def make_batch() -> PackedBatch:
    lengths = (5, 3)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return PackedBatch(torch.randint(0, 200, (8,)), positions, lengths)


def build() -> VLM:
    torch.manual_seed(0)
    return VLM(tiny_config()).requires_grad_(False)


def trained(vlm: VLM) -> None:
    """Move every adapter away from where it starts."""
    for module in vlm.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.1)
            if module.lora_magnitude is not None:
                module.lora_magnitude.data.mul_(1.2)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["", "int8", "int4"])
def test_adapters_change_nothing_until_trained_and_merge_exactly(kind: str, dora: bool) -> None:
    vlm, batch = build(), make_batch()
    if kind:
        quantize_decoder(vlm.decoder, kind)  # type: ignore[arg-type]
    before = vlm(batch)[-1]
    added = add_lora(vlm.decoder, LoraRecipe(rank=4, dora=dora))
    assert len(added) == 4 * vlm.config.decoder.num_layers
    torch.testing.assert_close(vlm(batch)[-1], before, atol=1e-5, rtol=1e-5)
    trained(vlm)
    after = vlm(batch)[-1]
    assert not torch.allclose(after, before, atol=1e-3)
    merged = VLM(tiny_config())
    merged.load_state_dict(merged_state(vlm), strict=False)
    torch.testing.assert_close(merged(batch)[-1], after, atol=1e-5, rtol=1e-5)


def test_pairs_of_our_own_layout_merge_to_the_same() -> None:
    vlm, batch = build(), make_batch()
    base = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    add_lora(vlm.decoder, LoraRecipe(rank=4, scale=2.0))
    trained(vlm)
    merge(base, native_pairs(vlm), 2.0, Path("adapter"))
    loaded = VLM(tiny_config())
    loaded.load_state_dict(base)
    torch.testing.assert_close(loaded(batch)[-1], vlm(batch)[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("int4", 0.2)])
def test_quantized_linears_are_near_and_pass_gradients(kind: str, error: float) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(70, 33), torch.randn(5, 70, requires_grad=True)
    quantized = QLoRALinear(linear, kind)  # type: ignore[arg-type]
    difference = (quantized.weight - linear.weight).abs().max() / linear.weight.abs().max()
    assert difference < error
    dense = torch.nn.functional.linear(x, quantized.weight, linear.bias)
    torch.testing.assert_close(quantized(x), dense)
    direction = torch.randn(5, 33)
    expected = torch.autograd.grad(dense, x, direction)[0]
    torch.testing.assert_close(torch.autograd.grad(quantized(x), x, direction)[0], expected)


def test_a_quantized_decoder_holds_fewer_bytes() -> None:
    vlm = build()
    before = sum(t.nbytes for t in vlm.decoder.blocks.state_dict().values())
    quantize_decoder(vlm.decoder, "int8")
    assert sum(t.nbytes for t in vlm.decoder.blocks.state_dict().values()) < before


@pytest.mark.parity
@pytest.mark.parametrize("dora", [False, True])
def test_one_layer_computes_what_peft_does(dora: bool) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    peer = nn.Sequential(nn.Linear(16, 12, bias=False))
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=dora)
    ours = LoRALinear(peer[0], (12,), LoraRecipe(rank=4, scale=2.0, dora=dora))
    adapted = get_peft_model(peer, settings)
    trained_pair = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, parameter in trained_pair.items():
            value = torch.randn_like(parameter) * 0.3 + (2.0 if "magnitude" in name else 0.0)
            parameter.copy_(value)
            own = {"lora_A": ours.lora_a, "lora_B": ours.lora_b, "magni": ours.lora_magnitude}
            next(p for key, p in own.items() if key in name and p is not None).copy_(value)
    x = torch.randn(5, 16)
    torch.testing.assert_close(ours(x), adapted(x))
    loss, theirs = ours(x).square().sum(), adapted(x).square().sum()
    found = torch.autograd.grad(loss, ours.lora_a)[0]
    expected = torch.autograd.grad(theirs, next(p for n, p in trained_pair.items() if "_A" in n))[0]
    torch.testing.assert_close(found, expected)
