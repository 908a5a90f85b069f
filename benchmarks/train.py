"""Tokens a second of training: packed, beside transformers' Trainer with padding.

    python benchmarks/train.py [--threads N] [--runs N] [--json FILE] [--quick]

The same tiny LLaVA (8 layers of 384), the same conversations in the same order, bfloat16 autocast
on float32 weights, the same threads. Padding does not count as tokens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from _harness import Report, engines, interleaved, parse_options

BATCH = 16  # conversations of a step, as in _trainers.py
NEAR = 0.02  # of a loss: both compute in bfloat16, in another order


def main() -> int:
    options = parse_options("train", __doc__, runs=3)
    report = Report(options, "Training: packed and padded")
    steps = 2 if options.quick else 3
    with (
        tempfile.TemporaryDirectory() as folder,
        engines("_trainers.py", ["visavis", "transformers"], options) as started,
    ):
        ours, theirs = started
        model, samples, encoded = (str(Path(folder, name)) for name in ("model", "samples", "ids"))
        ours.ask("write", folder=model, samples=samples)
        ours.ask("load", folder=model, samples=samples)
        lengths = ours.ask("encode", output=encoded)["tokens"]
        theirs.ask("load", folder=model, encoded=encoded)
        warm = [engine.ask("train", steps=2, first=0)["losses"] for engine in started]
        difference = max(abs(a - b) for a, b in zip(*warm, strict=True))
        report.check(
            f"two steps: largest difference of losses ({warm[0][0]:.3f} at first)",
            difference,
            passed=difference < NEAR * warm[0][0],
        )

        def once(engine: object, number: int) -> float:
            first = number % 4 * steps * BATCH
            seconds = engine.ask("train", steps=steps, first=first)["seconds"]  # type: ignore[attr-defined]
            return sum(lengths[first : first + steps * BATCH]) / seconds

        timed = {
            engine.name: (lambda number, engine=engine: once(engine, number)) for engine in started
        }
        report.add(
            f"{steps} steps of {BATCH} conversations",
            interleaved(timed, options.runs),
            "tokens/s",
            ratios={"transformers": 1.5},
        )
    return report.finish()


if __name__ == "__main__":
    raise SystemExit(main())
