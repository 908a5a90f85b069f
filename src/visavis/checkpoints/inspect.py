"""Description of a checkpoint from its settings and file headers; no tensor is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from visavis.checkpoints.checkpoint_format import CheckpointFormat
from visavis.checkpoints.formats import detect
from visavis.model.config import VLMConfig
from visavis.model.image_tokens import tokens_per_view
from visavis.model.vlm import VLM

PARTS = {  # attributes of a VLM
    "tower": "vision tower",
    "connector": "connector",
    "decoder": "language model",
    "text_tower": "text tower",
    "head": "embedding head",
    "dual_head": "embedding head",
    "multi_vector_head": "multi-vector head",
}


def describe(path: Path) -> CheckpointFormat:
    """Open a checkpoint.

    Raises:
        CheckpointError: it is damaged, or in no known format.
    """
    return detect(path).open()


def parts(opened: CheckpointFormat) -> list[dict[str, Any]]:
    """Return name, number of parameters and measures of each part."""
    if opened.config is not None:
        return model_parts(opened.config)
    count = opened.num_parameters
    return [{"part": opened.title, "parameters": count, "details": opened.details}]


def model_parts(config: VLMConfig) -> list[dict[str, Any]]:
    """Count each part's parameters on torch's meta device, which holds no numbers."""
    with torch.device("meta"):
        vlm = VLM(config)
    decoder, tower, connector, head = config.decoder, config.tower, config.connector, config.head
    details = {
        "decoder": (
            f"{decoder.num_layers} layers × {decoder.width}, vocabulary {decoder.vocab_size}, "
            f"context {decoder.context_length}"
        )
    }
    if tower:
        size = getattr(tower, "image_size", 0)
        details["tower"] = f"{tower.kind}, {f'{size} px' if size else 'any size'}"
    if connector:
        details["connector"] = connector.kind
        if hasattr(tower, "image_size"):
            details["connector"] += f", {tokens_per_view(config)} tokens per view"
    if text := config.text_tower:
        details["text_tower"] = f"{text.kind}, {text.num_layers} layers × {text.width}"
        if not config.has_decoder:
            details["text_tower"] += (
                f", vocabulary {text.vocab_size}, context {text.context_length}"
            )
    if head:
        of = "the towers" if head.text_width else f"layers {head.layers}"
        details["head"] = details["dual_head"] = f"{head.dim} dimensions from {of}"
    if config.multi_vector_dim:
        details["multi_vector_head"] = f"{config.multi_vector_dim} numbers for each token"
    found = []
    for attribute, name in PARTS.items():
        if (module := getattr(vlm, attribute, None)) is not None:
            unique = {id(p): p.numel() for p in module.parameters()}
            found.append(
                {"part": name, "parameters": sum(unique.values()), "details": details[attribute]}
            )
    return found
