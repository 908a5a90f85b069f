"""Frozen configs of the towers of models that only embed: CLIP, SigLIP, EmbeddingGemma 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from visavis.model.image_input import ImageGrid


@dataclass(frozen=True)
class NaFlexConfig:
    """SigLIP 2's tower for images of any aspect ratio (NaFlex, Tschannen et al. 2025).

    Args:
        num_positions: learned positions, a square of them, resized to each image's rows and
            columns of patches.
    """

    patch_size: int
    num_positions: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "gelu_tanh"
    norm_eps: float = 1e-6
    kind: Literal["naflex"] = "naflex"
    any_resolution: ClassVar[bool] = True
    num_prefix_tokens: ClassVar[int] = 0
    gated_ffn: ClassVar[bool] = False
    layer_scale: ClassVar[bool] = False
    norm: ClassVar[Literal["layer", "rms"]] = "layer"
    qkv_bias: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = False

    def num_patches(self, shape: ImageGrid) -> int:
        """Return how many patches the tower reads of an image or video."""
        return shape.frames * shape.rows * shape.columns


@dataclass(frozen=True)
class GemmaTowerConfig:
    """EmbeddingGemma 2's vision tower, Gemma 4's.

    Args:
        merge: side of the square of patches that become one token.
        num_positions: learned positions of columns and of rows, each.
    """

    patch_size: int
    merge: int
    num_positions: int
    width: int
    num_layers: int
    num_heads: int
    head_dim: int
    ffn_width: int
    rope_base: float
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu"] = "gelu_tanh"
    norm_eps: float = 1e-6
    kind: Literal["gemma"] = "gemma"
    any_resolution: ClassVar[bool] = True
    num_prefix_tokens: ClassVar[int] = 0

    def num_patches(self, shape: ImageGrid) -> int:
        """Return how many patches the tower reads of an image or video."""
        return shape.frames * shape.rows * shape.columns


@dataclass(frozen=True)
class ClipTextConfig:
    """The text tower of CLIP (Radford et al. 2021) or SigLIP (Zhai et al. 2023).

    Args:
        context_length: learned positions, the most tokens of a text, special ones included.
        causal: a token sees those before it (CLIP) instead of the whole text (SigLIP).
        pooling: the token that stands for the text: the first `eos_id`, the first of the highest
            id (what CLIP's code takes where its config says 2), or the last.
        padded: the side on which texts are filled up to `context_length` with padding tokens,
            which the model was trained to read (SigLIP); empty: they are not.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    context_length: int
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu", "relu"]
    norm_eps: float
    causal: bool
    pooling: Literal["eos", "highest", "last"]
    eos_id: int = -1
    padded: Literal["", "right", "left"] = ""
    kind: Literal["CLIP"] = "CLIP"
    gated_ffn: ClassVar[bool] = False
    layer_scale: ClassVar[bool] = False
    norm: ClassVar[Literal["layer", "rms"]] = "layer"
    qkv_bias: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = False


@dataclass(frozen=True)
class GemmaEncoderConfig:
    """EmbeddingGemma 2's encoder of texts with image tokens among them, as a text tower.

    Args:
        dim: numbers of an embedding.
        ple_width: numbers of the per-layer embeddings that are mixed into each layer.
        head_dims, kv_heads, rope_bases: of each layer.
        windows: tokens that a layer sees to each side; 0: all.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    context_length: int
    dim: int
    ple_width: int
    head_dims: tuple[int, ...]
    kv_heads: tuple[int, ...]
    windows: tuple[int, ...]
    rope_bases: tuple[float, ...]
    activation: Literal["quick_gelu", "gelu", "gelu_tanh", "silu", "relu"] = "gelu_tanh"
    norm_eps: float = 1e-6
    kind: Literal["Gemma"] = "Gemma"
