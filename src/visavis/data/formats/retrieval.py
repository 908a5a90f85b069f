"""The rows that VLM2Vec and LLaVE train on: MMEB-train, LLaVA-Hound, ViDoRe, VisRAG.

    mmeb         {qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path}
    llava-hound  {id, video, conversations: [human with <video>, gpt]}
    vidore       {image, query, answer}: questions about a page, their answers as targets
    visrag       {query, image, source}: queries and the page that answers them

Texts are those of VLM2Vec's code, blanks included. What stands behind a picture's token (a newline,
a blank) is left to the model's profile.
"""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import Any, Literal

from visavis.data.formats.place import Options, Place, field, listed
from visavis.data.formats.rows import Row
from visavis.data.mmeb_strings import (
    HOUND_QUESTION,
    HOUND_RETRIEVAL,
    VISRAG_TRAINING,
    Strings,
)
from visavis.data.samples import Match
from visavis.errors import InputError
from visavis.prompt import Message, Part, Prompt, Text, Visual

_TOKEN = re.compile(r"(?:<\|image_1\|>|<image>|<\|image_pad\|>|<video>)\n?")


class HoundOptions(Options):
    """Options of `llava-hound`.

    Args:
        mode: `qa`: question with video → answer; `caption_retrieval`: question with video → what it
            shows; `video_retrieval`: what it shows → video.
        frames: of each video; None: as many as the model takes. VLM2Vec takes 8.
    """

    mode: Literal["qa", "caption_retrieval", "video_retrieval"]
    frames: int | None = None


def mmeb(row: Row, place: Place, options: Options) -> Match:
    """Return a row of MMEB-train.

    A token without a picture (WebQA's queries have one) is dropped, a picture without a token
    stands first.
    """
    texts = listed(row.get("neg_text"))
    paths = listed(row.get("neg_image_path"))
    negatives = [
        _marked(text or "", listed(path), place)
        for text, path in zip_longest(texts, paths)
        if text or path
    ]
    return Match(
        row["id"],
        _marked(field(row, "qry", str), listed(row.get("qry_image_path")), place),
        _marked(field(row, "pos_text", str), listed(row.get("pos_image_path")), place),
        tuple(negatives),
    )


def _marked(text: str, paths: list[Any], place: Place) -> Prompt:
    """Return a text with its picture in the place of its token."""
    found = list(_TOKEN.finditer(text))
    if len(paths) > 1 or len(found) > 1:
        raise InputError(
            f"{text[:60]!r} has {len(found)} image tokens and {len(paths)} pictures, expected at "
            "most one of each"
        )
    if not paths:
        return _prompt(Text(_TOKEN.sub("", text)))
    picture = place.image(paths[0])
    if not found:
        return _prompt(picture, Text(text))
    return _prompt(Text(text[: found[0].start()]), picture, Text(text[found[0].end() :]))


def hound(row: Row, place: Place, options: HoundOptions) -> Match:
    """Return a row of LLaVA-Hound."""
    turns = field(row, "conversations", list, what="a question and an answer")
    values = [str(turn["value"]) for turn in turns if isinstance(turn, dict) and "value" in turn]
    if len(turns) != 2 or len(values) != 2:
        raise InputError(
            f"its conversation has {len(turns)} turns, expected a question and an answer as "
            "{from, value}"
        )
    question, answer = values
    video = place.video(row.get("video"), options.frames)
    if options.mode == "video_retrieval":
        strings = HOUND_RETRIEVAL
        query, target = _prompt(Text(strings.query + answer)), _prompt(Text(strings.target), video)
    else:
        before = HOUND_QUESTION if options.mode == "qa" else ""
        query, target = _filmed(before + question, video), _prompt(Text(answer))
    return Match(row["id"], query, target)


def _filmed(text: str, video: Visual) -> Prompt:
    found = list(_TOKEN.finditer(text))
    if len(found) != 1:
        raise InputError(f"its question has {len(found)} <video>, expected one: {text[:60]!r}")
    return _prompt(Text(text[: found[0].start()]), video, Text(text[found[0].end() :]))


def vidore(row: Row, place: Place, options: Options) -> Match:
    """Return a row of vidore/colpali_train_set."""
    query = _prompt(place.image(row.get("image")), Text(field(row, "query", str)))
    return Match(row["id"], query, _prompt(Text(field(row, "answer", str))))


def visrag(row: Row, place: Place, options: Options) -> Match:
    """Return a row of VisRAG's training data; sources that are not its own get no description."""
    strings = VISRAG_TRAINING.get(row.get("source") or "", Strings("", ""))
    query = f"{strings.query} {field(row, 'query', str)} ".removeprefix(" ")
    target = f"{strings.target}  " if strings.target else ""
    return Match(
        row["id"], _prompt(Text(query)), _prompt(Text(target), place.image(row.get("image")))
    )


def _prompt(*parts: Part) -> Prompt:
    kept = tuple(part for part in parts if not isinstance(part, Text) or part.text)
    return Prompt((Message("user", kept),))
