"""Config and tensor names of EmbeddingGemma 2: texts and images in one encoder.

language_model.*   vision_tower.*   embed_vision.*       audio_tower.* and embed_audio.* are left
"""

from __future__ import annotations

from typing import Any

from visavis.checkpoints.transformers.config_reader import (
    ACTIVATIONS,
    Json,
    count,
    num_layers,
    number,
    require,
    section,
    without_nulls,
)
from visavis.checkpoints.weight_mapping import MappingRow, NameTable
from visavis.model.config import ConnectorConfig, VLMConfig, no_decoder
from visavis.model.embedder_config import GemmaEncoderConfig, GemmaTowerConfig

KIND = "embedding_gemma2"
TEXT: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 512,
    "embedding_dim": 768,
}
WIDE = {"head_dim": 512, "num_key_value_heads": 1}  # of layers that see all
BASES = {"sliding_attention": 1e4, "full_attention": 1e6}
VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "pooling_kernel_size": 3,
    "patch_size": 16,
    "position_embedding_size": 10240,
}
TOKENS = {"image_token_id": 258880, "boi_token_id": 255999, "eoi_token_id": 258882}
MAX_MERGE = 64


def gemma_config(config: Json) -> VLMConfig:
    """Return the model that a config.json describes, without its audio tower.

    Raises:
        CheckpointError: a setting that our parts do not have.
    """
    text = _encoder(TEXT | without_nulls(section(config, "text_config")))
    vision = section(config, "vision_config")
    if not vision:
        return VLMConfig(decoder=no_decoder(text), text_tower=text)
    tower = _tower(VISION | without_nulls(vision))
    image = (TOKENS | without_nulls(config))["image_token_id"]
    fits = type(image) is int and 0 <= image < text.vocab_size
    require("image_token_id", image, fits, f"0 to {text.vocab_size - 1}")
    connector = ConnectorConfig("pooled", tower.width, text.width, shuffle=tower.merge)
    return VLMConfig(
        decoder=no_decoder(text),
        tower=tower,
        connector=connector,
        image_token_id=image,
        text_tower=text,
    )


def _encoder(config: Json) -> GemmaEncoderConfig:
    layers, heads = num_layers(config), count(config, "num_attention_heads")
    require("attention_bias", bias := config.get("attention_bias"), not bias, "false")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [("full" if n % 6 == 5 else "sliding") + "_attention" for n in range(layers)]
    fits = isinstance(kinds, list) and len(kinds) == layers and all(k in BASES for k in kinds)
    require("layer_types", str(kinds)[:80], fits, f"one of {', '.join(BASES)} for each layer")
    window, special = count(config, "sliding_window"), config.get("per_layer_config")
    shapes, bases = [], []
    for at, kind in enumerate(kinds):
        wide = WIDE if special is None and kind == "full_attention" else {}
        own = section(special, str(at)) if isinstance(special, dict) else {}
        shapes.append({**config, **wide, **own})
        rope = section(section(config, "rope_parameters"), kind)
        require("rope_type", name := rope.get("rope_type", "default"), name == "default", "default")
        bases.append(number({"rope_theta": BASES[kind], **rope}, "rope_theta"))
    kv_heads = [count(shape, "num_key_value_heads") for shape in shapes]
    require("num_key_value_heads", kv_heads, all(heads % n == 0 for n in kv_heads), "divisors")
    head_dims = [count(shape, "head_dim") for shape in shapes]
    require("head_dim", head_dims, all(n % 2 == 0 for n in head_dims), "even numbers")
    return GemmaEncoderConfig(
        vocab_size=count(config, "vocab_size"),
        width=count(config, "hidden_size"),
        num_layers=layers,
        num_heads=heads,
        ffn_width=count(config, "intermediate_size"),
        context_length=count(config, "max_position_embeddings"),
        dim=count(config, "embedding_dim"),
        ple_width=count(config, "hidden_size_per_layer_input"),
        head_dims=tuple(head_dims),
        kv_heads=tuple(kv_heads),
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
        rope_bases=tuple(bases),
        activation=_activation(config),
        norm_eps=number(config, "rms_norm_eps"),
    )


def _tower(config: Json) -> GemmaTowerConfig:
    kind = config.get("model_type", "gemma4_vision")
    require("model_type of vision_config", kind, kind == "gemma4_vision", "'gemma4_vision'")
    heads = count(config, "num_attention_heads")
    kv_heads = count(config, "num_key_value_heads")
    require("num_key_value_heads", kv_heads, kv_heads == heads, f"{heads}, as many as heads")
    for name in ("use_clipped_linears", "standardize", "attention_bias"):
        require(name, config.get(name), not config.get(name), "false")
    head_dim, merge = count(config, "head_dim"), count(config, "pooling_kernel_size")
    require("head_dim", head_dim, head_dim % 4 == 0, "a multiple of 4")
    require("pooling_kernel_size", merge, merge <= MAX_MERGE, f"at most {MAX_MERGE}")
    eps = number(config, "rms_norm_eps")
    require("rms_norm_eps", eps, eps == 1e-6, "1e-6")
    rope = {"rope_theta": 100.0, "rope_type": "axial"} | section(config, "rope_parameters")
    require("rope_type", rope["rope_type"], rope["rope_type"] == "axial", "'axial'")
    return GemmaTowerConfig(
        patch_size=count(config, "patch_size"),
        merge=merge,
        num_positions=count(config, "position_embedding_size"),
        width=count(config, "hidden_size"),
        num_layers=num_layers(config),
        num_heads=heads,
        head_dim=head_dim,
        ffn_width=count(config, "intermediate_size"),
        rope_base=number(rope, "rope_theta"),
        activation=_activation(config),
        norm_eps=eps,
    )


def _activation(config: Json) -> Any:
    name = config["hidden_activation"]
    known = isinstance(name, str) and name in ACTIVATIONS
    require("hidden_activation", name, known, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _block_rows(ours: str, theirs: str, linear: str, sizes: tuple[str, str]) -> list[MappingRow]:
    """Rows of the blocks of the encoder or the tower.

    Args:
        linear: what stands between a linear layer's name and its weight.
        sizes: the names in `Sizes` of the rows of q and of k, and of gate and up.
    """
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    qkv = tuple(f"{attention}.{part}_proj{linear}.weight" for part in "qkv")
    up = tuple(f"{mlp}.{part}_proj{linear}.weight" for part in ("gate", "up"))
    prefix, ffn = sizes
    norms = {
        "attn_norm": "input_layernorm",
        "attn_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    }
    return [
        *(MappingRow(f"{ours}.{a}.weight", (f"{theirs}.{b}.weight",)) for a, b in norms.items()),
        MappingRow(f"{ours}.qkv.weight", qkv, (f"{prefix}q", f"{prefix}kv", f"{prefix}kv")),
        MappingRow(f"{ours}.out.weight", (f"{attention}.o_proj{linear}.weight",)),
        MappingRow(f"{ours}.q_norm.weight", (f"{attention}.q_norm.weight",)),
        MappingRow(f"{ours}.k_norm.weight", (f"{attention}.k_norm.weight",)),
        MappingRow(f"{ours}.up.weight", up, (ffn, ffn)),
        MappingRow(f"{ours}.down.weight", (f"{mlp}.down_proj{linear}.weight",)),
    ]


def gemma_table() -> NameTable:
    """Return the names of EmbeddingGemma 2's tensors."""
    text, vision = "language_model", "vision_tower"
    ours, theirs = "text_tower", f"{text}.layers.*"
    rows = [
        MappingRow(f"{ours}.embed.weight", (f"{text}.embed_tokens.weight",)),
        *_block_rows(f"{ours}.blocks.*", theirs, "", ("text_", "text_ffn")),
        MappingRow(f"{ours}.scales.*", (f"{theirs}.layer_scalar",)),
        MappingRow(
            f"{ours}.ple.*.gate.weight", (f"{theirs}.ple_block.per_layer_input_gate.weight",)
        ),
        MappingRow(
            f"{ours}.ple.*.project.weight", (f"{theirs}.ple_block.per_layer_projection.weight",)
        ),
        MappingRow(
            f"{ours}.ple.*.norm.weight", (f"{theirs}.ple_block.post_per_layer_input_norm.weight",)
        ),
        MappingRow(
            f"{ours}.ple_project.weight", (f"{text}.ple.per_layer_model_projection.weight",)
        ),
        MappingRow(f"{ours}.ple_norm.weight", (f"{text}.ple.per_layer_projection_norm.weight",)),
        MappingRow(f"{ours}.norm.weight", (f"{text}.norm.weight",)),
        MappingRow(f"{ours}.project.weight", (f"{text}.embedding_projection.weight",)),
        MappingRow("tower.patch.weight", (f"{vision}.patch_embedder.input_proj.weight",)),
        MappingRow("tower.positions", (f"{vision}.patch_embedder.position_embedding_table",)),
        *_block_rows("tower.blocks.*", f"{vision}.encoder.layers.*", ".linear", ("width_", "gate")),
        MappingRow("connector.layer.weight", ("embed_vision.embedding_projection.weight",)),
    ]
    audio = ("audio_tower.**", "embed_audio.**")
    return NameTable(tuple(rows), (("model.**", "**"),), audio)
