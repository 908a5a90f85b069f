"""Files for evaluation servers, in the exact form that LLaVA's converters write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from visavis.errors import InputError
from visavis.evaluate.tables import iterate_rows
from visavis.evaluate.vqa.answers import normalise
from visavis.evaluate.vqa.data import VqaData
from visavis.utils import write_atomically

MMBENCH_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
MMBENCH_PLACE = 6  # of the column `prediction`


def _number(text: str) -> Any:
    return int(text) if text.isdigit() else text


def vqav2(data: VqaData, answers: Mapping[str, str], path: Path) -> None:
    """A list of {question_id, answer}: all ids of test2015, those that were not asked empty."""
    ids = [question.id for question in data.questions]
    if "all_ids" in data.files:
        ids = [str(row["question_id"]) for row in iterate_rows([data.files["all_ids"]])]
    rows = [
        {
            "question_id": _number(name),
            "answer": normalise(answers[name], "official") if name in answers else "",
        }
        for name in ids
    ]
    _write_json(path, rows)


def vizwiz(data: VqaData, answers: Mapping[str, str], path: Path) -> None:
    """A list of {image, answer}."""
    rows = [
        {"image": q.truth["row"]["image"], "answer": normalise(answers[q.id], "official")}
        for q in data.questions
        if q.id in answers
    ]
    _write_json(path, rows)


def gqa(data: VqaData, answers: Mapping[str, str], path: Path) -> None:
    """A list of {questionId, prediction} for GQA's eval.py."""
    rows = [
        {"questionId": q.id, "prediction": answers[q.id].rstrip(".").lower()}
        for q in data.questions
        if q.id in answers
    ]
    _write_json(path, rows)


def mmvet(data: VqaData, answers: Mapping[str, str], path: Path) -> None:
    """{"v1_<id>": text}, as MM-Vet's evaluator takes it."""
    rows = {
        f"v1_{q.id.removeprefix('v1_')}": answers[q.id] for q in data.questions if q.id in answers
    }
    _write_json(path, rows, indent=2)


def seed(data: VqaData, answers: Mapping[str, str], path: Path) -> None:
    """JSON lines of {question_id, prediction}."""
    lines = [
        json.dumps({"question_id": q.id, "prediction": answers[q.id]})
        for q in data.questions
        if q.id in answers
    ]
    with write_atomically(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def mmmu(data: VqaData, answers: Mapping[str, str], path: Path) -> None:
    """{id: answer}, as MMMU's main_eval_only.py takes it."""
    _write_json(path, {q.id: answers[q.id] for q in data.questions if q.id in answers})


def mmbench(data: VqaData, answers: Mapping[str, str], path: Path) -> None:
    """A workbook of the table without images, with a column `prediction` at place 6.

    Control characters, which a workbook cannot hold, are left out of predictions.

    Raises:
        InputError: the package openpyxl is missing.
    """
    try:
        from openpyxl import Workbook
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise InputError(
            "MMBench's workbook is written with the package openpyxl, which is not installed; "
            "`pip install 'visavis[evaluate]'`"
        ) from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for number, row in enumerate(iterate_rows([data.files["table"]])):
        names = [name for name in row if name not in MMBENCH_DROPPED]
        if not number:
            sheet.append([*names[:MMBENCH_PLACE], "prediction", *names[MMBENCH_PLACE:]])
        cells = [_cell(row[name]) for name in names]
        found = answers.get(str(row["index"]), answers.get(f"{row['index']}/0"))
        found = None if found is None else ILLEGAL_CHARACTERS_RE.sub("", found)
        sheet.append([*cells[:MMBENCH_PLACE], found, *cells[MMBENCH_PLACE:]])
    with write_atomically(path) as temporary:
        book.save(temporary)


def _cell(value: str) -> Any:
    """Return a cell as pandas writes it: whole numbers as numbers, nothing for empty text."""
    if value == "" or value.lower() == "nan":
        return None
    return int(value) if value.isdigit() else value


def _write_json(path: Path, value: Any, indent: int | None = None) -> None:
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent), encoding="utf-8")


WRITERS: dict[str, tuple[str, Callable[[VqaData, Mapping[str, str], Path], None]]] = {
    "vqav2": (".json", vqav2),
    "vizwiz": (".json", vizwiz),
    "gqa": (".json", gqa),
    "mmvet": (".json", mmvet),
    "seed": (".jsonl", seed),
    "mmmu": (".json", mmmu),
    "mmbench": (".xlsx", mmbench),
}
