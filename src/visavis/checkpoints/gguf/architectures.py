"""Text architectures of GGUF: their options of our decoder and their names of our tensors.

GGUF names tensors alike in all of them; they differ in which there are, in whether q, k, v (and
gate, up) are one tensor, and in how rotary pairs lie. One generator of rows serves both
directions. Metadata keys are read and written in `decoder.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from visavis.model.config import DecoderConfig

PROFILE = "visavis.prompt_profile"  # ours: how to ask and to embed, word for word
POOLING = {"mean": 1, "first": 2, "last": 3}  # llama.cpp's numbers

Size = Literal["vocab", "width", "head", "q", "kv", "qkv", "ffn", "gate_up"]


@dataclass(frozen=True)
class Architecture:
    """One value of `general.architecture`.

    Args:
        switches: fields of `DecoderConfig` that it always sets.
        rotary_pairs: rotary pairs are neighbouring rows of q and k; else half a head apart.
        fused_qkv: q, k and v are one tensor; None: some files have them so, others apart.
        fused_up: gate and up are one tensor.
        windowed: `attention.sliding_window` counts.
        scaled_embedding: token embeddings are multiplied by the root of the width.
    """

    switches: dict[str, Any] = field(default_factory=dict)
    rotary_pairs: bool = False
    fused_qkv: bool | None = False
    fused_up: bool = False
    windowed: bool = False
    scaled_embedding: bool = False


ARCHITECTURES = {
    "llama": Architecture(rotary_pairs=True),  # Mistral, TinyLlama, SmolLM2 and Vicuna too
    "qwen2": Architecture(),
    "phi2": Architecture(
        {"norm": "layer", "activation": "gelu_tanh", "gated": False, "parallel_block": True},
        fused_qkv=None,
    ),
    "phi3": Architecture(fused_qkv=True, fused_up=True, windowed=True),
    # Converters add Gemma's 1 to its norm weights, so there is no offset here.
    "gemma": Architecture({"activation": "gelu_tanh"}, scaled_embedding=True),
    "stablelm": Architecture({"norm": "layer"}),
    "openelm": Architecture({"qk_norm": True}, fused_qkv=True),
}


@dataclass(frozen=True)
class TensorLayout:
    """How one file holds what may be held in two ways."""

    rotary_pairs: bool = True
    fused_qkv: bool = False
    fused_up: bool = False


LLAMA = TensorLayout()


@dataclass(frozen=True)
class RowPart:
    """One GGUF tensor, and whether its rows hold interleaved rotary pairs."""

    name: str
    shape: tuple[Size, ...]
    rotary: bool = False


def rows(config: DecoderConfig, layout: TensorLayout) -> Iterator[tuple[str, list[RowPart]]]:
    """Yield each tensor of ours and the GGUF tensors whose rows make it up, in order."""
    yield "decoder.embed.weight", [RowPart("token_embd.weight", ("vocab", "width"))]
    for kind in _kinds(config.norm == "layer"):
        yield f"decoder.norm.{kind}", [RowPart(f"output_norm.{kind}", ("width",))]
    if not config.tied_head:
        yield "decoder.head.weight", [RowPart("output.weight", ("vocab", "width"))]
    if config.head_bias:
        yield "decoder.head.bias", [RowPart("output.bias", ("vocab",))]
    for layer in range(config.num_layers):
        for ours, parts in _block_rows(config, layout):
            named = [RowPart(f"blk.{layer}.{part.name}", part.shape, part.rotary) for part in parts]
            yield f"decoder.blocks.{layer}.{ours}", named


def sizes(config: DecoderConfig, layer: int) -> dict[Size, int]:
    """Return the number for each symbolic size of a shape in one layer."""
    q = config.per_layer(config.num_heads, layer) * config.head_dim
    kv = config.per_layer(config.num_kv_heads, layer) * config.head_dim
    ffn = config.per_layer(config.ffn_width, layer)
    return {
        "vocab": config.vocab_size,
        "width": config.width,
        "head": config.head_dim,
        "q": q,
        "kv": kv,
        "qkv": q + 2 * kv,
        "ffn": ffn,
        "gate_up": 2 * ffn,
    }


def shape_of(part: RowPart, config: DecoderConfig) -> tuple[int, ...]:
    """Return the shape that a part must have."""
    known = sizes(config, layer_of(part.name))
    return tuple(known[size] for size in part.shape)


def layer_of(name: str) -> int:
    """Return the layer that a GGUF tensor belongs to; 0 for those of no layer."""
    return int(name.split(".")[1]) if name.startswith("blk.") else 0


def _block_rows(config: DecoderConfig, layout: TensorLayout) -> Iterator[tuple[str, list[RowPart]]]:
    """Yield the rows of one block, without its number."""
    norm_kinds = _kinds(config.norm == "layer")
    for kind in norm_kinds:
        yield f"attn_norm.{kind}", [RowPart(f"attn_norm.{kind}", ("width",))]
    for kind in _kinds(config.qkv_bias):
        yield f"qkv.{kind}", _qkv(kind, layout)
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        yield f"{name}.weight", [RowPart(f"attn_{name}.weight", ("head",))]
    for kind in _kinds(config.out_bias):
        yield f"out.{kind}", [_linear("attn_output", "width", "q", kind)]
    for kind in () if config.parallel_block else norm_kinds:
        yield f"ffn_norm.{kind}", [RowPart(f"ffn_norm.{kind}", ("width",))]
    for kind in _kinds(config.ffn_bias):
        gate = [_linear("ffn_gate", "ffn", "width", kind)] if config.gated else []
        apart = [*gate, _linear("ffn_up", "ffn", "width", kind)]
        fused = [_linear("ffn_up", "gate_up", "width", kind)]
        yield f"up.{kind}", fused if layout.fused_up else apart
        yield f"down.{kind}", [_linear("ffn_down", "width", "ffn", kind)]


def _qkv(kind: str, layout: TensorLayout) -> list[RowPart]:
    if layout.fused_qkv:
        return [_linear("attn_qkv", "qkv", "width", kind)]
    return [
        _linear("attn_q", "q", "width", kind, layout.rotary_pairs),
        _linear("attn_k", "kv", "width", kind, layout.rotary_pairs),
        _linear("attn_v", "kv", "width", kind),
    ]


def _linear(name: str, outside: Size, inside: Size, kind: str, rotary: bool = False) -> RowPart:
    shape = (outside, inside) if kind == "weight" else (outside,)
    return RowPart(f"{name}.{kind}", shape, rotary)


def _kinds(biased: bool) -> tuple[str, ...]:
    return ("weight", "bias") if biased else ("weight",)
