"""Our configs as transformers' config.json: the inverse of `vision_models.py` and
`language_models.py`.

Every candidate is read again by those files and must give exactly the requested config, so
nothing is approximated: a setting that no family has is an error that names it. Returns JSON and
writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from visavis.checkpoints.transformers.config_reader import Json
from visavis.checkpoints.transformers.idefics3 import idefics3_json
from visavis.checkpoints.transformers.internvl import internvl_json
from visavis.checkpoints.transformers.language_models import decoder_config
from visavis.checkpoints.transformers.vision_models import vit_config, vlm_config
from visavis.errors import CheckpointError
from visavis.model.config import ConnectorConfig, DecoderConfig, RopeScaling, ViTConfig, VLMConfig

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "idefics3": "Idefics3ForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
MAX_SHOWN = 200  # characters of a strange setting
OTHERS = "`--to native` and `--to sentence-transformers` keep every part"


def config_json(config: VLMConfig) -> dict[str, Any]:
    """Return the config.json of a whole model.

    Raises:
        CheckpointError: transformers has no class for it; the part is named.
    """
    tower, connector = config.tower, config.connector
    normed = connector is not None and connector.input_norm
    if isinstance(tower, ViTConfig) and (tower.position_buckets or normed):
        write = idefics3_json if tower.position_buckets else internvl_json
        found = write(config, decoder_json(config.decoder))
        if _read(vlm_config, found) == config:
            return found
    if problems := strange_parts(config):
        raise inexpressible("; ".join(problems), "no class of transformers has such")
    if tower is None:
        return decoder_json(config.decoder)
    assert isinstance(tower, ViTConfig) and connector is not None
    text, vision = decoder_json(config.decoder), tower_json(tower)
    outer = {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": config.image_token_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": (
            config.select_layer if isinstance(config.select_layer, int) else [*config.select_layer]
        ),
        "vision_feature_select_strategy": _strategy(config),
        "tie_word_embeddings": config.decoder.tied_head,
    }
    for kind, extra in _llavas(config):
        found = {"architectures": [ARCHITECTURES[kind]], "model_type": kind, **outer, **extra}
        if _read(vlm_config, found) == _as_read(config, kind):
            return found
    raise inexpressible(f"the views of a picture ({config.merge})", "LLaVA's classes differ")


def strange_parts(config: VLMConfig) -> list[str]:
    """Return the parts of a model that no LLaVA of transformers has, for people."""
    found = []
    if config.head is not None:
        found.append("the embedding head")
    if config.text_tower is not None:
        found.append("the text tower")
    if config.tower is None:
        return found
    layers = 1 if isinstance(config.select_layer, int) else len(config.select_layer)
    plain = ConnectorConfig("mlp", layers * config.tower.width, config.decoder.width, depth=2)
    if not isinstance(config.tower, ViTConfig):
        found.append(f"the vision tower ({config.tower.kind})")
    if config.connector != plain:
        found.append(f"the connector ({describe_connector(config.connector)})")
    if config.decoder.head_bias:
        found.append("a bias on the output layer beside a vision tower")
    return found


def decoder_json(config: DecoderConfig) -> dict[str, Any]:
    """Return the config.json of a language model.

    Raises:
        CheckpointError: no family is like it; what the nearest one lacks is named.
    """
    nearest: list[str] | None = None
    for kind, extra in FAMILIES.items():
        found = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
        found |= _common(config, kind) | extra(config)
        read = _read(decoder_config, found)
        if read == config:
            return found
        if read is not None:
            names = [f.name for f in fields(config)]
            other = [name for name in names if getattr(read, name) != getattr(config, name)]
            nearest = other if nearest is None or len(other) < len(nearest) else nearest
    switches = ", ".join(f"{name}={getattr(config, name)!r}" for name in nearest or ["num_heads"])
    if len(switches) > MAX_SHOWN:
        switches = f"{switches[:MAX_SHOWN]}…"
    raise inexpressible(f"the language model ({switches})", "no family of transformers is like it")


def tower_json(config: ViTConfig) -> dict[str, Any]:
    """Return the vision_config of a CLIP, SigLIP or DINOv2.

    Raises:
        CheckpointError: none of them is like it.
    """
    common = {
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_act": ACTIVATIONS[config.activation],
        "layer_norm_eps": config.norm_eps,
    }
    clip = {"model_type": "clip_vision_model", "projection_dim": config.width}
    siglip = {"model_type": "siglip_vision_model", "vision_use_head": False}
    dino = {
        "mlp_ratio": config.ffn_width / config.width,
        "use_swiglu_ffn": config.gated_ffn,
    }
    plain = {"model_type": "dinov2", **dino}
    registers = {"model_type": "dinov2_with_registers", **dino}
    registers["num_register_tokens"] = config.num_registers
    if config.gated_ffn:  # inverse of two thirds in steps of 8
        dino["mlp_ratio"] = plain["mlp_ratio"] = registers["mlp_ratio"] = (
            config.ffn_width * 3 / 2 / config.width
        )
        common["hidden_act"] = "gelu"
    for kind in (clip, siglip, plain, registers):
        if _read(vit_config, {**kind, **common}) == config:
            return {**kind, **common}
    raise inexpressible(
        "the vision tower", "it is no CLIP, SigLIP or DINOv2 as transformers' classes have them"
    )


def describe_connector(config: ConnectorConfig | None) -> str:
    """Return a readable description of the layers of a connector."""
    if config is None:
        return "none"
    steps = [f"pixel shuffle {config.shuffle}"] if config.shuffle > 1 else []
    steps += ["a norm"] if config.input_norm else []
    steps.append("linear" if config.kind == "linear" else f"an MLP of {config.depth} layers")
    wide = f", {config.hidden_width} wide" if config.hidden_width else ""
    return ", ".join(steps) + wide


def inexpressible(part: str, reason: str, others: str = OTHERS) -> CheckpointError:
    """Return the error for a part that a layout cannot represent."""
    return CheckpointError(f"{part} cannot be written in this layout: {reason}. {others}.")


# --- language models ------------------------------------------------------------------------------


def _common(config: DecoderConfig, kind: str) -> dict[str, Any]:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    found: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": ACTIVATIONS[config.activation],
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tied_head,
        "rope_theta": config.rope_base,
    }
    norm = "layer_norm_eps" if config.norm == "layer" else "rms_norm_eps"
    found[norm] = config.norm_eps
    if kind in ("gemma", "qwen3") or (
        isinstance(heads, int) and config.head_dim * heads != config.width
    ):
        found["head_dim"] = config.head_dim
    if config.rope_scaling is not None:
        found["rope_scaling"] = _rope_scaling(config.rope_scaling)
    return found


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    if scaling.kind == "factors":  # beyond the first context, which ours ends at, nothing is known
        factors = list(scaling.factors)
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": scaling.magnitude,
            "original_max_position_embeddings": scaling.original_context,
        }
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def _llama(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias}


def _mistral(config: DecoderConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window or None}


def _qwen2(config: DecoderConfig) -> dict[str, Any]:
    if not config.sliding_window:
        return {"use_sliding_window": False}
    window = config.sliding_window
    return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}


def _qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {**_qwen2(config), "attention_bias": config.qkv_bias}


def _phi(config: DecoderConfig) -> dict[str, Any]:
    return {"partial_rotary_factor": config.rope_fraction}


def _phi3(config: DecoderConfig) -> dict[str, Any]:
    original = config.rope_scaling.original_context if config.rope_scaling else 0
    return {
        "partial_rotary_factor": config.rope_fraction,
        "original_max_position_embeddings": original or config.context_length,
        "sliding_window": config.sliding_window or None,
    }


def _gemma(config: DecoderConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias}


def _stablelm(config: DecoderConfig) -> dict[str, Any]:
    return {
        "partial_rotary_factor": config.rope_fraction,
        "use_qkv_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel_block,
    }


FAMILIES: dict[str, Callable[[DecoderConfig], dict[str, Any]]] = {  # the plainest first
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "phi3": _phi3,
    "phi": _phi,
    "stablelm": _stablelm,
}


# --- whole models ---------------------------------------------------------------------------------


def _llavas(config: VLMConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield model types that may be this one, with the settings that only they have."""
    yield "llava", {}
    yield "llava_next", {}
    aspect = {"vision_aspect_ratio": f"anyres_max_{config.merge.max_tiles}"}
    yield "llava_onevision", {"video_token_index": config.video_token_id, **aspect}


def _strategy(config: VLMConfig) -> str:
    assert isinstance(config.tower, ViTConfig)
    drops = config.select_feature == "patch" and config.tower.num_prefix_tokens
    return "default" if drops else "full"


def _as_read(config: VLMConfig, kind: str) -> VLMConfig:
    """Return a config in the one of its spellings that is read back."""
    tower, merge = config.tower, config.merge
    assert isinstance(tower, ViTConfig)
    if kind != "llava_onevision":  # no videos
        config = replace(config, video_token_id=-1)
        merge = replace(merge, video_newline="one_token", video_pool=1, video_pool_mode="bilinear")
    # int(x) and int(round(x, 7)) cut the same rows for all but one in 20,000 sizes.
    config = replace(config, merge=replace(merge, round_unpad=merge.unpad))
    if tower.num_prefix_tokens:
        return config
    return replace(config, select_feature="class_patch")  # there is nothing to drop


def _read(read: Callable[[Json], Any], found: Json) -> Any:
    """Return the result of a reader for a candidate, or None if the reader raises an error."""
    try:
        return read(found)
    except (CheckpointError, TypeError):
        return None
