"""Packed attention against the formula, written out per token and head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visavis.model.attention import SequenceLayout, attend
from visavis.model.config import DecoderConfig
from visavis.model.kv_cache import KVCache

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
LENGTHS = (1, 17, 4, 9)


def random_qkv(total: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(total, HEADS, HEAD_DIM, generator=generator)
    k, v = torch.randn(2, total, KV_HEADS, HEAD_DIM, generator=generator)
    return q, k, v


def by_formula(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int) -> Tensor:
    """Attend within one sequence, one token and one head at a time."""
    out = torch.empty_like(q)
    for token in range(len(q)):
        first = max(0, token - window + 1) if causal and window else 0
        seen = slice(first, token + 1 if causal else len(q))
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            scores = k[seen, shared] @ q[token, head] / HEAD_DIM**0.5
            out[token, head] = scores.softmax(0) @ v[seen, shared]
    return out


@pytest.mark.parametrize("lengths", [LENGTHS, (6, 6, 6), (13,), (1, 1)])
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 3), (True, 50), (False, 0)])
def test_each_sequence_attends_to_itself(
    lengths: tuple[int, ...], causal: bool, window: int
) -> None:
    q, k, v = random_qkv(sum(lengths))
    packed = attend(q, k, v, SequenceLayout(lengths), causal=causal, window=window)
    singles = [
        by_formula(*parts, causal, window)
        for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(singles), atol=1e-6, rtol=1e-5)


def cache(capacity: int) -> KVCache:
    config = DecoderConfig(8, 48, 1, HEADS, KV_HEADS, HEAD_DIM, 8, 64)
    return KVCache(config, dtype=torch.float32, capacity=capacity)


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("capacity", [1, 64])
def test_chunks_through_a_cache_equal_the_whole(window: int, capacity: int) -> None:
    q, k, v = random_qkv(40)
    expected = attend(q, k, v, SequenceLayout((40,)), window=window)
    store = cache(capacity)
    pieces = []
    for length in (7, 1, 1, 20, 1, 10):
        now = slice(store.length, store.length + length)
        layout = SequenceLayout((length,), (store,))
        pieces.append(attend(q[now], k[now], v[now], layout, window=window))
        store.advance(length)
    torch.testing.assert_close(torch.cat(pieces), expected, atol=1e-6, rtol=1e-5)


def test_sequences_with_pasts_of_their_own_share_a_stream() -> None:
    lengths, pasts = (1, 3, 1), (5, 0, 12)
    sequences = [random_qkv(p + n, seed=n + p) for n, p in zip(lengths, pasts, strict=True)]
    caches = tuple(cache(4) for _ in lengths)
    for store, past, (_, k, v) in zip(caches, pasts, sequences, strict=True):
        store.extend(0, k[:past], v[:past])
        store.advance(past)
    new = [
        torch.cat([parts[i][past:] for parts, past in zip(sequences, pasts, strict=True)])
        for i in range(3)
    ]
    packed = attend(*new, SequenceLayout(lengths, caches))
    singles = [
        attend(*parts, SequenceLayout((len(parts[0]),)))[past:]
        for parts, past in zip(sequences, pasts, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(singles), atol=1e-6, rtol=1e-5)


def test_a_truncated_cache_forgets() -> None:
    q, k, v = random_qkv(10)
    store = cache(16)
    attend(q, k * 2, v + 1, SequenceLayout((10,), (store,)))
    store.advance(10)
    store.truncate(0)
    again = attend(q, k, v, SequenceLayout((10,), (store,)))
    torch.testing.assert_close(again, attend(q, k, v, SequenceLayout((10,))))


def test_boundaries_of_sequences() -> None:
    layout = SequenceLayout((3, 1, 4))
    assert layout.cu_seqlens(torch.device("cpu")).tolist() == [0, 3, 4, 8]
    assert layout.max_length == 4


@pytest.mark.parametrize("lengths", [(5,), (7, 3, 1), (4, 4)])
def test_training_attention_has_the_gradients_of_the_fused_kernel(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    shapes = ((total, 6, 8), (total, 2, 8), (total, 2, 8))
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    weights = torch.randn(total, 6, 8)
    (attend(*inputs, SequenceLayout(lengths)) * weights).sum().backward()
    found = [x.grad for x in inputs]

    q, k, v = (x.detach().clone().requires_grad_() for x in inputs)
    pieces = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in piece), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        for piece in pieces
    ]
    (torch.cat(outputs) * weights).sum().backward()
    for mine, theirs in zip(found, (q.grad, k.grad, v.grad), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
