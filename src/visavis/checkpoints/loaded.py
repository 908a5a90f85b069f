"""What every checkpoint layout gives back, and how tensors by our names become a model.

Knows no layout: which file holds what is said elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from visavis.errors import CheckpointError
from visavis.model.config import EfficientNetConfig, VLMConfig
from visavis.model.vlm import VLM
from visavis.processing.encoder import PromptEncoder
from visavis.registry import lookup

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from visavis.processing.images import ImageProcessorConfig
    from visavis.processing.profile import PromptProfile
    from visavis.processing.tokenizer import SpecialTokens


INTEGERS = {"int8": 8, "int4": 4}  # precisions that keep weights in so many bits at most


@dataclass
class Loaded:
    """A model with what its prompts and pictures need."""

    name: str
    vlm: VLM
    tokenizer: Tokenizer
    specials: SpecialTokens
    profile: PromptProfile
    processor: ImageProcessorConfig | None
    fingerprint: str  # changes when vectors would: hash of weights, config and profile
    files: list[Path] = field(default_factory=list)

    @property
    def encoder(self) -> PromptEncoder:
        """The way from prompts to ids."""
        return PromptEncoder(
            self.name,
            self.vlm.config,
            self.tokenizer,
            self.specials,
            self.profile,
            self.processor,
        )


def auto_dtype(precision: str, device: str) -> torch.dtype:
    """Return what matmuls compute in for a `precision` name.

    `auto` is bfloat16 on CUDA and on processors with bf16 instructions, else float32; so are
    integers, which are what weights are kept in.
    """
    best = torch.bfloat16 if device != "cpu" or has_bf16_instructions() else torch.float32
    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    return lookup("precision", precision, dict.fromkeys(("auto", *INTEGERS), best) | dtypes)


def has_bf16_instructions() -> bool:
    """Return whether this processor multiplies bfloat16 natively."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def blank(config: VLMConfig, dtype: torch.dtype) -> VLM:
    """Return a model without numbers, each tensor of the type that it will run in."""
    with torch.device("meta"):
        vlm = VLM(config).cast(dtype)
    if vlm.tower is not None and not isinstance(config.tower, EfficientNetConfig):
        vlm.tower.to(dtype)  # EfficientNet's convolutions lose too much in half precision
    return vlm


def build(
    config: VLMConfig, state: dict[str, Tensor], dtype: torch.dtype, device: str, *, where: str
) -> VLM:
    """Return a model that owns the given tensors; no random initialisation, no second copy.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    vlm = blank(config, dtype)
    if config.decoder.tied_head:
        state["decoder.head.weight"] = state.get("decoder.embed.weight", torch.empty(0))
    expected = vlm.state_dict()
    problems = [f"missing {name}" for name in sorted(expected.keys() - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"the tensors of {where} do not fit its config: {'; '.join(problems[:5])}{more}. "
            "The config belongs to other weights, or a file is missing."
        )
    for name, tensor in state.items():
        if not tensor.is_meta:  # packed, see packing.py
            state[name] = tensor.to(device, expected[name].dtype)
    vlm.load_state_dict(state, assign=True)
    if config.decoder.tied_head:
        vlm.decoder.head.weight = vlm.decoder.embed.weight
    if vlm.tower is not None:
        vlm.tower = vlm.tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vlm.requires_grad_(False).eval()


def fingerprint(files: list[Path], data: dict[str, Any]) -> str:
    """Return 16 hex digits that change when the weights' files or the settings do.

    Small files are hashed whole; of large ones the size and both ends are, which costs nothing and
    still tells two checkpoints apart.
    """
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]
