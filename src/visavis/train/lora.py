"""Low-rank adapters on the decoder's linear layers (LoRA, Hu et al. 2021; DoRA, Liu et al. 2024).

    y = W x + s B A x                        W frozen, A [r, in], B [out, r], s = alpha / r
    y = m * (W x + s B A x) / |W + s B A|    DoRA: m and the lengths |.| are per row of W

q, k and v are stacked in one linear layer, as are gate and up; each has its own A and B, so an
adapter equals one on separate matrices and is saved as such (`write_peft`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from visavis.errors import TrainError
from visavis.model.config import DecoderConfig
from visavis.model.decoder import Decoder
from visavis.model.vlm import VLM
from visavis.utils import write_atomically

if TYPE_CHECKING:
    from visavis.checkpoints.weight_mapping import NameTable
    from visavis.train.recipe import LoraRecipe


GAUSSIAN_RANK_SHARE = 1.0  # PEFT's "gaussian": standard deviation 1 / r


class LoRALinear(nn.Module):
    """A linear whose own weight is frozen; the adapter is float32 and computes in the input's type.

    Args:
        linear: what is adapted, kept as it is.
        parts: rows of each matrix that stands in it, such as (q, k, v).
    """

    def __init__(self, linear: nn.Module, parts: tuple[int, ...], recipe: LoraRecipe) -> None:
        super().__init__()
        self.base, self.parts, self.scale = linear, parts, recipe.scale
        self.dropout = nn.Dropout(recipe.dropout)
        rank, inside = recipe.rank, linear.in_features
        assert isinstance(inside, int)
        self.rank = rank
        self.lora_a = nn.Parameter(torch.empty(len(parts) * rank, inside))
        self.lora_b = nn.Parameter(torch.zeros(sum(parts), rank))
        if recipe.init == "gaussian":
            nn.init.normal_(self.lora_a, std=GAUSSIAN_RANK_SHARE / rank)
        else:  # each A as a linear of its own would be
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        lengths = self.weight.float().norm(dim=1) if recipe.dora else None
        self.lora_magnitude = None if lengths is None else nn.Parameter(lengths)  # [out]

    @property
    def weight(self) -> Tensor:
        """The frozen weight [out, in]."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.dropout(x)
        low = F.linear(dropped, self.lora_a.to(x.dtype))  # [T, parts * r]
        b = self.lora_b.to(x.dtype).split(self.parts)
        high = torch.cat(
            [one @ rows.T for one, rows in zip(low.split(self.rank, -1), b, strict=True)], -1
        )
        if self.lora_magnitude is None:
            return self.base(x) + self.scale * high
        lengths = (self.weight.float() + self.delta()).norm(dim=1).detach()
        share = (self.lora_magnitude / lengths).to(x.dtype)
        bias = self.base.bias
        own = F.linear(dropped, self.weight) if bias is not None else self.base(dropped)
        mixed = share * (own + self.scale * high)
        return mixed if bias is None else mixed + bias

    def delta(self) -> Tensor:
        """Return the update that is added to the weight, float32 [out, in]."""
        pairs = zip(self.lora_a.split(self.rank), self.lora_b.split(self.parts), strict=True)
        return self.scale * torch.cat([b.float() @ a.float() for a, b in pairs])

    def merged(self) -> Tensor:
        """Return the adapted weight, in the base's type."""
        with torch.no_grad():
            whole = self.weight.float() + self.delta()
            if self.lora_magnitude is not None:
                whole = whole * (self.lora_magnitude / whole.norm(dim=1))[:, None]
            return whole.to(self.weight.dtype)


def part_rows(config: DecoderConfig, layer: int, target: str) -> tuple[int, ...]:
    """Return the rows of each matrix that stands in one of our linears."""
    if target == "qkv":
        heads, kv_heads = (
            config.per_layer(number, layer) * config.head_dim
            for number in (config.num_heads, config.num_kv_heads)
        )
        return (heads, kv_heads, kv_heads)
    if target == "up":
        width = config.per_layer(config.ffn_width, layer)
        return (width, width) if config.gated else (width,)
    return (config.width,)


def add_lora(decoder: Decoder, recipe: LoraRecipe) -> list[LoRALinear]:
    """Replace the named linears of every block by adapted ones; the output does not change yet.

    Raises:
        TrainError: a target names no linear of a block.
    """
    added = []
    for layer, block in enumerate(decoder.blocks):
        for target in recipe.targets:
            linear = getattr(block, target, None)
            if not isinstance(linear, nn.Linear | QLoRALinear):
                raise TrainError(
                    f"lora target {target!r} is no linear of a decoder block; expected some of "
                    "qkv, out, up, down."
                )
            adapted = LoRALinear(linear, part_rows(decoder.config, layer, target), recipe)
            setattr(block, target, adapted.to(linear.weight.device))
            added.append(adapted)
    return added


def merged_state(vlm: VLM) -> dict[str, Tensor]:
    """Return every tensor by its name in a model without adapters, adapters merged."""
    state = {name: t for name, t in vlm.state_dict().items() if ".base." not in name}
    for name, module in vlm.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{name}.weight"] = module.merged()
            bias = module.base.bias
            if isinstance(bias, Tensor):
                state[f"{name}.bias"] = bias
            for own in ("lora_a", "lora_b", "lora_magnitude"):
                state.pop(f"{name}.{own}", None)
        elif isinstance(module, QLoRALinear) and f"{name}.codes" in state:
            state[f"{name}.weight"] = module.weight
            for own in ("codes", "scales"):
                del state[f"{name}.{own}"]
    if vlm.config.decoder.tied_head:
        state.pop("decoder.head.weight", None)
    return state


def native_pairs(vlm: VLM) -> dict[str, Tensor]:
    """Return adapters as `checkpoints/native.py` reads them: one pair a linear, B block by block.

    Raises:
        TrainError: an adapter is of a kind that has no such pair.
    """
    pairs = {}
    for name, module in vlm.named_modules():
        if isinstance(module, LoRALinear):
            if module.lora_magnitude is not None:
                raise TrainError("adapters of DoRA cannot be kept apart from their base: merge")
            pairs[f"{name}.lora_a"] = module.lora_a.detach()
            pairs[f"{name}.lora_b"] = torch.block_diag(*module.lora_b.detach().split(module.parts))
    return pairs


def write_peft(
    vlm: VLM, names: NameTable, folder: Path, *, base: str, recipe: LoraRecipe, whole: bool
) -> None:
    """Write the adapters as a folder of PEFT's, under the names of the base's modules.

    Args:
        names: of the base's layout.
        base: what PEFT calls base_model_name_or_path.
        whole: the connector was trained too, and goes along as it is (`modules_to_save`).

    Raises:
        TrainError: the base keeps in one matrix what has several adapters here.
    """
    tensors: dict[str, Tensor] = {}
    targets, saved = set(), []
    for name, module in vlm.named_modules():
        if not isinstance(module, LoRALinear):
            continue
        theirs = names.theirs(f"{name}.weight")
        magnitude = module.lora_magnitude
        if len(theirs) != len(module.parts):  # Phi-3 keeps q, k and v in one matrix
            raise TrainError(
                f"{name} is {len(theirs)} matrix in the base's layout, but its adapter has "
                f"{len(module.parts)} parts, which PEFT cannot express"
            )
        lengths = (
            (None,) * len(theirs) if magnitude is None else magnitude.detach().split(module.parts)
        )
        a, b = module.lora_a.detach().split(module.rank), module.lora_b.detach().split(module.parts)
        for their, low, high, length in zip(theirs, a, b, lengths, strict=True):
            module_name = their.removesuffix(".weight")
            targets.add(module_name.rpartition(".")[2])
            tensors[f"{module_name}.lora_A.weight"] = low
            tensors[f"{module_name}.lora_B.weight"] = high
            if length is not None:
                tensors[f"{module_name}.lora_magnitude_vector"] = length
    if whole:
        assert vlm.connector is not None
        state = vlm.connector.state_dict(prefix="connector.")
        connector = {names.theirs(name)[0]: tensor for name, tensor in state.items()}
        tensors |= connector
        saved = [_common_module(connector)]
    # In a model that sees, the tower has modules of these names too.
    pattern = rf".*\.language_model\..*\.({'|'.join(sorted(targets))})"
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": recipe.rank,
        "lora_alpha": recipe.scale * recipe.rank,
        "lora_dropout": recipe.dropout,
        "use_dora": recipe.dora,
        "target_modules": sorted(targets) if vlm.tower is None else pattern,
        "modules_to_save": saved or None,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    kept = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    with write_atomically(folder / "adapter_model.safetensors") as temporary:
        save_file(kept, temporary)
    with write_atomically(folder / "adapter_config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _common_module(names: Iterable[str]) -> str:
    """Return the module that holds all of some tensors."""
    parts = [name.split(".")[:-1] for name in names]
    together = takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return ".".join(level[0] for level in together)


GROUP = 64
LEVELS = {"int8": 127, "int4": 7}


class QLoRALinear(nn.Module):
    """A frozen linear of integers; computes in the type of its input.

    `codes` is int8 [out, in], or for int4 uint8 [out, in / 2], two codes a byte.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, kind: Literal["int8", "int4"]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.kind = linear.weight.dtype, kind
        self.bias = linear.bias
        grouped = F.pad(linear.weight.float(), (0, -self.in_features % GROUP))
        grouped = grouped.unflatten(1, (-1, GROUP))  # [out, groups, 64]
        level = LEVELS[kind]
        scales = (grouped.abs().amax(-1, keepdim=True) / level).clamp(min=1e-12)
        codes = (grouped / scales).round().clamp(-level, level).flatten(1).to(torch.int8)
        if kind == "int4":
            pairs = (codes + 8).to(torch.uint8).unflatten(1, (-1, 2))
            codes = pairs[..., 0] | pairs[..., 1] << 4
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales[..., 0].to(torch.bfloat16))

    @property
    def weight(self) -> Tensor:
        """The weight as numbers [out, in], made anew each time."""
        codes = self.codes
        if self.kind == "int4":
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1).to(torch.int8) - 8
        numbers = codes.to(self.dtype).unflatten(1, (-1, GROUP)) * self.scales[..., None]
        return numbers.flatten(1)[:, : self.in_features].to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """x Wᵀ that does not keep W for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QLoRALinear) -> Tensor:
        ctx.linear = linear
        return F.linear(x, linear.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.linear.weight.to(gradient.dtype), None


def quantize_decoder(decoder: Decoder, kind: Literal["int8", "int4"]) -> None:
    """Replace every linear of every block by integers; embeddings and head stay as they are."""
    for block in decoder.blocks:
        for name, linear in list(block.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(block, name, QLoRALinear(linear, kind))
