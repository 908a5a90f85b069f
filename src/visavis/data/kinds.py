"""Kinds of things that names are of, and questions about whether a thing is there.

`kinds.tsv` holds a line for each kind: its name and the names that belong to it (first names of
ImageNet's classes and labels of the data sets).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from visavis.data.datasets import Record

ASK_PRESENCE = (
    "Is there {} in this picture?",
    "Is there {}?",
    "Does the picture show {}?",
    "Can you see {} in the image?",
)
NEAR = 0.3  # share of absent things that are of the same kind as the one that is there


def with_article(name: str) -> str:
    """Return "a cat" for "cat", "an owl" for "owl"."""
    return f"{'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name}"


@cache
def kinds() -> dict[str, str]:
    """Return the kind of each known name, names in small letters."""
    text = (Path(__file__).parent / "kinds.tsv").read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.splitlines()]
    return {name: kind for kind, names in lines for name in names.split(", ")}


def kinds_of(record: Record) -> list[str]:
    """Return the kinds that a record's label belongs to, narrow to wide: bird, animal."""
    found = [record.group.lower() or kinds().get(record.label.lower(), "")]
    while found[-1] and len(found) < len(kinds()):
        found.append(kinds().get(found[-1], ""))
    return found[:-1]


def with_presence(records: list[Record]) -> list[Record]:
    """Return records with labels with a question about a thing that is there and one about a
    thing that is not, as many with the answer yes as no."""
    labels = sorted({record.group or record.label for record in records if record.label})
    if len(labels) < 2:
        return records
    asked = []
    for record in records:
        draw, own = random.Random(f"presence/{record.key}"), record.group or record.label
        others = [name for name in labels if name not in own and own not in name]
        questions = record.questions
        if record.label and others:
            yes, no = with_article(own), with_article(draw.choice(others))
            questions += (
                (draw.choice(ASK_PRESENCE).format(yes), "Yes"),
                (draw.choice(ASK_PRESENCE).format(no), "No"),
            )
        asked.append(replace(record, questions=questions))
    return asked


def ask_presence(records: Sequence[Record], number: int, seed: int) -> list[Record]:
    """Return records, those with labels with `number` questions whether a thing is there.

    A coin decides each answer, so that none tells another. What is there is the label or one of its
    kinds; what is not is another label or kind, now and then of the same kind.
    """
    labels: dict[str, set[str]] = {}
    for record in records:
        if record.label:
            labels.setdefault(_kind(record), set()).add(record.label)
    everything = set().union(*labels.values(), kinds().values())
    asked = []
    for record in records:
        if record.label:
            draw = random.Random(f"presence/{seed}/{record.key}")
            own = [record.label, *kinds_of(record)]
            near = _absent(labels[_kind(record)], own)
            absent = _absent(everything, own)
            questions = {}
            for _ in range(number):
                there = draw.random() < 0.5
                if there:
                    name = own[0] if draw.random() < 0.5 else draw.choice(own)
                else:
                    name = draw.choice(near if near and draw.random() < NEAR else absent)
                question = draw.choice(ASK_PRESENCE).format(with_article(name))
                questions[question] = "Yes" if there else "No"
            record = replace(record, questions=tuple(questions.items()))
        asked.append(record)
    return asked


def _kind(record: Record) -> str:
    return (kinds_of(record) or [""])[0]


def _absent(names: Iterable[str], own: Sequence[str]) -> list[str]:
    """Return the names that are no part of what is there, nor the reverse."""
    there = [one.lower() for one in own]
    return sorted(
        name for name in names if not any(a in name.lower() or name.lower() in a for a in there)
    )
