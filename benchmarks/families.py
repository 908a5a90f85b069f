"""Embedding and prefill of each family of models beside transformers, with random weights.

    python benchmarks/families.py [--threads N] [--runs N] [--json FILE] [--quick]

Each model has a decoder of SmolLM2-135M's size and a vision tower of 0.1 billion weights, made by
the stock class of transformers. Texts and images of many sizes are embedded as one mixed set; a
prefill is the forward pass over an image and a text to the logits of all tokens.
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

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "colpali", "colqwen2")
MULTI = ("colpali", "colqwen2")
FULL = {"short text": 24, "long text": 6, "image": 8}
QUICK = {"short text": 2, "image": 1}
BYTES = 0.2  # share of words that a model of bytes is given: as many tokens as others read
TARGET = 1.5
MIN_MEDIAN, MIN_COSINE = 0.999, 0.98  # to the stock class in float32, of either in bfloat16

Items = list[dict[str, Any]]


def main() -> int:
    options = parse_options("families", __doc__)
    report = Report(options, "Families of models, random weights")
    for family in FAMILIES:
        with (
            tempfile.TemporaryDirectory() as temporary,
            engines("_families.py", ["visavis", "transformers"], options) as (ours, peer),
        ):
            measure(report, ours, peer, family, Path(temporary))
    return report.finish()


def measure(report: Report, ours: Engine, peer: Engine, family: str, folder: Path) -> None:
    """Add the rows of one family."""
    options = report.options
    model = folder / "model"
    peer.ask("write", family=family, folder=str(model), quick=options.quick)
    facts = ours.ask("load", folder=str(model))
    peer.ask("load", dtype=facts["dtype"])
    originals = copy_samples(folder / "originals")
    counts = QUICK if options.quick else FULL
    for do in ("embed",) if family in MULTI else ("embed", "prefill"):
        sets = [
            mixed(counts, originals, folder, run, words=BYTES)
            if do == "embed"
            else mixed({"image and text": 1}, originals, folder, 100 + run, words=BYTES)
            for run in range(options.runs + 1)
        ]
        ids = [ours.ask("ids", items=items, prefill=do == "prefill")["ids"] for items in sets]
        check(report, ours, peer, do, family, sets[0], ids[0], folder)
        what = ", ".join(f"{count} × {kind}" for kind, count in counts.items())
        measured = {
            engine.name: per_second(engine, do, sets[1:], ids[1:], folder)
            for engine in (ours, peer)
        }
        report.add(
            f"{family}: {f'embed {what}' if do == 'embed' else 'prefill of an image and a text'}",
            interleaved(measured, options.runs),
            "items/s",
            ratios={"transformers": TARGET},
        )


def check(
    report: Report,
    ours: Engine,
    peer: Engine,
    do: str,
    family: str,
    items: Items,
    ids: Any,
    folder: Path,
) -> None:
    """Compare both with the peer in float32; also the warm-up."""
    _, exact = run(peer, do, items, ids, folder, exact=True)
    for engine in (ours, peer):
        _, found = run(engine, do, items, ids, folder)
        cosines = np.concatenate([cosine(a, b) for a, b in zip(found, exact, strict=True)])
        for which, value, limit in (
            ("median", float(np.median(cosines)), MIN_MEDIAN),
            ("smallest", float(cosines.min()), MIN_COSINE),
        ):
            report.check(
                f"{family}, {do}, {engine.name}: {which} cosine to {peer.name} in float32",
                value,
                passed=value >= limit,
            )


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosine of two vectors [D], or of each pair of vectors [tokens, D]."""
    lengths = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    found: np.ndarray = np.atleast_1d((first * second).sum(-1) / lengths)
    return found


def per_second(
    engine: Engine, do: str, sets: list[Items], ids: list[Any], folder: Path
) -> Callable[[int], float]:
    return lambda number: len(sets[number]) / run(engine, do, sets[number], ids[number], folder)[0]


def run(
    engine: Engine, do: str, items: Items, ids: Any, folder: Path, **settings: bool
) -> tuple[float, list[np.ndarray]]:
    """Return seconds and the result of each item."""
    output = folder / f"{engine.name}.npz"
    answer = engine.ask(do, items=items, output=str(output), ids=ids, **settings)
    with np.load(output) as found:
        return answer["seconds"], [found[name] for name in found.files]


if __name__ == "__main__":
    raise SystemExit(main())
