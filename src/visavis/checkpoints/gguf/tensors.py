"""A module's weights as the bytes of GGUF tensors, a few rows at a time. Knows no names."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from visavis.checkpoints.gguf.quantize import quantize
from visavis.checkpoints.gguf.writer import NewTensor

CHUNK = 1 << 22  # values that are float32 at a time


def weight(module: nn.Module, name: str) -> Tensor:
    """Return a tensor below a module by name, whatever keeps it."""
    owner_name, _, last = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    found = getattr(owner, last)
    assert isinstance(found, Tensor)
    return found.detach()


def as_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor as float32 in the main memory."""
    array: np.ndarray = tensor.detach().to("cpu", torch.float32).numpy()
    return array


def quantized(tensor: Tensor, type: str) -> Iterator[np.ndarray]:
    """Yield a tensor's bytes in a GGML type."""
    rows = max(1, CHUNK // max(1, tensor[0].numel()))
    for part in tensor.split(rows):
        yield from quantize(as_numpy(part), type)


def stored(name: str, tensor: Tensor, type: str = "F32") -> NewTensor:
    """Return a GGUF tensor of a tensor as it is."""
    return NewTensor(name, tuple(tensor.shape), type, lambda: quantized(tensor, type))
