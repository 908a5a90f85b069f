"""The decode step of Llama-like decoders on the CPU, flattened.

One token through 30 layers is some 500 small operations, and walking modules costs as much as the
arithmetic. Here the weights are looked up once and the layers are one loop. The operations and
their order are those of `decoder.Block`, so results are bitwise the same (a test holds them
together); configs with other switches take `Decoder.forward`. Several tokens of one sequence can
pass at a time: packed products then read the weights once, operations whose rounding depends on
the number of rows run row by row, and each token's logits are bitwise those of a single token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.config import DecoderConfig
from visavis.model.decoder import ACTIVATIONS, Block, Decoder
from visavis.model.kv_cache import KVCache
from visavis.model.quantized_linear import QuantizedLinear, each_row, multiply, packed_kernels
from visavis.model.rope import rotate


def can_flatten(decoder: Decoder) -> bool:
    """Return whether `FusedDecodeStep` computes this decoder."""
    if decoder.compiled is not None:
        return True
    config = decoder.config
    plain = config.norm == "rms" and not config.norm_offset and not config.qk_norm and config.gated
    simple = not (config.parallel_block or config.sliding_window)
    on_cpu = decoder.norm.weight.device.type == "cpu"
    return plain and simple and on_cpu and config.rotary_dim == config.head_dim


def is_row_by_row(decoder: Decoder) -> bool:
    """Return whether several tokens of one sequence cost little more than one in a decode step.

    Packed products take four rows at a time.
    """
    if decoder.compiled is not None:
        return True
    linears = [(block.qkv, block.out, block.up, block.down) for block in decoder.blocks]
    every = (decoder.head, *chain.from_iterable(linears))
    return can_flatten(decoder) and all(
        isinstance(one, QuantizedLinear) and (one.low is None or one.dtype == torch.bfloat16)
        for one in every
    )


class FusedDecodeStep:
    """Extends one sequence; inference only.

    Args:
        position_offset: by how much a token's position exceeds the number of tokens before it.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, position_offset: int = 0) -> None:
        assert can_flatten(decoder)
        self.decoder, self.cache, self.position_offset = decoder, cache, position_offset
        if decoder.compiled is not None:
            return
        self.layers = [_Layer(block, decoder.config, i) for i, block in enumerate(decoder.blocks)]
        self.head = multiply(decoder.head)

    def __call__(self, token: int) -> Tensor:
        """Return the scores of the token after `token`, float32 [vocab]."""
        return self.several((token,))[0]

    def several(self, tokens: Sequence[int]) -> Tensor:
        """Return the scores of what follows each token, float32 [n, vocab]."""
        decoder, cache = self.decoder, self.cache
        past, count = cache.length, len(tokens)
        cache.reserve(past + count)
        x = decoder.embed_tokens(torch.tensor(tokens))  # [n, D]
        first = past + self.position_offset
        positions = torch.arange(first, first + count)
        if decoder.compiled is not None:
            return decoder.compiled.scores(x, positions, (cache,))
        cos, sin = decoder.rope(positions, decoder.dtype)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer(x, cos, sin, keys, values, past)
        cache.advance(count)
        with packed_kernels():
            return self.head(decoder.norm(x).to(decoder.dtype)).float()


class _Layer:
    """One block with its weights at hand."""

    def __init__(self, block: nn.Module, config: DecoderConfig, number: int) -> None:
        assert isinstance(block, Block)
        assert block.attn_norm is not None and block.ffn_norm is not None
        self.heads = config.per_layer(config.num_heads, number)
        self.kv_heads = config.per_layer(config.num_kv_heads, number)
        self.head_dim, self.eps = config.head_dim, config.norm_eps
        self.ffn_width = config.per_layer(config.ffn_width, number)
        self.activation = ACTIVATIONS[config.activation]
        self.attn_norm, self.ffn_norm = block.attn_norm.weight, block.ffn_norm.weight
        linears = (block.qkv, block.out, block.up, block.down)
        self.qkv, self.out, self.up, self.down = map(multiply, linears)

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, past: int
    ) -> Tensor:  # [n, D] -> [n, D]
        heads, kv_heads, dim, dtype = self.heads, self.kv_heads, self.head_dim, cos.dtype
        count = len(x)
        qkv = self.qkv(self.norm(x, self.attn_norm).to(dtype)).view(-1, heads + 2 * kv_heads, dim)
        rotated = qkv.narrow(1, 0, heads + kv_heads)
        rotated = each_row(rotate, rotated, cos, sin)
        keys.narrow(1, past, count).copy_(rotated.narrow(1, heads, kv_heads).transpose(0, 1))
        values.narrow(1, past, count).copy_(
            qkv.narrow(1, heads + kv_heads, kv_heads).transpose(0, 1)
        )
        queries = rotated.narrow(1, 0, heads)
        ends = range(past + 1, past + count + 1)
        mixed = [self.attend(q, keys, values, end) for q, end in zip(queries, ends, strict=True)]
        x = x + self.out(joined(mixed))
        up = self.up(self.norm(x, self.ffn_norm).to(dtype))  # gate and up side by side
        return x + self.down(joined([self.gated(row) for row in up.split(1)]))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, end: int) -> Tensor:
        """Let one token [heads, head_dim] see the first `end`; return [1, heads * head_dim]."""
        mixed = F.scaled_dot_product_attention(  # heads that share a key head: rows of one query
            query.view(1, self.kv_heads, self.heads // self.kv_heads, self.head_dim),
            keys.narrow(1, 0, end)[None],
            values.narrow(1, 0, end)[None],
        )
        return mixed.reshape(1, self.heads * self.head_dim)

    def gated(self, up: Tensor) -> Tensor:  # [1, 2F] -> [1, F]
        width = self.ffn_width
        return self.activation(up.narrow(1, 0, width)) * up.narrow(1, width, width)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        scales = [(torch.dot(row, row).item() / len(row) + self.eps) ** -0.5 for row in x]
        scale = scales[0] if len(scales) == 1 else x.new_tensor(scales)[:, None]
        return x * scale * weight


def joined(rows: list[Tensor]) -> Tensor:
    """Return rows [1, D] as [n, D]."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)
