"""One vision transformer for CLIP, SigLIP and DINOv2; `ViTConfig` flags are their differences.

Takes normalised pixels [N, 3, S, S] and returns the hidden state of a chosen layer [N, P, W].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.attention import SequenceLayout, attend
from visavis.model.config import MixtureConfig, ViTConfig
from visavis.model.decoder import ACTIVATIONS
from visavis.model.embedder_config import ClipTextConfig, NaFlexConfig
from visavis.model.layers import Conv2d, Linear

QK_NORM_EPS = 1e-6  # in the library's code, not in its config


class ViTBlock(nn.Module):
    """Pre-norm attention and feed-forward, both with biases; CLIP's text tower has it too."""

    def __init__(self, config: ViTConfig | NaFlexConfig | ClipTextConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        norm = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
        self.attn_norm = norm(width, config.norm_eps)
        self.qkv = Linear(width, 3 * width, bias=config.qkv_bias)
        self.q_norm = nn.RMSNorm(width, QK_NORM_EPS) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(width, QK_NORM_EPS) if config.qk_norm else None
        self.out = Linear(width, width)
        self.ffn_norm = norm(width, config.norm_eps)
        self.up = Linear(width, config.ffn_width * (1 + config.gated_ffn))
        self.down = Linear(config.ffn_width, width)
        self.activation, self.gated = ACTIVATIONS[config.activation], config.gated_ffn
        scaled = config.layer_scale
        self.attn_scale = nn.Parameter(torch.ones(width)) if scaled else None
        self.ffn_scale = nn.Parameter(torch.ones(width)) if scaled else None

    def forward(
        self, x: Tensor, layout: SequenceLayout | None = None, causal: bool = False
    ) -> Tensor:
        """Return the block's output for views [N, P, W], or for a packed stream [T, W].

        Args:
            layout: of a stream.
        """
        if layout is None:
            layout = SequenceLayout((x.shape[1],) * len(x))
        rows = x.shape[:-1].numel()
        qkv = self.qkv(self.attn_norm(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.chunk(3, -1)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), -1)
        q, k, v = qkv.view(rows, 3 * self.num_heads, -1).chunk(3, 1)  # each [rows, heads, head_dim]
        mixed = attend(q, k, v, layout, causal=causal).reshape(x.shape)
        mixed = self.out(mixed)
        x = x + (mixed if self.attn_scale is None else mixed * self.attn_scale)
        hidden = self.up(self.ffn_norm(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, -1)
            hidden = self.activation(gate) * hidden
        else:
            hidden = self.activation(hidden)
        hidden = self.down(hidden)
        return x + (hidden if self.ffn_scale is None else hidden * self.ffn_scale)


class AttentionPool(nn.Module):
    """SigLIP's pooling: a learned query attends to all patches, then a feed-forward."""

    def __init__(self, config: ViTConfig | NaFlexConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.probe = nn.Parameter(torch.zeros(width))
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.up, self.down = Linear(width, config.ffn_width), Linear(config.ffn_width, width)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, hidden: Tensor) -> Tensor:  # [N, P, W] -> [N, W]
        width, num = hidden.shape[-1], len(hidden)
        weights, biases = self.qkv.weight.split(width), self.qkv.bias.split(width)
        query = F.linear(self.probe, weights[0], biases[0])
        key, value = (F.linear(hidden, weights[i], biases[i]) for i in (1, 2))
        q = query.view(1, self.num_heads, 1, -1).expand(num, -1, -1, -1)
        k, v = (x.view(num, -1, self.num_heads, q.shape[-1]).transpose(1, 2) for x in (key, value))
        x: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).reshape(num, width))
        pooled: Tensor = x + self.down(self.activation(self.up(self.norm(x))))
        return pooled


class ViT(nn.Module):
    """Patch embedding, optional class and register tokens, blocks, optional final norm."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width, num_patches = config.width, config.grid**2
        stride = config.patch_size
        self.patch = Conv2d(3, width, stride, stride, bias=config.patch_bias)
        self.class_token = nn.Parameter(torch.zeros(width)) if config.class_token else None
        self.registers = (
            nn.Parameter(torch.zeros(config.num_registers, width)) if config.num_registers else None
        )
        self.positions = nn.Parameter(torch.zeros(num_patches + config.class_token, width))
        self.pre_norm = nn.LayerNorm(width, config.norm_eps) if config.pre_norm else None
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(width, config.norm_eps) if config.post_norm else None
        self.pool = AttentionPool(config) if config.pooling == "attention" else None

    def forward(self, pixels: Tensor, layer: int | tuple[int, ...] = -1) -> Tensor:
        """Return hidden states [N, prefix + P, W], of several layers side by side [N, …, n * W].

        Args:
            layer: which hidden state: 0 is the embeddings, n the output of block n, negative
                from the end. Only the last passes the final norm, and only with `norm_output`.
        """
        x = self.embed(pixels)
        layers, total = (layer,) if isinstance(layer, int) else layer, self.config.num_layers + 1
        numbers = [one if one >= 0 else total + one for one in layers]
        found = {0: x}
        for number, block in enumerate(self.blocks[: max(numbers)], start=1):
            x = block(x)
            if number in numbers:
                found[number] = x
        if self.config.norm_output and total - 1 in found:
            assert self.post_norm is not None
            found[total - 1] = self.post_norm(found[total - 1])
        states = [found[one] for one in numbers]
        return states[0] if len(states) == 1 else torch.cat(states, -1)

    def normed(self, pixels: Tensor) -> Tensor:
        """Return the last hidden state after the final norm, [N, prefix + P, W]."""
        assert self.post_norm is not None
        last = self(pixels)
        return last if self.config.norm_output else self.post_norm(last)

    def pooled(self, pixels: Tensor) -> Tensor:
        """Return one vector per view for a dual encoder, [N, W]."""
        if self.pool is not None:
            found: Tensor = self.pool(self.normed(pixels))
            return found
        assert self.post_norm is not None and self.config.class_token
        return self.post_norm(self(pixels)[:, 0])

    def embed(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)  # [N, P, W]
        grid = pixels.shape[-1] // self.config.patch_size
        patch_positions = self.positions[int(self.config.class_token) :]
        if self.config.position_buckets:
            x = x + patch_positions[position_buckets(self.config.grid, grid).to(x.device)]
        else:
            x = x + resize_positions(patch_positions, grid, self.config.position_antialias)
        if self.registers is not None:
            x = torch.cat((self.registers.expand(len(x), -1, -1), x), 1)
        if self.class_token is not None:
            first = (self.class_token + self.positions[0]).expand(len(x), 1, -1)
            x = torch.cat((first, x), 1)
        return x if self.pre_norm is None else self.pre_norm(x)


def resize_positions(positions: Tensor, grid: int, antialias: bool) -> Tensor:
    """Stretch learned positions [G * G, W] to another grid (bicubic, as DINOv2 does)."""
    side = round(len(positions) ** 0.5)
    if side == grid:
        return positions
    image = positions.view(1, side, side, -1).permute(0, 3, 1, 2).float()
    image = F.interpolate(
        image, (grid, grid), mode="bicubic", align_corners=False, antialias=antialias
    )
    return image.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(positions.dtype)


def position_buckets(learned: int, grid: int) -> Tensor:
    """Return which of learned x learned positions each patch of a grid x grid view takes, [P].

    Computed in float32 as Idefics2 does, so that a place on the border of two positions is rounded
    to the same one (https://arxiv.org/abs/2307.06304 and Idefics2VisionEmbeddings).
    """
    borders = torch.arange(1 / learned, 1.0, 1 / learned)
    places = torch.arange(grid, dtype=torch.float32) * (1.0 / torch.tensor(grid))
    index = torch.bucketize(places.clamp(max=1.0 - 1e-6), borders, right=True)
    return (index[:, None] * learned + index).flatten()


class TowerMixture(nn.Module):
    """Hidden states of both towers side by side in the channels."""

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.config = config
        self.first, self.second = ViT(config.first), ViT(config.second)

    def forward(self, pixels: Tensor, layer: int | tuple[int, ...] = -1) -> Tensor:
        """Return hidden states [V, prefix + P, W1 + W2]; see `ViT`."""
        return torch.cat((self.first(pixels, layer), self.second(pixels, layer)), -1)
