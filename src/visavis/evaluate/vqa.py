"""Exact match of generated answers. Knows no data set."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from visavis.api import Model
from visavis.data.datasets import Record
from visavis.inputs import Image


def normalise(text: str) -> str:
    """Return an answer as it is compared: lower case, no full stop, single spaces."""
    return re.sub(r"\s+", " ", text.strip().lower().rstrip(".")).strip()


def exact_match(
    model: Model,
    records: Sequence[Record],
    *,
    max_questions: int | None = None,
    max_new_tokens: int = 12,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float | int]:
    """Ask every question greedily; return the share answered exactly, over all and by answer kind.

    Args:
        max_questions: ask only so many, spread evenly over all.
    """
    asked = [(r, question, answer) for r in records for question, answer in r.questions]
    if max_questions is not None and max_questions < len(asked):
        step = len(asked) / max_questions
        asked = [asked[int(i * step)] for i in range(max_questions)]
    right: dict[str, list[bool]] = defaultdict(list)
    for number, (record, question, answer) in enumerate(asked, start=1):
        reply = model.chat(question, [Image(record.image)], max_new_tokens=max_new_tokens)
        correct = normalise(reply.text) == normalise(answer)
        kind = "yes/no" if normalise(answer) in ("yes", "no", "true", "false") else "other"
        for key in ("all", kind):
            right[key].append(correct)
        report(number, len(asked))
    scores: dict[str, float | int] = {"questions": len(asked)}
    for key, values in right.items():
        scores["exact_match" if key == "all" else f"exact_match {key}"] = round(
            sum(values) / len(values), 4
        )
    return scores
