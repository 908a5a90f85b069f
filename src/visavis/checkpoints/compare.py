"""Differences between two checkpoints: settings, names, shapes, types and values of tensors.

Two of one layout are compared by its own names; two folders of different layouts by ours, because
their tables say what each calls our tensors. One pair of tensors is read at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from visavis.checkpoints.checkpoint_format import CheckpointFormat, TensorEntry
from visavis.checkpoints.weight_mapping import fill
from visavis.errors import InputError
from visavis.model.config import to_dict

CHUNK = 1 << 22  # numbers compared at once
MAX_TEXT = 70
ABSENT = "absent"


@dataclass
class Comparison:
    """Differences between two checkpoints; pairs of values are in the order (first, second)."""

    settings: dict[str, tuple[str, str]]
    only_in_a: list[str]
    only_in_b: list[str]
    shapes: dict[str, tuple[str, str]] = field(default_factory=dict)
    types: dict[str, tuple[str, str]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)  # by how much at most; worst first
    compared: int = 0  # tensors of which the values were

    @property
    def same(self) -> bool:
        differences = (self.settings, self.only_in_a, self.only_in_b, self.shapes, self.types)
        return not any(differences) and not self.values


def compare(a: CheckpointFormat, b: CheckpointFormat) -> Comparison:
    """Compare two checkpoints.

    Raises:
        InputError: the one is GGUF and the other is not, so that their tensors are no pairs.
        CheckpointError: a tensor cannot be read.
    """
    ggufs = [one.kind in ("gguf", "mmproj") for one in (a, b)]
    if ggufs[0] != ggufs[1]:
        raise InputError(
            f"{a.name} is in the layout {a.title} and {b.name} in {b.title}; their "
            "tensors are cut differently. Compare two of a kind: convert one of them first."
        )
    alike = a.kind == b.kind
    ours, theirs = (_by_key(one, alike) for one in (a, b))
    found = Comparison(
        settings=dict(_differences(_settings(a, alike), _settings(b, alike))),
        only_in_a=[key for key in ours if key not in theirs],
        only_in_b=[key for key in theirs if key not in ours],
    )
    values = {}
    for key, first in ours.items():
        second = theirs.get(key)
        if second is None:
            continue
        if first.shape != second.shape:
            found.shapes[key] = str(first.shape), str(second.shape)
            continue
        if first.type != second.type:
            found.types[key] = first.type, second.type
        found.compared += 1
        if largest := distance(first.read(), second.read()):
            values[key] = largest
    found.values = dict(sorted(values.items(), key=lambda item: -item[1]))
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; infinite where only one is a number."""
    largest = 0.0
    for x, y in zip(a.flatten().split(CHUNK), b.flatten().split(CHUNK), strict=True):
        x, y = x.float(), y.float()
        apart = (x - y).abs().masked_fill((x == y) | (x.isnan() & y.isnan()), 0)
        if len(apart):
            largest = max(largest, apart.nan_to_num(nan=math.inf, posinf=math.inf).max().item())
    return largest


def _by_key(one: CheckpointFormat, alike: bool) -> dict[str, TensorEntry]:
    """Return tensors by what they are called in both."""
    if one.table is None:
        return one.tensors
    found = {}
    for name, entry in one.tensors.items():
        key = one.table.canonical(name)
        part = None if alike else one.table.part_of(key)
        if part is not None:
            row, place, stars = part
            which = f" ({place + 1} of {len(row.theirs)})" if len(row.theirs) > 1 else ""
            key = fill(row.ours, stars) + which
        found[key] = entry
    return found


def _settings(one: CheckpointFormat, alike: bool) -> Mapping[str, Any]:
    if alike:
        found = dict(one.settings)
    else:
        found = {"config": None if one.config is None else to_dict(one.config)}
    return found | {"pictures": one.processor.to_dict() if one.processor else None}


def _differences(a: Any, b: Any, key: str = "") -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the dotted key of each setting that differs, with both values."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys((*a, *b)):
            below = f"{key}.{name}" if key else str(name)
            yield from _differences(a.get(name, ABSENT), b.get(name, ABSENT), below)
    elif a != b:
        yield key, (_short(a), _short(b))


def _short(value: Any) -> str:
    text = value if value is ABSENT else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
