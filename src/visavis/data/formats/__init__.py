"""Data formats: `open_data_source` reads data files as examples; `FORMATS` lists the formats.

    source: {format: llava, path: mix665k.json, images: pictures}   ──►   Sequence of Chat or Match

A format says what a row means; which kind of file the rows lie in is another question, answered by
`rows.py` and `tables.py`. In memory is only where rows lie; a picture is read when its batch is
made. Knows neither order (see `mixture.py`) nor models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, overload

from pydantic import ValidationError

from visavis.data import fingerprint
from visavis.data.examples import ContrastiveExample, Sample
from visavis.data.formats import synthetic
from visavis.data.formats.image_folder import (
    Folder,
    PictureOptions,
    RecordOptions,
    Records,
    classified,
    from_record,
)
from visavis.data.formats.llava import LlavaOptions, conversation
from visavis.data.formats.retrieval import (
    HoundOptions,
    Mined,
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
from visavis.data.readers import Row, Rows, find_files, open_rows
from visavis.errors import TrainError, VisavisError
from visavis.utils import lookup


class SourceSpec(Protocol):
    """What a recipe says of a source (`train.recipe.SourceRecipe`)."""

    @property
    def format(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def images(self) -> str: ...
    @property
    def options(self) -> Mapping[str, Any]: ...
    @property
    def cap(self) -> int | None: ...
    @property
    def instruction(self) -> str: ...
    @property
    def target_instruction(self) -> str: ...
    @property
    def negatives(self) -> str: ...


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
    content: Callable[[str, Path], Iterable[bytes]] = fingerprint.of_files


def _versioned(module: Any) -> Callable[[str, Path], Iterable[bytes]]:
    """Return the contents of what a module of our own draws."""
    return lambda path, root: [f"{path} {module.VERSION}".encode()]


def _relation_contents(path: str, root: Path) -> Iterable[bytes]:
    drawn = path.startswith(synthetic.PREFIX)
    return (_versioned(synthetic) if drawn else fingerprint.of_files)(path, root)


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
        fingerprint.of_pictures,
    ),
    "records": Format(_each(from_record), RecordOptions, Records, fingerprint.of_records),
    "shapes": Format(_each(shape_sample), ShapeOptions, Scenes, _versioned(synthetic)),
    "scene-graph": Format(Predicates, SceneGraphOptions, open_relations, _relation_contents),
}


class Source(Sequence[Sample]):
    """Samples of one source, made when they are asked for.

    Attributes:
        mined: negatives from elsewhere, None without.
    """

    def __init__(self, spec: SourceSpec, root: Path, name: str) -> None:
        form, options = _format(spec, name)
        self.spec, self.name = spec, name
        self.rows = form.rows(spec.path, root, options)
        self.place = Place(root, _folder(spec, root))
        self.make = form.make(self.place, options)
        self.size = len(self.rows) if spec.cap is None else min(spec.cap, len(self.rows))
        self.mined = Mined(root / spec.negatives) if spec.negatives else None
        if not self.size:
            raise TrainError(f"there are no records in {root / spec.path}.")

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, number: int) -> Sample: ...
    @overload
    def __getitem__(self, number: slice) -> list[Sample]: ...
    def __getitem__(self, number: int | slice) -> Sample | list[Sample]:
        """Return a sample.

        Raises:
            TrainError: the record is not as its format wants it; the message names it.
        """
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(self.size))]
        if not -self.size <= number < self.size:
            raise IndexError(number)
        number %= self.size
        row = self.rows[number]
        row["id"] = id = self._id_in(row, number)
        try:
            sample = self.make(row)
            if isinstance(sample, ContrastiveExample):
                return self._completed(sample, id)
            if self.spec.instruction or self.spec.target_instruction or self.mined:
                raise TrainError("it is a conversation; instructions and negatives are of queries")
        except VisavisError as error:
            raise TrainError(
                f"{self.name}: the record {id!r} ({self.rows.where(number)}) cannot be used: "
                f"{error}"
            ) from error
        return sample

    def id_of(self, number: int) -> str:
        """Return a record's id, whatever else is wrong with it."""
        try:
            return self._id_in(self.rows[number], number)
        except TrainError:
            return self._id_in({}, number)

    def _id_in(self, row: Row, number: int) -> str:
        """Return the record's id, or its number with the name of its file."""
        if row.get("id") not in (None, ""):
            return str(row["id"])
        return f"{Path(self.spec.path).stem}:{number}"

    def _completed(self, sample: ContrastiveExample, id: str) -> ContrastiveExample:
        """Return a sample with what the recipe adds to it."""
        added = self.mined.of(sample.id, self.place) if self.mined else ()
        if self.mined and not added and sample.id != id:  # one of several positives
            added = self.mined.of(id, self.place)
        return replace(
            sample,
            negatives=sample.negatives + added,
            instruction=self.spec.instruction,
            target_instruction=self.spec.target_instruction,
        )


def open_data_source(recipe: SourceSpec, root: Path, *, name: str) -> Source:
    """Return the samples of a source; any of them can be asked for, none is made yet.

    Args:
        recipe: format, path and so on, as in a recipe.
        root: the folder that paths start at.
        name: of the source, for messages.

    Raises:
        TrainError: its files are missing or damaged, or it has options that its format has not.
    """
    try:
        return Source(recipe, root, name)
    except VisavisError as error:
        raise TrainError(f"the source {name!r} cannot be opened: {error}") from error


def source_fingerprint(recipe: SourceSpec, root: Path) -> str:
    """Return 16 hex digits that change when the samples would.

    Files are hashed by content, those above 256 MiB by size and 256 pieces; of pictures outside of
    data files, those of the format `images` by name and size, others not at all.
    """
    form, options = _format(recipe, recipe.path)
    kept = {
        "format": recipe.format,
        "options": options.model_dump(mode="json"),
        "cap": recipe.cap,
        "instructions": [recipe.instruction, recipe.target_instruction],
    }
    digest = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8)
    for content in form.content(recipe.path, root):
        digest.update(content)
    others = [str(value) for _, value in options if isinstance(value, Path)]
    for other in filter(None, [*others, recipe.negatives]):
        for content in fingerprint.of_file(root / other):
            digest.update(content)
    return digest.hexdigest()


def _format(spec: SourceSpec, name: str) -> tuple[Format, Options]:
    form = lookup("data format", spec.format, FORMATS)
    try:
        return form, form.options.model_validate(dict(spec.options))
    except ValidationError as error:
        known = [field.alias or key for key, field in form.options.model_fields.items()]
        wrong = "; ".join(
            f"{'.'.join(map(str, one['loc'])) or 'options'}: {one['msg']}" for one in error.errors()
        )
        raise TrainError(
            f"the options of the source {name!r} do not fit its format {spec.format!r}: {wrong}. "
            f"It takes {', '.join(known) or 'none'}."
        ) from error


def _folder(spec: SourceSpec, root: Path) -> Path:
    """Return where paths of pictures start."""
    if spec.images:
        return root / spec.images
    if spec.format == "images":
        return root / spec.path
    return (root / spec.path).parent
