"""A visavis model as files that a peer made of transformers can read: float32, LoRA merged.

llama.safetensors    the decoder, by transformers' names
rest.safetensors     tower, connector and head, by ours
tokenizer.json
settings.json        config of the decoder, and how items are embedded
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def export(model: str, folder: Path) -> None:
    """Write weights and settings of a bundled name, folder or GGUF file."""
    from safetensors.torch import save_file

    import visavis
    from visavis.checkpoints.transformers.weights import write
    from visavis.model.config import to_dict
    from visavis.model.image_tokens import tokens_per_view

    exact = visavis.load(model, precision="f32", device="cpu")
    config, decoder = exact.vlm.config, exact.vlm.config.decoder
    layers = config.head.layers if config.head else (-1,)
    settings = {
        "config": to_dict(config),
        "llama": {
            "model_type": "llama",
            "vocab_size": decoder.vocab_size,
            "hidden_size": decoder.width,
            "intermediate_size": decoder.ffn_width,
            "num_hidden_layers": decoder.num_layers,
            "num_attention_heads": decoder.num_heads,
            "num_key_value_heads": decoder.num_kv_heads,
            "head_dim": decoder.head_dim,
            "max_position_embeddings": decoder.context_length,
            "rms_norm_eps": decoder.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_base},
            "tie_word_embeddings": decoder.tied_head,
        },
        "layers": [layer % (decoder.num_layers + 1) for layer in layers],
        "pooling": exact.profile.pooling,
        "prefix": exact.profile.embed_prefix,
        "suffix": exact.profile.embed_suffix,
        "bos": exact.specials.bos_id if exact.specials.add_bos else None,
        "tokens_per_image": tokens_per_view(config),
        "processor": exact.processor.to_dict() if exact.processor else None,
    }
    state = exact.vlm.state_dict()
    own = {name: state[name] for name in state if name.startswith("decoder.")}
    theirs = write(settings["llama"], own)
    for file, tensors in (
        ("llama.safetensors", theirs),
        ("rest.safetensors", {name: state[name] for name in state if name not in own}),
    ):
        save_file({name: tensors[name].contiguous() for name in tensors}, folder / file)
    exact.tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")


def settings_of(folder: str) -> dict[str, Any]:
    """Return what `export` wrote as settings."""
    settings: dict[str, Any] = json.loads(Path(folder, "settings.json").read_text(encoding="utf-8"))
    return settings


def llama(folder: str) -> Any:
    """Return transformers' `LlamaForCausalLM` with the exported weights, float32."""
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**settings_of(folder)["llama"]))
    missing, unexpected = model.load_state_dict(
        load_file(f"{folder}/llama.safetensors"), strict=False
    )
    model.tie_weights()
    tied = settings_of(folder)["llama"]["tie_word_embeddings"]
    assert not unexpected and missing == (["lm_head.weight"] if tied else []), (missing, unexpected)
    return model.eval()


def rest(config: dict[str, Any], folder: str) -> tuple[Any, ...]:
    """Return tower, connector and head with the exported weights; None for what is not there."""
    from safetensors.torch import load_file

    from visavis.model.config import EfficientNetConfig, vlm_config_from_dict
    from visavis.model.connectors import build_connector
    from visavis.model.embedding_head import EmbeddingHead
    from visavis.model.vision import build_tower

    described = vlm_config_from_dict(config)
    assert described.tower is None or isinstance(described.tower, EfficientNetConfig)
    parts = {
        "tower": build_tower(described.tower) if described.tower else None,
        "connector": build_connector(described.connector) if described.connector else None,
        "head": EmbeddingHead(described.head, described.decoder.width) if described.head else None,
    }
    state = load_file(f"{folder}/rest.safetensors")
    for name, part in parts.items():
        if part is not None:
            prefix = f"{name}."
            own = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
            part.load_state_dict(own)
    return tuple(parts.values())
