"""Low-rank adapters of the native format: pairs that are merged into a base or kept beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from visavis.checkpoints.quantize import LowRank
from visavis.errors import CheckpointError


def merge(
    state: dict[str, Tensor], own: Mapping[str, Tensor], lora_scale: float, folder: Path
) -> None:
    """Lay an adapter's tensors over a base, in place: replacements, then LoRA deltas.

    Raises:
        CheckpointError: half of a LoRA pair is missing, or it fits no linear of the base.
    """
    for name, tensor in own.items():
        if name.endswith(".lora_b"):
            continue
        if not name.endswith(".lora_a"):
            state[name] = tensor
            continue
        target, other = name.removesuffix(".lora_a"), name[:-1] + "b"
        weight = state.get(f"{target}.weight")
        if weight is None or other not in own or own[other].shape[0] != weight.shape[0]:
            raise CheckpointError(
                f"{folder}: {name} needs {other} and a base tensor {target}.weight with as many "
                "rows; the adapter belongs to another base model."
            )
        state[f"{target}.weight"] = weight.float().addmm(
            own[other].float(), tensor.float(), alpha=lora_scale
        )


def low_rank_pairs(own: Mapping[str, Tensor], scale: float) -> LowRank:
    """Return an adapter's pairs in bfloat16 by their linear's name, the scale in the second."""
    names = [name.removesuffix(".lora_a") for name in own if name.endswith(".lora_a")]
    return {
        name: (own[f"{name}.lora_a"].bfloat16(), (scale * own[f"{name}.lora_b"].float()).bfloat16())
        for name in names
    }
