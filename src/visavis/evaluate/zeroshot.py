"""Naming pictures by comparing them with class names, and by asking. Knows no data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from visavis.api import Model
from visavis.data.datasets import Record
from visavis.evaluate.vqa import normalise
from visavis.inputs import Image

PHRASE = "a photo of {name}"


def zero_shot(
    model: Model, records: Sequence[Record], *, coarse: bool = False, phrase: str = PHRASE
) -> dict[str, float | int]:
    """Return the share of pictures whose own class name is nearest (and among the nearest 5)."""
    labels = [record.group if coarse else record.label for record in records]
    names = sorted(set(labels))
    classes = model.embed([phrase.format(name=name) for name in names])
    pictures = model.embed([Image(record.image) for record in records])
    order = np.argsort(-(pictures @ classes.T), axis=1)  # [pictures, classes]
    own = np.array([names.index(label) for label in labels])[:, None]
    return {
        "classes": len(names),
        "chance": round(1 / len(names), 4),
        "top1": round(float((order[:, :1] == own).any(1).mean()), 4),
        "top5": round(float((order[:, :5] == own).any(1).mean()), 4),
    }


def named_in_chat(
    model: Model, records: Sequence[Record], *, question: str = "What is in this picture?"
) -> dict[str, float | int]:
    """Return how often the generated answer contains the class name, or its coarse group."""
    fine = coarse = 0
    for record in records:
        reply = model.chat(question, [Image(record.image)], max_new_tokens=24)
        answer = normalise(reply.text)
        fine += normalise(record.label) in answer
        coarse += normalise(record.group) in answer
    total = max(1, len(records))
    return {
        "pictures": len(records),
        "names_class": round(fine / total, 4),
        "names_group": round(coarse / total, 4),
    }
