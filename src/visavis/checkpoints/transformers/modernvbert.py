"""ModernVBERT of transformers: a SigLIP, Idefics3's fold and projection, and a ModernBERT that sees
every token from every other.

Warner et al., "ModernBERT" (2024): layer norms without bias, one on the embeddings and none before
the first attention; two of three layers see a window of their neighbours, by other rotary
frequencies. Opens no file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from visavis.checkpoints.transformers.config_reader import (
    Json,
    activation,
    count,
    num_layers,
    number,
    require,
    section,
    without_nulls,
)
from visavis.checkpoints.transformers.language_models import decoder_rows
from visavis.checkpoints.weight_mapping import MappingRow
from visavis.model.config import ConnectorConfig, DecoderConfig, ViTConfig, VLMConfig

KIND = "modernvbert"
SETTINGS: dict[str, Any] = {"image_token_id": 50407, "pixel_shuffle_factor": 4}
TEXT: dict[str, Any] = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "hidden_activation": "gelu",
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
}
FULL, LOCAL = "full_attention", "sliding_attention"
BASES = {FULL: ("global_rope_theta", 160000.0), LOCAL: ("local_rope_theta", 10000.0)}


def modernvbert_config(config: Json, tower: ViTConfig) -> VLMConfig:
    """Return the model that a config.json describes.

    Args:
        tower: of its `vision_config`.

    Raises:
        CheckpointError: a setting that no part of ours has.
    """
    decoder, tower = _decoder(section(config, "text_config")), replace(tower, norm_output=True)
    config = SETTINGS | without_nulls(config)
    fold, placeholder = count(config, "pixel_shuffle_factor"), config["image_token_id"]
    require("pixel_shuffle_factor", fold, tower.grid % fold == 0, f"a divisor of {tower.grid}")
    known = isinstance(placeholder, int) and 0 <= placeholder < decoder.vocab_size
    require("image_token_id", placeholder, known, f"0 to {decoder.vocab_size - 1}")
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig("linear", tower.width, decoder.width, shuffle=fold, bias=False),
        image_token_id=placeholder,
    )


def _decoder(text: Json) -> DecoderConfig:
    """Return a ModernBERT."""
    found = text.get("model_type", "modernbert")
    require("text_config.model_type", found, found == "modernbert", "'modernbert'")
    text = TEXT | without_nulls(text)
    width, heads = count(text, "hidden_size"), count(text, "num_attention_heads")
    fits = width % (2 * heads) == 0
    require("num_attention_heads", heads, fits, f"one that parts {width} into even heads")
    layers, radius = num_layers(text), count(text, "local_attention") // 2
    bias = bool(text.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=count(text, "vocab_size"),
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        ffn_width=count(text, "intermediate_size"),
        context_length=count(text, "max_position_embeddings"),
        norm="layer",
        norm_eps=number(text, "norm_eps"),
        norm_bias=bool(text.get("norm_bias", False)),
        activation=activation({"hidden_act": text["hidden_activation"]}),
        qkv_bias=bias,
        out_bias=bias,
        ffn_bias=bool(text.get("mlp_bias", False)),
        rope_base=_rope_base(text, FULL),
        causal=False,
        embed_norm=True,
        local_layers=_local_layers(text, layers),
        local_window=radius + 1,
        local_rope_base=_rope_base(text, LOCAL),
    )


def _local_layers(text: Json, layers: int) -> tuple[int, ...]:
    """Return the layers with a window: as the file lists them, or all but one of every few."""
    every = count(text, "global_attn_every_n_layers")
    kinds = text.get("layer_types", [LOCAL if n % every else FULL for n in range(layers)])
    listed = isinstance(kinds, list) and len(kinds) == layers and {*kinds} <= {FULL, LOCAL}
    require("layer_types", kinds, listed, f"{layers} of {FULL!r} and {LOCAL!r}")
    return tuple(n for n, kind in enumerate(kinds) if kind == LOCAL)


def _rope_base(text: Json, kind: str) -> float:
    """Return the rotary base of a kind of layer, from where newer or else older files keep it."""
    older, default = BASES[kind]
    rope = without_nulls(section(section(text, "rope_parameters"), kind))
    found = rope.get("rope_type", "default")
    require("rope_type", found, found == "default", "'default'")
    return number({"rope_theta": text.get(older, default)} | rope, "rope_theta")


def modernvbert_rows() -> tuple[MappingRow, ...]:
    """Rows of the text encoder and the connector."""
    return (
        *decoder_rows("modernbert", "", "lm_head"),
        *(
            MappingRow(f"decoder.embed_norm.{kind}", (f"text_model.embeddings.norm.{kind}",))
            for kind in ("weight", "bias")
        ),
        MappingRow("connector.layers.0.weight", ("connector.modality_projection.weight",)),
    )
