"""What a trained model says to a few samples, for the report: answers, and what queries find.

Samples that no step has drawn come first; where all were drawn, it says so. Knows objectives and
the model; draws no page (see `report.py`).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from visavis.checkpoints.checkpoint import Checkpoint
from visavis.errors import VisavisError
from visavis.generate.engine import generate
from visavis.generate.sampling import Sampler, Sampling
from visavis.inputs import Image, Prompt
from visavis.model.pooling import pooled
from visavis.processing.chat_template import Encoded
from visavis.processing.images import content_hash, decode_image
from visavis.train.gradcache import token_chunks
from visavis.train.objectives import Task
from visavis.train.objectives.contrastive import ContrastiveTask, JointTask
from visavis.train.objectives.generative import GenerativeTask

SHOWN = 6  # samples of each objective
CANDIDATES = 48  # targets that a query is looked up among
NEW_TOKENS = 64
THUMBNAIL = (168, 168)
CHUNK_TOKENS = 2048

Row = dict[str, Any]


def predict(loaded: Checkpoint, task: Task) -> list[Row]:
    """Return rows of {kind, id, drawn, query, expected, found, right, …}; a sample that cannot be
    shown is a row with its problem."""
    rows: list[Row] = []
    for part in task.parts if isinstance(task, JointTask) else [task]:
        if isinstance(part, GenerativeTask):
            rows += _answers(loaded, part)
        elif isinstance(part, ContrastiveTask):
            rows += _matches(loaded, part)
    return rows


def _answers(loaded: Checkpoint, task: GenerativeTask) -> list[Row]:
    rows = []
    for drawn, sample in _samples(task, SHOWN):
        row: Row = {"kind": "answer", "id": sample.id, "drawn": drawn}
        try:
            row |= _answer(loaded, task, sample.id, sample.prompt)
        except VisavisError as error:
            row["problem"] = str(error)
        rows.append(row)
    return rows


def _answer(loaded: Checkpoint, task: GenerativeTask, id: str, prompt: Prompt) -> Row:
    roles = [message.role for message in prompt.messages]
    first = roles.index("assistant")
    question = Prompt(prompt.messages[:first])
    encoder, vlm = task.batcher.encoder, loaded.vlm
    encoded = encoder.chat(question)
    room = encoder.context_length - len(encoded.token_ids)
    ids = generate(
        vlm,
        task.batcher.pack([question], [encoded], ids=[id]),
        Sampler(Sampling()),
        max_new_tokens=min(NEW_TOKENS, room),
        stop_ids=frozenset(loaded.specials.eot_ids),
    )
    text = loaded.tokenizer.decode(list(ids), skip_special_tokens=True)
    if encoder.stop:
        text = text.partition(encoder.stop)[0]
    expected = Prompt(prompt.messages[first : first + 1])
    return {
        "query": shown(question),
        "expected": shown(expected),
        "found": {"text": text.strip(), "pictures": []},
        "right": text.strip() == expected.text.strip(),
    }


def _matches(loaded: Checkpoint, task: ContrastiveTask) -> list[Row]:
    samples = _samples(task, CANDIDATES)
    item = task.batcher.item
    try:
        keys = [one.target.content_key(content_hash) for _, one in samples]
        distinct = dict(zip(keys, (one for _, one in samples), strict=True))
        queries = [
            (one.id, one.query, item(one.id, one.query, one.instruction)) for _, one in samples
        ]
        targets = [
            (one.id, one.target, item(one.id, one.target, one.target_instruction))
            for one in distinct.values()
        ]
        similarity = _vectors(loaded, task, queries) @ _vectors(loaded, task, targets).T
    except VisavisError as error:
        return [{"kind": "match", "id": "", "drawn": False, "problem": str(error)}]
    found = list(distinct)
    best = similarity.argmax(1).tolist()
    right = [found[place] == key for place, key in zip(best, keys, strict=True)]
    return [
        {
            "kind": "match",
            "id": one.id,
            "drawn": drawn,
            "query": shown(one.query),
            "expected": shown(one.target),
            "found": shown(targets[place][1]),
            "score": round(float(similarity[number, place]), 3),
            "right": right[number],
            "hits": sum(right),
            "of": len(samples),
            "among": len(targets),
        }
        for number, (place, (drawn, one)) in enumerate(
            islice(zip(best, samples, strict=True), SHOWN)
        )
    ]


@torch.inference_mode()
def _vectors(
    loaded: Checkpoint, task: ContrastiveTask, items: Sequence[tuple[str, Prompt, Encoded]]
) -> Tensor:
    found = []
    for chunk in token_chunks([len(one.token_ids) for _, _, one in items], CHUNK_TOKENS):
        own = [items[i] for i in chunk]
        batch = task.batcher.pack(
            [prompt for _, prompt, _ in own],
            [encoded for _, _, encoded in own],
            ids=[id for id, _, _ in own],
        )
        found.append(pooled(loaded.vlm, batch, task.pooling).float().cpu())
    return torch.cat(found)


def _samples(task: GenerativeTask | ContrastiveTask, limit: int) -> list[tuple[bool, Any]]:
    """Return samples, and whether a step has drawn them."""
    return [
        (drawn, task.sources[name][number])
        for drawn, (name, number) in islice(task.mixture.all_samples(), limit)
    ]


def shown(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as {text, pictures}, its first pictures as small data URIs."""
    pictures = [
        thumbnail(part) if isinstance(part, Image) else type(part).__name__.lower()
        for part in prompt.visuals[:2]
    ]
    return {"text": prompt.text, "pictures": pictures}


def thumbnail(image: Image) -> str:
    """Return a small picture as a data URI."""
    small = decode_image(image)
    small.thumbnail(THUMBNAIL)
    file = io.BytesIO()
    small.convert("RGB").save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
