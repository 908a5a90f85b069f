"""PyTorch's `varlen_attn` by its definition, one sequence and one mask at a time, on any device.

Stands in for the CUDA kernel, so that what the kernel is told can be checked by what comes out:
which pages, how many keys, which mask. Knows nothing of who calls it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from torch import Tensor


def varlen_by_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Masks are aligned at the last query and the last key, as FlashAttention 2 aligns them."""
    left, right = window_size
    bounds, key_bounds = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert bounds[-1] == len(query) and len(bounds) == len(key_bounds)
    outputs = []
    for i in range(len(bounds) - 1):
        q = query[bounds[i] : bounds[i + 1]]
        if block_table is None or seqused_k is None:
            k, v = (x[key_bounds[i] : key_bounds[i + 1]] for x in (key, value))
        else:
            pages, used = block_table[i].long(), int(seqused_k[i])
            assert used == key_bounds[i + 1] - key_bounds[i]
            k, v = (x[pages].flatten(0, 1)[:used] for x in (key, value))
            assert len(k) == used
        assert len(q) <= max_q and len(k) <= max_k
        rows = torch.arange(len(k) - len(q), len(k))[:, None]
        columns = torch.arange(len(k))[None]
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        if left >= 0:
            seen &= columns >= rows - left
        if right >= 0:
            seen &= columns <= rows + right
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=enable_gqa)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def use_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU go the way of CUDA, all but its graphs, with 4 MB for keys and values."""
    for module in ("attention", "paged_kv_cache", "cuda_graphs"):
        monkeypatch.setattr(f"visavis.model.{module}.has_kernel", lambda *kind: True)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_by_definition)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 23, 1 << 24))
