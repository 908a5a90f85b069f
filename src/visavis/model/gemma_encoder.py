"""EmbeddingGemma 2: a bidirectional encoder of texts with image tokens among them, and its tower.

Gemma's block with a norm before and after attention and feed-forward, RMS norms on queries, keys
and values, and unscaled scores. The encoder alternates layers that see `window` tokens to each side
with wider ones that see all, and mixes a projection of its input into every layer (per-layer
embeddings). The tower is Gemma 4's: learned positions and rotary ones by column and row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.attention import SequenceLayout, attend
from visavis.model.decoder import ACTIVATIONS
from visavis.model.embedder_config import GemmaEncoderConfig, GemmaTowerConfig
from visavis.model.layers import Embedding, Linear
from visavis.model.rope import rotate, signed_tables
from visavis.model.vision.naflex import Grid, frame_lengths
from visavis.model.vision.qwen2_vl import patch_places

Tables = list[tuple[Tensor, Tensor]]  # cos and signed sin of each equal part of a head


class RmsNorm(nn.Module):
    """x / sqrt(mean x² + eps) * weight, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)
        return normed.to(x.dtype)


class GemmaBlock(nn.Module):
    """Attention and feed-forward between norms."""

    def __init__(
        self, config: GemmaEncoderConfig | GemmaTowerConfig, head_dim: int, kv_heads: int
    ) -> None:
        super().__init__()
        width, heads, eps = config.width, config.num_heads, config.norm_eps
        self.heads, self.kv_heads, self.head_dim, self.eps = heads, kv_heads, head_dim, eps
        self.attn_norm, self.attn_post_norm = RmsNorm(width, eps), RmsNorm(width, eps)
        self.ffn_norm, self.ffn_post_norm = RmsNorm(width, eps), RmsNorm(width, eps)
        self.qkv = Linear(width, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.out = Linear(heads * head_dim, width, bias=False)
        self.q_norm, self.k_norm = RmsNorm(head_dim, eps), RmsNorm(head_dim, eps)
        self.up = Linear(width, 2 * config.ffn_width, bias=False)
        self.down = Linear(config.ffn_width, width, bias=False)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, tables: Tables, layout: SequenceLayout, window: int) -> Tensor:
        qkv = self.qkv(self.attn_norm(x)).view(len(x), -1, self.head_dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
        q = _rotated(self.q_norm(q) * self.head_dim**0.5, tables)  # scores are not scaled
        k = _rotated(self.k_norm(k), tables)
        v = F.rms_norm(v.float(), v.shape[-1:], eps=self.eps).to(v.dtype)
        mixed = attend(q, k, v, layout, causal=False, window=window).flatten(1)
        x = x + self.attn_post_norm(self.out(mixed))
        gate, hidden = self.up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.ffn_post_norm(self.down(self.activation(gate) * hidden))


def _rotated(x: Tensor, tables: Tables) -> Tensor:
    """Return heads [T, H, d] rotated, each equal part by its own tables."""
    parts = x.float().chunk(len(tables), -1)
    turned = [rotate(part, *table) for part, table in zip(parts, tables, strict=True)]
    return torch.cat(turned, -1).to(x.dtype)


def _tables(places: Tensor, base: float, dim: int) -> tuple[Tensor, Tensor]:
    """Return cos and signed sin for positions [T], each [T, 1, dim]."""
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=places.device) / dim
    return signed_tables(places[:, None] * base**-exponent)


class PerLayerInput(nn.Module):
    """Mixes a layer's share of the projected input into the residual stream."""

    def __init__(self, config: GemmaEncoderConfig) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.ple_width, bias=False)
        self.project = Linear(config.ple_width, config.width, bias=False)
        self.norm = RmsNorm(config.width, config.norm_eps)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, share: Tensor) -> Tensor:
        mixed: Tensor = self.norm(self.project(self.activation(self.gate(x)) * share))
        return x + mixed


class GemmaEncoder(nn.Module):
    """Token embeddings, blocks, final norm and the projection to the embedding."""

    def __init__(self, config: GemmaEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        shapes = zip(config.head_dims, config.kv_heads, strict=True)
        self.blocks = nn.ModuleList(GemmaBlock(config, *shape) for shape in shapes)
        self.ple = nn.ModuleList(PerLayerInput(config) for _ in range(config.num_layers))
        self.scales = nn.ParameterList(torch.ones(1) for _ in range(config.num_layers))
        total = config.num_layers * config.ple_width
        self.ple_project = Linear(config.width, total, bias=False)
        self.ple_norm = RmsNorm(config.ple_width, config.norm_eps)
        self.norm = RmsNorm(config.width, config.norm_eps)
        self.project = Linear(config.width, config.dim, bias=False)

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Return the scaled embeddings of tokens, [T, W]."""
        found: Tensor = self.embed(token_ids)
        return found * torch.tensor(self.config.width**0.5, dtype=found.dtype)

    def forward(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the states that are averaged, [T, dim], of the input x [T, W]."""
        config, layout = self.config, SequenceLayout(tuple(lengths))
        shares = self.ple_project(x) * config.width**-0.5
        shares = self.ple_norm(shares.view(len(x), config.num_layers, -1))
        places = torch.cat([torch.arange(n, device=x.device) for n in lengths])
        tables: dict[tuple[float, int], Tables] = {}
        for number, block in enumerate(self.blocks):
            key = (config.rope_bases[number], config.head_dims[number])
            if key not in tables:
                tables[key] = [_tables(places, *key)]
            radius = config.windows[number]  # the token itself not included
            x = block(x, tables[key], layout, radius + 1 if radius else 0)
            x = self.ple[number](x, shares[:, number]) * self.scales[number]
        found: Tensor = self.project(self.norm(x))
        return found


class GemmaTower(nn.Module):
    """Patch embedding with positions, and blocks; pooling belongs to the connector."""

    def __init__(self, config: GemmaTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch = Linear(3 * config.patch_size**2, config.width, bias=False)
        self.positions = nn.Parameter(torch.zeros(2, config.num_positions, config.width))
        shape = (config.head_dim, config.num_heads)
        self.blocks = nn.ModuleList(GemmaBlock(config, *shape) for _ in range(config.num_layers))

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Return the last hidden state, [P, W], of patches [P, C] of images one after another."""
        places = torch.cat([patch_places(grid, self.config.merge) for grid in grids])
        rows, columns = places.to(patches.device).unbind(1)
        x = self.patch(patches) + self.positions[0, columns] + self.positions[1, rows]
        dim = self.config.head_dim // 2
        tables = [_tables(axis, self.config.rope_base, dim) for axis in (columns, rows)]
        layout = SequenceLayout(frame_lengths(grids))
        for block in self.blocks:
            x = block(x, tables, layout, 0)
        return x
