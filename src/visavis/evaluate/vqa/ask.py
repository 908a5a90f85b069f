"""Asking a model many questions, with the answers kept as they come."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visavis.errors import InputError, OutOfMemoryError, VisavisError
from visavis.evaluate.prompts import model_key
from visavis.evaluate.vectors import ALONE, Workers
from visavis.evaluate.vqa.data import Question
from visavis.inputs import Prompt

if TYPE_CHECKING:
    from visavis.api import Model

CHUNK = 32  # questions


def ask_all(
    model: Model,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    folder: Path | None = None,
    workers: Workers = ALONE,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the greedy answers by question id, and the reasons of questions without one.

    Args:
        folder: keeps a line of JSON for each answer; answers to the same question by the same
            model are read from there. None: nothing is kept.
    """
    keys = {question.id: _key(model, question, max_new_tokens) for question in questions}
    kept = _read(folder) if folder else {}
    answers = {q.id: kept[keys[q.id]] for q in questions if keys[q.id] in kept}
    missing = [question for question in questions if question.id not in answers]
    progress(len(answers))
    bad: dict[str, str] = {}
    for number, first in enumerate(range(0, len(missing), CHUNK)):
        chunk = missing[first : first + CHUNK]
        if number % workers.count != workers.rank:
            continue
        found, failed = _ask(model, chunk, max_new_tokens)
        bad |= failed
        answers |= found
        if folder:
            lines = [
                {"key": keys[q.id], "question_id": q.id, "prompt": q.text, "text": found[q.id]}
                for q in chunk
                if q.id in found
            ]
            _append(folder / f"answers-{workers.rank}.jsonl", lines)
        progress(len(chunk))
    if folder and workers.count > 1:
        workers.wait()
        kept = _read(folder)
        answers |= {q.id: kept[keys[q.id]] for q in questions if keys[q.id] in kept}
        lost = [q.id for q in questions if q.id not in answers and q.id not in bad]
        bad |= dict.fromkeys(lost, "could not be asked in another process; see its messages")
    return answers, bad


def _ask(
    model: Model, questions: Sequence[Question], max_new_tokens: int
) -> tuple[dict[str, str], dict[str, str]]:
    """Ask some questions together; where that fails, halves of them, down to the one that fails."""
    prompts = [Prompt.chat(question.text, question.images) for question in questions]
    try:
        replies = model.chat_many(prompts, max_new_tokens=max_new_tokens)
    except OutOfMemoryError:
        raise
    except VisavisError as error:
        if len(questions) == 1:
            return {}, {questions[0].id: str(error)}
        half = len(questions) // 2
        first = _ask(model, questions[:half], max_new_tokens)
        second = _ask(model, questions[half:], max_new_tokens)
        return first[0] | second[0], first[1] | second[1]
    return {q.id: r.text.strip() for q, r in zip(questions, replies, strict=True)}, {}


def _key(model: Model, question: Question, max_new_tokens: int) -> str:
    text = f"{model_key(model)} {question.key()} {max_new_tokens}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _read(folder: Path) -> dict[str, str]:
    """Return kept answers by key; a line that was cut off by a kill is no answer."""
    found: dict[str, str] = {}
    if not folder.is_dir():
        return found
    for path in sorted(folder.glob("answers-*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            found[entry["key"]] = entry["text"]
    return found


def _append(path: Path, lines: Sequence[dict[str, str]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.is_file() and path.stat().st_size and path.read_bytes()[-1:] != b"\n"
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" if torn else "")
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path}: {error}; give another --output") from error
