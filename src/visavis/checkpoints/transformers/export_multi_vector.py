"""Export of multi-vector models to transformers' layout: the inverse of `multi_vector.py`,
`modernvbert.py` and PaliGemma's part of `vision_models.py`.

What is written is read again by these files and must come out the same.
"""

from __future__ import annotations

from dataclasses import replace
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
from visavis.checkpoints.transformers.export_config import (
    ACTIVATIONS,
    decoder_json,
    inexpressible,
    tower_json,
)
from visavis.checkpoints.transformers.export_processor import processor_json
from visavis.checkpoints.transformers.export_qwen_vl import qwen_vl_json, qwen_vl_processors
from visavis.checkpoints.transformers.modernvbert import FULL, LOCAL
from visavis.checkpoints.transformers.multi_vector import KINDS, multi_vector_prompts
from visavis.checkpoints.transformers.vision_models import vlm_config
from visavis.checkpoints.transformers.weights import write
from visavis.errors import CheckpointError
from visavis.model.config import DecoderConfig, Qwen2VLTowerConfig, ViTConfig, VLMConfig
from visavis.model.image_tokens import tokens_per_view

CLASSES = {"colpali": "ColPali", "colqwen2": "ColQwen2", "colmodernvbert": "ColModernVBert"}


def write_multi_vector(loaded: Checkpoint, folder: Path, *, progress: bool = False) -> Written:
    """Write a multi-vector model.

    Raises:
        CheckpointError: no multi-vector class of transformers computes the same.
    """
    config, dtype = loaded.vlm.config, loaded.vlm.decoder.dtype
    data = multi_vector_json(config)
    specials, tokenizer = loaded.specials, loaded.tokenizer
    image = tokenizer.id_to_token(config.image_token_id) or ""
    settings = _processors(loaded, data)
    data["torch_dtype"] = str(dtype).removeprefix("torch.")
    data["vlm_config"]["text_config"] |= {  # else each family's default, beyond small vocabularies
        "bos_token_id": specials.bos_id,
        "eos_token_id": specials.eos_id,
        "pad_token_id": specials.pad_id,
    }
    files = [write_json(folder / "config.json", data)]
    files += write_words(
        folder,
        tokenizer,
        specials,
        context_length=config.decoder.context_length,
        image_token=image,
    )
    files += [write_json(folder / name, one) for name, one in settings.items()]
    state = whole_state(loaded.vlm)
    files += write_tensors(folder, write(data, state), dtype=dtype, progress=progress)
    return Written(files)


def multi_vector_json(config: VLMConfig) -> dict[str, Any]:
    """Return the config.json of a multi-vector model.

    Raises:
        CheckpointError: no class of transformers computes the same.
    """
    inner = replace(config, multi_vector_dim=0)
    if isinstance(config.tower, Qwen2VLTowerConfig):
        kind, within = "colqwen2", qwen_vl_json(inner)
    elif config.decoder.embed_norm:
        kind, within = "colmodernvbert", _modernvbert_json(inner)
    else:
        kind, within = "colpali", _paligemma_json(inner)
    name = f"{CLASSES[kind]}ForRetrieval"
    found = {
        "architectures": [name],
        "model_type": kind,
        "embedding_dim": config.multi_vector_dim,
        "vlm_config": within,
    }
    try:
        read = vlm_config(found)
    except CheckpointError as error:
        raise inexpressible("the model", str(error)) from error
    if read != config:
        raise inexpressible("the model", f"{name} differs")
    return found


def _paligemma_json(config: VLMConfig) -> dict[str, Any]:
    """Return the config.json of a PaliGemma."""
    width = config.decoder.width
    return {
        "model_type": "paligemma",
        "text_config": decoder_json(replace(config.decoder, causal=True)),
        "vision_config": _siglip_json(config),
        "image_token_index": config.image_token_id,
        "projection_dim": width,
        "hidden_size": width,
    }


def _siglip_json(config: VLMConfig) -> dict[str, Any]:
    """Return the vision_config of a SigLIP.

    Raises:
        CheckpointError: the tower is none.
    """
    if not isinstance(config.tower, ViTConfig):
        raise inexpressible("the vision tower", "the multi-vector classes have a SigLIP")
    return tower_json(replace(config.tower, norm_output=False))


def _modernvbert_json(config: VLMConfig) -> dict[str, Any]:
    """Return the config.json of a ModernVBERT."""
    assert config.connector is not None
    return {
        "model_type": "modernvbert",
        "text_config": _modernbert_json(config.decoder),
        "vision_config": _siglip_json(config),
        "image_token_id": config.image_token_id,
        "pixel_shuffle_factor": config.connector.shuffle,
    }


def _modernbert_json(config: DecoderConfig) -> dict[str, Any]:
    layers = range(config.num_layers)
    bases = {FULL: config.rope_base, LOCAL: config.local_rope_base}
    return {
        "model_type": "modernbert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_activation": ACTIVATIONS[config.activation],
        "max_position_embeddings": config.context_length,
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.ffn_bias,
        "local_attention": 2 * (config.local_window - 1),
        "layer_types": [LOCAL if layer in config.local_layers else FULL for layer in layers],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()
        },
    }


def _processors(loaded: Checkpoint, data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the files that say how images and prompts are prepared, by their names.

    Raises:
        CheckpointError: the library's classes prepare them otherwise.
    """
    config, processor, profile = loaded.vlm.config, loaded.processor, loaded.profile
    name = data["model_type"]
    kind = KINDS[name]
    assert processor is not None
    whole: dict[str, Any] = {"processor_class": f"{CLASSES[name]}Processor"}
    if name == "colqwen2":
        inner = replace(config, multi_vector_dim=0)
        image = qwen_vl_processors(processor, inner, "qwen2_vl")["preprocessor_config.json"]
    else:
        image = processor_json(processor)
        size = {"colpali": "image_seq_length", "colmodernvbert": "image_seq_len"}[name]
        (image if name == "colpali" else whole)[size] = tokens_per_view(config)
    image["processor_class"] = whole["processor_class"]
    number = loaded.specials
    bos, pad = (
        "" if one is None else loaded.tokenizer.id_to_token(one) or ""
        for one in (number.bos_id, number.pad_id)
    )
    before, _, after = kind.document.replace("{bos}", bos).partition("{prefix}")
    document = profile.visual_form.replace("{visual}", kind.image)
    whole["visual_prompt_prefix"] = document.removeprefix(before).removesuffix(after)
    start = kind.query.replace("{bos}", bos).partition("{prefix}")[0]
    whole["query_prefix"] = profile.text_form.partition("{text}")[0].removeprefix(start)
    read = multi_vector_prompts(data, whole, bos=bos, pad=pad)
    if read != profile:
        raise inexpressible(f"the prompts ({profile.visual_form!r})", "the class has others")
    return {"preprocessor_config.json": image, "processor_config.json": whole}
