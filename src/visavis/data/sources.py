"""Data sources: `open_data_source` reads the data files of a `SourceConfig` as examples.

    {format: llava, path: mix665k.json, images: images}   ──►   Sequence[Conversation]
    {format: pairs, path: pairs.jsonl}                    ──►   Sequence[ContrastiveExample]

Only the positions of rows are in memory; an example is made when it is asked for, and its images
are read when its batch is made. `data/sampler.py` decides the order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, overload

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from visavis.data.examples import ContrastiveExample, Sample
from visavis.data.formats import FORMATS, Format
from visavis.data.formats.retrieval import ROW, Mined
from visavis.data.media_paths import Options, Place
from visavis.data.readers import Row, file_content
from visavis.errors import TrainError, VisavisError
from visavis.utils import lookup, suggest


class SourceConfig(BaseModel):
    """Where samples come from: the entry of a source under `data` in a recipe.

    Args:
        format: one of `data.formats.FORMATS`.
        path: file, folder or glob under --data; of `records`: a name.
        images: folder that images' paths start at; empty: beside the file.
        options: options of the format (see `data.formats`).
        cap: use only the first `cap` examples.
        instruction: put before each query when it is embedded; `target_instruction` likewise.
        negatives: JSONL of mined negatives, joined by id (`visavis mine`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str
    path: str
    images: str = ""
    options: dict[str, Any] = {}
    cap: Annotated[int, Field(ge=1)] | None = None
    instruction: str = ""
    target_instruction: str = ""
    negatives: str = ""

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FORMATS:
            raise ValueError(f"no data format is called {name!r}: {suggest(name, FORMATS)}")
        return name


class Source(Sequence[Sample]):
    """Samples of one source, made when they are asked for.

    Attributes:
        mined: negatives from elsewhere, None without.
    """

    def __init__(self, spec: SourceConfig, root: Path, name: str) -> None:
        form, options = _format(spec, name)
        self.spec, self.name = spec, name
        self.rows = form.rows(spec.path, root, options)
        self.place = Place(root, _folder(spec, root))
        self.make = form.make(self.place, options)
        self.size = len(self.rows) if spec.cap is None else min(spec.cap, len(self.rows))
        self.kept: Sequence[int] | None = None  # numbers of rows, see `keep`
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
        number = self._row(number % self.size)
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
        """Return a record's id, even if the record cannot be used."""
        number = self._row(number)
        try:
            return self._id_in(self.rows[number], number)
        except TrainError:
            return self._id_in({}, number)

    def keep(self, numbers: Sequence[int]) -> None:
        """Leave out all samples but those of these numbers."""
        self.kept = [self._row(number) for number in numbers]
        self.size = len(self.kept)

    def _row(self, number: int) -> int:
        return number if self.kept is None else self.kept[number]

    def _id_in(self, row: Row, number: int) -> str:
        """Return the record's id, or its number with the name of its file."""
        if row.get("id") not in (None, ""):
            return str(row["id"])
        return f"{Path(self.spec.path).stem}:{row.get(ROW, number)}"

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


def open_data_source(config: SourceConfig, root: Path, *, name: str) -> Source:
    """Return the samples of a source; any of them can be asked for, none is made yet.

    Args:
        config: format, path and so on, as in a recipe.
        root: the folder that paths start at.
        name: of the source, for messages.

    Raises:
        TrainError: its files are missing or damaged, or its format does not take its options.
    """
    try:
        return Source(config, root, name)
    except VisavisError as error:
        raise TrainError(f"the source {name!r} cannot be opened: {error}") from error


def source_fingerprint(config: SourceConfig, root: Path) -> str:
    """Return 16 hex digits that change when the samples would.

    Files are hashed by content, those above 256 MiB by size and 256 pieces; of images outside of
    data files, those of the format `images` by name and size, others not at all.
    """
    form, options = _format(config, config.path)
    kept = {
        "format": config.format,
        "options": options.model_dump(mode="json"),
        "cap": config.cap,
        "instructions": [config.instruction, config.target_instruction],
    }
    digest = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8)
    for content in form.content(config.path, root):
        digest.update(content)
    others = [str(value) for _, value in options if isinstance(value, Path)]
    for other in filter(None, [*others, config.negatives]):
        for content in file_content(root / other):
            digest.update(content)
    return digest.hexdigest()


def _format(spec: SourceConfig, name: str) -> tuple[Format, Options]:
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


def _folder(spec: SourceConfig, root: Path) -> Path:
    """Return where paths of images start."""
    if spec.images:
        return root / spec.images
    if spec.format == "images":
        return root / spec.path
    return (root / spec.path).parent
