"""Weight names: one declarative table of patterns, read in both directions.

    Row("decoder.blocks.*.out.weight", ("layers.*.o_proj.weight",))           one to one
    Row("decoder.blocks.*.qkv.weight", ("layers.*.q_proj.weight", ...), ("q", "kv", "kv"))   fused

`*` stands for one part of a dotted name, `**` for any rest. Reading is idempotent: names that
already are ours stay. Nothing is dropped silently: a tensor that no row matches is an error that
names it. The rows of each model family are defined beside its reader, for example in
`transformers/weights.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from visavis.errors import CheckpointError

MAX_LISTED = 6

Convert = Callable[[str, Tensor], Tensor]  # our name and tensor -> the tensor to keep
Sizes = Callable[[int], Mapping[str, int]]  # layer -> rows of each named part ("q", "kv", "ffn")


@dataclass(frozen=True)
class MappingRow:
    """One of our tensors and what the other layout calls it.

    Args:
        ours: our name.
        theirs: their name; several names are tensors that stand one below the other in ours.
        sizes: of several names, what the rows of each are called in `Sizes`.
        unit_axes: how many leading axes of size 1 theirs has and ours does not have.
        axes: sizes of the axes behind their first that are one axis in ours.
    """

    ours: str
    theirs: tuple[str, ...]
    sizes: tuple[str, ...] = ()
    unit_axes: int = 0
    axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class NameTable:
    """A layout.

    Args:
        rows: every tensor the layout may hold.
        aliases: other spellings and the one that rows use, e.g. of an older generation of files;
            tried in order, each on the result of those before it.
        ignored: names (as rows spell them) that are known and not needed.
    """

    rows: tuple[MappingRow, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def canonical(self, name: str) -> str:
        """Return their name in the spelling that rows use."""
        for pattern, target in self._aliases:
            if match := pattern.fullmatch(name):
                name = fill(target, match.groups())
        return name

    def part_of(self, name: str) -> tuple[MappingRow, int, tuple[str, ...]] | None:
        """Return the row their name belongs to, its place in it, and what the stars stand for."""
        for pattern, row, place in self._theirs:
            if match := pattern.fullmatch(name):
                return row, place, match.groups()
        return None

    def row_of(self, name: str) -> tuple[MappingRow, tuple[str, ...]] | None:
        """Return the row our name belongs to, and what the stars stand for."""
        for pattern, row in self._ours:
            if match := pattern.fullmatch(name):
                return row, match.groups()
        return None

    def theirs(self, ours: str) -> tuple[str, ...]:
        """Return the names of our tensor in the other layout; empty if no row has it.

        The spelling is that of modules in the current version of the library.
        """
        found = self.row_of(ours)
        if found is None:
            return ()
        return tuple(self._newest(fill(name, found[1])) for name in found[0].theirs)

    def _newest(self, name: str) -> str:
        for spelling, rows in self.aliases:  # of which the first are the newest
            if match := compiled(rows).fullmatch(name):
                return fill(spelling, match.groups())
        return name

    def is_ignored(self, name: str) -> bool:
        return any(pattern.fullmatch(name) for pattern in self._ignored)

    @cached_property
    def _aliases(self) -> list[tuple[re.Pattern[str], str]]:
        return [(compiled(pattern), target) for pattern, target in self.aliases]

    @cached_property
    def _theirs(self) -> list[tuple[re.Pattern[str], MappingRow, int]]:
        return [
            (compiled(name), row, place)
            for row in self.rows
            for place, name in enumerate(row.theirs)
        ]

    @cached_property
    def _ours(self) -> list[tuple[re.Pattern[str], MappingRow]]:
        return [(compiled(row.ours), row) for row in self.rows]

    @cached_property
    def _ignored(self) -> list[re.Pattern[str]]:
        return [compiled(pattern) for pattern in self.ignored]


def to_ours(
    tensors: Mapping[str, Tensor],
    table: NameTable,
    expected: Mapping[str, tuple[int, ...]],
    sizes: Sizes,
    *,
    where: str,
    convert: Convert = lambda _, tensor: tensor,
) -> dict[str, Tensor]:
    """Return the tensors under our names, fused where ours are.

    Args:
        tensors: by their names, in any spelling the table knows, or already by ours.
        expected: name and shape of every tensor the model needs.
        sizes: rows of the parts of fused tensors, by layer.
        where: the file or folder, for messages.
        convert: what is done to each tensor when it has been read.

    Raises:
        CheckpointError: listing what is missing, unexpected, there twice or of another shape.
    """
    state: dict[str, Tensor] = {}
    groups: dict[str, _Group] = {}
    problems = []
    for name in tensors:
        if name in expected:
            state[name] = tensors[name]
            continue
        spelled = table.canonical(name)
        part = table.part_of(spelled)
        ours = fill(part[0].ours, part[2]) if part else ""
        if part is None or ours not in expected:
            if not table.is_ignored(spelled):
                problems.append(f"unexpected {name}")
            continue
        row, place, stars = part
        group = groups.setdefault(ours, _Group(row, stars))
        if place in group.found:
            problems.append(f"{name} and {group.found[place]} are the same tensor")
        group.found[place] = name
    # The largest first: what is read and not kept then adds to little else.
    for ours, shape in sorted(expected.items(), key=lambda item: -math.prod(item[1])):
        if ours in groups:
            if ours in state:
                problems.append(f"{ours} and {groups[ours].names()[0]} are the same tensor")
            state[ours] = groups[ours].fuse(tensors, shape, sizes, problems, partial(convert, ours))
        elif ours in state:
            problems += _misshapen(ours, state[ours], shape)
            state[ours] = convert(ours, state[ours])
        else:
            known = table.row_of(ours)
            absent = _Group(*known).names() if known else [ours]
            problems += [f"missing {name}" for name in absent]
    _refuse(problems, where)
    return state


@dataclass
class _Group:
    """The tensors that make one of ours, as far as found."""

    row: MappingRow
    stars: tuple[str, ...]
    found: dict[int, str] = field(default_factory=dict)  # place in the row -> name as found

    def names(self) -> list[str]:
        wanted = enumerate(self.row.theirs)
        return [self.found.get(place, fill(name, self.stars)) for place, name in wanted]

    def fuse(
        self,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, ...],
        sizes: Sizes,
        problems: list[str],
        convert: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return our tensor; what keeps it from being made is added to `problems`."""
        known = sizes(int(self.stars[0]) if self.stars else 0)
        heights = [known[size] for size in self.row.sizes] or [*shape[:1]] or [1]
        whole, start, wrong = torch.empty(0), 0, []
        for place, (name, height) in enumerate(zip(self.names(), heights, strict=True)):
            if place not in self.found:
                wrong.append(f"missing {name}")
                continue
            part = tensors[name]
            for _ in range(self.row.unit_axes):  # an axis that is not 1 stays and is refused
                part = part.squeeze(0) if part.dim() > len(shape) else part
            if self.row.axes and part.shape[1:] == self.row.axes:
                part = part.flatten(1)
            wrong += _misshapen(name, part, (height, *shape[1:]) if shape else ())
            if wrong:
                continue
            if len(heights) == 1:
                return convert(part)
            if place == 0:  # filled part by part: two copies of all are never held
                whole = part.new_empty((sum(heights), *shape[1:]))
            whole[start : start + height] = part
            start += height
        problems += wrong
        return whole if wrong else convert(whole)


def to_theirs(state: Mapping[str, Tensor], table: NameTable, sizes: Sizes) -> dict[str, Tensor]:
    """Return the tensors under their names, split where theirs are; the inverse of `to_ours`.

    Raises:
        CheckpointError: a name is in no row, or a fused tensor has another number of rows.
    """
    tensors: dict[str, Tensor] = {}
    problems = []
    for name, tensor in state.items():
        found = table.row_of(name)
        if found is None:
            if table.part_of(name):
                tensors[name] = tensor
            else:
                problems.append(f"unexpected {name}")
            continue
        row, stars = found
        parts: tuple[Tensor, ...] = (tensor,)
        if row.sizes:
            known = sizes(int(stars[0]) if stars else 0)
            lengths = [known[size] for size in row.sizes]
            if sum(lengths) != len(tensor):
                problems.append(f"{name} has {len(tensor)} rows, expected {sum(lengths)}")
                continue
            parts = tensor.split(lengths)
        for pattern, part in zip(row.theirs, parts, strict=True):
            part = part[(None,) * row.unit_axes].contiguous()
            tensors[fill(pattern, stars)] = part.unflatten(1, row.axes) if row.axes else part
    _refuse(problems, "the model")
    return tensors


def compiled(pattern: str) -> re.Pattern[str]:
    """Return the regular expression of a name pattern; each star is a group.

    Example:
        "layers.*.weight" matches "layers.11.weight" and not "layers.1.mlp.weight"
    """
    parts = re.split(r"(\*\*|\*)", pattern)
    groups = {"**": "(.+)", "*": r"([^.]+)"}
    return re.compile("".join(groups.get(part, re.escape(part)) for part in parts))


def fill(pattern: str, stars: Iterable[str]) -> str:
    """Return a pattern with its stars replaced, in order."""
    values = iter(stars)
    return re.sub(r"\*\*|\*", lambda _: next(values), pattern)


def _misshapen(name: str, tensor: Tensor, shape: tuple[int, ...]) -> list[str]:
    found = tuple(tensor.shape)
    return [] if found == shape else [f"{name} has shape {found}, expected {shape}"]


def _refuse(problems: list[str], where: str) -> None:
    if not problems:
        return
    more = f" and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
    raise CheckpointError(
        f"the tensors of {where} do not fit its config: {'; '.join(problems[:MAX_LISTED])}{more}. "
        "Expected every tensor the config describes and no other; a file is missing, or the "
        "config belongs to other weights."
    )
