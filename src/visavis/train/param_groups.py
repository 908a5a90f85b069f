"""Trainable parameters of a stage by part, and a table of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from visavis.errors import TrainError
from visavis.model.vlm import VLM

if TYPE_CHECKING:
    from visavis.train.recipe import StepsStage


def trainable_groups(vlm: VLM, stage: StepsStage) -> dict[str, list[nn.Parameter]]:
    """Freeze everything but the parts that a stage trains; return their parameters by part.

    Raises:
        TrainError: the model lacks a part.
    """
    vlm.requires_grad_(False)
    found: dict[str, list[nn.Parameter]] = {
        part: _parameters(vlm, part, stage) for part in stage.train
    }
    for part, parameters in found.items():
        if not parameters:
            raise TrainError(
                f"stage {stage.name!r} trains {part!r}, which the model does not have; remove it "
                "from `train`, or add the part under `model`."
            )
        for parameter in parameters:
            parameter.requires_grad_(True)
    return found


def _parameters(vlm: VLM, part: str, stage: StepsStage) -> list[nn.Parameter]:
    if part == "lora":
        blocks = vlm.decoder.blocks[stage.lora_from :]
        return [p for name, p in blocks.named_parameters() if ".lora_" in name]
    if part == "language_model":
        return [p for name, p in vlm.decoder.named_parameters() if ".lora_" not in name]
    module = {"connector": vlm.connector, "head": vlm.head, "vision_tower": vlm.tower}[part]
    if module is None:
        return []
    if part == "vision_tower" and stage.vision_from:
        blocks = getattr(module, "blocks", nn.ModuleList())
        return list(blocks[stage.vision_from :].parameters())
    parameters = list(module.parameters())
    if part == "connector":  # its newline and separators are of the same making
        own = {"image_newline", "separators"}
        parameters += [p for name, p in vlm.named_parameters() if name.partition(".")[0] in own]
    return parameters


def trainable_table(
    vlm: VLM, groups: Mapping[str, list[nn.Parameter]], rates: Mapping[str, float]
) -> list[dict[str, object]]:
    """Return a row per part of the model: its parameters, how many are trained, at what rate."""
    trained = {id(p): name for name, parameters in groups.items() for p in parameters}
    rows: list[dict[str, object]] = []
    parts = [(name, list(module.parameters())) for name, module in vlm.named_children()]
    parts += [(name, [own]) for name, own in vlm.named_parameters(recurse=False)]
    for name, parameters in parts:
        mine = [p for p in parameters if id(p) in trained]
        kinds = sorted({trained[id(p)] for p in mine})
        rows.append(
            {
                "part": name,
                "parameters": sum(p.numel() for p in parameters),
                "trained": sum(p.numel() for p in mine),
                "as": ", ".join(kinds),
                "learning rate": ", ".join(f"{rates[kind]:g}" for kind in kinds),
            }
        )
    return rows
