"""GGUF files for tests, written with the independent `gguf` library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from visavis.checkpoints.gguf.decoder import gguf_state
from visavis.model.config import DecoderConfig


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    types: Mapping[str, str] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write a file. Integers become uint32 (int64 if negative or large), floats float32.

    Args:
        types: GGML type by tensor name; such tensors are given as their raw bytes, uint8
            [rows, bytes per row].
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add_value(writer, key, value)
    for name, array in tensors.items():
        kind = (types or {}).get(name)
        writer.add_tensor(
            name, array, raw_dtype=None if kind is None else gguf.GGMLQuantizationType[kind]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if 0 <= value < 2**32 else writer.add_int64(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)


def llama_metadata(config: DecoderConfig) -> dict[str, Any]:
    """Return the metadata that describes a decoder of the llama architecture."""
    return {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.width,
        "llama.feed_forward_length": config.ffn_width,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": float(config.rope_base),
        "llama.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "llama.vocab_size": config.vocab_size,
    }


def random_state(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random float32 tensors by our names."""
    generator = np.random.default_rng(seed)
    kv, q = config.num_kv_heads * config.head_dim, config.num_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (config.vocab_size, config.width)}
    for layer in range(config.num_layers):
        shapes |= {
            f"blocks.{layer}.attn_norm.weight": (config.width,),
            f"blocks.{layer}.qkv.weight": (q + 2 * kv, config.width),
            f"blocks.{layer}.out.weight": (config.width, q),
            f"blocks.{layer}.ffn_norm.weight": (config.width,),
            f"blocks.{layer}.up.weight": (2 * config.ffn_width, config.width),
            f"blocks.{layer}.down.weight": (config.width, config.ffn_width),
        }
        if config.qkv_bias:
            shapes[f"blocks.{layer}.qkv.bias"] = (q + 2 * kv,)
        if config.out_bias:
            shapes[f"blocks.{layer}.out.bias"] = (config.width,)
    shapes["norm.weight"] = (config.width,)
    if not config.tied_head:
        shapes["head.weight"] = (config.vocab_size, config.width)
    return {
        f"decoder.{name}": generator.standard_normal(shape, np.float32)
        for name, shape in shapes.items()
    }


def tiny_config(**changes: Any) -> DecoderConfig:
    """Return a decoder of a few thousand weights."""
    fields: dict[str, Any] = {
        "vocab_size": 40,
        "width": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_width": 64,
        "context_length": 128,
    }
    return DecoderConfig(**(fields | changes))


def write_llama(
    path: Path, config: DecoderConfig, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Write a llama model with random weights."""
    tensors = dict(gguf_state(random_state(config), config))
    return write_gguf(path, llama_metadata(config) | dict(metadata or {}), tensors)
