"""The image tasks of MMEB, from any of the layouts that their files are published in.

    MMEB-eval/<Dataset>/test-*.parquet + eval_images/<Dataset>/…       (MMEB-V1)
    MMEB_Test_Instruct/<Dataset>/test*.parquet + image-tasks/<Dataset>/…     (MMEB-V2)
    image-tasks/image-query/<Dataset>/test*.parquet + image-tasks/MMEB/<Dataset>/…   (MMEB-V3)

Rows of MMEB-eval hold whole strings (`qry_text` with `<|image_1|>`), rows of MMEB_Test_Instruct
instruction and text apart (`qry_inst`, `qry_text`); both end in the same verbatim strings. The
right candidate of a row is its first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visavis.errors import InputError
from visavis.evaluate.items import (
    VISUAL,
    CandidateSet,
    Item,
    MissingFilesError,
    Problem,
    RetrievalData,
)
from visavis.evaluate.metrics import Relevant
from visavis.evaluate.suite import Task
from visavis.evaluate.tables import find_first, iterate_rows
from visavis.inputs import Image

TOKEN = "<|image_1|>"
ANNOTATIONS = (
    "MMEB-eval/{name}/test*.parquet",
    "{name}/test*.parquet",
    "MMEB_Test_Instruct/{name}/test*.parquet",
    "image-tasks/image-query/{name}/test*.parquet",
    "image-query/{name}/test*.parquet",
    "image-tasks/MMEB_Test_Instruct/{name}/test*.parquet",
)
IMAGE_ROOTS = (
    "eval_images",
    "MMEB-eval/eval_images",
    "image-tasks",
    "image-tasks/MMEB",
    "MMEB",
    "images",
    "MMEB-eval/images",
    "MMEB-eval",
    "",
)


def annotation_files(task: Task, root: Path) -> list[Path]:
    """Return a task's annotation files, or nothing."""
    name = task.get("dataset", task.name)
    return find_first(root, [pattern.format(name=name) for pattern in ANNOTATIONS])


class ImageFinder:
    """Where the images lie that annotations name by relative paths.

    Args:
        roots: folders below `root`, tried in this order for each image.
    """

    def __init__(self, root: Path, roots: Sequence[str] = IMAGE_ROOTS) -> None:
        self.root = root
        self.roots = [root / name for name in roots if (root / name).is_dir()]
        self.found: dict[str, Path | None] = {}

    def __call__(self, name: str) -> Path | None:
        """Return an image's file, or None where there is none."""
        if name not in self.found:
            self.found[name] = next(
                (folder / name for folder in self.roots if (folder / name).is_file()), None
            )
            found = self.found[name]
            if found is not None:  # the folder that had the last one is tried first
                folder = next(f for f in self.roots if found == f / name)
                self.roots.remove(folder)
                self.roots.insert(0, folder)
        return self.found[name]

    def need(self, name: str) -> Image:
        """Return an image.

        Raises:
            InputError: it is in none of the folders.
        """
        path = self(name)
        if path is None:
            folders = ", ".join(str(f.relative_to(self.root) or ".") for f in self.roots)
            raise InputError(
                f"image {name} is missing, looked in {folders or self.root}; unpack the images, or "
                "copy that archive again"
            )
        return Image(path)


def read(task: Task, root: Path, *, compat: str = "corrected") -> RetrievalData:
    """Return the queries and candidates of a task.

    Args:
        compat: "official" takes two candidates for the same where VLM2Vec's code for MMEB-V2 does:
            by text for text candidates, by image path alone for text to image.

    Raises:
        MissingFilesError: there are no annotations.
        InputError: they are damaged.
    """
    files = annotation_files(task, root)
    if not files:
        raise MissingFilesError(
            f"no annotations of {task.name} below {root}; see --check for commands"
        )
    find, candidates = ImageFinder(root), CandidateSet()
    data = RetrievalData(pools=[], sources=files)
    seen: dict[tuple[str, str], int | str] = {}
    strings: Strings | None = None
    for number, row in enumerate(iterate_rows(files)):
        name = f"{files[0].name}, row {number + 1}"
        try:
            if strings is None:
                strings = _strings_of(row, task)
                data.notes["layout"] = strings.layout
            query = strings.query(row, find)
            texts, paths = strings.targets(row)
            pool = []
            for text, path in zip(texts, paths, strict=True):
                known = seen.get((text, path))
                if known is None:
                    try:
                        item = strings.target(text, path, bool(texts[0].strip()), row, find)
                        key = strings.official_key(text, path) if compat == "official" else None
                        known = candidates.add(item, path or text, key)
                    except InputError as error:
                        known = str(error)
                    seen[text, path] = known
                if isinstance(known, str):
                    raise InputError(known)
                pool.append(known)
        except InputError as error:
            data.problems.append(Problem(name, str(error)))
            continue
        data.queries.append(query)
        data.query_ids.append(str(number))
        data.relevant.append(Relevant.of({pool[0]: 1.0}))
        assert data.pools is not None
        data.pools.append(np.array(list(dict.fromkeys(pool)), np.int64))
    if strings is None:
        raise InputError(f"{files[0]} holds no rows; copy the file again")
    data.candidates, data.candidate_ids = candidates.items, candidates.ids
    return data


class Strings:
    """How rows with whole strings become items (MMEB-eval)."""

    layout = "MMEB-eval"

    def __init__(self, task: Task) -> None:
        self.task, self.form = task, task.get("form")

    def query(self, row: dict[str, Any], find: ImageFinder) -> Item:
        """Return the query of a row."""
        path = _text(row, "qry_img_path")
        return self._whole(_text(row, "qry_text"), path, self.task.get("query", ""), find)

    def targets(self, row: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Return the texts and image paths of a row's candidates, both of one length."""
        texts, paths = row.get("tgt_text"), row.get("tgt_img_path")
        if not isinstance(texts, list) or not texts:
            raise InputError("its list of candidates tgt_text is empty, expected the right one")
        paths = paths or [""] * len(texts)
        if len(paths) != len(texts):
            raise InputError(f"it has {len(texts)} tgt_text and {len(paths)} tgt_img_path")
        return [text or "" for text in texts], [path or "" for path in paths]

    def target(
        self, text: str, path: str, captioned: bool, row: dict[str, Any], find: ImageFinder
    ) -> Item:
        """Return a candidate; `captioned`: the row's first has a text."""
        return self._whole(text, path, self.task.get("target", ""), find)

    def official_key(self, text: str, path: str) -> Any:
        """Return the key by which the original code tells candidates apart.

        None stands for text and path, as in V1.
        """
        return None

    def _whole(self, text: str, path: str, instruction: str, find: ImageFinder) -> Item:
        own = text.replace(TOKEN, "").strip()
        known = instruction if instruction and own.startswith(instruction) else ""
        rest = own[len(known) :].strip()
        if not path:
            if not own:
                raise InputError("a query or candidate has neither text nor image")
            plain = text.replace(TOKEN + "\n", "").replace(TOKEN, "")
            return Item(rest, (), known, plain)
        verbatim = text.replace(TOKEN, VISUAL) if TOKEN in text else VISUAL + text
        return Item(rest, (find.need(path),), known, verbatim)


class InstructStrings(Strings):
    """How rows with instructions apart become items, as VLM2Vec's code for MMEB-V2 writes them."""

    layout = "MMEB_Test_Instruct"

    def query(self, row: dict[str, Any], find: ImageFinder) -> Item:
        """Return the query of a row."""
        instruction, text = _text(row, "qry_inst"), _text(row, "qry_text")
        clean = instruction.replace(TOKEN, "").strip()
        if self.form == "t2i":
            written = instruction.replace(TOKEN + "\n", "").replace(TOKEN, "") + " " + text + "\n"
            written += "\n" if self.task.name == "VisDial" else ""
            return Item(text, (), clean, written)
        before = instruction.replace(TOKEN, "")
        if self.form in ("qa", "i2i"):
            before = "\n" + before.strip()
        written = _joined(before, text) + "\n"
        return Item(text, (find.need(_text(row, "qry_img_path")),), clean, written)

    def targets(self, row: dict[str, Any]) -> tuple[list[str], list[str]]:
        """Return the texts and image paths of a row's candidates, both of one length."""
        texts, paths = super().targets(row)
        return (texts, [""] * len(texts)) if self.form in ("i2t", "qa") else (texts, paths)

    def target(
        self, text: str, path: str, captioned: bool, row: dict[str, Any], find: ImageFinder
    ) -> Item:
        """Return a candidate; `captioned`: the row's first has a text."""
        if self.form in ("i2t", "qa"):
            if not text:
                raise InputError("a candidate has no text")
            return Item(text, (), "", text)
        instruction = _text(row, "tgt_inst").replace(TOKEN, "")
        if captioned:
            written = _joined(instruction + " " + text, "") + "\n"
        else:  # only text-to-image tasks end these in a newline
            written = _joined(instruction, "") + ("\n" if self.form == "t2i" else "")
        return Item(text.strip(), (find.need(path),), instruction.strip(), written)

    def official_key(self, text: str, path: str) -> Any:
        """Return the key by which VLM2Vec's code for MMEB-V2 tells candidates apart."""
        keys: dict[str, Callable[[], Any]] = {
            "i2t": lambda: text,
            "qa": lambda: text,
            "t2i": lambda: path,
            "i2i": lambda: path + ":" + text.strip('"'),
        }
        return keys[self.form]()


def _joined(instruction: str, text: str) -> str:
    """Return image, instruction and text as `process_input_text` and its caller join them."""
    prompt = instruction + (" " + text if text else "")
    return (VISUAL + " " + prompt).replace(" \n", "\n")


def _strings_of(row: dict[str, Any], task: Task) -> Strings:
    for kind, needed in (
        (InstructStrings, ("qry_inst", "qry_text", "tgt_text")),
        (Strings, ("qry_text", "tgt_text")),
    ):
        if all(name in row for name in needed):
            return kind(task)
    raise InputError(
        f"its columns are {', '.join(row)}, expected qry_text, qry_img_path, tgt_text and "
        "tgt_img_path; it is no file of MMEB-eval or MMEB_Test_Instruct"
    )


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"its {name} is a {type(value).__name__}, expected text")
    return value
