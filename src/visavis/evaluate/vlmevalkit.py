"""Answers of a run as a prediction file that VLMEvalKit scores (`run.py --mode eval`)."""

from __future__ import annotations

from pathlib import Path

from visavis.errors import InputError
from visavis.evaluate.results import read_json
from visavis.evaluate.tables import iterate_rows
from visavis.utils import write_atomically

DROPPED = ("image", "image_path")


def export_answers(run: Path, task: str, table: Path, output: Path) -> int:
    """Write VLMEvalKit's table without images and with a column `prediction`; return its rows.

    Args:
        run: the folder of a run of the suite `vqa` or `local`.
        task: whose answers; their ids are the table's `index`.
        table: the .tsv of VLMEvalKit's LMUData folder.
        output: as <model>_<dataset>.xlsx or .tsv, where VLMEvalKit looks for predictions.

    Raises:
        InputError: a row has no answer, or a file cannot be read or written.
    """
    samples = read_json(run / "tasks" / f"{task}.json")["samples"]
    answers = {sample["id"]: sample.get("answer") for sample in samples}
    rows = []
    for row in iterate_rows([table]):
        found = answers.get(str(row.get("index")))
        if found is None:
            raise InputError(
                f"index {row.get('index')} of {table.name} has no answer in {task}; the run is of "
                "another set or incomplete"
            )
        kept = {name: value for name, value in row.items() if name not in DROPPED}
        rows.append(kept | {"prediction": found})
    if output.suffix == ".xlsx":
        _write_workbook(output, rows)
    elif output.suffix == ".tsv":
        _write_table(output, rows)
    else:
        raise InputError(f"{output} ends in {output.suffix!r}, expected .xlsx or .tsv")
    return len(rows)


def _write_table(path: Path, rows: list[dict[str, str]]) -> None:
    import csv

    with write_atomically(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def _write_workbook(path: Path, rows: list[dict[str, str]]) -> None:
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(list(rows[0]))
    for row in rows:
        cells = [ILLEGAL_CHARACTERS_RE.sub("", value) for value in row.values()]
        sheet.append([int(cells[0]) if cells[0].isdigit() else cells[0], *cells[1:]])
    with write_atomically(path) as temporary:
        book.save(temporary)
