"""Contrastive batches of any size: memory and cost with GradCache, beside sentence-transformers.

    python benchmarks/gradcache.py [--threads N] [--runs N] [--json FILE] [--quick]

The same tiny LLaVA (4 layers of 256, its vision tower frozen), the same captions and JPEG files, in
float32, 32 pictures a pass. A step reads files and ends with gradients. Each batch size has
processes of its own; memory is what a step takes above the loaded model.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from _harness import Options, Report, engines, interleaved, parse_options
from _inputs import WORDS

NAMES = ["visavis", "sentence-transformers"]
SMALL, LARGE = 64, 4096
FLAT, COST = 1.2, 1.5  # the most that memory and time may grow
NEAR = 1e-4


def main() -> int:
    options = parse_options("gradcache", __doc__)
    report = Report(options, "GradCache: images and captions")
    small, large = (16, 64) if options.quick else (SMALL, LARGE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, pairs = folder / "model", made_pairs(folder, large)
        with engines("_contrasters.py", NAMES[:1], options) as (ours,):
            ours.ask("write", folder=str(model))
        few, whole = measured(report, options, model, pairs, small)
        fresh, many = (steps(options, model, pairs[:size]) for size in (small, large))
    for size, found in ((small, fresh), (large, many)):
        memory = {name: [one["memory"] for one in runs] for name, runs in found.items()}
        report.add(f"memory of a step of {size}", memory, "MB")
    for size, found in ((small, whole), (small, few), (large, many)):
        cost = {name: [1e3 * one["seconds"] / size for one in runs] for name, runs in found.items()}
        how = "uncached" if found is whole else "cached"
        report.add(f"a sample in a step of {size}, {how}", cost, "ms")
    grown = growth(fresh, many, "memory", 1)
    report.add(f"memory, {large} over {small}", grown, "×", limit=FLAT)
    dearer = growth(whole, many, "seconds", small / large)
    report.add(f"time of a sample, {large} cached over {small} uncached", dearer, "×", limit=COST)
    return report.finish()


def measured(
    report: Report, options: Options, model: Path, pairs: list[Any], size: int
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Compare both on the same batch, then measure: what cached and uncached steps took."""
    with engines("_contrasters.py", NAMES, options) as started:
        for engine in started:
            engine.ask("load", folder=str(model))
        first = [
            [engine.ask("step", pairs=pairs[:size], cached=cached) for cached in (True, False)]
            for engine in started
        ]
        ours, theirs = first
        for what, one, other in (
            ("both, cached", ours[0], theirs[0]),
            ("ours, cached and not", *ours),
        ):
            for name in ("loss", "norm"):
                difference = abs(one[name] - other[name]) / max(1.0, other[name])
                label = "loss" if name == "loss" else "length of the gradient"
                report.check(
                    f"{what}: difference in {label} ({other[name]:.3f}) of a batch of {size}",
                    difference,
                    passed=difference <= NEAR,
                )
        found: dict[bool, dict[str, list[Any]]] = {}
        for cached in (True, False):
            kept: dict[str, list[Any]] = {name: [] for name in NAMES}

            def once(engine: Any, number: int, cached: bool = cached, kept: Any = kept) -> float:
                chosen = random.Random(number).sample(pairs, size)
                kept[engine.name].append(engine.ask("step", pairs=chosen, cached=cached))
                return 0.0

            interleaved(
                {one.name: lambda run, one=one: once(one, run) for one in started}, options.runs
            )
            found[cached] = kept
    return found[True], found[False]


def steps(options: Options, model: Path, pairs: list[Any]) -> dict[str, list[Any]]:
    """Take one cached step of all pairs in each engine, in processes that took no other."""
    found = {}
    for name in NAMES:
        with engines("_contrasters.py", [name], options) as (engine,):
            engine.ask("load", folder=str(model))
            engine.ask("step", pairs=pairs[:8], cached=True)  # what is set up once
            found[name] = [engine.ask("step", pairs=pairs, cached=True)]
    return found


def growth(
    before: dict[str, list[Any]], after: dict[str, list[Any]], name: str, factor: float
) -> dict[str, list[float]]:
    """Return by engine how many times as much `after` is as the median of `before`."""
    middle = {
        engine: sorted(one[name] for one in runs)[len(runs) // 2] for engine, runs in before.items()
    }
    return {
        engine: [one[name] * factor / middle[engine] for one in runs]
        for engine, runs in after.items()
    }


def made_pairs(folder: Path, count: int) -> list[tuple[str, str]]:
    """Write JPEG files of 256 to 512 pixels; return captions and paths, no two the same."""
    import numpy as np
    from PIL import Image

    chance, random_blocks = random.Random("pictures"), np.random.default_rng(0)
    pairs = []
    for number in range(count):
        blocks = random_blocks.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        size = (chance.randint(256, 512), chance.randint(256, 512))
        path = folder / f"{number}.jpg"
        Image.fromarray(blocks).resize(size).save(path, quality=85)
        pairs.append((f"{number} {chance.choice(WORDS)} {chance.choice(WORDS)}", str(path)))
    return pairs


if __name__ == "__main__":
    raise SystemExit(main())
