"""Checks of training data: `visavis data check`.

Every example is built and every image decoded, as training would. Reported are records that cannot
be used, unreadable images, conversations without a learned token, sequences that are too long,
duplicates, and examples that are both trained and tested on.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from visavis.data.datasets import SOURCES, is_made
from visavis.data.examples import Conversation, Sample, estimated_tokens
from visavis.data.readers import find_files, open_rows
from visavis.data.sources import Source, SourceConfig, open_data_source
from visavis.errors import TrainError, VisavisError
from visavis.inputs import Image, Part, Prompt, Stored, Text, Video
from visavis.processing.config import VideoConfig
from visavis.processing.images import content_hash, decode_image
from visavis.processing.prompt_encoder import PromptEncoder
from visavis.processing.video import read_frames

WINDOW = 64  # samples whose pictures are decoded side by side
EDGES = tuple(16 << power for power in range(12))  # of the histogram's bars, in tokens

Pictures: TypeAlias = dict[Part, str | Exception]  # hash of the content, or why there is none
Kind: TypeAlias = Literal["source", "record", "picture", "masked", "long", "leak"]
ERRORS: dict[Kind, str] = {
    "source": "source cannot be opened",
    "record": "record cannot be used",
    "picture": "picture missing or unreadable",
    "masked": "nothing would be learned",
    "long": "too long",
    "leak": "trained and tested on",
}


@dataclass(frozen=True)
class Problem:
    """One error: what training would stop at, or what makes its scores wrong."""

    kind: Kind
    id: str
    text: str


@dataclass(frozen=True)
class CheckedSource:
    """A source to check.

    Args:
        test: held out: nothing of it may be in the others.
        encoder: counts tokens; None: they are estimated from texts alone.
        limit: tokens of the longest sequence that its stages take.
    """

    name: str
    spec: SourceConfig
    root: Path
    test: bool = False
    encoder: PromptEncoder | None = None
    limit: int | None = None


@dataclass
class Findings:
    """Results of checking one source.

    Attributes:
        lengths: tokens of every sequence.
        copies: (id, id of the first) of samples that are the same as an earlier one of any source.
        repeated_ids: ids that several samples have.
        seen_pictures: (id, id of a training sample) of tested samples whose image was trained on.
        unused: mined negatives whose record is not there.
    """

    entry: CheckedSource
    samples: int = 0
    pictures: int = 0
    videos: int = 0
    negatives: int = 0
    lengths: array[int] = field(default_factory=lambda: array("I"))
    problems: list[Problem] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)
    repeated_ids: list[str] = field(default_factory=list)
    seen_pictures: list[tuple[str, str]] = field(default_factory=list)
    unused: int = 0

    def histogram(self) -> list[tuple[int, int]]:
        """Return (upper edge, sequences of fewer tokens than it and at least the one before)."""
        counts = [0] * (len(EDGES) + 1)
        for length in self.lengths:
            counts[bisect_right(EDGES, length)] += 1
        return [
            (edge, count) for edge, count in zip((*EDGES, 1 << 32), counts, strict=True) if count
        ]

    def quantile(self, share: float) -> int:
        """Return the length that this share of the sequences does not exceed."""
        ordered = sorted(self.lengths)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


Track: TypeAlias = Callable[[range, str], Iterable[int]]


def check(
    entries: Sequence[CheckedSource], *, track: Track = lambda numbers, name: numbers
) -> list[Findings]:
    """Look at every sample of every source.

    Args:
        track: goes through numbers of samples, showing how far it is.
    """
    seen = _Seen()
    # Tested sources come last, so that what they share with training is found there.
    found = {id(entry): _check(entry, seen, track) for entry in sorted(entries, key=_is_test)}
    return [found[id(entry)] for entry in entries]


def leave_out_bad_rows(source: Source) -> list[Problem]:
    """Keep only the samples that can be made and whose images and videos can be decoded; return
    what is wrong with the others.

    Raises:
        TrainError: none is left.
    """
    problems: list[Problem] = []
    kept: list[int] = []
    seen = _Seen()
    for start in range(0, len(source), WINDOW):
        made: list[tuple[int, Sample]] = []
        for number in range(start, min(start + WINDOW, len(source))):
            try:
                made.append((number, source[number]))
            except TrainError as error:
                problems.append(Problem("record", source.id_of(number), str(error)))
        found = seen.look(one for _, sample in made for one in _visuals(sample))
        for number, sample in made:
            wrong = [e for one in _visuals(sample) if isinstance(e := found[one], Exception)]
            if wrong:
                problems.append(Problem("picture", sample.id, str(wrong[0])))
            else:
                kept.append(number)
    if not kept:
        raise TrainError(
            f"{source.name}: none of {len(source)} records can be used; the first: "
            f"{problems[0].id!r}: {problems[0].text}"
        )
    source.keep(kept)
    return problems


def _is_test(entry: CheckedSource) -> bool:
    return entry.test


def _check(entry: CheckedSource, seen: _Seen, track: Track) -> Findings:
    findings = Findings(entry)
    try:
        source = open_data_source(entry.spec, entry.root, name=entry.name)
    except VisavisError as error:
        findings.problems.append(Problem("source", entry.name, str(error)))
        return findings
    ids: set[str] = set()
    window: list[Sample] = []
    for number in track(range(len(source)), entry.name):
        try:
            window.append(source[number])
        except TrainError as error:
            findings.problems.append(Problem("record", source.id_of(number), str(error)))
        if len(window) == WINDOW or number == len(source) - 1:
            pictures = seen.look(one for sample in window for one in _visuals(sample))
            for sample in window:
                _add(findings, sample, seen, pictures)
                if sample.id in ids:
                    findings.repeated_ids.append(sample.id)
                ids.add(sample.id)
            window = []
    if source.mined is not None:
        findings.unused = _unused(source, ids)
    return findings


def _add(findings: Findings, sample: Sample, seen: _Seen, pictures: Pictures) -> None:
    entry = findings.entry
    findings.samples += 1
    visuals = _visuals(sample)
    findings.pictures += sum(isinstance(one, Image) and not is_made(one) for one in visuals)
    findings.videos += sum(isinstance(one, Video) for one in visuals)
    findings.negatives += 0 if isinstance(sample, Conversation) else len(sample.negatives)
    broken = [pictures[one] for one in visuals if isinstance(pictures[one], Exception)]
    if broken:
        findings.problems.append(Problem("picture", sample.id, str(broken[0])))
        return
    _measure(findings, sample)
    place = f"{entry.name}: {sample.id}"
    # Negatives do not count: two samples are the same if query and target are.
    key = tuple(p.content_key(lambda v: str(pictures[v])) for p in _prompts(sample)[:2])
    first = seen.samples.setdefault(key, (place, entry.test))
    if first[0] != place:
        findings.copies.append((sample.id, first[0]))
    if entry.test and not first[1]:
        text = f"it is the training sample {first[0]}"
        findings.problems.append(Problem("leak", sample.id, text))
    for one in dict.fromkeys(visuals):
        first = seen.pictures.setdefault(str(pictures[one]), (place, entry.test))
        if entry.test and not first[1]:
            findings.seen_pictures.append((sample.id, first[0]))


def _measure(findings: Findings, sample: Sample) -> None:
    """Count tokens; note what would be masked whole, and what is too long."""
    encoder, limit = findings.entry.encoder, findings.entry.limit
    said = isinstance(sample, Conversation) and any(
        part.text.strip()
        for message in sample.prompt.messages
        if message.role == "assistant"
        for part in message.parts
        if isinstance(part, Text)
    )
    if isinstance(sample, Conversation) and not said:
        text = "all its answers are empty"
        findings.problems.append(Problem("masked", sample.id, text))
    if encoder is None:
        findings.lengths.append(estimated_tokens(sample, 0))
        return
    try:
        lengths = list(_lengths(sample, encoder))
    except VisavisError as error:
        kind: Kind = "long" if type(error).__name__ == "ContextLengthError" else "record"
        findings.problems.append(Problem(kind, sample.id, str(error)))
        return
    if said and not lengths[0][1]:
        text = "its chat format marks none of its tokens as an answer's"
        findings.problems.append(Problem("masked", sample.id, text))
    for length, _ in lengths:
        findings.lengths.append(length)
    longest = max(length for length, _ in lengths)
    if limit is not None and longest > limit:
        text = f"{longest} tokens, expected at most {limit}"
        findings.problems.append(Problem("long", sample.id, text))


def _lengths(sample: Sample, encoder: PromptEncoder) -> Iterator[tuple[int, bool]]:
    """Yield the tokens of each sequence of a sample, and whether any is learned."""
    if isinstance(sample, Conversation):
        encoded = encoder.chat(sample.prompt, add_generation_prompt=False)
        yield len(encoded.token_ids), any(encoded.loss_mask[1:])
        return
    yield len(encoder.item(sample.query, sample.instruction).token_ids), False
    for prompt in (sample.target, *sample.negatives):
        yield len(encoder.item(prompt, sample.target_instruction).token_ids), False


# ---- what was seen before ------------------------------------------------------------------------


class _Seen:
    """Samples and images by content, over all sources; each image file is decoded once."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, ...], tuple[str, bool]] = {}
        self.pictures: dict[str, tuple[str, bool]] = {}
        self.files: dict[str, str | Exception] = {}
        self.pool = ThreadPoolExecutor()

    def look(self, visuals: Iterable[Image | Video]) -> Pictures:
        """Look at images that were not looked at before, side by side."""
        distinct = list(dict.fromkeys(visuals))
        found: Pictures = {
            one: self.files[name] for one in distinct if (name := _name(one)) in self.files
        }
        new = [one for one in distinct if one not in found]
        for one, result in zip(new, self.pool.map(_examine, new), strict=True):
            found[one] = result
            if name := _name(one):
                self.files[name] = result
        return found


def _name(visual: Image | Video) -> str:
    """Return the name of an image's file, or an empty string."""
    source = visual.source
    return source.name if isinstance(source, Stored) else str(source) * isinstance(source, Path)


def _examine(visual: Image | Video) -> str | Exception:
    try:
        if isinstance(visual, Video):
            read_frames(visual, VideoConfig())
        elif not is_made(visual):
            decode_image(visual)
        return content_hash(visual)
    except VisavisError as error:
        return error


def _visuals(sample: Sample) -> list[Image | Video]:
    return [one for prompt in _prompts(sample) for one in prompt.visuals]


def _prompts(sample: Sample) -> tuple[Prompt, ...]:
    if isinstance(sample, Conversation):
        return (sample.prompt,)
    return (sample.query, sample.target, *sample.negatives)


def _unused(source: Source, ids: set[str]) -> int:
    assert source.mined is not None
    used = {*ids, *(id.rpartition("#")[0] for id in ids)}
    return sum(id not in used for id in source.mined.numbers)


# ---- what a file is ------------------------------------------------------------------------------


def guess_format(path: Path) -> str:
    """Return which format a data file or folder is in, from its first record.

    Raises:
        TrainError: it is in none that is known.
    """
    if str(path) in SOURCES:
        return "records"
    try:
        row = open_rows(find_files(str(path), Path()))[0]
    except (TrainError, IndexError):
        if os.path.isdir(path):
            return "images"
        raise
    signs = [
        ("llava", {"conversations"}),
        ("pairs", {"query", "positives"}),
        ("pairs", {"anchor", "positive"}),
        ("pairs", {"query", "positive"}),
        ("pairs", {"messages", "positive_messages"}),
        ("llava", {"messages"}),
        ("mmeb", {"qry", "pos_text"}),
        ("vidore", {"query", "answer", "image"}),
        ("visrag", {"query", "source", "image"}),
        ("scene-graph", {"predicate", "subject", "object"}),
    ]
    for name, keys in signs:
        if keys <= row.keys():
            return name
    raise TrainError(
        f"{path} has records of {', '.join(row) or 'nothing'}; expected those of one of "
        f"{', '.join(f'{name} ({chr(44).join(sorted(keys))})' for name, keys in signs)}. "
        "Name it with its format in a recipe."
    )
