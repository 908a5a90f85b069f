"""Benchmark of a model against the hardware roofline.

The roofline is the memory bandwidth and matrix-product throughput of this machine, measured in two
seconds: decode reads every weight once per token, prefill multiplies every weight with every token.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from visavis.errors import InputError
from visavis.generate.engine import Engine, GeneratedSequence
from visavis.model.quantized_linear import QuantizedLinear
from visavis.processing.chat_template import Encoded
from visavis.processing.collate import pack
from visavis.processing.feature_cache import FeatureCache
from visavis.processing.prompt_checks import need_decoder

if TYPE_CHECKING:
    from visavis.api import Model


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


PROMPT_TOKENS, NEW_TOKENS, SEQUENCES, ITEMS = 512, 64, 8, 16
PICTURE_SIZE = (640, 480)
SENTENCE = "a photo of two cats that sleep on a red sofa beside a window "


@dataclass(frozen=True)
class BenchRow:
    """One measured rate.

    Args:
        value: the median over runs; `lowest` and `highest` are the spread.
        floor: what the machine's peaks would allow, in the same unit; None: no bound is known.
        share: of the floor that is reached, 0 to 1.
    """

    name: str
    unit: str
    value: float
    lowest: float
    highest: float
    floor: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class BenchReport:
    """Everything that `visavis bench` says."""

    model: str
    parameters: int
    weight_bytes: int  # read for each token that is said
    resident_bytes: int  # of the whole process
    machine: Machine
    rows: list[BenchRow]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(model: Model, load_seconds: float, *, runs: int = 3) -> Iterator[str | BenchReport]:
    """Yield what is being measured, in words, and at last the report.

    Args:
        load_seconds: how long loading it took.
        runs: how often each rate is measured.

    Raises:
        InputError: `runs` is below 1.
    """
    if runs < 1:
        raise InputError(f"runs is {runs}, expected at least 1.")
    yield "the machine"
    need_decoder(model.vlm.config, model.name)
    dtype = model.vlm.dtype
    machine = measure_machine(model.device, dtype)
    weights, read = decoder_weights(model)
    rows = [_load_row(model, load_seconds, machine)]
    prompt = min(PROMPT_TOKENS, model.context_length // 2)
    yield f"prefill of {prompt} tokens"
    floor = machine.flops / (2 * weights)
    rows.append(_rate("prefill", "tokens/s", prompt, runs, lambda: _say(model, prompt, 1), floor))
    new = min(NEW_TOKENS, model.context_length // 4)
    for number in (1, SEQUENCES):
        yield f"decode of {new} tokens, {number} at a time"
        seconds = [_decode_seconds(model, new, number) for _ in range(runs)]
        name = "decode" if number == 1 else f"decode, {number} at a time"
        bound = min(machine.bandwidth / read * number, floor)
        rows.append(_row(name, "tokens/s", [number * new / s for s in seconds], bound))
    yield f"embedding {ITEMS} texts"
    texts = [f"{SENTENCE * (1 + i % 4)}{i}" for i in range(ITEMS)]
    rows.append(_rate("embed texts", "texts/s", ITEMS, runs, lambda: model.embed(texts)))
    if model.takes_images:
        yield f"embedding {ITEMS} images"
        pictures = [_picture(seed) for seed in range(ITEMS)]

        def anew() -> None:
            model.image_encoder.cache = FeatureCache()
            model.embed(pictures)

        rows.append(_rate("embed pictures", "pictures/s", ITEMS, runs, anew))
        kept = [_seconds(lambda: model.embed(pictures)) / ITEMS for _ in range(runs)]
        rows.append(_row("a known picture", "ms", [1000 * s for s in kept]))
    yield BenchReport(
        model=model.name,
        parameters=model.num_parameters,
        weight_bytes=read,
        resident_bytes=resident_bytes(),
        machine=machine,
        rows=rows,
    )


def decoder_weights(model: Model) -> tuple[int, int]:
    """Return the numbers and the bytes that one token reads: blocks and head, not embeddings."""
    numbers = size = 0
    decoder = model.vlm.decoder
    for module in (*decoder.blocks.modules(), decoder.head):
        if isinstance(module, QuantizedLinear):
            numbers += module.num_weights
            size += module.num_bytes
        elif isinstance(module, nn.Linear):
            numbers += module.weight.numel()
            size += module.weight.nbytes
    return numbers, size


def resident_bytes() -> int:
    """Return the memory that this process holds; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            import os

            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        if sys.platform == "win32":
            return 0
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def _load_row(model: Model, seconds: float, machine: Machine) -> BenchRow:
    size = sum(path.stat().st_size for path in model.files if path.is_file())
    floor = size / machine.bandwidth
    return BenchRow(
        "load", "s", seconds, seconds, seconds, floor, floor / seconds if seconds else None
    )


def _say(model: Model, prompt: int, new: int, number: int = 1) -> list[float]:
    """Read prompts and say tokens; return when each step ended."""
    ids = [(7 * i) % min(1000, model.vlm.config.decoder.vocab_size) for i in range(prompt)]
    batch = pack([Encoded(ids, loss_mask=[False] * prompt)]).to(model.device)

    def first(scores: torch.Tensor) -> int:
        return int(scores.argmax())

    sequences = [GeneratedSequence(batch, first, new, frozenset()) for _ in range(number)]
    engine = Engine(model.vlm, max_sequences=number)
    for sequence in sequences:
        engine.add(sequence)
    ends = []
    while engine.busy:
        engine.step()
        ends.append(time.perf_counter())
    return ends


def _decode_seconds(model: Model, new: int, number: int) -> float:
    """Return the seconds of decode, from the end of prefill to the last token."""
    ends = _say(model, 16, new + 1, number)
    return ends[-1] - ends[number - 1]


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _rate(
    name: str,
    unit: str,
    amount: float,
    runs: int,
    work: Callable[[], object],
    floor: float | None = None,
) -> BenchRow:
    work()  # warm
    return _row(name, unit, [amount / _seconds(work) for _ in range(runs)], floor)


def _row(name: str, unit: str, values: list[float], floor: float | None = None) -> BenchRow:
    value = median(values)
    share = None if floor is None else value / floor
    return BenchRow(name, unit, value, min(values), max(values), floor, share)


def _picture(seed: int) -> Image.Image:
    width, height = PICTURE_SIZE
    blocks = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)
