"""Scores of a model on the held-out sets, as JSON on stdout.

    python -m visavis.evaluate nano --data DATA > scores.json
    python -m visavis.evaluate nano --data DATA --only easy-vqa --questions 1000

Knows which metric belongs to which set; the metrics are in the files beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from visavis.api import Model, load
from visavis.data.datasets import load_source
from visavis.errors import VisavisError
from visavis.evaluate.retrieval import retrieval
from visavis.evaluate.vqa import exact_match
from visavis.evaluate.zeroshot import named_in_chat, zero_shot

Options = argparse.Namespace


def openstax(model: Model, options: Options) -> dict[str, Any]:
    return retrieval(model, load_source("openstax-figures/val", options.data))


def coco(model: Model, options: Options) -> dict[str, Any]:
    return retrieval(model, load_source("coco-mini/val", options.data))


def grocery(model: Model, options: Options) -> dict[str, Any]:
    records = load_source("grocery-store/test", options.data)
    return {
        "fine": zero_shot(model, records),
        "coarse": zero_shot(model, records, coarse=True),
        "chat": named_in_chat(model, records[:: max(1, len(records) // 100)]),
    }


def easy_vqa(model: Model, options: Options) -> dict[str, Any]:
    records = load_source("easy-vqa/test", options.data)
    return exact_match(model, records, max_questions=options.questions, report=_report)


SUITES: dict[str, Callable[[Model, Options], dict[str, Any]]] = {
    "openstax-figures/val": openstax,
    "coco-mini/val": coco,
    "grocery-store/test": grocery,
    "easy-vqa/test": easy_vqa,
}


def _report(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total}", end="", file=sys.stderr)


def main() -> int:
    """Run the chosen suites; print one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m visavis.evaluate", description=__doc__)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--only", action="append", choices=sorted(SUITES), help="run only this")
    parser.add_argument("--questions", type=int, help="ask at most so many easy-vqa questions")
    options = parser.parse_args()
    try:
        model = load(options.model)
        scores: dict[str, Any] = {
            "command": " ".join(["python -m visavis.evaluate", *sys.argv[1:]])
        }
        for name in options.only or SUITES:
            started = time.perf_counter()
            scores[name] = SUITES[name](model, options)
            scores[name]["seconds"] = round(time.perf_counter() - started, 1)
    except VisavisError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(scores, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
