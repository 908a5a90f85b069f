"""EmbeddingGemma 2 as transformers' folder: the inverse of `embedding_gemma2.py`.

The config that is written is read again and must come out the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from visavis.checkpoints.checkpoint import (
    Checkpoint,
    Written,
    whole_state,
    write_json,
    write_tensors,
    write_words,
)
from visavis.checkpoints.transformers.embedding_gemma2 import KIND, gemma_config, gemma_table
from visavis.checkpoints.transformers.export_config import ACTIVATIONS, inexpressible
from visavis.checkpoints.transformers.export_processor import processor_json
from visavis.checkpoints.transformers.weights import write_as
from visavis.model.config import VLMConfig
from visavis.model.embedder_config import GemmaEncoderConfig, GemmaTowerConfig


def write_gemma(loaded: Checkpoint, folder: Path, *, progress: bool = False) -> Written:
    """Write an EmbeddingGemma 2; all tensors in the type that it computes in.

    Raises:
        CheckpointError: the library's class is not like it; nothing is written.
    """
    config, specials, dtype = loaded.vlm.config, loaded.specials, loaded.vlm.dtype
    data = gemma_json(config)
    profile, number = loaded.profile, loaded.tokenizer.token_to_id
    marks = {"boi_token_id": profile.embed_image_start, "eoi_token_id": profile.embed_image_end}
    data |= {key: number(text) for key, text in marks.items() if text}
    data["dtype"] = str(dtype).removeprefix("torch.")
    names = ("bos", "eos", "pad")
    data["text_config"] |= {f"{name}_token_id": getattr(specials, f"{name}_id") for name in names}
    length = config.decoder.context_length
    files = write_words(folder, loaded.tokenizer, specials, context_length=length, chats=False)
    files.append(write_json(folder / "config.json", data))
    if loaded.processor is not None:
        settings = processor_json(loaded.processor)
        files.append(write_json(folder / "preprocessor_config.json", settings))
    state = write_as(config, gemma_table(), whole_state(loaded.vlm))
    return Written(files + write_tensors(folder, state, dtype=dtype, progress=progress))


def gemma_json(config: VLMConfig) -> dict[str, Any]:
    """Return the config.json of an EmbeddingGemma 2.

    Raises:
        CheckpointError: the library's class is not like it.
    """
    text, tower = config.text_tower, config.tower
    assert isinstance(text, GemmaEncoderConfig)
    kinds = ["sliding_attention" if window else "full_attention" for window in text.windows]
    bases = dict(zip(kinds, text.rope_bases, strict=True))
    shapes = zip(text.head_dims, text.kv_heads, strict=True)
    data: dict[str, Any] = {
        "architectures": ["EmbeddingGemma2Model"],
        "model_type": KIND,
        "audio_config": None,
        "text_config": {
            "model_type": f"{KIND}_text",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": text.ffn_width,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.kv_heads[0],
            "head_dim": text.head_dims[0],
            "hidden_activation": ACTIVATIONS[text.activation],
            "max_position_embeddings": text.context_length,
            "rms_norm_eps": text.norm_eps,
            "sliding_window": max(text.windows) or 1,
            "hidden_size_per_layer_input": text.ple_width,
            "embedding_dim": text.dim,
            "layer_types": kinds,
            "per_layer_config": {
                str(at): {"head_dim": dim, "num_key_value_heads": heads}
                for at, (dim, heads) in enumerate(shapes)
                if (dim, heads) != (text.head_dims[0], text.kv_heads[0])
            },
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()
            },
        },
        "vision_config": None,
    }
    if isinstance(tower, GemmaTowerConfig):
        data |= {"image_token_id": config.image_token_id, "vision_config": _vision(tower)}
    if gemma_config(data) != config:
        raise inexpressible("the encoder", f"{KIND} of transformers differs")
    return data


def _vision(tower: GemmaTowerConfig) -> dict[str, Any]:
    return {
        "model_type": "gemma4_vision",
        "hidden_size": tower.width,
        "intermediate_size": tower.ffn_width,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "num_key_value_heads": tower.num_heads,
        "head_dim": tower.head_dim,
        "hidden_activation": ACTIVATIONS[tower.activation],
        "rms_norm_eps": tower.norm_eps,
        "patch_size": tower.patch_size,
        "pooling_kernel_size": tower.merge,
        "position_embedding_size": tower.num_positions,
        "rope_parameters": {"rope_type": "axial", "rope_theta": tower.rope_base},
    }
