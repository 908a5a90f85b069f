"""Attention that reads keys and values from a pool of pages.

On CUDA in half precision one kernel follows each sequence's list of pages. Elsewhere the decode
step, one new token a sequence, is written out in plain operations of the same shapes. Knows what
stands where (`Paging`), not how it came there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from visavis.model.paged import PagedCache, PagePool


@dataclass(frozen=True)
class Paging:
    """Where one pass over the decoder writes and reads a pool; tensors on the pool's device.

    Args:
        slots: int64 [T], where each new token's key and value go.
        table: int32 [B, n], the pages of each sequence, then any.
        starts: int32 [B + 1], where each sequence's new tokens begin in the stream.
        key_starts: int32 [B + 1], the running sum of `totals`.
        totals: int32 [B], tokens of each sequence, the new ones included.
        longest: most new tokens of a sequence.
        past: whether a sequence may have tokens before the new ones.
    """

    pool: PagePool
    slots: Tensor
    table: Tensor
    starts: Tensor
    key_starts: Tensor
    totals: Tensor
    longest: int
    past: bool

    @staticmethod
    def of(caches: Sequence[PagedCache], lengths: Sequence[int]) -> Paging:
        """Make room for new tokens of each sequence and say where it is."""
        pairs = list(zip(caches, lengths, strict=True))
        for cache, length in pairs:
            cache.reserve(cache.length + length)
        widest = max(len(cache.pages) for cache in caches)
        totals = [cache.length + length for cache, length in pairs]
        pool = caches[0].pool

        def ints(values: list[int] | list[list[int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).to(pool.keys[0].device)

        return Paging(
            pool,
            slots=torch.cat([cache.slots(length) for cache, length in pairs]),
            table=ints([c.pages + [0] * (widest - len(c.pages)) for c in caches]),
            starts=ints([0, *accumulate(lengths)]),
            key_starts=ints([0, *accumulate(totals)]),
            totals=ints(totals),
            longest=max(lengths),
            past=any(cache.length for cache in caches),
        )


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether `varlen_attn` takes keys of this kind there; it asks for an Ampere GPU."""
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not half or head_dim % 8 or head_dim > 256:
        return False
    if not torch.cuda.is_available():
        return True  # tensors without numbers, to look at shapes
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend_paged(
    query: Tensor,  # [T, heads, head_dim]
    paging: Paging,
    *,
    layer: int,
    window: int = 0,
) -> Tensor:  # [T, heads, head_dim]
    """Attend causally within each sequence, all of whose keys and values are in the pool."""
    keys, values = paging.pool.keys[layer], paging.pool.values[layer]
    if not has_kernel(keys.device, keys.dtype, keys.shape[-1]):
        return _attend_step(query, paging, layer, window)
    from torch.nn.attention.varlen import varlen_attn

    # One token sees everything there is; without a mask, heads that share a key head are read once.
    plain = paging.longest == 1 and not window
    out = varlen_attn(
        query,
        keys,
        values,
        paging.starts,
        paging.key_starts,
        paging.longest,
        paging.table.shape[1] * paging.pool.page,
        window_size=(-1, -1) if plain else (window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != keys.shape[2],
        seqused_k=paging.totals,
        block_table=paging.table,
    )
    assert isinstance(out, Tensor)
    return out


def _attend_step(query: Tensor, paging: Paging, layer: int, window: int) -> Tensor:
    """One new token of each sequence, without a kernel: all pages of the table are read."""
    assert paging.longest == 1
    num, num_heads, head_dim = query.shape
    keys, values = paging.pool.read(layer, paging.table.flatten())
    num_kv_heads = keys.shape[1]
    k, v = (x.view(num, -1, num_kv_heads, head_dim).transpose(1, 2) for x in (keys, values))
    places, totals = torch.arange(k.shape[2], device=k.device), paging.totals[:, None]
    seen = places < totals
    if window:
        seen = seen & (places >= totals - window)
    grouped = query.view(num, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen[:, None, None])
    return out.reshape(query.shape)
