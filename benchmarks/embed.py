"""Items embedded per second: short texts, long texts, images, and all of them mixed.

    python benchmarks/embed.py [--threads N] [--runs N] [--json FILE] [--quick] [--model MODEL]

Pictures are JPEG files of many sizes; reading, decoding and resizing them counts, on both sides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _harness import Engine, Report, engines, interleaved, parse_options
from _inputs import mixed

from visavis.demo.samples import copy_samples

FULL = {"short text": 48, "long text": 12, "image": 24, "image and text": 12}
QUICK = {"short text": 5, "long text": 1, "image": 2, "image and text": 1}
BYTES = 0.2  # share of words that a model of bytes is given: as many tokens as others read
# Cosines to the peer in float32. Now and then a short text loses more to bfloat16 than others, in
# either engine, so the typical vector is held to more than the worst one.
MIN_MEDIAN, MIN_COSINE = 0.999, 0.99

Items = list[dict[str, Any]]


def main() -> int:
    options = parse_options("embed", __doc__, model="nano")
    counts = QUICK if options.quick else FULL
    with (
        tempfile.TemporaryDirectory() as temporary,
        engines("_embedders.py", ["visavis", "transformers"], options) as (ours, peer),
    ):
        folder = Path(temporary)
        facts = ours.ask("load", model=options.model)
        report = Report(options, f"Embedding: {facts['name']}")
        ours.ask("export", model=options.model, folder=temporary)
        peer.ask("load", folder=temporary)
        originals = copy_samples(folder / "originals")
        if not facts["takes_images"]:
            counts = {kind: count for kind, count in counts.items() if "image" not in kind}

        check(report, ours, peer, mixed(counts, originals, folder, 0), folder)
        cases = {"mixed": counts} | {kind: {kind: count} for kind, count in counts.items()}
        if options.quick:
            cases = {"mixed": counts}
        for place, (name, chosen) in enumerate(cases.items(), start=1):
            inputs = [
                mixed(chosen, originals, folder, 100 * place + run) for run in range(options.runs)
            ]
            what = ", ".join(f"{count} × {kind}" for kind, count in chosen.items())
            report.add(
                f"mixed: {what}" if name == "mixed" else what,
                interleaved(
                    {engine.name: per_second(engine, inputs, folder) for engine in (ours, peer)},
                    options.runs,
                ),
                "items/s",
                ratios={"transformers": 2} if name == "mixed" else None,
            )
    beside_sentence_transformers(report)
    return report.finish()


def beside_sentence_transformers(report: Report) -> None:
    """Add rows of a LLaVA in transformers' layout."""
    runs = report.options.runs
    counts = QUICK if report.options.quick else {kind: n // 2 for kind, n in FULL.items()}
    names = ["visavis", "sentence-transformers"]
    with (
        tempfile.TemporaryDirectory() as temporary,
        engines("_embedders.py", names, report.options) as (ours, peer),
    ):
        folder = Path(temporary)
        model = folder / "model"
        ours.ask("write", folder=str(model))
        ours.ask("load", model=str(model))
        peer.ask("load", folder=str(model))
        originals = copy_samples(folder / "originals")
        first, *inputs = (
            mixed(counts, originals, folder, number, words=BYTES) for number in range(runs + 1)
        )
        check(report, ours, peer, first, folder)
        what = ", ".join(f"{count} × {kind}" for kind, count in counts.items())
        measured = {engine.name: per_second(engine, inputs, folder) for engine in (ours, peer)}
        report.add(
            f"LLaVA of 0.2 billion random weights, mixed: {what}",
            interleaved(measured, runs),
            "items/s",
            ratios={"sentence-transformers": 2},
        )


def check(report: Report, ours: Engine, peer: Engine, items: Items, folder: Path) -> None:
    """Compare both with the peer in float32; also the warm-up."""
    _, exact = embed(peer, items, folder, exact=True)
    for engine in (ours, peer):
        _, vectors = embed(engine, items, folder)
        cosines = (vectors * exact).sum(1)
        for which, cosine, limit in (
            ("median", float(np.median(cosines)), MIN_MEDIAN),
            ("smallest", float(cosines.min()), MIN_COSINE),
        ):
            report.check(
                f"{engine.name}: {which} cosine of {len(items)} vectors to those of {peer.name} in "
                "float32",
                cosine,
                passed=cosine >= limit,
            )


def per_second(engine: Engine, inputs: list[Items], folder: Path) -> Callable[[int], float]:
    return lambda run: len(inputs[run]) / embed(engine, inputs[run], folder)[0]


def embed(engine: Engine, items: Items, folder: Path, **settings: bool) -> tuple[float, np.ndarray]:
    """Return seconds and vectors."""
    output = folder / f"{engine.name}.npy"
    answer = engine.ask("embed", items=items, output=str(output), **settings)
    return answer["seconds"], np.load(output)


if __name__ == "__main__":
    raise SystemExit(main())
