"""On a GPU: embedding, reading a prompt and answering, beside transformers and the device's peaks.

    python benchmarks/cuda.py [--runs N] [--json FILE] [--quick] [--model 2B | 7B]

Weights are random, in the shapes of Qwen2-VL-2B's and 7B's language models, in bfloat16; nothing is
fetched. Shares are of what the device did in the same run: large products (operations with weights
of the blocks alone are counted), and one large read. Without a GPU: one line, and exit status 2.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from _generation import MAX_LEAD
from _harness import OURS, Report, engines, interleaved, parse_options

Texts = list[list[int]]
MIN_COSINE = 0.999


def main() -> int:
    options = parse_options("cuda", __doc__, runs=5, model="2B")
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/cuda.py needs a CUDA device; there is none, so nothing was measured.")
        return 2
    shape = "tiny" if options.quick else options.model
    with (
        tempfile.TemporaryDirectory() as folder,
        engines("_gpu_engines.py", [OURS, "transformers"], options) as started,
    ):
        report = measure(options, shape, "cuda", folder, {one.name: one.ask for one in started})
    return report.finish()


def measure(options: Any, shape: str, device: str, folder: str, ask: Mapping[str, Any]) -> Report:
    """Run everything; `ask` calls a method of each engine by name."""
    vocabulary = ask["transformers"]("make", folder=folder, shape=shape, device=device)
    sizes = {name: engine("load", folder=folder, device=device) for name, engine in ask.items()}
    found, peaks = sizes[OURS], ask[OURS]("peaks")
    title = (
        f"CUDA, {shape}, random weights: {peaks['name']}, of which {peaks['flops'] / 1e12:.3g} "
        f"TFLOP/s and {peaks['bandwidth'] / 1e9:.4g} GB/s were seen"
    )
    report = Report(options, title)
    small = shape == "tiny"
    read, said, lengths = (24, 4, (3, 24)) if small else (2048, 128, (16, 1024))

    def texts(number: int, count: int, length: tuple[int, int]) -> Texts:
        chance = random.Random(f"{number} {count} {length}")
        sizes = sorted(chance.randint(*length) for _ in range(count))
        return [[chance.randrange(vocabulary["vocab_size"]) for _ in range(n)] for n in sizes]

    def in_batches(number: int) -> list[Texts]:
        many = texts(number, 8 if small else 128, lengths)
        return [many[start : start + 16] for start in range(0, len(many), 16)]

    def tokens(number: int) -> int:
        return sum(len(text) for batch in in_batches(number) for text in batch)

    vectors = {n: engine("embed", batches=in_batches(-1))["vectors"] for n, engine in ask.items()}
    worst = min(map(cosine, *vectors.values()))
    what = "smallest cosine of the same text's vectors"
    report.check(what, worst, passed=worst >= MIN_COSINE)
    speeds = interleaved(
        {
            name: lambda run, e=engine: tokens(run) / e("embed", batches=in_batches(run))["seconds"]
            for name, engine in ask.items()
        },
        options.runs,
    )
    report.add(f"embedding texts of {lengths[0]} to {lengths[1]} tokens", speeds, "tokens/s")
    per_token = 2 * found["block_weights"] / peaks["flops"]
    report.add("… share of large products", shares(speeds, per_token), "%")

    prompts = {run: texts(run, 1, (read, read)) for run in range(-1, options.runs)}
    for name, engine in ask.items():
        answers = engine("run", prompts=prompts[-1], new_tokens=said)["ids"]
        lead = ask["transformers"]("judge", prompts=prompts[-1], answers=answers)["lead"]
        what = f"{name}: in {said} tokens, largest lead of a better token over the one chosen"
        report.check(what, lead, passed=lead <= MAX_LEAD)
    seconds = interleaved(
        {
            name: lambda run, e=engine: e("run", prompts=prompts[run], new_tokens=1)["prefill_s"]
            for name, engine in ask.items()
        },
        options.runs,
    )
    report.add(f"first token after {read}", seconds, "s")

    for count in (1, 16):
        together = {
            run: texts(run, count, (read // 4, read // 4)) for run in range(-1, options.runs)
        }

        def rate(engine: Any, run: int, count: int = count, together: Any = together) -> float:
            times = engine("run", prompts=together[run], new_tokens=said)
            return count * (said - 1) / float(times["decode_s"])

        for engine in ask.values():
            rate(engine, -1)  # graphs are captured, memory is set aside
        speeds = interleaved(
            {name: lambda run, e=engine: rate(e, run) for name, engine in ask.items()}, options.runs
        )
        report.add(f"decoding {count} at a time after {read // 4}", speeds, "tokens/s")
        per_step = found["read_bytes"] / peaks["bandwidth"] / count
        report.add("… share of the memory's speed", shares(speeds, per_step), "%")
    return report


def shares(speeds: Mapping[str, Sequence[float]], seconds: float) -> dict[str, list[float]]:
    """Return what share of its time, in percent, each engine must spend at the device's peak."""
    return {name: [100 * seconds * value for value in values] for name, values in speeds.items()}


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / (sum(a * a for a in one) * sum(b * b for b in other)) ** 0.5


if __name__ == "__main__":
    sys.exit(main())
