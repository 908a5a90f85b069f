"""PyTorch's layers that skip random initialisation on the meta device.

A model is built on the meta device before its weights are loaded; initialising it there has no
effect and makes PyTorch import its compiler, which takes over a second.
"""

from __future__ import annotations

from torch import Tensor, nn


class _NoMetaInit:
    weight: Tensor

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()  # type: ignore[misc]


class Linear(_NoMetaInit, nn.Linear):
    """See `torch.nn.Linear`."""


class Embedding(_NoMetaInit, nn.Embedding):
    """See `torch.nn.Embedding`."""


class Conv2d(_NoMetaInit, nn.Conv2d):
    """See `torch.nn.Conv2d`."""
