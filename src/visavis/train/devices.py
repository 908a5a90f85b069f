"""Vectors of all processes in one loss, and its gradients back. Knows no model and no objective.

Every process computes the whole loss on all rows, its own with gradients: exact whatever the
number of rows of each, and simpler than sending gradients around. The gradients of parameters are
then a share of the whole on each process; where they are averaged and not summed, multiply by the
number of processes (`cached_backward(…, factor=world_size())`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows [n, ...] of all processes, in the order of processes; n may differ.

    Only this process' own rows keep their gradient.
    """
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(max(counts))
    padded = rows.detach().new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    parts = [part[: int(count)] for part, count in zip(everyone, counts, strict=True)]
    parts[rank()] = rows
    return torch.cat(parts)
