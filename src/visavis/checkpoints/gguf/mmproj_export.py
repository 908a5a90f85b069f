"""Writing the vision half of a model: a ViT and LLaVA's projector as llama.cpp's mmproj file.

What llama.cpp cannot run is refused, all of it named at once; layer scales are folded into the
matrices before them, positions laid out for the size that images come in. Names are those of
mmproj.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visavis.checkpoints.checkpoint import Checkpoint
from visavis.checkpoints.gguf.mmproj import ARCHITECTURE, NEWLINES, VISION, tower_rows
from visavis.checkpoints.gguf.quantize import FILE_TYPES, fitting_type
from visavis.checkpoints.gguf.writer import NewTensor, stored, weight, write_file
from visavis.errors import CheckpointError
from visavis.model.config import ConnectorConfig, ViTConfig, VLMConfig
from visavis.model.vision.vit import resize_positions
from visavis.processing.config import ImageProcessorConfig


def check_exportable(loaded: Checkpoint) -> None:
    """Refuse a vision half that llama.cpp cannot run.

    Raises:
        CheckpointError: what it has that llama.cpp lacks, all at once.
    """
    config = loaded.vlm.config
    tower, connector, merge = config.tower, config.connector, config.merge
    assert tower is not None and connector is not None
    found = []
    if not isinstance(tower, ViTConfig):
        found.append(f"a vision tower of kind {tower.kind!r}")
    else:
        if tower.num_registers:
            found.append("register tokens")
        if tower.gated_ffn and tower.activation != "silu":
            found.append(f"a gated tower with {tower.activation}")
        if config.select_feature == "class_patch" and tower.class_token:
            found.append("the class token among its image tokens")
        if num_blocks(config, tower) < 1:
            found.append("features from before the first block")
    if config.drop_first_token:
        found.append("one patch left out (TinyLLaVA's)")
    if connector.kind not in ("linear", "mlp") or (connector.kind == "mlp" and connector.depth > 2):
        found.append(f"a connector of kind {connector.kind!r} and depth {connector.depth}")
    if connector.shuffle > 1:
        found.append("pixel shuffle (llama.cpp ties it to the prompts of Idefics3 and LFM2)")
    if not isinstance(config.select_layer, int):
        found.append("features of several layers")
    if connector.input_norm:
        found.append("a norm before the connector")
    if merge.kind == "hd" or merge.max_tiles:
        found.append("views put together as GGUF has no key for (HD transform or anyres_max)")
    if found:
        raise CheckpointError(
            f"{loaded.name} has {', '.join(found)}; expected a CLIP, SigLIP or DINOv2 tower and a "
            "linear layer or an MLP of two, LLaVA's, which is what llama.cpp runs. Export it in "
            "transformers' or visavis' own layout instead."
        )


def num_blocks(config: VLMConfig, tower: ViTConfig) -> int:
    """Return how many of a tower's blocks run."""
    layer = config.select_layer
    assert isinstance(layer, int)
    return layer if layer >= 0 else tower.num_layers + 1 + layer


def write_mmproj(loaded: Checkpoint, path: Path, *, kind: str) -> None:
    """Write a model's tower and connector; blocks past the one whose output is taken are left.

    Args:
        kind: F32, F16 or Q8_0; vectors, positions and, unless F32, the patch matrix (F16) are not
            quantised.

    Raises:
        CheckpointError: llama.cpp cannot run them.
    """
    check_exportable(loaded)
    config, processor = loaded.vlm.config, loaded.processor
    assert isinstance(config.tower, ViTConfig) and processor is not None
    tower = replace(config.tower, num_layers=num_blocks(config, config.tower))
    tensors = [*_tower_tensors(loaded, tower, kind), *_connector_tensors(loaded, kind)]
    if loaded.vlm.image_newline is not None:
        tensors.append(stored(NEWLINES[0], loaded.vlm.image_newline.detach()))
    write_file(path, _metadata(loaded, tower, processor, kind), tensors)


def _metadata(
    loaded: Checkpoint, tower: ViTConfig, processor: ImageProcessorConfig, kind: str
) -> dict[str, Any]:
    config, connector = loaded.vlm.config, loaded.vlm.config.connector
    assert connector is not None
    aspect = {"pad": "pad"}.get(processor.resize, "square")
    merge = "spatial_unpad" if config.merge.unpad else config.merge.kind
    vision: dict[str, Any] = {
        "image_size": processor.size,
        "patch_size": tower.patch_size,
        "embedding_length": tower.width,
        "feed_forward_length": tower.ffn_width,
        "projection_dim": config.decoder.width,
        "block_count": tower.num_layers,
        "attention.head_count": tower.num_heads,
        "attention.layer_norm_epsilon": float(tower.norm_eps),
        "image_mean": np.array(processor.mean, np.float32),
        "image_std": np.array(processor.std, np.float32),
        "feature_layer": np.array([tower.num_layers], np.int32),
        "mm_patch_merge_type": merge,
        "mm_projector_type": "linear" if _is_linear(connector) else "mlp2x_gelu",
        "image_aspect_ratio": "anyres" if processor.tiles else aspect,
    }
    if processor.tiles is not None:
        step = 1 if processor.tiles.axes == "wh" else -1
        pairs = [side for grid in processor.tiles.grids for side in grid[::step]]
        vision["image_grid_pinpoints"] = np.array(pairs, np.int32)
    ours = {"merge": asdict(config.merge), "processor": processor.to_dict()}
    return {
        "general.architecture": ARCHITECTURE,
        "general.type": "mmproj",
        "general.name": loaded.name,
        "general.file_type": FILE_TYPES[kind],
        "clip.has_text_encoder": False,
        "clip.has_vision_encoder": True,
        "clip.has_llava_projector": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": tower.activation in ("gelu", "gelu_tanh"),
        "clip.use_silu": tower.activation == "silu",
        **{f"clip.vision.{key}": value for key, value in vision.items()},
        VISION: json.dumps(ours),
    }


def _tower_tensors(loaded: Checkpoint, tower: ViTConfig, kind: str) -> Iterator[NewTensor]:
    module = loaded.vlm.tower
    assert module is not None and loaded.processor is not None
    for row in tower_rows(tower):
        tensor = weight(module, row.ours)
        block, _, part = row.ours.rpartition(".")[0].rpartition(".")
        scale = {"out": "attn_scale", "down": "ffn_scale"}.get(part)
        if tower.layer_scale and scale is not None:  # DINOv2's: rows of the layer before it
            by_row = weight(module, f"{block}.{scale}")
            tensor = tensor.float() * (by_row[:, None] if tensor.dim() == 2 else by_row)
        if row.ours == "positions":
            tensor = _positions(tensor, tower, loaded.processor.size // tower.patch_size)
        for name, rows in zip(row.theirs, tensor.chunk(len(row.theirs)), strict=True):
            yield stored(name, rows, _type(name, tuple(rows.shape), kind))


def _positions(positions: Tensor, tower: ViTConfig, grid: int) -> Tensor:
    """Return positions for images as they are prepared: llama.cpp does not stretch them."""
    first = positions[: int(tower.class_token)]
    patches = resize_positions(positions[len(first) :], grid, tower.position_antialias)
    return torch.cat((first, patches))


def _type(name: str, shape: tuple[int, ...], kind: str) -> str:
    if len(shape) == 1 or kind == "F32" or name == "v.position_embd.weight":
        return "F32"
    return "F16" if len(shape) == 4 else fitting_type(kind, shape)


def _is_linear(connector: ConnectorConfig) -> bool:
    return connector.kind == "linear" or connector.depth == 1


def _connector_tensors(loaded: Checkpoint, kind: str) -> Iterator[NewTensor]:
    module, config = loaded.vlm.connector, loaded.vlm.config.connector
    assert module is not None and config is not None
    if _is_linear(config):
        layers = _linear_as_two(weight(module, "layers.0.weight"), weight(module, "layers.0.bias"))
    else:
        layers = [
            (weight(module, f"layers.{number}.weight"), weight(module, f"layers.{number}.bias"))
            for number in (0, 2)
        ]
    for number, (matrix, bias) in zip((0, 2), layers, strict=True):
        name = f"mm.{number}.weight"
        yield stored(name, matrix, _type(name, tuple(matrix.shape), kind))
        yield stored(f"mm.{number}.bias", bias)


def _linear_as_two(matrix: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return two layers with GELU between them that are one linear layer.

    llama.cpp has no projector without the activation; but gelu(x) - gelu(-x) is x, of the exact
    GELU as of its tanh form.
    """
    identity = torch.eye(len(bias), device=bias.device)
    return [
        (torch.cat((matrix, -matrix)), torch.cat((bias, -bias))),
        (torch.cat((identity, -identity), 1), torch.zeros_like(bias)),
    ]
