"""Nanoseconds per weight of one matrix product, by the number of rows: integers, tiles, dense.

    python benchmarks/products.py [--threads N] [--width 2048] [--out 8192]

Shows where PyTorch's packed kernel stops to pay: it does every row's work anew, where the others
make the weights floating-point once (tiles) or find them so (dense) and multiply in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from visavis.model.quantized_linear import QuantizedLinear, QuantizedRows, packed_kernels, quantize

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
SECONDS = 0.3  # of each measurement; the fastest call counts, which other programs disturb least


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--out", type=int, default=8192)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    values = torch.randn(options.out, options.width) * 0.02
    four, eight = (QuantizedLinear([QuantizedRows.of(quantize(values, bits))]) for bits in (4, 8))
    dense = QuantizedLinear(four.parts, dense=values)
    print("| rows | 4 bits | 8 bits | tiles of 4 | tiles of 8 | dense |")
    print("|---:|---:|---:|---:|---:|---:|")
    for rows in ROWS:
        x = torch.randn(rows, options.width).bfloat16()
        with torch.inference_mode():
            with packed_kernels():
                found = [seconds(four, x), seconds(eight, x)]
            found += [seconds(linear, x) for linear in (four, eight, dense)]
        each = " | ".join(f"{1e9 * s / values.numel():.3f}" for s in found)
        print(f"| {rows} | {each} |")


def seconds(work: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the time of the fastest call."""
    work(x)
    best, end = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < end or best == float("inf"):
        started = time.perf_counter()
        work(x)
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
