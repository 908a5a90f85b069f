"""The vision half of a model in GGUF (`general.architecture` "clip"), both ways.

    v.patch_embd  v.class_embd  v.position_embd  v.pre_ln  v.blk.N.…   a ViT: CLIP, SigLIP, DINOv2
    mm.0  mm.2                                                         LLaVA's projector, `mlp`
    v.image_newline                                                    LLaVA 1.6

One generator of rows serves both directions. Keys and tensors have the names of llama.cpp. Those
of its first converter are read too; it swapped the names of the two feed-forward matrices. Files
are written by `mmproj_export.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor

from visavis.checkpoints.gguf.reader import GGUFFile
from visavis.checkpoints.tensor_files import warn_not_finite
from visavis.errors import CheckpointError, InputError
from visavis.model.config import ConnectorConfig, ImageLayoutConfig, ViTConfig, VLMConfig
from visavis.processing.config import AnyresConfig, ImageProcessorConfig
from visavis.utils import parse_json

ARCHITECTURE = "clip"
VISION = "visavis.vision"  # ours: how pictures are prepared and put together, to the last setting
NEWLINES = ("v.image_newline", "model.image_newline")  # now; in LLaVA 1.6's first files
MAX_LISTED = 8


@dataclass(frozen=True)
class MmprojModel:
    """The vision half of a model, as read from the metadata of an mmproj file.

    Attributes:
        linear: the projector is one layer, written as two (see `mmproj_export.py`).
    """

    tower: ViTConfig
    connector: ConnectorConfig
    merge: ImageLayoutConfig
    processor: ImageProcessorConfig
    linear: bool

    def joined(self, config: VLMConfig, image_token_id: int) -> VLMConfig:
        """Return a language model's config with this half."""
        return replace(
            config,
            tower=self.tower,
            connector=self.connector,
            merge=self.merge,
            image_token_id=image_token_id,
        )


@dataclass(frozen=True)
class MmprojRow:
    """One tensor of ours, its shape, and those of GGUF whose rows make it up, in order."""

    ours: str
    shape: tuple[int, ...]
    theirs: tuple[str, ...]

    @property
    def part_shape(self) -> tuple[int, ...]:
        return (self.shape[0] // len(self.theirs), *self.shape[1:])


def tower_rows(tower: ViTConfig, swapped: bool = False) -> Iterator[MmprojRow]:
    """Yield the tensors of a tower, except layer scales, which GGUF does not have.

    Args:
        swapped: the first converter's names, in which `ffn_down` comes before `ffn_up`.
    """
    width, patch = tower.width, tower.patch_size
    yield MmprojRow("patch.weight", (width, 3, patch, patch), ("v.patch_embd.weight",))
    if tower.patch_bias:
        yield MmprojRow("patch.bias", (width,), ("v.patch_embd.bias",))
    if tower.class_token:
        yield MmprojRow("class_token", (width,), ("v.class_embd",))
    num_positions = tower.grid**2 + int(tower.class_token)
    yield MmprojRow("positions", (num_positions, width), ("v.position_embd.weight",))
    for kind in ("weight", "bias") if tower.pre_norm else ():
        yield MmprojRow(f"pre_norm.{kind}", (width,), (f"v.pre_ln.{kind}",))
    up, down = ("ffn_down", "ffn_up") if swapped else ("ffn_up", "ffn_down")
    gated_up = ("ffn_gate", up) if tower.gated_ffn else (up,)
    wide = tower.ffn_width * len(gated_up)
    for layer in range(tower.num_layers):
        for ours, outside, inside, theirs in (
            ("attn_norm", width, 0, ("ln1",)),
            ("qkv", 3 * width, width, ("attn_q", "attn_k", "attn_v")),
            ("out", width, width, ("attn_out",)),
            ("ffn_norm", width, 0, ("ln2",)),
            ("up", wide, width, gated_up),
            ("down", width, tower.ffn_width, (down,)),
        ):
            for kind in ("weight", "bias"):
                shape = (outside, inside) if inside and kind == "weight" else (outside,)
                found = tuple(f"v.blk.{layer}.{name}.{kind}" for name in theirs)
                yield MmprojRow(f"blocks.{layer}.{ours}.{kind}", shape, found)


def read_half(file: GGUFFile) -> MmprojModel:
    """Return the parts that an mmproj file describes.

    Raises:
        CheckpointError: another projector than LLaVA's MLP, another tower than a plain ViT, or
            settings that do not make one.
    """
    keys = _Keys(file)
    kind = keys.optional("clip.projector_type", str, "") or keys.optional(
        "clip.vision.projector_type", str, ""
    )
    if keys.optional("clip.has_vision_encoder", bool, True) is not True or kind != "mlp":
        raise CheckpointError(
            f"{file.path}: the projector is of type {kind!r}, expected 'mlp' on a vision tower "
            "(LLaVA's); other projectors are not read from GGUF. Load the model from the layout "
            "that it was published in."
        )
    tensors = file.tensors
    num_layers = keys.number("clip.vision.block_count", int)
    layers = np.atleast_1d(keys.optional("clip.vision.feature_layer", object, num_layers))
    if layers.dtype.kind not in "iu" or len(layers) != 1 or not 0 < layers[0] <= num_layers:
        keys.fail("clip.vision.feature_layer", f"one number of 1 to {num_layers}")
    size = keys.number("clip.vision.image_size", int)
    projector = tensors.get("mm.2.weight")
    if "mm.0.weight" not in tensors or projector is None or len(projector.shape) != 2:
        raise CheckpointError(
            f"{file.path} has no mm.0.weight and mm.2.weight, expected the two layers of LLaVA's "
            "MLP; other projectors are not read from GGUF."
        )
    gelu, silu = (keys.optional(f"clip.use_{name}", bool, False) for name in ("gelu", "silu"))
    class_token = "v.class_embd" in tensors
    tower = ViTConfig(
        image_size=size,
        patch_size=keys.number("clip.vision.patch_size", int),
        width=keys.number("clip.vision.embedding_length", int),
        num_layers=int(layers[0]),
        num_heads=keys.number("clip.vision.attention.head_count", int),
        ffn_width=_ffn_width(file),
        activation=_activation(gelu, silu, class_token),
        norm_eps=keys.number("clip.vision.attention.layer_norm_epsilon", float),
        class_token=class_token,
        patch_bias="v.patch_embd.bias" in tensors,
        pre_norm="v.pre_ln.weight" in tensors,
        post_norm=False,
        gated_ffn="v.blk.0.ffn_gate.weight" in tensors,
    )
    if tower.width % tower.num_heads:
        keys.fail("clip.vision.embedding_length", f"a width of {tower.num_heads} whole heads")
    linear = keys.optional("clip.vision.mm_projector_type", str, "") == "linear"
    connector = ConnectorConfig(
        "linear" if linear else "mlp",
        tower.width,
        out_width=projector.shape[0],
        depth=1 if linear else 2,
        hidden_width=0
        if linear or projector.shape[1] == projector.shape[0]
        else projector.shape[1],
    )
    merge, processor = _preparation(keys, tower)
    half = MmprojModel(tower, connector, merge, processor, linear)
    _check_tensors(file, half)
    return half


def half_state(file: GGUFFile, half: MmprojModel) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of ours by name, float32; those that are not finite with a warning."""
    for row in tower_rows(half.tower, _is_swapped(file)):
        parts = [_values(file, name).reshape(row.part_shape) for name in row.theirs]
        yield f"tower.{row.ours}", torch.cat(parts) if len(parts) > 1 else parts[0]
    for number in (0,) if half.linear else (0, 2):
        for kind in ("weight", "bias"):
            tensor = _values(file, f"mm.{number}.{kind}")
            if half.linear:  # the other rows are its negative, mm.2 takes their difference
                tensor = tensor[: half.connector.out_width]
            yield f"connector.layers.{number}.{kind}", tensor
    if half.merge.newline:
        yield "image_newline", _values(file, _newline(file)).flatten()


def _activation(
    gelu: bool, silu: bool, class_token: bool
) -> Literal["quick_gelu", "gelu", "gelu_tanh", "silu"]:
    """Return the activation that a tower was trained with.

    In llama.cpp "gelu" is the tanh form, which SigLIP uses. It is a close approximation for CLIP
    models whose config.json has "gelu", the exact form.
    """
    if silu or not gelu:
        return "silu" if silu else "quick_gelu"
    return "gelu" if class_token else "gelu_tanh"


def _newline(file: GGUFFile) -> str:
    return next((name for name in NEWLINES if name in file.tensors), NEWLINES[0])


def _values(file: GGUFFile, name: str) -> Tensor:
    tensor = torch.from_numpy(file.dequantize(name))
    if not tensor.sum().isfinite():
        warn_not_finite(name, str(file.path))
    return tensor


def _is_swapped(file: GGUFFile) -> bool:
    """Return whether `ffn_down` is what widens, as the first converter named it."""
    width = file.metadata.get("clip.vision.embedding_length")
    down, up = (file.tensors.get(f"v.blk.0.ffn_{name}.weight") for name in ("down", "up"))
    return down is not None and down.shape[-1] == width and up is not None and up.shape[0] == width


def _ffn_width(file: GGUFFile) -> int:
    """Return the width inside a block, from its tensors: some files say 0."""
    name = "v.blk.0.ffn_down.weight" if _is_swapped(file) else "v.blk.0.ffn_up.weight"
    info = file.tensors.get(name)
    return 0 if info is None else info.shape[0]


def _check_tensors(file: GGUFFile, half: MmprojModel) -> None:
    found, connector = file.tensors, half.connector
    wanted = {
        name: row.part_shape
        for row in tower_rows(half.tower, _is_swapped(file))
        for name in row.theirs
    }
    out = connector.out_width
    inner = 2 * out if half.linear else connector.hidden_width or out
    wanted |= {"mm.0.weight": (inner, half.tower.width), "mm.0.bias": (inner,)}
    wanted |= {"mm.2.weight": (out, inner), "mm.2.bias": (out,)}
    if half.merge.newline:
        wanted[_newline(file)] = (out,)

    def bare(shape: tuple[int, ...]) -> tuple[int, ...]:  # some converters keep dimensions of 1
        return tuple(size for size in shape if size != 1)

    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [
        f"{name} has shape {found[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and bare(found[name].shape) != bare(shape)
    ]
    known = {*wanted, *NEWLINES}
    problems += [f"unexpected {n}" for n in found if n not in known and not _is_cut(n, half.tower)]
    if problems:
        more = f" and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise CheckpointError(
            f"{file.path}: the tensors do not make the vision tower and projector that the "
            f"metadata describes: {'; '.join(problems[:MAX_LISTED])}{more}. The file is of a "
            "variant not known here or was converted wrongly; try one from another source."
        )


def _is_cut(name: str, tower: ViTConfig) -> bool:
    """Return whether a tensor belongs to a block after the one whose output is taken."""
    parts = name.split(".")
    return parts[:2] == ["v", "blk"] and parts[2].isdecimal() and int(parts[2]) >= tower.num_layers


def _preparation(keys: _Keys, tower: ViTConfig) -> tuple[ImageLayoutConfig, ImageProcessorConfig]:
    """Return how images are prepared and their views put together.

    Without word of ours: padded to a square of the mean colour, as LLaVA 1.5 was trained and as
    llama.cpp does; with candidate sizes, LLaVA 1.6's tiles.
    """
    own = keys.optional(VISION, str, "")
    try:
        if own:
            data = parse_json(own)
            return ImageLayoutConfig(**data["merge"]), ImageProcessorConfig.from_dict(
                data["processor"]
            )
        mean, std = (keys.three(f"clip.vision.image_{name}") for name in ("mean", "std"))
        pairs = keys.optional("clip.vision.image_grid_pinpoints", np.ndarray, np.empty(0, np.int32))
        plain = ImageProcessorConfig(tower.image_size, "pad", mean, std)
        if not pairs.size:
            return ImageLayoutConfig(), plain
        grids = tuple((int(w), int(h)) for w, h in pairs.reshape(-1, 2))
        merge = keys.optional("clip.vision.mm_patch_merge_type", str, "flat")
        if merge not in ("flat", "spatial", "spatial_unpad"):
            keys.fail("clip.vision.mm_patch_merge_type", "'flat', 'spatial' or 'spatial_unpad'")
        newline = any(name in keys.file.tensors for name in NEWLINES)
        unpad = merge == "spatial_unpad"
        return (
            ImageLayoutConfig()
            if merge == "flat"
            else ImageLayoutConfig("spatial", unpad, unpad and newline),
            replace(plain, resize="squash", tiles=AnyresConfig(grids)),
        )
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{keys.file.path}: how pictures are prepared cannot be read ({error}); the metadata "
            "is damaged or from a newer visavis."
        ) from error


class _Keys:
    """Typed look-ups whose errors name the key."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file

    def number(self, key: str, kind: type) -> Any:
        value: Any = self.file.metadata.get(key)
        known = isinstance(value, kind) and not isinstance(value, bool)
        if not known or not 0 < value < 1 << 24:
            self.fail(key, f"a positive {kind.__name__}")
        return value

    def optional(self, key: str, kind: type, default: Any) -> Any:
        value: Any = self.file.metadata.get(key, default)
        if not isinstance(value, kind):
            self.fail(key, f"{kind.__name__} or nothing")
        return value

    def three(self, key: str) -> tuple[float, float, float]:
        value = self.file.metadata.get(key)
        if not isinstance(value, np.ndarray) or value.shape != (3,) or value.dtype.kind != "f":
            self.fail(key, "three numbers")
        assert isinstance(value, np.ndarray)
        red, green, blue = (float(str(number)) for number in value)  # 0.5, not its neighbour
        return red, green, blue

    def fail(self, key: str, expected: str) -> NoReturn:
        raise CheckpointError(
            f"{self.file.path}: {key!r} is {self.file.metadata.get(key)!r}, expected {expected}; "
            "the file was converted wrongly or is no vision projector; try another source."
        )
