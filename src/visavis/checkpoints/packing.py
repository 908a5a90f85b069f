"""Swap a decoder's linears for packed ones, straight from the blocks of a GGUF file, and back.

Only types whose codes come in groups of 32 with a scale and a minimum have a packed kernel; other
tensors stay dense. Knows stored parts and modules, not how either is computed with.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import nn

from visavis.checkpoints.gguf.decoder import StoredPart, decoder_tensors
from visavis.checkpoints.gguf.reader import GGUFFile
from visavis.model.decoder import Decoder
from visavis.model.layers import Linear
from visavis.model.quantized import GROUP, PackedLinear

PACKABLE = {"Q4_0": 8, "Q4_1": 0, "Q5_0": 16, "Q5_1": 0, "Q8_0": 128}  # code that means 0
ROWS = 16  # the packed kernel takes whole tiles of so many rows; odd vocabularies stay dense


LowRank = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def pack_linears(decoder: Decoder, file: GGUFFile, low_rank: LowRank | None = None) -> None:
    """Replace every bias-free linear of a bfloat16 decoder whose blocks can be packed.

    Args:
        low_rank: by a linear's name, a pair [r, in], [out, r] that is merged into the decoder's
            weights but not into the file's blocks.
    """
    pairs = low_rank or {}

    def pack(name: str, stored: list[StoredPart]) -> None:
        path = name.removeprefix("decoder.").removesuffix(".weight")
        if path == "embed" and decoder.config.tied_head:
            path = "head"
        linear = decoder.get_submodule(path) if not path.endswith("bias") else None
        packable = all(part.type in PACKABLE for part in stored)
        if not isinstance(linear, nn.Linear) or linear.bias is not None or not packable:
            return
        if linear.out_features % ROWS:
            return
        owner, _, attribute = path.rpartition(".")
        packed = PackedLinear(*_codes(stored), linear.weight.detach(), pairs.get(f"decoder.{path}"))
        setattr(decoder.get_submodule(owner), attribute, packed)
        file.release()

    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda item: pack(*item), decoder_tensors(file)))


def unpack_linears(decoder: Decoder) -> None:
    """Replace packed linears by plain ones, which can be trained and adapted."""
    for path, module in list(decoder.named_modules()):
        if isinstance(module, PackedLinear):
            owner, _, attribute = path.rpartition(".")
            rows, columns = module.dense.shape
            linear = Linear(columns, rows, bias=False, device="meta")
            linear.weight = nn.Parameter(module.dense, requires_grad=False)
            setattr(decoder.get_submodule(owner), attribute, linear)
    if decoder.config.tied_head:
        decoder.head.weight = decoder.embed.weight


def _codes(stored: list[StoredPart]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return non-negative codes [out, in], scales and minimums [out, in / 32]."""
    codes, scales, minimums = [], [], []
    for part in stored:
        found = part.parts()
        assert found.codes.shape[-1] == GROUP * found.scale.shape[-1]
        scales.append(found.scale)
        if found.minimum is None:
            zero = PACKABLE[part.type]
            codes.append(found.codes.view(np.uint8) + np.uint8(zero))  # wraps around as it should
            minimums.append(-zero * found.scale)
        else:
            codes.append(found.codes)
            minimums.append(found.minimum)
    joined = (
        np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
        for arrays in (codes, scales, minimums)
    )
    first, second, third = (torch.from_numpy(array) for array in joined)
    return first, second, third
