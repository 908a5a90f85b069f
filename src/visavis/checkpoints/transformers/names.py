"""Tensor names of transformers: rows of every language model and vision tower we read.

Both generations of names are read: that of the files on the hub and that of modules since 4.52;
the hub's is written. Knows no settings (see `config.py`) and holds no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from visavis.checkpoints.names import NameTable, Row
from visavis.checkpoints.transformers.config import vision_part
from visavis.checkpoints.transformers.settings import Json


@dataclass(frozen=True)
class DecoderNames:
    """What a family calls the parts of a language model; defaults are Llama's.

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


def decoder_rows(kind: str, prefix: str, head: str) -> tuple[Row, ...]:
    """Rows of a language model; `prefix` (ends in a dot or is empty) and `head` are where its
    body and its output layer hang."""
    names = DECODER_NAMES.get(kind, DecoderNames())
    body = f"{prefix}{names.body}"
    ours, theirs = "decoder.blocks.*", f"{body}.layers.*"
    attention, mlp = f"{theirs}.{names.attention}", f"{theirs}.{names.mlp}"
    rows = [
        Row("decoder.embed.weight", (f"{body}.{names.embed}.weight",)),
        Row(f"{ours}.q_norm.weight", (f"{attention}.q_norm.weight",)),
        Row(f"{ours}.k_norm.weight", (f"{attention}.k_norm.weight",)),
    ]
    for tensor in ("weight", "bias"):
        qkv = tuple(f"{attention}.{part}.{tensor}" for part in names.qkv)
        up = tuple(f"{mlp}.{part}.{tensor}" for part in names.up)
        rows += [
            Row(f"decoder.norm.{tensor}", (f"{body}.{names.norm}.{tensor}",)),
            Row(f"decoder.head.{tensor}", (f"{head}.{tensor}",)),
            Row(f"{ours}.attn_norm.{tensor}", (f"{theirs}.{names.attn_norm}.{tensor}",)),
            Row(f"{ours}.ffn_norm.{tensor}", (f"{theirs}.{names.ffn_norm}.{tensor}",)),
            Row(f"{ours}.qkv.{tensor}", qkv, ("q", "kv", "kv") if len(qkv) > 1 else ()),
            Row(f"{ours}.out.{tensor}", (f"{attention}.{names.out}.{tensor}",)),
            Row(f"{ours}.up.{tensor}", up, ("ffn", "ffn") if len(up) > 1 else ()),
            Row(f"{ours}.down.{tensor}", (f"{mlp}.{names.down}.{tensor}",)),
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


def tower_table(config: Json, prefix: str = "") -> NameTable:
    """Return the names of a vision tower; `prefix` ends in a dot or is empty."""
    config = vision_part(config)
    if config["model_type"].startswith("dinov2"):
        rows = _dinov2_rows(prefix)
        if config.get("use_swiglu_ffn"):
            rows = _gated(rows, prefix)
        aliases = tuple((prefix + name, prefix + target) for name, target in DINOV2_ALIASES)
        return NameTable(rows, aliases, ignored=(f"{prefix}embeddings.mask_token",))
    model = f"{prefix}vision_model"
    other_half = () if prefix else ("text_model.**", "*_projection.weight", "logit_*")
    return NameTable(
        rows=_clip_rows(model),
        aliases=tuple((f"{prefix}{part}.**", f"{model}.{part}.**") for part in CLIP_PARTS),
        # SigLIP's attention pooling, and a buffer that old files carry.
        ignored=(f"{model}.head.**", f"{model}.embeddings.position_ids", *other_half),
    )
