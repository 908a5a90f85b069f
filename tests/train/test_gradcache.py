"""Gradients through a cache equal those of the whole batch, on one process and on two."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from visavis.train.distributed import gather_rows, world_size
from visavis.train.gradcache import cached_backward, token_chunks
from visavis.train.losses import Contrast, contrastive_loss

LLAVE = Contrast(symmetric=True, alpha=9.0)


def build(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))


def data(num: int) -> Tensor:
    """Queries and targets, interleaved: rows 2i and 2i + 1 belong together."""
    return torch.randn(2 * num, 6, generator=torch.Generator().manual_seed(num))


def loss_of(vectors: Tensor) -> Tensor:
    vectors = F.normalize(vectors, dim=-1)
    return contrastive_loss(vectors[::2], vectors[1::2], LLAVE, scale=20.0)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_cache_changes_no_gradient(size: int, dropout: float) -> None:
    model, rows = build(dropout), data(5)
    chunks = rows.split(size)
    torch.manual_seed(7)
    whole = loss_of(torch.cat([model(chunk) for chunk in chunks]))
    whole.backward()
    expected = gradients(model)
    drawn_next = torch.rand(1)
    model.zero_grad()
    torch.manual_seed(7)
    loss = cached_backward(chunks, model, loss_of)
    torch.testing.assert_close(loss, whole.detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients(model), expected, atol=1e-5, rtol=0)
    assert torch.equal(torch.rand(1), drawn_next)


def test_chunks_are_cut_by_tokens() -> None:
    assert token_chunks([3, 3, 3, 9, 1, 1], 6) == [[0, 1], [2], [3], [4, 5]]
    assert token_chunks([], 6) == []


def one_process(number: int, store: Path, out: Path) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", f"file://{store}", rank=number, world_size=2)
    model = nn.parallel.DistributedDataParallel(build())
    own = data(7).split(6)[number * 1 : 1] if number == 0 else data(7).split(6)[1:]
    chunks = torch.cat(own).split(2)  # 3 pairs here, 4 there
    loss = cached_backward(
        chunks,
        model,
        lambda vectors: loss_of(gather_rows(vectors)),
        no_sync=model.no_sync,
        factor=world_size(),
    )
    torch.save((loss, gradients(model)), out / f"{number}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_joined_batch(tmp_path: Path) -> None:
    model = build()
    whole = loss_of(model(data(7)))
    whole.backward()
    spawn(one_process, (tmp_path / "store", tmp_path), nprocs=2)
    for number in range(2):
        loss, found = torch.load(tmp_path / f"{number}.pt")
        torch.testing.assert_close(loss, whole.detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(found, gradients(model), atol=1e-5, rtol=0)
