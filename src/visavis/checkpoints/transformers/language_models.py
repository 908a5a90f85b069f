"""Language models of transformers: config.json as a `DecoderConfig`, and the names of tensors.

OpenELM, for which transformers has no class, follows Apple's files: its heads and feed-forward
widths grow layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from visavis.checkpoints.transformers.config_reader import (
    Json,
    activation,
    count,
    num_layers,
    number,
    require,
    section,
    unknown_type,
    without_nulls,
)
from visavis.checkpoints.weight_mapping import MappingRow
from visavis.model.config import DecoderConfig, RopeScaling

NORM_EPS = 1e-6  # in Apple's code, not in its config
DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "max_context_length": 2048,
    "num_transformer_layers": 12,
    "model_dim": 2048,
    "head_dim": 128,
    "qkv_multipliers": 1.0,
    "num_gqa_groups": 1,
    "ffn_multipliers": 4.0,
    "ffn_with_glu": True,
    "ffn_dim_divisor": 256,
    "activation_fn_name": "swish",
    "normalization_layer_name": "rms_norm",
    "normalize_qk_projections": False,
    "share_input_output_layers": False,
    "rope_freq_constant": 10000,
}


def openelm_config(config: Json) -> DecoderConfig:
    """Return the decoder that a config.json of type openelm describes.

    Raises:
        CheckpointError: a setting that our decoder does not have.
    """
    config = DEFAULTS | without_nulls(config)
    norm = config["normalization_layer_name"]
    require("normalization_layer_name", norm, norm == "rms_norm", "'rms_norm'")
    layers = num_layers({"num_hidden_layers": config["num_transformer_layers"]})
    width, head_dim = count(config, "model_dim"), count(config, "head_dim")
    groups = count(config, "num_gqa_groups")
    require("head_dim", head_dim, head_dim % 2 == 0, "an even number")
    query_dims = [
        _divisible(width * share, head_dim * groups)
        for share in _per_layer(config, "qkv_multipliers", layers)
    ]
    derived = tuple(dim // head_dim for dim in query_dims)
    heads = _counts(config, "num_query_heads", derived)
    kv_heads = _counts(config, "num_kv_heads", tuple(num // groups for num in heads))
    fits = all(num % kv == 0 for num, kv in zip(heads, kv_heads, strict=True))
    require("num_kv_heads", kv_heads, fits, f"divisors of {heads}")
    divisor = count(config, "ffn_dim_divisor")
    ffn = (_divisible(width * m, divisor) for m in _per_layer(config, "ffn_multipliers", layers))
    return DecoderConfig(
        vocab_size=count(config, "vocab_size"),
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_width=tuple(ffn),
        context_length=count(config, "max_context_length"),
        norm_eps=NORM_EPS,
        activation=activation({"hidden_act": config["activation_fn_name"]}),
        gated=bool(config["ffn_with_glu"]),
        rope_base=number(config, "rope_freq_constant"),
        qk_norm=bool(config["normalize_qk_projections"]),
        tied_head=bool(config["share_input_output_layers"]),
    )


def _per_layer(config: Json, name: str, layers: int) -> list[float]:
    """Return one number per layer from one for all, from the first and last, or from all."""
    value = config[name]
    listed = value if isinstance(value, list) else [value] * layers
    numbers = all(isinstance(v, int | float) and 0 < v < 1000 for v in listed)
    known = numbers and len(listed) in (2, layers)
    require(name, value, known, f"a number, the first and last of {layers}, or all of them")
    if len(listed) == layers:
        return list(map(float, listed))
    first, last = listed
    steps: list[float] = np.linspace(first, last, layers).round(2).tolist()
    return steps


def _counts(config: Json, name: str, derived: tuple[int, ...]) -> tuple[int, ...]:
    """Return numbers of heads as the file lists them, or else as they follow from multipliers."""
    value = config.get(name, list(derived))
    whole = isinstance(value, list) and all(isinstance(v, int) and 0 < v < 2**20 for v in value)
    fits = whole and len(value) == len(derived)
    require(name, value, fits, f"{len(derived)} positive whole numbers")
    return tuple(value)


def _divisible(value: float, divisor: int) -> int:
    """Round to a multiple of `divisor`, at least one of them and never more than 10 % down."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


NULL_IS_NONE = ("num_key_value_heads", "head_dim", "sliding_window")  # null is not the default here

COMMON: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "layer_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Family:
    """A model type: what its config.json leaves out, and what it makes of our decoder.

    Args:
        defaults: settings as the library sets them.
        switches: fields of `DecoderConfig` beyond the common ones, from the settings.
        rotary_share: the default share of a head that rotates; None: all of it, always.
    """

    defaults: dict[str, Any]
    switches: Callable[[Json], dict[str, Any]]
    rotary_share: float | None = None


def decoder_config(config: Json) -> DecoderConfig:
    """Return the decoder that a config.json describes.

    Raises:
        CheckpointError: a type that is not in `KINDS`, or a setting that our decoder does not have.
    """
    kind = config.get("model_type", "llama")
    if kind == "openelm":
        return openelm_config(config)
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise unknown_type(kind, KINDS)
    family = FAMILIES[kind]
    given = {k: v for k, v in config.items() if v is not None or k in NULL_IS_NONE}
    config = COMMON | family.defaults | given
    width, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    settings = {"num_key_value_heads": heads, "head_dim": width // heads} | without_nulls(config)
    kv_heads, head_dim = count(settings, "num_key_value_heads"), count(settings, "head_dim")
    require("num_key_value_heads", kv_heads, heads % kv_heads == 0, f"a divisor of {heads}")
    require("head_dim", head_dim, head_dim % 2 == 0, "an even number")
    context = count(config, "max_position_embeddings")
    rope = without_nulls(section(config, "rope_parameters") or section(config, "rope_scaling"))
    scaling = _rope_scaling(rope, config, context)
    if scaling is not None and scaling.kind == "factors":
        context = min(context, scaling.original_context)
    fields: dict[str, Any] = {
        "vocab_size": count(config, "vocab_size"),
        "width": width,
        "num_layers": num_layers(config),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "ffn_width": count(config, "intermediate_size"),
        "context_length": context,
        "norm_eps": number(config, "rms_norm_eps"),
        "activation": activation(config),
        "rope_base": number({"rope_theta": 10000.0} | _first(config, rope), "rope_theta"),
        "rope_fraction": _rotary_share(config, rope, family),
        "rope_scaling": scaling,
        "tied_head": bool(config["tie_word_embeddings"]),
    }
    decoder = DecoderConfig(**fields | family.switches(config))
    if scaling is not None and scaling.kind == "factors":
        found, wanted = len(scaling.factors), decoder.rotary_dim // 2
        require("short_factor", f"{found} numbers", found == wanted, f"{wanted} numbers")
    return decoder


# --- families -------------------------------------------------------------------------------------


def _llama(config: Json) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "out_bias": bias, "ffn_bias": bool(config.get("mlp_bias", False))}


def _mistral(config: Json) -> dict[str, Any]:
    return {"sliding_window": _window(config)}


def _qwen2(config: Json) -> dict[str, Any]:
    """Qwen2 and 2.5; a window applies from layer `max_window_layers` on, so to none or to all."""
    first = config.get("max_window_layers", 28)
    require("max_window_layers", first, isinstance(first, int), "a whole number")
    if not config.get("use_sliding_window", False) or first >= config["num_hidden_layers"]:
        return {"qkv_bias": True}
    require("max_window_layers", first, first == 0, "0, or no fewer than there are layers")
    return {"qkv_bias": True, "sliding_window": _window({"sliding_window": 4096} | dict(config))}


def _qwen3(config: Json) -> dict[str, Any]:
    """Qwen3: a norm on each query and key, and biases on none of the projections."""
    bias = bool(config.get("attention_bias", False))
    window = _qwen2(config).get("sliding_window", 0)
    return {"qk_norm": True, "qkv_bias": bias, "out_bias": bias, "sliding_window": window}


def _phi(config: Json) -> dict[str, Any]:
    """Phi-1, 1.5 and 2."""
    _refuse_qk_layernorm(config)
    biased = ("qkv_bias", "out_bias", "ffn_bias", "head_bias")
    norm = {"norm": "layer", "norm_eps": number(config, "layer_norm_eps")}
    return {"gated": False, "parallel_block": True, **norm, **dict.fromkeys(biased, True)}


def _phi3(config: Json) -> dict[str, Any]:
    return {"sliding_window": _window(config)}


def _gemma(config: Json) -> dict[str, Any]:
    """The first Gemma. Old files say "gelu" and mean its tanh form, as the library reads them."""
    both_ways = config.get("use_bidirectional_attention")
    require("use_bidirectional_attention", both_ways, not both_ways, "false")
    bias = bool(config.get("attention_bias", False))
    found = activation(config)
    return {
        "norm_offset": 1.0,
        "activation": "gelu_tanh" if found == "gelu" else found,
        "embedding_scale": config["hidden_size"] ** 0.5,
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _stablelm(config: Json) -> dict[str, Any]:
    _refuse_qk_layernorm(config)
    return {
        "norm": "layer",
        "norm_eps": number(config, "layer_norm_eps"),
        "qkv_bias": bool(config.get("use_qkv_bias", False)),
        "parallel_block": bool(config.get("use_parallel_residual", False)),
    }


FAMILIES = {
    "llama": Family({}, _llama),
    "mistral": Family(
        {
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        _mistral,
    ),
    "qwen2": Family(
        {
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
        },
        _qwen2,
    ),
    "qwen3": Family(
        {
            "vocab_size": 151936,
            "intermediate_size": 22016,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
        },
        _qwen3,
    ),
    "phi": Family(
        {
            "vocab_size": 51200,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "hidden_act": "gelu_new",
        },
        _phi,
        rotary_share=0.5,
    ),
    "phi3": Family(
        {
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        _phi3,
        rotary_share=1.0,
    ),
    "gemma": Family(
        {
            "vocab_size": 256000,
            "hidden_size": 3072,
            "intermediate_size": 24576,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        _gemma,
    ),
    "stablelm": Family(
        {
            "vocab_size": 50304,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        },
        _stablelm,
        rotary_share=0.25,
    ),
}
KINDS = (*FAMILIES, "openelm")  # every model type that `decoder_config` reads


# --- settings shared by families ------------------------------------------------------------------


def _window(config: Json) -> int:
    """Return the sliding window; null means none."""
    return 0 if config.get("sliding_window") is None else count(config, "sliding_window")


def _refuse_qk_layernorm(config: Json) -> None:
    found = config.get("qk_layernorm", False)
    require("qk_layernorm", found, not found, "false")


def _first(config: Json, rope: Json) -> dict[str, Any]:
    """Return the rotary base and share from where newer files or else older ones keep them."""
    names = ("rope_theta", "partial_rotary_factor")
    return {n: source[n] for source in (config, rope) for n in names if n in source}


def _rotary_share(config: Json, rope: Json, family: Family) -> float:
    found = {"partial_rotary_factor": family.rotary_share or 1.0} | _first(config, rope)
    share = number(found, "partial_rotary_factor")
    whole = family.rotary_share is not None or share == 1
    require("partial_rotary_factor", share, share <= 1 and whole, "1 in this family")
    return share


def _rope_scaling(rope: Json, config: Json, context: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = {"original_max_position_embeddings": context} | dict(config) | dict(rope)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=number(rope, "factor"))
    if kind in ("longrope", "su") and config.get("model_type") == "phi3":
        return _longrope(rope, count(original, "original_max_position_embeddings"), context)
    require("rope_type", kind, kind == "llama3", "'default', 'linear' or 'llama3'")
    return RopeScaling(
        "llama3",
        factor=number(rope, "factor"),
        low_freq_factor=number(rope, "low_freq_factor"),
        high_freq_factor=number(rope, "high_freq_factor"),
        original_context=count(original, "original_max_position_embeddings"),
    )


def _longrope(rope: Json, original: int, context: int) -> RopeScaling:
    """Phi-3's stretch, for prompts within the context it was first trained with.

    A longer prompt would turn all of its positions by other (`long_factor`) frequencies, those
    already cached too, so the context length that we report ends there.
    """
    factors = rope.get("short_factor")
    listed = isinstance(factors, list) and all(
        isinstance(factor, int | float) and factor > 0 for factor in factors
    )
    require("short_factor", factors, listed, "a list of positive numbers")
    stretch = number({"factor": context / original} | dict(rope), "factor")
    magnitude = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    return RopeScaling(
        "factors",
        factors=tuple(map(float, rope["short_factor"])),
        magnitude=number({"attention_factor": magnitude} | dict(rope), "attention_factor"),
        original_context=original,
    )


# ---- names of tensors ------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderNames:
    """Names of the parts of a language model in one family; defaults are Llama's.

    Several names under `qkv` or `up` are tensors that stand one below the other in ours.
    """

    body: str = "model"
    embed: str = "embed_tokens"
    norm: str = "norm"
    attention: str = "self_attn"
    attn_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    mlp: str = "mlp"
    ffn_norm: str = "post_attention_layernorm"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"


DECODER_NAMES = {  # by model type; all others are called as Llama's are
    "modernbert": DecoderNames(
        body="text_model",
        embed="embeddings.tok_embeddings",
        norm="final_norm",
        attention="attn",
        attn_norm="attn_norm",
        qkv=("Wqkv",),
        out="Wo",
        ffn_norm="mlp_norm",
        up=("Wi",),
        down="Wo",
    ),
    "phi": DecoderNames(out="dense", up=("fc1",), down="fc2", norm="final_layernorm"),
    "phi3": DecoderNames(qkv=("qkv_proj",), up=("gate_up_proj",)),
    "openelm": DecoderNames(
        body="transformer",
        embed="token_embeddings",
        attention="attn",
        attn_norm="attn_norm",
        qkv=("qkv_proj",),
        out="out_proj",
        mlp="ffn",
        ffn_norm="ffn_norm",
        up=("proj_1",),
        down="proj_2",
    ),
}


def decoder_rows(kind: str, prefix: str, head: str, *, body: str = "") -> tuple[MappingRow, ...]:
    """Rows of a language model; `prefix` (ends in a dot or is empty) and `head` are where its
    body and its output layer hang; `body` is where its body does, if it is called otherwise."""
    names = DECODER_NAMES.get(kind, DecoderNames())
    body = body or f"{prefix}{names.body}"
    ours, theirs = "decoder.blocks.*", f"{body}.layers.*"
    attention, mlp = f"{theirs}.{names.attention}", f"{theirs}.{names.mlp}"
    rows = [
        MappingRow("decoder.embed.weight", (f"{body}.{names.embed}.weight",)),
        MappingRow(f"{ours}.q_norm.weight", (f"{attention}.q_norm.weight",)),
        MappingRow(f"{ours}.k_norm.weight", (f"{attention}.k_norm.weight",)),
    ]
    for tensor in ("weight", "bias"):
        qkv = tuple(f"{attention}.{part}.{tensor}" for part in names.qkv)
        up = tuple(f"{mlp}.{part}.{tensor}" for part in names.up)
        rows += [
            MappingRow(f"decoder.norm.{tensor}", (f"{body}.{names.norm}.{tensor}",)),
            MappingRow(f"decoder.head.{tensor}", (f"{head}.{tensor}",)),
            MappingRow(f"{ours}.attn_norm.{tensor}", (f"{theirs}.{names.attn_norm}.{tensor}",)),
            MappingRow(f"{ours}.ffn_norm.{tensor}", (f"{theirs}.{names.ffn_norm}.{tensor}",)),
            MappingRow(f"{ours}.qkv.{tensor}", qkv, ("q", "kv", "kv") if len(qkv) > 1 else ()),
            MappingRow(f"{ours}.out.{tensor}", (f"{attention}.{names.out}.{tensor}",)),
            MappingRow(f"{ours}.up.{tensor}", up, ("ffn", "ffn") if len(up) > 1 else ()),
            MappingRow(f"{ours}.down.{tensor}", (f"{mlp}.{names.down}.{tensor}",)),
        ]
    return tuple(rows)
