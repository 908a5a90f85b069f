"""Data formats: `FORMATS` lists them by name. `data/sources.py` opens a source in one of them.

A format says what a row means. Which kind of file the rows lie in is decided by `data/readers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from visavis.data.examples import Sample
from visavis.data.formats import synthetic
from visavis.data.formats.image_folder import (
    Folder,
    PictureOptions,
    RecordOptions,
    Records,
    classified,
    folder_content,
    from_record,
    records_content,
)
from visavis.data.formats.llava import LlavaOptions, conversation
from visavis.data.formats.retrieval import (
    HoundOptions,
    PairOptions,
    Pairs,
    Spread,
    hound,
    mmeb,
    vidore,
    visrag,
)
from visavis.data.formats.scene_graph import Predicates, SceneGraphOptions, open_relations
from visavis.data.formats.synthetic import Scenes, ShapeOptions, shape_sample
from visavis.data.media_paths import Options, Place
from visavis.data.readers import Row, Rows, files_content, find_files, open_rows


@dataclass(frozen=True)
class Format:
    """How samples are made.

    Args:
        make: from place and options, what makes a sample of a row.
        options: which it takes.
        rows: from path, root and options to the rows.
        content: from path and root to what changes when the rows do.
    """

    make: Callable[[Place, Any], Callable[[Row], Sample]]
    options: type[Options] = Options
    rows: Callable[[str, Path, Any], Rows] = lambda path, root, options: open_rows(
        find_files(path, root)
    )
    content: Callable[[str, Path], Iterable[bytes]] = files_content


def _versioned(module: Any) -> Callable[[str, Path], Iterable[bytes]]:
    """Return the contents of what a module of our own draws."""
    return lambda path, root: [f"{path} {module.VERSION}".encode()]


def _relation_contents(path: str, root: Path) -> Iterable[bytes]:
    drawn = path.startswith(synthetic.PREFIX)
    return (_versioned(synthetic) if drawn else files_content)(path, root)


def _each(function: Callable[..., Sample]) -> Callable[[Place, Any], Any]:
    return lambda place, options: partial(function, place=place, options=options)


FORMATS: dict[str, Format] = {
    "llava": Format(_each(conversation), LlavaOptions),
    "pairs": Format(
        Pairs, PairOptions, lambda path, root, options: Spread(open_rows(find_files(path, root)))
    ),
    "mmeb": Format(_each(mmeb)),
    "llava-hound": Format(_each(hound), HoundOptions),
    "vidore": Format(_each(vidore)),
    "visrag": Format(_each(visrag)),
    "images": Format(
        _each(classified),
        PictureOptions,
        lambda path, root, options: Folder(root / path),
        folder_content,
    ),
    "records": Format(_each(from_record), RecordOptions, Records, records_content),
    "shapes": Format(_each(shape_sample), ShapeOptions, Scenes, _versioned(synthetic)),
    "scene-graph": Format(Predicates, SceneGraphOptions, open_relations, _relation_contents),
}
