"""A GGUF model cut into files, `name-00001-of-00003.gguf` and so on, read as one.

Every part is a whole GGUF file; the first one's metadata describes the model. Knows no tensor by
its name.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from visavis.checkpoints.gguf.reader import GGUFFile, TensorInfo, open_gguf
from visavis.errors import CheckpointError

NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
MAX_LISTED = 5


class SplitGGUF(GGUFFile):
    """Several open files as one: tensors stay in the file that holds them."""

    def __init__(self, parts: list[GGUFFile]) -> None:
        first = parts[0]
        metadata = {k: v for k, v in first.metadata.items() if not k.startswith("split.")}
        self.owner: dict[str, GGUFFile] = {}
        tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for name, info in part.tensors.items():
                if name in tensors:
                    raise CheckpointError(
                        f"{name} stands in {self.owner[name].path.name} and in {part.path.name}, "
                        "expected once; parts of two models are mixed, fetch them again."
                    )
                tensors[name], self.owner[name] = info, part
        super().__init__(first.path, b"", metadata, tensors)

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor's bytes, a read-only uint8 view of its mapped file."""
        return self.owner[name].raw(name)

    def release(self, name: str) -> None:
        self.owner[name].release(name)


def part_names(name: str) -> list[str]:
    """Return the names of all parts of a model from one of them; of a whole file, its own."""
    named = NAME.fullmatch(name)
    if named is None:
        return [name]
    return [f"{named[1]}-{n:05}-of-{named[3]}.gguf" for n in range(1, int(named[3]) + 1)]


def open_model(path: Path) -> tuple[GGUFFile, list[Path]]:
    """Open a GGUF file, with all other parts if it is one of several; return their paths too.

    Raises:
        CheckpointError: a file is damaged, or parts are missing or do not belong together.
    """
    file = open_gguf(path)
    count = file.metadata.get("split.count", 1)
    if isinstance(count, int) and count in (0, 1):
        return file, [path]
    named = NAME.fullmatch(path.name)
    if not isinstance(count, int) or named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, expected a name that ends in "
            f"-00001-of-{count!s:0>5}.gguf, by which the others are found; give the parts their "
            "names back, or join them with `llama-gguf-split --merge`."
        )
    paths = [path.with_name(name) for name in part_names(path.name)]
    missing = [one.name for one in paths if not one.is_file()]
    if missing:
        more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        raise CheckpointError(
            f"{path.parent} lacks {', '.join(missing[:MAX_LISTED])}{more} of {count} parts; fetch "
            "what is missing into the same folder."
        )
    parts = [open_gguf(one) for one in paths]
    for number, part in enumerate(parts):
        found = tuple(part.metadata.get(f"split.{key}") for key in ("no", "count"))
        if found != (number, count):
            raise CheckpointError(
                f"{part.path} says it is part {found[0]} of {found[1]}, expected {number} (from "
                f"0) of {count}; its name was changed or it belongs to another model."
            )
    whole = SplitGGUF(parts)
    total = parts[0].metadata.get("split.tensors.count", len(whole.tensors))
    if total != len(whole.tensors):
        raise CheckpointError(
            f"the {count} parts of {path} hold {len(whole.tensors)} tensors, expected {total}; "
            "parts of two models are mixed, fetch them again."
        )
    return whole, paths
