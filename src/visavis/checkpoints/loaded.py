"""What every checkpoint layout gives back when it has been read. Holds parts; runs nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from visavis.model.vlm import VLM
    from visavis.processing.images import ImageProcessorConfig
    from visavis.processing.profile import PromptProfile
    from visavis.processing.tokenizer import SpecialTokens


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


def auto_dtype(precision: str, device: str) -> torch.dtype:
    """Return what matmuls compute in for a `precision` name.

    `auto` is bfloat16 on CUDA and on processors with bf16 instructions, else float32.
    """
    import torch

    from visavis.registry import lookup

    dtypes = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    if precision != "auto":
        return lookup("precision", precision, {**dtypes, "auto": torch.float32})
    if device != "cpu" or has_bf16_instructions():
        return torch.bfloat16
    return torch.float32


def has_bf16_instructions() -> bool:
    """Return whether this processor multiplies bfloat16 natively."""
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported())
