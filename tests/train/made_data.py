"""Two rows for every source of a recipe, in the files and fields that its format reads."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet

from tests.fakes import picture
from visavis.data.sources import SourceConfig
from visavis.train.recipe import Recipe

ROWS = 2
TALK = [
    {"from": "human", "value": "<image>\nwhat is in the picture?"},
    {"from": "gpt", "value": "blocks of many colours, one beside another"},
]
FILMED = [{"from": "human", "value": "<video>\nwhat happens?"}, {"from": "gpt", "value": "a walk"}]


def png() -> bytes:
    file = io.BytesIO()
    picture(1, (400, 300)).save(file, "PNG")
    return file.getvalue()


def make_data(recipe: Recipe, root: Path) -> None:
    """Write the files that a recipe's sources name."""
    for source in recipe.data.values():
        if source.format in ROW:
            _write(source, root)


def _write(source: SourceConfig, root: Path) -> None:
    path = root / source.path.replace("*", "0")
    if path.suffix not in (".json", ".jsonl", ".parquet"):
        path = path / "train.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    images = root / (source.images or path.parent)
    images.mkdir(parents=True, exist_ok=True)
    (images / "picture.png").write_bytes(png())
    frames = images / "film"
    frames.mkdir(exist_ok=True)
    for number in range(2):
        (frames / f"{number}.png").write_bytes(png())
    rows = [{"id": str(number), **ROW[source.format]} for number in range(ROWS)]
    if path.suffix == ".parquet":
        if source.format == "llava":  # published with its pictures inside
            rows = [{**row, "image": {"bytes": png(), "path": "a.png"}} for row in rows]
        arrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))


ROW: dict[str, dict[str, Any]] = {
    "llava": {"image": "picture.png", "conversations": TALK},
    "mmeb": {
        "qry": "<|image_1|>\nWhat is it?\n",
        "qry_image_path": "picture.png",
        "pos_text": "blocks",
        "pos_image_path": "",
    },
    "vidore": {"image": {"bytes": png(), "path": "a.png"}, "query": "what?", "answer": "blocks"},
    "visrag": {"image": {"bytes": png(), "path": "a.png"}, "query": "what?", "source": "PlotQA"},
    "llava-hound": {"video": "film", "conversations": FILMED},
    "scene-graph": {},
}
