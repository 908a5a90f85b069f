"""What this machine can do: bytes read and numbers multiplied a second, measured in two seconds.

The floor of everything else: decoding reads every weight once a token, reading a prompt multiplies
every weight with every token. Knows no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

READ_BYTES = 256 * 2**20  # far beyond any cache
SIDE = 1536


@dataclass(frozen=True)
class Machine:
    """Peaks measured on the device that a model runs on.

    Args:
        bandwidth: bytes read from memory a second.
        flops: floating-point operations a second in dense products of `dtype`.
    """

    device: str
    threads: int
    dtype: str
    bandwidth: float
    flops: float


def measure_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measure the peaks; on the CPU with the threads that PyTorch uses now."""
    numbers = torch.ones(READ_BYTES // 4, device=device)
    square = torch.randn(SIDE, SIDE, device=device).to(dtype)
    reading = fastest(lambda: numbers.sum(), device)
    multiplying = fastest(lambda: square @ square, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return Machine(
        device=name,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        bandwidth=READ_BYTES / reading,
        flops=2 * SIDE**3 / multiplying,
    )


def fastest(work: Callable[[], object], device: torch.device, seconds: float = 0.5) -> float:
    """Return the shortest time of one run, in seconds, over about `seconds` of runs."""
    best, started = float("inf"), time.perf_counter()
    work()
    while time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best
