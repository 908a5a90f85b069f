"""The decode loop: prefill once, then one token at a time through the key-value cache.

Takes token ids and yields token ids. Knows nothing of tokenizers, templates or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from visavis.model.attention import Layout
from visavis.model.batch import PackedBatch
from visavis.model.decode import FlatStep, can_flatten
from visavis.model.decoder import Decoder
from visavis.model.kv_cache import KVCache
from visavis.model.quantized import packed_kernels
from visavis.model.vlm import VLM


def generate(
    vlm: VLM,
    batch: PackedBatch,
    sample: Callable[[Tensor], int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    """Yield new token ids of one sequence until a stop id (not yielded) or the limit.

    The first token arrives when the prompt has been read; stopping the iteration frees the cache.
    """
    decoder = vlm.decoder
    cache = KVCache(
        decoder.config,
        dtype=decoder.dtype,
        device=batch.token_ids.device,
        capacity=batch.num_tokens + min(max_new_tokens, 512),
    )
    logits = _prefill(vlm, batch, cache)
    # With M-RoPE an image takes fewer positions than tokens; after it all axes are equal again.
    ahead = int(batch.positions.max()) + 1 - batch.num_tokens
    flat = FlatStep(decoder, cache, ahead) if can_flatten(decoder) else None
    for _ in range(max_new_tokens - 1):
        token = sample(logits)
        if token in stop_ids:
            return
        yield token
        logits = _step(decoder, token, cache, flat, ahead)
    token = sample(logits)
    if token not in stop_ids:
        yield token


@torch.inference_mode()
def _prefill(vlm: VLM, batch: PackedBatch, cache: KVCache) -> Tensor:
    """Read the prompt; return the scores of its last position, float32 [vocab]."""
    hidden = vlm(batch, caches=(cache,))[-1]
    return vlm.decoder.logits(hidden[-1:])[0]


@torch.inference_mode()
def _step(
    decoder: Decoder, token: int, cache: KVCache, flat: FlatStep | None, ahead: int
) -> Tensor:
    """Extend the sequence by one token; return the scores of the next, float32 [vocab].

    Args:
        ahead: by how much the token's position exceeds the number of tokens before it.
    """
    if flat is not None:
        return flat(token)
    device = cache.keys[0].device
    x = decoder.embed_tokens(torch.tensor([token], device=device))
    positions = torch.tensor([cache.length + ahead], device=device)
    with packed_kernels():
        hidden = decoder(x, positions, Layout((1,), (cache,)))[-1]
        return decoder.logits(hidden)[0]
