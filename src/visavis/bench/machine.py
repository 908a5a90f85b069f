"""What this machine can do: bytes read and numbers multiplied a second, measured in two seconds.

The floor of everything else: decoding reads every weight once a token, reading a prompt multiplies
every weight with every token. Knows no model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

READ_BYTES, SIDE = 256 * 2**20, 1536  # far beyond any cache
CUDA_BYTES, CUDA_SIDE = 2**30, 8192  # so long that starting a kernel takes no share of it


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
    on_cuda = device.type == "cuda"
    size, side = (CUDA_BYTES, CUDA_SIDE) if on_cuda else (READ_BYTES, SIDE)
    numbers = torch.ones(size // 4, device=device)
    square = torch.randn(side, side, device=device).to(dtype)
    reading = fastest(lambda: numbers.sum(), device)
    multiplying = fastest(lambda: square @ square, device)
    name = torch.cuda.get_device_name(device) if on_cuda else "cpu"
    return Machine(
        device=name,
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        bandwidth=size / reading,
        flops=2 * side**3 / multiplying,
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
