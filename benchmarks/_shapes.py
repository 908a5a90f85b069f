"""GGUF files as large as real models, of random weights, for what depends on size alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from visavis.checkpoints.gguf.architectures import LLAMA, shape_of
from visavis.checkpoints.gguf.decoder import split_rows
from visavis.checkpoints.gguf.export import decoder_metadata
from visavis.checkpoints.gguf.quantize import FILE_TYPES, quantize, tensor_type
from visavis.checkpoints.gguf.writer import NewTensor, write_file
from visavis.model.config import DecoderConfig

SHAPES = {
    "0.1B": DecoderConfig(
        vocab_size=32000,
        width=768,
        num_layers=8,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        ffn_width=3072,
        context_length=4096,
    ),
    "1B": DecoderConfig(  # Llama 3.2's, with a vocabulary of usual size
        vocab_size=32000,
        width=2048,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        ffn_width=8192,
        context_length=4096,
    ),
}
REPEATED = 64  # rows that are random; the others are those again


def write_random(path: Path, shape: str, kind: str) -> Path:
    """Write a language model of a name of `SHAPES`, its tensors of llama.cpp's types for a kind."""
    config = SHAPES[shape]
    metadata = {
        "general.architecture": "llama",
        "general.name": f"random {shape} {kind}",
        "general.file_type": FILE_TYPES[kind],
        **decoder_metadata(config, "llama"),
        **_vocabulary(config.vocab_size),
    }
    generator = np.random.default_rng(0)
    tensors = []
    for _, _, part in split_rows(config, LLAMA):
        sizes = shape_of(part, config)
        type = tensor_type(part.name, sizes, kind, config.num_layers, config.tied_head)

        def pieces(sizes: tuple[int, ...] = sizes, type: str = type) -> Iterator[np.ndarray]:
            if len(sizes) == 1:
                yield np.ones(sizes, np.float32).view(np.uint8)
                return
            rows = generator.standard_normal((REPEATED, sizes[1]), np.float32) * 0.02
            block = np.concatenate(list(quantize(rows, type)))
            for _ in range(sizes[0] // REPEATED):
                yield block

        tensors.append(NewTensor(part.name, sizes, type, pieces))
    write_file(path, metadata, tensors)
    return path


def _vocabulary(size: int) -> dict[str, object]:
    """Return a byte-level tokenizer whose tokens past the bytes are never met."""
    codes = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in codes] + [chr(256 + i) for i in range(256 - len(codes))]
    tokens = [*letters, "ab", *(f"token {number}" for number in range(size - len(letters) - 1))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.ones(size, np.int32),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": size - 1,
    }
