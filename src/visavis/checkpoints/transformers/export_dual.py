"""Dual encoders as transformers' folders: the inverse of `dual_encoders.py`.

The config that is written is read again and must come out the same.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from visavis.checkpoints.tensor_files import read_json
from visavis.checkpoints.transformers.dual_encoders import LEGACY_EOS, dual_config, dual_table
from visavis.checkpoints.transformers.export_config import ACTIVATIONS, inexpressible
from visavis.checkpoints.transformers.export_processor import processor_json
from visavis.checkpoints.transformers.weights import write_as
from visavis.errors import CheckpointError
from visavis.model.config import ViTConfig, VLMConfig
from visavis.model.embedder_config import ClipTextConfig, NaFlexConfig

ARCHITECTURES = {
    "clip": "CLIPModel",
    "metaclip_2": "MetaClip2Model",
    "siglip": "SiglipModel",
    "siglip2": "Siglip2Model",
}
PROCESSORS = {"siglip": "SiglipProcessor", "siglip2": "Siglip2Processor"}


def write_dual_encoder(loaded: Checkpoint, folder: Path, *, progress: bool = False) -> Written:
    """Write a dual encoder; all tensors in the type that its towers compute in.

    Raises:
        CheckpointError: no class of transformers is like it; nothing is written.
    """
    config, specials, dtype = loaded.vlm.config, loaded.specials, loaded.vlm.dtype
    tower = config.text_tower
    assert isinstance(tower, ClipTextConfig) and loaded.processor is not None
    data = dual_json(config)
    data["text_config"] |= {"bos_token_id": specials.bos_id, "pad_token_id": specials.pad_id}
    data["torch_dtype"] = str(dtype).removeprefix("torch.")
    processor = {"processor_class": PROCESSORS.get(data["model_type"], "CLIPProcessor")}
    settings = processor_json(loaded.processor) | processor
    files = write_words(
        folder, loaded.tokenizer, specials, context_length=tower.context_length, chats=False
    )
    words = read_json(folder / "tokenizer_config.json")
    if tower.padded:
        words |= {"padding_side": tower.padded, "model_input_names": ["input_ids"]}
    write_json(folder / "tokenizer_config.json", words)
    files += [
        write_json(folder / "config.json", data),
        write_json(folder / "preprocessor_config.json", settings),
        write_json(folder / "processor_config.json", processor),
    ]
    state = write_as(config, dual_table(config), whole_state(loaded.vlm))
    return Written(files + write_tensors(folder, state, dtype=dtype, progress=progress))


def dual_json(config: VLMConfig) -> dict[str, Any]:
    """Return the config.json of a dual encoder.

    Raises:
        CheckpointError: no class is like it.
    """
    text, head = config.text_tower, config.head
    assert isinstance(text, ClipTextConfig) and head is not None
    words = {"padding_side": text.padded or "right"}
    for data in _candidates(config, text):
        try:
            if dual_config(data, words) == config:
                return data
        except CheckpointError:
            continue
    raise inexpressible("the dual encoder", "CLIP's and SigLIP's classes differ")


def _candidates(config: VLMConfig, text: ClipTextConfig) -> Iterator[dict[str, Any]]:
    assert config.head is not None and isinstance(config.tower, ViTConfig | NaFlexConfig)
    eos = {"eos_token_id": LEGACY_EOS if text.pooling == "highest" else text.eos_id}
    outer = {
        "text_config": {
            **_common(text),
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            **({"projection_size": config.head.dim} if text.padded else eos),
        },
        "vision_config": {**_common(config.tower), "patch_size": config.tower.patch_size},
    }
    if isinstance(config.tower, NaFlexConfig):
        outer["vision_config"]["num_patches"] = config.tower.num_positions
    else:
        outer["vision_config"]["image_size"] = config.tower.image_size
    for kind, name in ARCHITECTURES.items():
        data = {"architectures": [name], "model_type": kind, **outer}
        yield data if text.padded else data | {"projection_dim": config.head.dim}


def _common(config: ClipTextConfig | ViTConfig | NaFlexConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
    }
