"""Short names of well-known models, from `models.tsv`: what `visavis models` lists.

A name stands for a repository on the hub, and maybe for how the model embeds (`profile`) where its
files do not say. Sizes are the published numbers of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

FILE = Path(__file__).parent / "models.tsv"


@dataclass(frozen=True)
class KnownModel:
    """One row.

    Attributes:
        hub: `owner/name`; empty: the model is not on the hub (nano).
        model_type: of its config.json; empty for one that is not on the hub.
        millions: parameters.
        tasks: of "chat", "embed", "video" and "rerank".
        profile: see `visavis.load`.
        note: for people.
    """

    name: str
    hub: str
    model_type: str
    licence: str
    millions: int
    tasks: tuple[str, ...]
    profile: str
    note: str


@cache
def known_models() -> dict[str, KnownModel]:
    """Return the rows by name, in the file's order."""
    header, *lines = FILE.read_text(encoding="utf-8").splitlines()
    names = header.split("\t")
    assert names == [field.name for field in fields(KnownModel)]
    found = {}
    for line in lines:
        row = dict(zip(names, line.split("\t") + [""] * len(names), strict=False))
        found[row["name"]] = KnownModel(
            **{key: row[key] for key in names if key not in ("millions", "tasks")},
            millions=int(row["millions"]),
            tasks=tuple(row["tasks"].split(",")),
        )
    return found
