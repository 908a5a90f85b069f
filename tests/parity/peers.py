"""What parity tests share: peers with weights that leave nothing hidden, and how they are compared.

A freshly initialised model has unit norms, zero biases and tiny matrices, so a forgotten bias or a
wrong activation would pass unseen. `randomized` makes every parameter matter.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
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


def peer_method(model: str, module: str, name: str) -> Callable[..., Any]:
    """Return a method of a class of transformers, from its source: the module needs torchvision."""
    spec = find_spec(f"transformers.models.{model}")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], f"{module}.py").read_text()
    found = next(
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    for argument in [*found.args.args, *found.args.kwonlyargs]:
        argument.annotation = None
    found.returns = None
    space: dict[str, Any] = {"np": np, "torch": torch}
    exec(compile(ast.Module([found], []), module, "exec"), space)
    method: Callable[..., Any] = space[name]
    return method
