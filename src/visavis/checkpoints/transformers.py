"""Checkpoints in the layout of Hugging Face transformers: config.json and tensor names.

Llama, CLIP, SigLIP and DINOv2 vision towers, and LLaVA made of them. Both generations of names
are read: that of the files on the hub (`language_model.model.layers…`, `vision_model.…`) and that
of modules since 4.52 (`model.language_model.layers…`); the hub's is written. Takes parsed JSON and
tensors by name: opens no file and imports no transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from visavis.checkpoints.names import NameTable, Row, Sizes, to_ours, to_theirs
from visavis.errors import CheckpointError
from visavis.model.config import (
    ConnectorConfig,
    DecoderConfig,
    RopeScaling,
    ViTConfig,
    VLMConfig,
)
from visavis.model.vlm import VLM
from visavis.registry import suggest

Json = Mapping[str, Any]

# Names in config.json and in ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}

# What a config.json leaves out stands at the library's default, which files rely on.
LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}
VIT: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
CLIP = VIT | {
    "intermediate_size": 3072,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SIGLIP = VIT | {
    "intermediate_size": 3072,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
DINOV2 = VIT | {"mlp_ratio": 4, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
REGISTERS = DINOV2 | {"patch_size": 16, "num_register_tokens": 4}
LLAVA_TOWER: dict[str, Any] = {  # of a llava whose vision_config names no model
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TOWERS = {
    "clip_vision_model": CLIP,
    "siglip_vision_model": SIGLIP,
    "dinov2": DINOV2,
    "dinov2_with_registers": REGISTERS,
}


# --- config.json ----------------------------------------------------------------------------------


def vlm_config(config: Json) -> VLMConfig:
    """Return the model that a config.json of type llama or llava describes.

    Raises:
        CheckpointError: another type, or a setting that no part of ours has.
    """
    kind = config.get("model_type")
    if kind == "llama":
        return VLMConfig(decoder=decoder_config(config))
    if kind != "llava":
        raise _unknown_type(kind, ("llama", "llava"))
    text, vision = _parts(config)
    tower, decoder = vit_config(vision), decoder_config(text)
    layer = config.get("vision_feature_layer", -2)
    select = config.get("vision_feature_select_strategy", "default")
    _require("vision_feature_layer", layer, isinstance(layer, int), "one number")
    _require("vision_feature_select_strategy", select, select in ("default", "full"), "one of two")
    # "default" drops exactly the first token, whatever the tower is.
    fits = select == "full" or tower.num_prefix_tokens == 1
    _require("vision_feature_select_strategy", select, fits, "'full' for this tower")
    act = config.get("projector_hidden_act", "gelu")
    _require("projector_hidden_act", act, act == "gelu", "'gelu'")
    bias = config.get("multimodal_projector_bias", True)
    _require("multimodal_projector_bias", bias, bias is True, "true")
    return VLMConfig(
        decoder=decoder,
        tower=tower,
        connector=ConnectorConfig("mlp", tower.width, decoder.width, depth=2),
        image_token_id=config.get("image_token_index", config.get("image_token_id", 32000)),
        select_layer=layer,
        select_feature="patch" if select == "default" else "class_patch",
    )


def decoder_config(config: Json) -> DecoderConfig:
    """Return the decoder that a config.json of type llama describes.

    Raises:
        CheckpointError: another type, or a setting that our decoder has not.
    """
    kind = config.get("model_type", "llama")
    if kind != "llama":
        raise _unknown_type(kind, ("llama",))
    config = LLAMA | _set(config)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        width=width,
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim", width // heads),
        ffn_width=config["intermediate_size"],
        context_length=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        activation=_activation(config),
        qkv_bias=config.get("attention_bias", False),
        out_bias=config.get("attention_bias", False),
        ffn_bias=config.get("mlp_bias", False),
        rope_base=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope, config["max_position_embeddings"]),
        tied_head=config.get("tie_word_embeddings", False),
    )


def vit_config(config: Json) -> ViTConfig:
    """Return the tower that a vision config.json describes, alone or within a CLIP or SigLIP.

    Raises:
        CheckpointError: another type, or a setting that our tower has not.
    """
    config = _vision_part(config)
    kind = config.get("model_type")
    if kind not in TOWERS:
        raise _unknown_type(kind, tuple(TOWERS))
    config = TOWERS[kind] | _set(config)
    for name in ("image_size", "patch_size"):
        _require(name, config[name], isinstance(config[name], int), "one number")
    _require("num_channels", (n := config.get("num_channels", 3)), n == 3, "3")
    width = config["hidden_size"]
    fields: dict[str, Any] = {
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "width": width,
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "activation": _activation(config),
        "norm_eps": config["layer_norm_eps"],
    }
    if kind == "clip_vision_model":
        return ViTConfig(**fields, ffn_width=config["intermediate_size"], pre_norm=True)
    if kind == "siglip_vision_model":
        ffn_width = config["intermediate_size"]
        return ViTConfig(**fields, ffn_width=ffn_width, class_token=False, patch_bias=True)
    _require("qkv_bias", (bias := config.get("qkv_bias", True)), bias is True, "true")
    ffn_width, gated = int(width * config["mlp_ratio"]), config.get("use_swiglu_ffn", False)
    if gated:  # two thirds, in steps of 8, so that three matrices cost what two did
        ffn_width, fields["activation"] = (int(ffn_width * 2 / 3) + 7) // 8 * 8, "silu"
    return ViTConfig(
        **fields,
        ffn_width=ffn_width,
        patch_bias=True,
        layer_scale=True,
        gated_ffn=gated,
        num_registers=config.get("num_register_tokens", 0),
        position_antialias=kind == "dinov2_with_registers",
    )


def _parts(config: Json) -> tuple[Json, Json]:
    """Return the text and vision configs of a llava, with what they take from the outer one."""
    text = {"model_type": "llama"} | _set(config.get("text_config") or {})
    if config.get("tie_word_embeddings"):
        text["tie_word_embeddings"] = True
    vision = _set(config.get("vision_config") or {})
    return text, vision if "model_type" in vision else LLAVA_TOWER | vision


def _vision_part(config: Json) -> Json:
    kind = config.get("model_type")
    if kind in ("clip", "siglip"):
        return {"model_type": f"{kind}_vision_model"} | _set(config.get("vision_config") or {})
    return config


def _rope_scaling(rope: Json, context: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=_number(rope, "factor"))
    _require("rope_type", kind, kind == "llama3", "'default', 'linear' or 'llama3'")
    return RopeScaling(
        "llama3",
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_context=rope.get("original_max_position_embeddings", context),
    )


def _number(config: Json, name: str) -> float:
    value = config.get(name)
    _require(name, value, isinstance(value, int | float), "a number")
    return float(config[name])


def _activation(config: Json) -> Any:
    name = config["hidden_act"]
    _require("hidden_act", name, name in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _set(config: Json) -> dict[str, Any]:
    """Drop nulls: they stand for the default."""
    return {key: value for key, value in config.items() if value is not None}


def _require(name: str, value: object, fits: bool, expected: str) -> None:
    if not fits:
        raise CheckpointError(
            f"config.json sets {name} to {value!r}, expected {expected}; this variant is not "
            "supported, use a checkpoint without it"
        )


def _unknown_type(kind: object, known: tuple[str, ...]) -> CheckpointError:
    return CheckpointError(
        f"config.json has model_type {kind!r}, which is not read here: {suggest(str(kind), known)}"
    )


# --- tensor names ---------------------------------------------------------------------------------


def read(config: Json, tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Return the state of `VLM(vlm_config(config))` from tensors in transformers' layout.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    ours = vlm_config(config)
    with torch.device("meta"):
        expected = _shapes(VLM(ours).state_dict())
    if ours.decoder.tied_head:
        del expected["decoder.head.weight"]
    table = _vlm_table(config, ours)
    state = to_ours(tensors, table, expected, _vlm_sizes(ours), where=where)
    if ours.decoder.tied_head:
        embeddings = state["decoder.head.weight"] = state["decoder.embed.weight"]
        for name in ("lm_head.weight", "language_model.lm_head.weight"):
            if name in tensors and not torch.equal(tensors[name], embeddings):
                raise CheckpointError(
                    f"{where} holds a {name} of its own, but config.json ties it to the "
                    "embeddings; one of the two is wrong: set tie_word_embeddings to false to "
                    "use the head that is there"
                )
    return state


def write(config: Json, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in transformers' layout (the hub's names): the inverse of `read`."""
    ours = vlm_config(config)
    kept = dict(state)
    if ours.decoder.tied_head:
        kept.pop("decoder.head.weight", None)
    return to_theirs(kept, _vlm_table(config, ours), _vlm_sizes(ours))


def read_tower(config: Json, tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Return the state of `ViT(vit_config(config))` from a vision or CLIP-like checkpoint.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    from visavis.model.towers.vit import ViT

    ours = vit_config(config)
    with torch.device("meta"):
        expected = _shapes(ViT(ours).state_dict(prefix="tower."))
    state = to_ours(tensors, _tower_table(config), expected, _tower_sizes(ours), where=where)
    return {name.removeprefix("tower."): tensor for name, tensor in state.items()}


def write_tower(config: Json, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in transformers' layout: the inverse of `read_tower`."""
    named = {f"tower.{name}": tensor for name, tensor in state.items()}
    return to_theirs(named, _tower_table(config), _tower_sizes(vit_config(config)))


def _decoder_rows(model: str, head: str) -> tuple[Row, ...]:
    """Rows of a Llama; `model` and `head` are where its body and its output layer hang."""
    ours, theirs = "decoder.blocks.*", f"{model}.layers.*"
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    rows = [
        Row("decoder.embed.weight", (f"{model}.embed_tokens.weight",)),
        Row("decoder.norm.weight", (f"{model}.norm.weight",)),
        Row("decoder.head.weight", (f"{head}.weight",)),
        Row(f"{ours}.attn_norm.weight", (f"{theirs}.input_layernorm.weight",)),
        Row(f"{ours}.ffn_norm.weight", (f"{theirs}.post_attention_layernorm.weight",)),
    ]
    for kind in ("weight", "bias"):
        qkv = tuple(f"{attention}.{part}_proj.{kind}" for part in "qkv")
        rows += [
            Row(f"{ours}.qkv.{kind}", qkv, ("q", "kv", "kv")),
            Row(f"{ours}.out.{kind}", (f"{attention}.o_proj.{kind}",)),
            Row(
                f"{ours}.up.{kind}",
                (f"{mlp}.gate_proj.{kind}", f"{mlp}.up_proj.{kind}"),
                ("ffn", "ffn"),
            ),
            Row(f"{ours}.down.{kind}", (f"{mlp}.down_proj.{kind}",)),
        ]
    return tuple(rows)


def _clip_rows(model: str) -> tuple[Row, ...]:
    """Rows of a CLIP or SigLIP vision tower."""
    embeddings = f"{model}.embeddings"
    rows = [
        Row("tower.class_token", (f"{embeddings}.class_embedding",)),
        Row("tower.positions", (f"{embeddings}.position_embedding.weight",)),
    ]
    for kind in ("weight", "bias"):
        ours, theirs = "tower.blocks.*", f"{model}.encoder.layers.*"
        qkv = tuple(f"{theirs}.self_attn.{part}_proj.{kind}" for part in "qkv")
        rows += [
            Row(f"tower.patch.{kind}", (f"{embeddings}.patch_embedding.{kind}",)),
            Row(f"tower.pre_norm.{kind}", (f"{model}.pre_layrnorm.{kind}",)),  # sic
            Row(f"tower.post_norm.{kind}", (f"{model}.post_layernorm.{kind}",)),
            Row(f"{ours}.attn_norm.{kind}", (f"{theirs}.layer_norm1.{kind}",)),
            Row(f"{ours}.qkv.{kind}", qkv, ("width", "width", "width")),
            Row(f"{ours}.out.{kind}", (f"{theirs}.self_attn.out_proj.{kind}",)),
            Row(f"{ours}.ffn_norm.{kind}", (f"{theirs}.layer_norm2.{kind}",)),
            Row(f"{ours}.up.{kind}", (f"{theirs}.mlp.fc1.{kind}",)),
            Row(f"{ours}.down.{kind}", (f"{theirs}.mlp.fc2.{kind}",)),
        ]
    return tuple(rows)


def _dinov2_rows(prefix: str) -> tuple[Row, ...]:
    """Rows of a DINOv2, with plain or gated feed-forward; `prefix` ends in a dot or is empty."""
    embeddings = f"{prefix}embeddings"
    ours, theirs = "tower.blocks.*", f"{prefix}encoder.layer.*"
    rows = [
        Row("tower.class_token", (f"{embeddings}.cls_token",), unit_axes=2),
        Row("tower.registers", (f"{embeddings}.register_tokens",), unit_axes=1),
        Row("tower.positions", (f"{embeddings}.position_embeddings",), unit_axes=1),
        Row(f"{ours}.attn_scale", (f"{theirs}.layer_scale1.lambda1",)),
        Row(f"{ours}.ffn_scale", (f"{theirs}.layer_scale2.lambda1",)),
    ]
    for kind in ("weight", "bias"):
        attention, mlp = f"{theirs}.attention", f"{theirs}.mlp"
        qkv = tuple(f"{attention}.attention.{part}.{kind}" for part in ("query", "key", "value"))
        rows += [
            Row(f"tower.patch.{kind}", (f"{embeddings}.patch_embeddings.projection.{kind}",)),
            Row(f"tower.post_norm.{kind}", (f"{prefix}layernorm.{kind}",)),
            Row(f"{ours}.attn_norm.{kind}", (f"{theirs}.norm1.{kind}",)),
            Row(f"{ours}.qkv.{kind}", qkv, ("width", "width", "width")),
            Row(f"{ours}.out.{kind}", (f"{attention}.output.dense.{kind}",)),
            Row(f"{ours}.ffn_norm.{kind}", (f"{theirs}.norm2.{kind}",)),
            Row(f"{ours}.up.{kind}", (f"{mlp}.fc1.{kind}",)),
            Row(f"{ours}.down.{kind}", (f"{mlp}.fc2.{kind}",)),
        ]
    return tuple(rows)


def _gated(rows: tuple[Row, ...], prefix: str) -> tuple[Row, ...]:
    """Give a DINOv2 the names of its gated feed-forward: the hub's, then those of 5.x modules."""
    theirs = f"{prefix}encoder.layer.*.mlp"
    kept = [row for row in rows if ".up." not in row.ours and ".down." not in row.ours]
    for kind in ("weight", "bias"):
        apart = (f"{theirs}.gate_proj.{kind}", f"{theirs}.up_proj.{kind}")
        kept += [
            Row(f"tower.blocks.*.up.{kind}", (f"{theirs}.weights_in.{kind}",)),
            Row(f"tower.blocks.*.up.{kind}", apart, ("gate", "gate")),
            Row(f"tower.blocks.*.down.{kind}", (f"{theirs}.weights_out.{kind}",)),
        ]
    return tuple(kept)


DINOV2_ALIASES = (
    ("**.attention.q_proj.*", "**.attention.attention.query.*"),
    ("**.attention.k_proj.*", "**.attention.attention.key.*"),
    ("**.attention.v_proj.*", "**.attention.attention.value.*"),
    ("**.attention.o_proj.*", "**.attention.output.dense.*"),
    ("**.mlp.down_proj.*", "**.mlp.weights_out.*"),
)
CLIP_PARTS = ("embeddings", "encoder", "pre_layrnorm", "post_layernorm", "head")


def _tower_table(config: Json, prefix: str = "") -> NameTable:
    """Return the names of a vision tower; `prefix` ends in a dot or is empty."""
    config = _vision_part(config)
    if config["model_type"].startswith("dinov2"):
        rows = _dinov2_rows(prefix)
        if config.get("use_swiglu_ffn"):
            rows = _gated(rows, prefix)
        return NameTable(rows, DINOV2_ALIASES, ignored=(f"{prefix}embeddings.mask_token",))
    model = f"{prefix}vision_model"
    other_half = () if prefix else ("text_model.**", "*_projection.weight", "logit_*")
    return NameTable(
        rows=_clip_rows(model),
        aliases=tuple((f"{prefix}{part}.**", f"{model}.{part}.**") for part in CLIP_PARTS),
        # SigLIP's attention pooling, and a buffer that old files carry.
        ignored=(f"{model}.head.**", f"{model}.embeddings.position_ids", *other_half),
    )


def _vlm_table(config: Json, ours: VLMConfig) -> NameTable:
    """Return the names of a whole llama or llava."""
    body = "model" if ours.tower is None else "language_model.model"
    head = "lm_head" if ours.tower is None else "language_model.lm_head"
    # A buffer that old files carry; and a tied head is the embeddings once more.
    ignored = ("**.rotary_emb.inv_freq", *([f"{head}.weight"] if ours.decoder.tied_head else []))
    if ours.tower is None:
        return NameTable(_decoder_rows(body, head), ignored=ignored)
    tower = _tower_table(_parts(config)[1], "vision_tower.")
    connector = [
        Row(f"connector.layers.{ours_at}.{kind}", (f"multi_modal_projector.{theirs}.{kind}",))
        for ours_at, theirs in ((0, "linear_1"), (2, "linear_2"))
        for kind in ("weight", "bias")
    ]
    newer = (
        ("lm_head.weight", f"{head}.weight"),
        ("model.language_model.**", f"{body}.**"),
        ("model.multi_modal_projector.**", "multi_modal_projector.**"),
        ("model.vision_tower.**", "vision_tower.**"),
    )
    return NameTable(
        rows=(*_decoder_rows(body, head), *connector, *tower.rows),
        aliases=(*newer, *tower.aliases),
        ignored=(*ignored, *tower.ignored),
    )


def _vlm_sizes(config: VLMConfig) -> Sizes:
    decoder = config.decoder
    tower = _tower_sizes(config.tower) if isinstance(config.tower, ViTConfig) else None

    def sizes(layer: int) -> Mapping[str, int]:
        return {
            "q": decoder.per_layer(decoder.num_heads, layer) * decoder.head_dim,
            "kv": decoder.per_layer(decoder.num_kv_heads, layer) * decoder.head_dim,
            "ffn": decoder.per_layer(decoder.ffn_width, layer),
            **(tower(layer) if tower else {}),
        }

    return sizes


def _tower_sizes(config: ViTConfig) -> Sizes:
    return lambda _: {"width": config.width, "gate": config.ffn_width}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
