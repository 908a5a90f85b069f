"""The decode step of Llama-like decoders on the CPU, flattened.

One token through 30 layers is some 500 small operations, and walking modules costs as much as the
arithmetic. Here the weights are looked up once and the layers are one loop. The operations and
their order are those of `decoder.Block`, so results are bitwise the same (a test holds them
together); configs with other switches take `Decoder.forward`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.config import DecoderConfig
from visavis.model.decoder import ACTIVATIONS, Block, Decoder
from visavis.model.kv_cache import KVCache
from visavis.model.quantized import PackedLinear, packed_kernels

Multiply = Callable[[Tensor], Tensor]


def can_flatten(decoder: Decoder) -> bool:
    """Return whether `FlatStep` computes this decoder."""
    config = decoder.config
    plain = config.norm == "rms" and not config.norm_offset and not config.qk_norm and config.gated
    simple = not (config.parallel_block or config.sliding_window)
    on_cpu = decoder.norm.weight.device.type == "cpu"
    return plain and simple and on_cpu and config.rotary_dim == config.head_dim


class FlatStep:
    """Extends one sequence by one token at a time; inference only.

    Args:
        ahead: by how much a token's position exceeds the number of tokens before it.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, ahead: int = 0) -> None:
        assert can_flatten(decoder)
        self.decoder, self.cache, self.ahead = decoder, cache, ahead
        self.layers = [_Layer(block, decoder.config, i) for i, block in enumerate(decoder.blocks)]
        self.head = multiply(decoder.head)

    def __call__(self, token: int) -> Tensor:
        """Return the scores of the token after `token`, float32 [vocab]."""
        decoder, cache = self.decoder, self.cache
        past = cache.length
        cache.reserve(past + 1)
        x = decoder.embed_tokens(torch.tensor([token]))  # [1, D]
        cos, sin = decoder.rope(torch.tensor([past + self.ahead]), decoder.dtype)
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer(x, cos, sin, keys, values, past)
        cache.advance(1)
        with packed_kernels():
            return self.head(decoder.norm(x).to(decoder.dtype))[0].float()


class _Layer:
    """One block with its weights at hand."""

    def __init__(self, block: nn.Module, config: DecoderConfig, number: int) -> None:
        assert isinstance(block, Block) and block.ffn_norm is not None
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
    ) -> Tensor:  # [1, D] -> [1, D]
        heads, kv_heads, dim, dtype = self.heads, self.kv_heads, self.head_dim, cos.dtype
        qkv = self.qkv(self.norm(x, self.attn_norm).to(dtype)).view(1, heads + 2 * kv_heads, dim)
        rotated = qkv.narrow(1, 0, heads + kv_heads)
        rotated = torch.addcmul(rotated * cos, rotated.roll(dim // 2, -1), sin)
        keys.select(1, past).copy_(rotated[0, heads:])
        values.select(1, past).copy_(qkv[0, heads + kv_heads :])
        mixed = F.scaled_dot_product_attention(  # heads that share a key head: rows of one query
            rotated.narrow(1, 0, heads).view(1, kv_heads, heads // kv_heads, dim),
            keys.narrow(1, 0, past + 1)[None],
            values.narrow(1, 0, past + 1)[None],
        )
        x = x + self.out(mixed.reshape(1, heads * dim))
        up = self.up(self.norm(x, self.ffn_norm).to(dtype))  # gate and up side by side
        width = self.ffn_width
        return x + self.down(self.activation(up.narrow(1, 0, width)) * up.narrow(1, width, width))

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        row = x.view(-1)
        mean_square = torch.dot(row, row).item() / row.numel()
        return x * (mean_square + self.eps) ** -0.5 * weight


def multiply(linear: nn.Module) -> Multiply:
    """Return a linear's product: its weights bound, packed where it is packed. What is more than
    a linear, such as one with an adapter in training, is called as it is."""
    if isinstance(linear, PackedLinear):
        return linear.product()
    if isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward:
        return partial(F.linear, weight=linear.weight, bias=linear.bias)
    return linear
