"""The `llama` architecture of GGUF: its metadata as a `DecoderConfig`, its tensors as ours.

One table names every tensor in both layouts and drives both directions. GGUF keeps rotary pairs
side by side, we keep them half a head apart (as Hugging Face does), so rows of q and k move; our
q, k, v and gate, up are fused by rows. Blocks run along rows, so all of this works on quantised
bytes as well. Knows no other architecture and builds no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from visavis.checkpoints import gguf_quants
from visavis.checkpoints.gguf import GGUFFile, TensorInfo
from visavis.errors import CheckpointError
from visavis.model.config import DecoderConfig, PerLayer, RopeScaling
from visavis.registry import suggest

ARCHITECTURES = ("llama",)
Size = Literal["vocab", "width", "q", "kv", "ffn"]
ROPE_FACTORS = "rope_freqs.weight"  # expected but no weight of ours: becomes config.rope_scaling


@dataclass(frozen=True)
class Part:
    """One GGUF tensor, and whether its rows hold interleaved rotary pairs."""

    name: str
    shape: tuple[Size, ...]
    rotary: bool = False


@dataclass(frozen=True)
class Row:
    """One tensor of ours and the GGUF tensors whose rows make it up, in order."""

    ours: str
    parts: tuple[Part, ...]
    needs: Literal["always", "qkv_bias", "out_bias", "untied_head"] = "always"


MODEL_ROWS = (
    Row("decoder.embed.weight", (Part("token_embd.weight", ("vocab", "width")),)),
    Row("decoder.norm.weight", (Part("output_norm.weight", ("width",)),)),
    Row("decoder.head.weight", (Part("output.weight", ("vocab", "width")),), "untied_head"),
)
BLOCK_ROWS = (  # ours below decoder.blocks.<n>., theirs below blk.<n>.
    Row("attn_norm.weight", (Part("attn_norm.weight", ("width",)),)),
    Row(
        "qkv.weight",
        (
            Part("attn_q.weight", ("q", "width"), rotary=True),
            Part("attn_k.weight", ("kv", "width"), rotary=True),
            Part("attn_v.weight", ("kv", "width")),
        ),
    ),
    Row(
        "qkv.bias",
        (
            Part("attn_q.bias", ("q",), rotary=True),
            Part("attn_k.bias", ("kv",), rotary=True),
            Part("attn_v.bias", ("kv",)),
        ),
        "qkv_bias",
    ),
    Row("out.weight", (Part("attn_output.weight", ("width", "q")),)),
    Row("out.bias", (Part("attn_output.bias", ("width",)),), "out_bias"),
    Row("ffn_norm.weight", (Part("ffn_norm.weight", ("width",)),)),
    Row(
        "up.weight",
        (Part("ffn_gate.weight", ("ffn", "width")), Part("ffn_up.weight", ("ffn", "width"))),
    ),
    Row("down.weight", (Part("ffn_down.weight", ("width", "ffn")),)),
)


@dataclass(frozen=True)
class StoredPart:
    """One GGUF tensor as stored, its rows already in our order."""

    raw: np.ndarray  # uint8 [rows, bytes per row]
    type: str
    shape: tuple[int, ...]

    def dequantize(self, out: np.ndarray) -> None:
        """Write float32 values to `out`, contiguous and of `shape`."""
        gguf_quants.dequantize(self.raw.reshape(-1), self.type, self.shape, out)

    def parts(self) -> gguf_quants.Parts:
        """Return codes, scales and minimums; only for quantised types."""
        return gguf_quants.parts(self.raw.reshape(-1), self.type, self.shape)


def decoder_config(file: GGUFFile) -> DecoderConfig:
    """Return the decoder that a GGUF file describes.

    Raises:
        CheckpointError: another architecture, one part of a split file, or a missing key.
    """
    metadata = _Metadata(file)
    architecture = metadata.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {architecture!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}; {suggest(architecture, ARCHITECTURES)}"
        )
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{file.path}: one of {file.metadata['split.count']} parts, expected a whole model; "
            "join the parts with `llama-gguf-split --merge` first"
        )
    if file.metadata.get("llama.expert_count", 0):
        raise CheckpointError(
            f"{file.path}: a mixture of {file.metadata['llama.expert_count']} experts, expected "
            "a dense model; mixtures of experts are not supported"
        )
    num_layers = metadata.get("llama.block_count", int)
    width = metadata.get("llama.embedding_length", int)
    num_heads = metadata.per_layer("llama.attention.head_count", num_layers)
    num_kv_heads = metadata.per_layer("llama.attention.head_count_kv", num_layers, num_heads)
    first_heads = num_heads[0] if isinstance(num_heads, tuple) else num_heads
    head_dim = metadata.get("llama.attention.key_length", int, width // max(first_heads, 1))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if metadata.get(key, int, head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path}: {key} is {file.metadata[key]}, expected the head size {head_dim}; "
                "the file was probably converted for another architecture"
            )
    embedding = file.tensors.get("token_embd.weight")
    vocab_size = embedding.shape[0] if embedding else metadata.get("llama.vocab_size", int)
    config = DecoderConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_width=metadata.per_layer("llama.feed_forward_length", num_layers),
        context_length=metadata.get("llama.context_length", int),
        norm_eps=metadata.get("llama.attention.layer_norm_rms_epsilon", float),
        rope_base=metadata.get("llama.rope.freq_base", float, 10000.0),
        rope_scaling=_rope_scaling(file, metadata, head_dim),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        tied_head="output.weight" not in file.tensors,
    )
    _check_sizes(file, config)
    return config


def decoder_tensors(file: GGUFFile) -> Iterator[tuple[str, list[StoredPart]]]:
    """Yield each tensor of ours by name, as the stored parts whose rows make it up.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; all are named.
    """
    config = decoder_config(file)
    _check_tensors(file, config)
    for ours, parts in _rows(config):
        stored = []
        for part in parts:
            info = file.tensors[part.name]
            raw = file.raw(part.name).reshape(info.shape[0], -1)  # [rows, bytes per row]
            if part.rotary:
                raw = _halves_apart(raw, config.head_dim)
            stored.append(StoredPart(raw, info.type, info.shape))
        yield ours, stored


def decoder_state(file: GGUFFile) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor of ours by name, as float32.

    Raises:
        CheckpointError: as `decoder_tensors`; a type that cannot be dequantised; values that
            are not finite.
    """
    for info in file.tensors.values():
        if info.type not in gguf_quants.SUPPORTED:
            file.dequantize(info.name)  # raises, naming the tensor and the types that can be
    for ours, stored in decoder_tensors(file):
        num_rows = sum(part.shape[0] for part in stored)
        array = np.empty((num_rows, *stored[0].shape[1:]), np.float32)
        start = 0
        for part in stored:
            part.dequantize(array[start : start + part.shape[0]])
            start += part.shape[0]
        with np.errstate(all="ignore"):
            finite = np.isfinite(array.sum())
        if not finite:
            raise CheckpointError(
                f"{file.path}: {ours} holds NaN or infinite values, expected finite weights; the "
                "file is damaged, fetch it again and compare its sha256"
            )
        yield ours, array


def gguf_state(
    state: Mapping[str, np.ndarray], config: DecoderConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield GGUF's tensors by GGUF's names from ours: the inverse of `decoder_state`."""
    for ours, parts in _rows(config):
        layer = int(parts[0].name.split(".")[1]) if parts[0].name.startswith("blk.") else 0
        sizes = _sizes(config, layer)
        ends = np.cumsum([sizes[part.shape[0]] for part in parts])[:-1]
        for part, rows in zip(parts, np.split(state[ours], ends), strict=True):
            yield part.name, _side_by_side(rows, config.head_dim) if part.rotary else rows
    if config.rope_scaling is not None and config.rope_scaling.kind == "factors":
        yield ROPE_FACTORS, np.array(config.rope_scaling.factors, np.float32)


def _rows(config: DecoderConfig) -> Iterator[tuple[str, list[Part]]]:
    """Yield the table's rows for one config, names in full."""
    present = {
        "always": True,
        "qkv_bias": config.qkv_bias,
        "out_bias": config.out_bias,
        "untied_head": not config.tied_head,
    }
    for row in MODEL_ROWS:
        if present[row.needs]:
            yield row.ours, list(row.parts)
    for layer in range(config.num_layers):
        for row in BLOCK_ROWS:
            if present[row.needs]:
                parts = [Part(f"blk.{layer}.{p.name}", p.shape, p.rotary) for p in row.parts]
                yield f"decoder.blocks.{layer}.{row.ours}", parts


def _sizes(config: DecoderConfig, layer: int) -> dict[Size, int]:
    return {
        "vocab": config.vocab_size,
        "width": config.width,
        "q": config.per_layer(config.num_heads, layer) * config.head_dim,
        "kv": config.per_layer(config.num_kv_heads, layer) * config.head_dim,
        "ffn": config.per_layer(config.ffn_width, layer),
    }


def _halves_apart(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Move rotary pairs from neighbouring rows to rows half a head apart: [rows, ...]."""
    paired = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def _side_by_side(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo `_halves_apart`."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _check_sizes(file: GGUFFile, config: DecoderConfig) -> None:
    """Refuse configs that no tensors could fit, before anything is sized by them."""
    layers = range(config.num_layers if config.num_layers <= len(file.tensors) else 0)
    heads_fit = all(
        config.per_layer(config.num_kv_heads, layer) > 0
        and config.per_layer(config.num_heads, layer) % config.per_layer(config.num_kv_heads, layer)
        == 0
        for layer in layers
    )
    even_head = config.head_dim >= 2 and config.head_dim % 2 == 0
    if not layers or not heads_fit or not even_head or not 0 < config.rope_base < math.inf:
        raise CheckpointError(
            f"{file.path}: {config.num_layers} layers, {config.num_heads} heads of size "
            f"{config.head_dim}, {config.num_kv_heads} key-value heads and {len(file.tensors)} "
            f"tensors (rope base {config.rope_base}) do not make a model; expected an even head "
            "size and heads that divide evenly among key-value heads; the metadata is damaged, "
            "fetch the file again"
        )


def _check_tensors(file: GGUFFile, config: DecoderConfig) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for _, parts in _rows(config):
        for part in parts:
            layer = int(part.name.split(".")[1]) if part.name.startswith("blk.") else 0
            sizes = _sizes(config, layer)
            wanted[part.name] = tuple(sizes[size] for size in part.shape)
    found: Mapping[str, TensorInfo] = file.tensors
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {n}" for n in found if n not in wanted and n != ROPE_FACTORS]
    problems += [
        f"{name} has shape {found[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{file.path}: the tensors do not make the llama model that the metadata describes: "
            f"{'; '.join(problems[:8])}{more}. The file is of a variant not known here or was "
            "converted wrongly; try a file of the same model from another source"
        )


def _rope_scaling(file: GGUFFile, metadata: _Metadata, head_dim: int) -> RopeScaling | None:
    if ROPE_FACTORS in file.tensors:
        factors = file.dequantize(ROPE_FACTORS)
        if factors.shape != (head_dim // 2,) or not (factors > 0).all():
            raise CheckpointError(
                f"{file.path}: {ROPE_FACTORS} has shape {factors.shape}, expected {head_dim // 2} "
                "positive numbers, one per rotary frequency; the file was converted wrongly"
            )
        return RopeScaling("factors", factors=tuple(factors.tolist()))
    kind = metadata.get("llama.rope.scaling.type", str, "")
    factor = metadata.get("llama.rope.scale_linear", float, 1.0)  # the key of older files
    factor = metadata.get("llama.rope.scaling.factor", float, factor)
    if kind not in ("", "none", "linear") or not 0 < factor < math.inf:
        raise CheckpointError(
            f"{file.path}: rope scaling {kind!r} by {factor}, expected none or 'linear'; this way "
            "of stretching the context is not supported, use another file of the model"
        )
    return RopeScaling("linear", factor=factor) if kind != "none" and factor != 1.0 else None


class _Metadata:
    """Typed look-ups whose errors name the key."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.file.metadata.get(key, default)
        if value is None:
            raise CheckpointError(
                f"{self.file.path}: metadata lacks {key!r}, expected a llama model's; the file "
                "is an adapter, a vocabulary or a damaged conversion; fetch the model itself"
            )
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(
                f"{self.file.path}: {key!r} is {value!r}, expected {kind.__name__}; the file was "
                "converted wrongly; try one from another source"
            )
        return value

    def per_layer(self, key: str, num_layers: int, default: PerLayer | None = None) -> PerLayer:
        """Return one number for all layers, or a tuple with one per layer."""
        value = self.file.metadata.get(key, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            value = tuple(value.tolist())
        if isinstance(value, tuple):
            if len(value) != num_layers:
                raise CheckpointError(
                    f"{self.file.path}: {key!r} holds {len(value)} numbers, expected one for "
                    f"each of {num_layers} layers; the metadata is damaged, fetch the file again"
                )
            return value if len(set(value)) > 1 else value[0]
        number: int = self.get(key, int, default)
        return number
