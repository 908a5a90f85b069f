"""Adapters: nothing changes when added; merged on load equals unmerged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fakes import tiny_config
from visavis.checkpoints.native import merge
from visavis.errors import TrainError
from visavis.model.batch import PackedBatch
from visavis.model.vlm import VLM
from visavis.train.lora import add_lora


def make_batch() -> PackedBatch:
    lengths = (5, 3)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return PackedBatch(torch.randint(0, 200, (8,)), positions, lengths)


def test_added_adapters_change_nothing_until_trained() -> None:
    torch.manual_seed(0)
    vlm, batch = VLM(tiny_config()).requires_grad_(False), make_batch()
    before = vlm(batch)[-1]
    added = add_lora(vlm.decoder, rank=4, scale=2.0)
    assert len(added) == 4 * vlm.config.decoder.num_layers
    assert torch.allclose(vlm(batch)[-1], before, atol=1e-5)
    torch.nn.init.normal_(added[0].lora_b)
    assert not torch.allclose(vlm(batch)[-1], before)


def test_merged_on_load_equals_unmerged() -> None:
    torch.manual_seed(0)
    vlm, batch = VLM(tiny_config()).requires_grad_(False), make_batch()
    base = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    for linear in add_lora(vlm.decoder, rank=4, scale=2.0):
        torch.nn.init.normal_(linear.lora_b, std=0.1)
    unmerged = vlm(batch)[-1]
    own = {name: t.clone() for name, t in vlm.state_dict().items() if ".lora_" in name}
    loaded = VLM(tiny_config())
    merge(base, own, 2.0, Path("adapter"))
    loaded.load_state_dict(base)
    assert torch.allclose(loaded(batch)[-1], unmerged, atol=1e-5)


def test_unknown_target_is_refused() -> None:
    with pytest.raises(TrainError, match="no linear"):
        add_lora(VLM(tiny_config()).decoder, rank=4, scale=1.0, targets=("query",))
