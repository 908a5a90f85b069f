"""Attention over packed sequences, with two backends.

Tokens of all sequences are one stream `[T, heads, head_dim]`; a `SequenceLayout` holds the
boundaries of sequences and their KV caches. On CUDA (Ampere and newer), in half precision, the
whole stream goes through `varlen_attn`, with keys and values in pages where there is a cache
(`paged_kv_cache.py`); otherwise scaled-dot-product attention runs sequence by
sequence. Projections and rotary embeddings are applied by the caller.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from visavis.model.paged_kv_cache import Cache, PagedCache, Paging, attend_paged, has_kernel

SHORT = 256  # tokens up to which attention is written out in training on the CPU


@dataclass(frozen=True)
class SequenceLayout:
    """How a packed stream divides into sequences.

    Args:
        lengths: new tokens of each sequence, in stream order; their sum is T.
        caches: one cache per sequence that earlier tokens are read from and new ones are
            written to; empty when nothing is cached.
        paging: where a kernel finds them, when they are in pages.
    """

    lengths: tuple[int, ...]
    caches: tuple[Cache, ...] = field(default=())
    paging: Paging | None = None
    _starts: dict[torch.device, Tensor] = field(default_factory=dict, init=False, compare=False)

    @staticmethod
    def of(lengths: tuple[int, ...], caches: tuple[Cache, ...]) -> SequenceLayout:
        """Return the layout of new tokens that follow what caches hold."""
        paged = [cache for cache in caches if isinstance(cache, PagedCache)]
        keys = paged[0].pool.keys[0] if paged else None
        if keys is None or not has_kernel(keys.device, keys.dtype, keys.shape[-1]):
            return SequenceLayout(lengths, caches)
        return SequenceLayout(lengths, caches, Paging.of(paged, lengths))

    @cached_property
    def max_length(self) -> int:
        return max(self.lengths)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """Return the running sum of lengths, starting with 0, int32 [B + 1]."""
        if device not in self._starts:  # once for all layers: the device waits for the copy
            starts = torch.tensor((0, *self.lengths)).cumsum(0).to(torch.int32)
            self._starts[device] = starts.to(device)
        return self._starts[device]


def attend(
    query: Tensor,  # [T, heads, head_dim]
    key: Tensor,  # [T, kv_heads, head_dim]
    value: Tensor,  # [T, kv_heads, head_dim]
    layout: SequenceLayout,
    *,
    layer: int = 0,
    causal: bool = True,
    window: int = 0,
) -> Tensor:  # [T, heads, head_dim]
    """Attend within each sequence of the stream; scores are scaled by 1 / sqrt(head_dim).

    Args:
        layer: which layer of the caches to read and extend.
        causal: a token sees itself and what came before; otherwise its whole sequence.
        window: how many tokens back, and without `causal` ahead too, a token sees, itself included;
            0 = all.
    """
    if layout.paging is not None:
        assert causal
        layout.paging.pool.write(layer, layout.paging.slots, key, value)
        if layout.paging.past:
            return attend_paged(query, layout.paging, layer=layer, window=window)
    if not layout.caches or layout.paging is not None:
        if has_kernel(query.device, query.dtype, query.shape[-1]):
            return _attend_varlen(query, key, value, layout, causal, window)
        if len(set(layout.lengths)) == 1 and not query.requires_grad:
            return _attend_equal(query, key, value, layout, causal, window)
    if len(layout.lengths) == 1 and layout.caches:
        keys, values = layout.caches[0].extend(layer, key, value)
        return _attend_one(query, keys, values, causal, window)
    outputs = []
    pieces = zip(*(x.split(layout.lengths) for x in (query, key, value)), strict=True)
    for index, (q, k, v) in enumerate(pieces):
        if layout.caches:
            k, v = layout.caches[index].extend(layer, k, v)  # [kv_heads, past + L, head_dim]
        else:
            k, v = k.transpose(0, 1), v.transpose(0, 1)
        outputs.append(_attend_one(q, k, v, causal, window))
    return torch.cat(outputs)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int) -> Tensor:
    """Attend for one sequence: q [L, H, d], k and v [KV, S, d] with S >= L -> [L, H, d]."""
    length, num_heads, head_dim = q.shape
    num_kv_heads, total = k.shape[0], k.shape[1]
    if length == 1:  # decode: the heads that share a key head become rows of one query
        if window and causal and total > window:
            k, v = k[:, -window:], v[:, -window:]
        grouped = q.view(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        out = F.scaled_dot_product_attention(grouped, k[None], v[None])
        return out.reshape(1, num_heads, head_dim)
    if q.requires_grad and causal and not q.is_cuda and total == length <= SHORT and not window:
        return _attend_short(q, k, v)
    mask = None
    plain = total == length and (not window or window >= length)
    if causal and not plain:
        mask = _causal_mask(length, total, window, q.device)
    elif window and not plain:
        mask = _window_mask(length, window, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=causal and plain,
        enable_gqa=num_heads != num_kv_heads,
    )
    return out[0].transpose(0, 1)


def _attend_short(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Written out for training on the CPU: a third of the fused kernel's backward time."""
    length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[0]
    rows = (num_kv_heads, num_heads // num_kv_heads, length)  # heads that share a key head
    grouped = q.view(length, *rows[:2], head_dim).permute(1, 2, 0, 3)
    scores = grouped.reshape(num_kv_heads, -1, head_dim) @ k.transpose(1, 2)
    scores = scores.view(*rows, length) * head_dim**-0.5
    scores = scores.masked_fill(~_causal_mask(length, length, 0, q.device), -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    mixed = weights.view(num_kv_heads, -1, length) @ v
    return mixed.view(*rows, head_dim).permute(2, 0, 1, 3).reshape(q.shape)


def _attend_equal(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, causal: bool, window: int
) -> Tensor:
    """Sequences of one length need no ragged loop: one call with a batch axis."""
    num, length = len(layout.lengths), layout.max_length
    q, k, v = (x.view(num, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
    windowed, mask = 0 < window < length, None
    if windowed and causal:
        mask = _causal_mask(length, length, window, q.device)
    elif windowed:
        mask = _window_mask(length, window, q.device)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and not windowed,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2).reshape(query.shape)


def _causal_mask(length: int, total: int, window: int, device: torch.device) -> Tensor:
    """Return which of `total` keys the last `length` positions may see, bool [length, total]."""
    rows = torch.arange(total - length, total, device=device)[:, None]
    columns = torch.arange(total, device=device)[None]
    mask = columns <= rows
    return mask & (columns > rows - window) if window else mask


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return which tokens see one another that are less than `window` apart, bool [L, L]."""
    places = torch.arange(length, device=device)
    return (places[:, None] - places).abs() < window


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, causal: bool, window: int
) -> Tensor:
    """One kernel over the whole stream (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens = layout.cu_seqlens(query.device)
    side = window - 1 if window else -1
    out = varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        layout.max_length,
        layout.max_length,
        window_size=(side, 0 if causal else side),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out
