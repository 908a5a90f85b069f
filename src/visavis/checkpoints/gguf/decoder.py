"""Language models in GGUF: metadata as a `DecoderConfig`, tensors as ours, both ways.

The tensors of each architecture are listed in `architectures.py`. Where GGUF keeps rotary pairs
side by side, rows of q and k move, because we keep them half a head apart (as Hugging Face does);
our q, k, v and gate, up are fused by rows.
Blocks run along rows, so all of this works on quantised bytes as well. Builds no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from visavis.checkpoints.gguf import dequantize
from visavis.checkpoints.gguf.architectures import (
    ARCHITECTURES,
    LLAMA,
    Architecture,
    RowPart,
    TensorLayout,
    rows,
    shape_of,
)
from visavis.checkpoints.gguf.dequantize import BlockParts
from visavis.checkpoints.gguf.reader import GGUFFile, TensorInfo
from visavis.checkpoints.tensor_files import warn_not_finite
from visavis.errors import CheckpointError
from visavis.model.config import DecoderConfig, PerLayer, RopeScaling
from visavis.utils import suggest

# Expected, but no weights of ours: they become config.rope_scaling.
ROPE_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"

MAX_WIDTH = 2**27  # no dimension of a real model is larger


@dataclass(frozen=True)
class StoredPart:
    """One GGUF tensor as stored, its rows already in our order."""

    raw: np.ndarray  # uint8 [rows, bytes per row]
    type: str
    shape: tuple[int, ...]

    def dequantize(self, out: np.ndarray) -> None:
        """Write float32 values to `out`, contiguous and of `shape`."""
        dequantize.dequantize(self.raw.reshape(-1), self.type, self.shape, out)

    def parts(self) -> BlockParts:
        """Return codes, scales and minimums; only for quantised types."""
        return dequantize.parts(self.raw.reshape(-1), self.type, self.shape)


def decoder_config(file: GGUFFile) -> DecoderConfig:
    """Return the decoder that a GGUF file describes.

    Raises:
        CheckpointError: another architecture, one part of a split file, or a missing key.
    """
    architecture, metadata = _architecture(file), _Metadata(file)
    _refuse_variants(file, metadata)
    num_layers = metadata.get("block_count", int)
    width = metadata.get("embedding_length", int)
    num_heads = metadata.per_layer("attention.head_count", num_layers)
    num_kv_heads = metadata.per_layer("attention.head_count_kv", num_layers, num_heads)
    first_heads = num_heads[0] if isinstance(num_heads, tuple) else num_heads
    head_dim = metadata.get("attention.key_length", int, width // max(first_heads, 1))
    if metadata.get("attention.value_length", int, head_dim) != head_dim:
        raise CheckpointError(
            f"{file.path}: keys of size {head_dim} and values of another, expected the same; the "
            "file was probably converted for another architecture"
        )
    rotary_dim = metadata.get("rope.dimension_count", int, head_dim)
    some = not architecture.rotary_pairs and 0 < rotary_dim <= head_dim and rotary_dim % 2 == 0
    if rotary_dim != head_dim and not some:
        raise CheckpointError(
            f"{file.path}: {rotary_dim} of {head_dim} channels of a head rotate, expected "
            f"{'all' if architecture.rotary_pairs else 'an even number'} of them; the file was "
            "probably converted for another architecture"
        )
    tensors = file.tensors
    embedding = tensors.get("token_embd.weight")
    context_length = metadata.get("context_length", int)
    scaling = _rope_scaling(file, metadata, rotary_dim, context_length)
    if scaling is not None and SHORT_FACTORS in tensors:
        context_length = min(context_length, scaling.original_context)
    norm = architecture.switches.get("norm", "rms")
    epsilon = "layer_norm_rms_epsilon" if norm == "rms" else "layer_norm_epsilon"
    fields: dict[str, Any] = {
        "vocab_size": embedding.shape[0] if embedding else metadata.get("vocab_size", int),
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "ffn_width": metadata.per_layer("feed_forward_length", num_layers),
        "context_length": context_length,
        "norm_eps": metadata.get(f"attention.{epsilon}", float),
        "rope_base": metadata.get("rope.freq_base", float, 10000.0),
        "rope_fraction": rotary_dim / head_dim,
        "rope_scaling": scaling,
        "qkv_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        "out_bias": "blk.0.attn_output.bias" in tensors,
        "ffn_bias": "blk.0.ffn_down.bias" in tensors,
        "head_bias": "output.bias" in tensors,
        "parallel_block": metadata.get("use_parallel_residual", bool, False),
        "tied_head": "output.weight" not in tensors,
    }
    if architecture.windowed:
        fields["sliding_window"] = metadata.get("attention.sliding_window", int, 0)
    if architecture.scaled_embedding:
        fields["embedding_scale"] = math.sqrt(max(width, 0))
    config = DecoderConfig(**fields | architecture.switches)
    _check_sizes(file, config)
    return config


def decoder_tensors(file: GGUFFile) -> Iterator[tuple[str, list[StoredPart]]]:
    """Yield each tensor of ours by name, as the stored parts whose rows make it up.

    Their bytes are in memory until the next tensor is asked for.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; all are named.
    """
    config = decoder_config(file)
    layout = _layout(file)
    _check_tensors(file, config, layout)
    for ours, parts in rows(config, layout):
        stored = []
        for part in parts:
            info = file.tensors[part.name]
            raw = file.raw(part.name).reshape(info.shape[0], -1)  # [rows, bytes per row]
            if part.rotary:
                raw = _halves_apart(raw, config.head_dim)
            stored.append(StoredPart(raw, info.type, info.shape))
        yield ours, stored
        for part in parts:
            file.release(part.name)


def decoder_state(file: GGUFFile) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each tensor of ours by name, as float32.

    Raises:
        CheckpointError: as `decoder_tensors`; a type that cannot be dequantised.
    """
    check_types(file)
    for ours, stored in decoder_tensors(file):
        yield ours, dequantized(file, ours, stored)


def check_types(file: GGUFFile) -> None:
    """Refuse a file with tensors that cannot be dequantised.

    Raises:
        CheckpointError: naming one, and the types that can be.
    """
    for info in file.tensors.values():
        if info.type not in dequantize.SUPPORTED:
            file.dequantize(info.name)


def dequantized(file: GGUFFile, ours: str, stored: list[StoredPart]) -> np.ndarray:
    """Return one tensor of ours as float32."""
    num_rows = sum(part.shape[0] for part in stored)
    array = np.empty((num_rows, *stored[0].shape[1:]), np.float32)
    start = 0
    for part in stored:
        part.dequantize(array[start : start + part.shape[0]])
        start += part.shape[0]
    with np.errstate(all="ignore"):
        finite = np.isfinite(array.sum())
    if not finite:
        warn_not_finite(ours, str(file.path))
    return array


def gguf_state(
    state: Mapping[str, np.ndarray], config: DecoderConfig, layout: TensorLayout = LLAMA
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield GGUF's tensors by GGUF's names from ours: the inverse of `decoder_state`."""
    for ours, at, part in split_rows(config, layout):
        split = state[ours][at]
        yield part.name, side_by_side(split, config.head_dim) if part.rotary else split
    if config.rope_scaling is not None and config.rope_scaling.kind == "factors":
        yield ROPE_FACTORS, np.array(config.rope_scaling.factors, np.float32)


def split_rows(config: DecoderConfig, layout: TensorLayout) -> Iterator[tuple[str, slice, RowPart]]:
    """Yield each GGUF tensor, with the tensor of ours and the rows of it that it holds."""
    for ours, parts in rows(config, layout):
        start = 0
        for part in parts:
            end = start + shape_of(part, config)[0]
            yield ours, slice(start, end), part
            start = end


def _architecture(file: GGUFFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {name!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}; {suggest(str(name), ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def _layout(file: GGUFFile) -> TensorLayout:
    """Return how this file holds what its architecture leaves open."""
    found = _architecture(file)
    fused = "blk.0.attn_qkv.weight" in file.tensors if found.fused_qkv is None else found.fused_qkv
    return TensorLayout(found.rotary_pairs, fused, found.fused_up)


def _refuse_variants(file: GGUFFile, metadata: _Metadata) -> None:
    num_parts = file.metadata.get("split.count", 1)
    if not isinstance(num_parts, int) or num_parts > 1:
        raise CheckpointError(
            f"{file.path}: one of {num_parts} parts, expected a whole model; "
            "open it with all its parts beside it, or join them with `llama-gguf-split --merge`"
        )
    if experts := metadata.get("expert_count", int, 0):
        raise CheckpointError(
            f"{file.path}: a mixture of {experts} experts, expected a dense model; mixtures of "
            "experts are not supported"
        )


def _halves_apart(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Move rotary pairs from neighbouring rows to rows half a head apart: [rows, ...]."""
    paired = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)


def side_by_side(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo `_halves_apart`: rotary pairs become neighbouring rows, as GGUF's llama has them."""
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
    rope_fits = 0 < config.rope_base < math.inf and config.sliding_window >= 0
    widths = [config.width, config.vocab_size]
    widths += [config.per_layer(n, i) for n in (config.num_heads, config.ffn_width) for i in layers]
    positive = all(0 < width < MAX_WIDTH for width in widths)
    if not layers or not heads_fit or not even_head or not rope_fits or not positive:
        raise CheckpointError(
            f"{file.path}: {config.num_layers} layers, {config.num_heads} heads of size "
            f"{config.head_dim}, {config.num_kv_heads} key-value heads, width {config.width}, "
            f"feed-forward {config.ffn_width}, vocabulary {config.vocab_size} and "
            f"{len(file.tensors)} tensors (rope base {config.rope_base}) do not make a model; "
            "expected an even head size and heads that divide evenly among key-value heads; the "
            "metadata is damaged, fetch the file again"
        )


def _check_tensors(file: GGUFFile, config: DecoderConfig, layout: TensorLayout) -> None:
    wanted = {
        part.name: shape_of(part, config) for _, parts in rows(config, layout) for part in parts
    }
    factors = (ROPE_FACTORS,) if ROPE_FACTORS in file.tensors else (SHORT_FACTORS, LONG_FACTORS)
    found: Mapping[str, TensorInfo] = file.tensors
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {n}" for n in found if n not in wanted and n not in factors]
    problems += [
        f"{name} has shape {found[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    problems += [
        f"{name} is of one dimension and {found[name].type}, "
        "expected numbers that are not quantised"
        for name, shape in wanted.items()
        if name in found and len(shape) == 1 and found[name].type not in dequantize.PLAIN
    ]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"{file.path}: the tensors do not make the model that the metadata describes: "
            f"{'; '.join(problems[:8])}{more}. The file is of a variant not known here or was "
            "converted wrongly; try a file of the same model from another source"
        )


def _rope_scaling(
    file: GGUFFile, metadata: _Metadata, rotary_dim: int, context_length: int
) -> RopeScaling | None:
    if ROPE_FACTORS in file.tensors:
        return RopeScaling("factors", factors=_factors(file, ROPE_FACTORS, rotary_dim))
    if SHORT_FACTORS in file.tensors:
        # Phi-3's stretch: used within its first context, see `transformers/decoders.py`.
        return RopeScaling(
            "factors",
            factors=_factors(file, SHORT_FACTORS, rotary_dim),
            magnitude=metadata.get("rope.scaling.attn_factor", float, 1.0),
            original_context=metadata.get(
                "rope.scaling.original_context_length", int, context_length
            ),
        )
    if LONG_FACTORS in file.tensors:
        raise CheckpointError(
            f"{file.path}: {LONG_FACTORS} without {SHORT_FACTORS}, expected both or none; the file "
            "was converted wrongly"
        )
    kind = metadata.get("rope.scaling.type", str, "")
    factor = metadata.get("rope.scale_linear", float, 1.0)  # the key of older files
    factor = metadata.get("rope.scaling.factor", float, factor)
    if kind not in ("", "none", "linear") or not 0 < factor < math.inf:
        raise CheckpointError(
            f"{file.path}: rope scaling {kind!r} by {factor}, expected none or 'linear'; this way "
            "of stretching the context is not supported, use another file of the model"
        )
    return RopeScaling("linear", factor=factor) if kind != "none" and factor != 1.0 else None


def _factors(file: GGUFFile, name: str, rotary_dim: int) -> tuple[float, ...]:
    factors = file.dequantize(name)
    if factors.shape != (rotary_dim // 2,) or not (factors > 0).all():
        raise CheckpointError(
            f"{file.path}: {name} has shape {factors.shape}, expected {rotary_dim // 2} "
            "positive numbers, one per rotary frequency; the file was converted wrongly"
        )
    return tuple(factors.tolist())


class _Metadata:
    """Typed look-ups below the architecture's name, whose errors name the key."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.prefix = file.metadata["general.architecture"]

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        key = f"{self.prefix}.{name}"
        value = self.file.metadata.get(key, default)
        if value is None:
            raise CheckpointError(
                f"{self.file.path}: metadata lacks {key!r}, expected a language model's; the "
                "file is an adapter, a vocabulary or a damaged conversion; fetch the model itself"
            )
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise CheckpointError(
                f"{self.file.path}: {key!r} is {value!r}, expected {kind.__name__}; the file was "
                "converted wrongly; try one from another source"
            )
        return value

    def per_layer(self, name: str, num_layers: int, default: PerLayer | None = None) -> PerLayer:
        """Return one number for all layers, or a tuple with one per layer."""
        key = f"{self.prefix}.{name}"
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
        number: int = self.get(name, int, default)
        return number
