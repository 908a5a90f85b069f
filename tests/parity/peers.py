"""What parity tests share: peers with weights that leave nothing hidden, and how they are compared.

A freshly initialised model has unit norms, zero biases and tiny matrices, so a forgotten bias or a
wrong activation would pass unseen. `randomized` makes every parameter matter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOLERANCE = 1e-4  # max abs difference of float32 outputs of order 1


def randomized(peer: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter of a peer: norms near one, the rest large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.dim() == 1 and name.endswith(("weight", "lambda1"))
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            parameter.copy_(1 + 0.2 * noise if is_scale else noise * fan_in**-0.5)
    return peer.eval()


def assert_close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Fail when two outputs differ; a reference that is all but zero proves nothing."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    assert theirs.abs().max() > 0.1, f"{what}: the reference is all but zero"
    difference = (ours - theirs).abs().max().item()
    print(f"{what}: max abs difference {difference:.2e}")  # shown by pytest -rP
    assert difference <= TOLERANCE, f"{what}: max abs difference {difference:.2e}"
