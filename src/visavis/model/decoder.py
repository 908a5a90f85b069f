"""One decoder for all language-model families; `DecoderConfig` holds their differences.

Reads a packed stream of embeddings `[T, D]` and returns hidden states `[T, D]`. The residual
stream is float32 for any data type of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from visavis.model.attention import SequenceLayout, attend
from visavis.model.config import DecoderConfig
from visavis.model.layers import Embedding, Linear
from visavis.model.paged_kv_cache import Cache
from visavis.model.quantized_linear import QuantizedEmbedding, apply_linear, decoding, each_row
from visavis.model.rope import Rope, rotate

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


def by_row(function: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """Return a function of tensors [T, ...]; in a decode step of one row after another, so that a
    sequence's row does not depend on how many there are."""
    return each_row(function, *xs) if decoding() else function(*xs)


class Norm(nn.Module):
    """RMS or layer norm; weights stay float32, as does the result."""

    def __init__(self, width: int, config: DecoderConfig) -> None:
        super().__init__()
        self.shape, self.eps, self.offset = (width,), config.norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - config.norm_offset))
        self.is_layer = config.norm == "layer"
        biased = self.is_layer and config.norm_bias
        self.bias = nn.Parameter(torch.zeros(width)) if biased else None

    def forward(self, x: Tensor) -> Tensor:  # [..., width] -> the same, float32
        if self.is_layer:
            norm = partial(
                F.layer_norm,
                normalized_shape=self.shape,
                weight=self.weight,
                bias=self.bias,
                eps=self.eps,
            )
            return by_row(norm, x)
        weight = self.weight + self.offset if self.offset else self.weight
        if x.dim() == 2 and decoding() and not x.is_cuda:
            # Three kernels a row instead of nine (1 ms a token for 60 norms), and the same sum
            # whatever other rows there are.
            squares = [torch.dot(row, row).item() / len(row) for row in x]
            if len(squares) == 1:
                return x * (squares[0] + self.eps) ** -0.5 * weight
            scales = x.new_tensor([(square + self.eps) ** -0.5 for square in squares])
            return x * scales[:, None] * weight
        return F.rms_norm(x, self.shape, weight, self.eps)


class Block(nn.Module):
    """Attention and feed-forward, each on a norm of the residual stream."""

    attend = staticmethod(attend)  # where a compiled block stops, see `train/loop.py`

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.num_heads = config.per_layer(config.num_heads, layer)
        self.num_kv_heads = config.per_layer(config.num_kv_heads, layer)
        head_dim, width = config.head_dim, config.width
        ffn_width = config.per_layer(config.ffn_width, layer)
        qkv_width = (self.num_heads + 2 * self.num_kv_heads) * head_dim
        self.window = config.sliding_window
        if layer in config.local_layers:
            self.window = config.local_window
        is_normed = config.embed_norm and not layer
        self.attn_norm = None if is_normed else Norm(width, config)
        self.qkv = Linear(width, qkv_width, bias=config.qkv_bias)
        self.out = Linear(self.num_heads * head_dim, width, bias=config.out_bias)
        self.ffn_norm = None if config.parallel_block else Norm(width, config)
        self.up = Linear(width, ffn_width * (1 + config.gated), bias=config.ffn_bias)
        self.down = Linear(ffn_width, width, bias=config.ffn_bias)
        self.q_norm = Norm(head_dim, config) if config.qk_norm else None
        self.k_norm = Norm(head_dim, config) if config.qk_norm else None
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], layout: SequenceLayout) -> Tensor:
        dtype = rotary[0].dtype
        normed = (x if self.attn_norm is None else self.attn_norm(x)).to(dtype)  # [T, D]
        if self.ffn_norm is None:
            return x + self.attention(normed, rotary, layout) + self.feed_forward(normed)
        x = x + self.attention(normed, rotary, layout)
        return x + self.feed_forward(self.ffn_norm(x).to(dtype))

    def attention(self, x: Tensor, rotary: tuple[Tensor, Tensor], layout: SequenceLayout) -> Tensor:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = apply_linear(self.qkv, x).view(-1, heads + 2 * kv_heads, self.config.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
            q = by_row(self.q_norm, q.float()).to(x.dtype)
            k = by_row(self.k_norm, k.float()).to(x.dtype)
            q, k = by_row(rotate, q, *rotary), by_row(rotate, k, *rotary)
        else:  # one rotation for queries and keys: they stand side by side
            both, v = qkv.split((heads + kv_heads, kv_heads), 1)
            q, k = by_row(rotate, both, *rotary).split((heads, kv_heads), 1)
        mixed = self.attend(
            q,
            k,
            v,
            layout,
            layer=self.layer,
            causal=self.config.causal,
            window=self.window,
        )
        return apply_linear(self.out, mixed.reshape(x.shape[0], -1))  # [T, D]

    def feed_forward(self, x: Tensor) -> Tensor:
        hidden = apply_linear(self.up, x)  # [T, F] or [T, 2F]: gate and up side by side
        if self.config.gated:
            gate, hidden = hidden.chunk(2, -1)
            hidden = by_row(self.activation, gate) * hidden
        else:
            hidden = by_row(self.activation, hidden)
        return apply_linear(self.down, hidden)


@dataclass(frozen=True)
class DeepStack:
    """Image features that are added between the first blocks (DeepStack, Meng et al. 2024).

    Args:
        positions: int64 [S], rows of the stream that belong to images.
        features: float [S, D] of each of the first blocks, added to its output at these rows.
    """

    positions: Tensor
    features: tuple[Tensor, ...]

    def add(self, x: Tensor, block: int) -> Tensor:
        """Return the output of a block, by its number from 0, with its features added [T, D]."""
        if block >= len(self.features):
            return x
        return x.index_add(0, self.positions, self.features[block].to(x.dtype))


class CompiledDecoder(Protocol):
    """Replacement of a decoder's forward pass, see `native_decoder.py`."""

    def takes(self, x: Tensor, layout: SequenceLayout) -> bool:
        """Return whether it computes this pass."""
        ...

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        layout: SequenceLayout,
        layers: Collection[int],
        deepstack: DeepStack | None,
    ) -> dict[int, Tensor]:
        """Do what `Decoder.forward` does."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Do what `Decoder.logits` does."""
        ...

    def scores(self, x: Tensor, positions: Tensor, caches: Sequence[Cache]) -> Tensor:
        """Extend caches by the tokens x [T, D], all by equally many; return the scores of what
        follows each token, float32 [T, vocab]."""
        ...


class Decoder(nn.Module):
    """Token embeddings, blocks, final norm and head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # in training: activations of blocks again on the way back
        self.compiled: CompiledDecoder | None = None
        self.rope = Rope(config)
        local = config.local_layers
        self.local_rope = (
            Rope(replace(config, rope_base=config.local_rope_base)) if local else self.rope
        )
        self.embed: Embedding | QuantizedEmbedding = Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.embed_norm = Norm(config.width, config) if config.embed_norm else None
        self.norm = Norm(config.width, config)
        self.head = Linear(config.width, config.vocab_size, bias=config.head_bias)
        if config.tied_head:
            self.head.weight = self.embed.weight

    @property
    def dtype(self) -> torch.dtype:
        """Data type of matrix products."""
        if isinstance(self.embed, QuantizedEmbedding):
            return self.embed.dtype
        weight = self.embed.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Return float32 embeddings [T, D] of int64 ids [T]."""
        return self.embed(token_ids).float() * self.config.embedding_scale

    def forward(
        self,
        x: Tensor,  # [T, D]
        positions: Tensor,  # int64 [T], or [3, T] for M-RoPE
        layout: SequenceLayout,
        layers: Collection[int] = (-1,),
        deepstack: DeepStack | None = None,
    ) -> dict[int, Tensor]:
        """Return the hidden states of the named layers, each float32 [T, D].

        Layer 0 is `x` itself, n the output of block n, before DeepStack's features are added to it;
        `num_layers` (or -1) is the output of the last block after the final norm. Blocks past the
        highest named layer do not run.
        """
        if self.compiled is not None and self.compiled.takes(x, layout):
            return self.compiled.forward(x, positions, layout, layers, deepstack)
        last = self.config.num_layers
        wanted = {layer: layer % (last + 1) for layer in layers}
        found = {0: x}
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        plain = self.rope(positions, self.dtype)
        local = self.local_rope(positions, self.dtype) if self.config.local_layers else plain
        for number, block in enumerate(self.blocks[: max(wanted.values())], start=1):
            rotary = local if number - 1 in self.config.local_layers else plain
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, layout, use_reentrant=False)
            else:
                x = block(x, rotary, layout)
            if number in wanted.values():
                found[number] = x
            if deepstack is not None:
                x = deepstack.add(x, number - 1)
        if max(wanted.values()) == last:
            found[last] = self.norm(x)
        for cache, length in zip(layout.caches, layout.lengths, strict=False):
            cache.advance(length)
        return {layer: found[number] for layer, number in wanted.items()}

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token scores, float32 [T, vocab], of normed hidden states [T, D]."""
        if self.compiled is not None and not (torch.is_grad_enabled() and hidden.requires_grad):
            return self.compiled.logits(hidden)
        return apply_linear(self.head, hidden.to(self.dtype)).float()
