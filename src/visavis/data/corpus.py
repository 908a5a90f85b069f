"""The corpus of hard-negative mining: queries and candidate items, deduplicated by content.

    example ──► key of its query, key of its query's images, place of its target among the items
    item    ──► key of its content; equal items are kept once

Only keys and numbers are in memory; a prompt is built again when it is embedded or written. Items
that cannot be read are left out and listed in `left_out`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from visavis.data.examples import ContrastiveExample, Sample
from visavis.errors import InputError, VisavisError
from visavis.inputs import Image, Message, Prompt, Stored, Text, Visual
from visavis.processing.images import content_hash
from visavis.utils import track


@dataclass(frozen=True)
class CorpusEntry:
    """A sample, by numbers.

    Args:
        number: where it is among the samples.
        query: key of what its vector depends on; `images`: of its images alone, "" without.
        target: its target's place among the items.
        own: places of negatives that it has already.
    """

    number: int
    id: str
    query: str
    pictures: str
    target: int
    group: str
    own: tuple[int, ...]


@dataclass
class Items:
    """Candidate items: targets, each content once, then other items of the corpus."""

    keys: list[str] = field(default_factory=list)  # by content and instruction
    owners: list[int] = field(default_factory=list)  # a sample whose target it is; -1 - n: other n
    is_text: list[bool] = field(default_factory=list)
    places: dict[str, int] = field(default_factory=dict)  # by content

    def __len__(self) -> int:
        return len(self.keys)

    def put(self, content: str, key: str, owner: int, is_text: bool) -> int:
        """Return the place of an item, adding it if its content is new."""
        if content not in self.places:
            self.places[content] = len(self.keys)
            self.keys.append(key)
            self.owners.append(owner)
            self.is_text.append(is_text)
        return self.places[content]


class Corpus:
    """Samples and items by content.

    Args:
        samples: queries with targets; conversations are an error.
        others: more that can be found, such as a larger corpus.
        progress: show a bar on stderr; every image is read once.

    Attributes:
        left_out: what cannot be read, each with the reason.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        others: Sequence[Prompt] = (),
        *,
        progress: bool = False,
    ) -> None:
        self.samples, self.others = samples, others
        self.entries: list[CorpusEntry] = []
        self.items = Items()
        self.left_out: list[tuple[str, str]] = []
        self.hashes: dict[Path | Stored, str] = {}  # of files, which many samples may share
        self.by_query: dict[str, set[int]] = {}  # targets of one query
        self.by_group: dict[str, set[int]] = {}
        self.by_pictures: dict[str, dict[int, None]] = {}  # in the order of the samples
        wrong: list[tuple[int, list[str]]] = []  # of each entry the negatives it has
        numbers = range(len(samples))
        for number in track(numbers, "reading", weights=[1] * len(numbers), show=progress):
            name = f"sample {number + 1}"
            try:
                sample = samples[number]
                name = sample.id
                self._add(number, sample, wrong)
            except VisavisError as error:
                self.left_out.append((name, str(error)))
        for number, prompt in enumerate(others):
            try:
                self._put(prompt, self._instruction, -1 - number)
            except VisavisError as error:
                self.left_out.append((f"item {number + 1} of the corpus", str(error)))
        self._settle(wrong)

    def excluded(self, entry: CorpusEntry) -> set[int]:
        """Return the items that are not negatives of an example or are its negatives already:
        all targets of its query and of its group."""
        found = {*self.by_query[entry.query], *entry.own}
        return found | self.by_group[entry.group] if entry.group else found

    def prompt(self, place: int) -> tuple[Prompt, str]:
        """Return an item and the instruction it is embedded with."""
        owner = self.items.owners[place]
        if owner < 0:
            return self.others[-1 - owner], self._instruction
        sample = self.samples[owner]
        assert isinstance(sample, ContrastiveExample)
        return sample.target, sample.target_instruction

    def name(self, place: int) -> str:
        """Return how a message names an item."""
        owner = self.items.owners[place]
        if owner < 0:
            return f"item {-owner} of the corpus"
        return next(f"the target of {one.id}" for one in self.entries if one.number == owner)

    def query(self, entry: CorpusEntry) -> tuple[Prompt, str]:
        """Return a sample's query and the instruction it is embedded with."""
        sample = self.samples[entry.number]
        assert isinstance(sample, ContrastiveExample)
        return sample.query, sample.instruction

    @property
    def _instruction(self) -> str:
        """The target instruction, for items that are not the target of an example."""
        return next((self._match(e).target_instruction for e in self.entries), "")

    def _match(self, entry: CorpusEntry) -> ContrastiveExample:
        sample = self.samples[entry.number]
        assert isinstance(sample, ContrastiveExample)
        return sample

    def _add(self, number: int, sample: Sample, wrong: list[tuple[int, list[str]]]) -> None:
        if not isinstance(sample, ContrastiveExample):
            raise InputError("it is a conversation, expected a query with what it should find")
        query = sample.query.content_key(self._hash, instruction=sample.instruction)
        parts = (part for message in sample.query.messages for part in message.parts)
        visuals = tuple(part for part in parts if not isinstance(part, Text))
        shown = Prompt((Message("user", visuals),)) if visuals else None
        pictures = shown.content_key(self._hash) if shown else ""
        has = [one.content_key(self._hash) for one in sample.negatives]
        target = self._put(sample.target, sample.target_instruction, number)
        wrong.append((len(self.entries), has))
        self.entries.append(
            CorpusEntry(number, sample.id, query, pictures, target, sample.group, ())
        )
        self.by_query.setdefault(query, set()).add(target)
        if sample.group:
            self.by_group.setdefault(sample.group, set()).add(target)
        if pictures:
            self.by_pictures.setdefault(pictures, {})[target] = None

    def _settle(self, wrong: Sequence[tuple[int, list[str]]]) -> None:
        """Look up negatives that samples have, now that all items have their places."""
        places: Mapping[str, int] = self.items.places
        for index, contents in wrong:
            own = tuple(places[content] for content in contents if content in places)
            if own:
                old = self.entries[index]
                fields = {**vars(old), "own": own}
                self.entries[index] = CorpusEntry(**fields)

    def _put(self, prompt: Prompt, instruction: str, owner: int) -> int:
        content = prompt.content_key(self._hash)
        key = prompt.content_key(self._hash, instruction=instruction) if instruction else content
        parts = (part for message in prompt.messages for part in message.parts)
        return self.items.put(content, key, owner, all(isinstance(part, Text) for part in parts))

    def _hash(self, visual: Visual) -> str:
        """Return the content hash of an image, video or document; image files are read once."""
        source = visual.source
        if not isinstance(visual, Image) or not isinstance(source, Path | Stored):
            return content_hash(visual)
        if source not in self.hashes:
            self.hashes[source] = content_hash(visual)
        return self.hashes[source]
