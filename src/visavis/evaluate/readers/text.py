"""The text tasks of MMEB-V3: queries, a corpus, and qrels or gold ids in the queries' rows.

BRIGHT, FollowIR, InfoSearch, LongEmbed, MultiConIR, NanoBEIR and R2MED lie in parquet or JSON lines
with names of their own for the same fields. As in VLM2Vec's code, FollowIR's and InfoSearch's
queries begin with an instruction of the row, and scores of 0 or less are no labels.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from visavis.evaluate.items import Item, MissingFilesError, Problem, RetrievalData
from visavis.evaluate.metrics import Relevant
from visavis.evaluate.suite import Task
from visavis.evaluate.tables import find_first, iterate_rows

HOMES = ("", "MMEB-V3/")
QUERY_IDS = ("_id", "id", "qid", "query_id", "query-id")
TEXTS = ("text", "query", "query_content", "short_query")
CORPUS_IDS = ("_id", "id", "doc_id", "document_id", "corpus-id")
QREL_QUERIES = ("query_id", "query-id", "qid", "q_id", "id")
QREL_DOCUMENTS = ("corpus_id", "corpus-id", "doc_id", "document_id", "p_id")
Row = dict[str, Any]


def read(task: Task, root: Path, *, compat: str = "corrected") -> RetrievalData:
    """Return the queries and documents of a task.

    Raises:
        MissingFilesError: its files are not there.
        InputError: they are damaged.
    """
    files = {part: _find(task, root, part) for part in ("queries", "corpus", "qrels")}
    data = RetrievalData(sources=[path for paths in files.values() for path in paths])
    numbers: dict[str, int] = {}
    for row in iterate_rows(files["corpus"]):
        name = _first(row, CORPUS_IDS)
        text = str(row.get("text") or row.get("content") or "")
        if row.get("title") and text:
            text = f"{row['title']}\n{text}"
        if not name or not text:
            data.problems.append(Problem(f"document {name}", f"has no {'text' if name else 'id'}"))
            continue
        if name in numbers:
            data.problems.append(Problem(f"document {name}", "this id stands twice in the corpus"))
            continue
        numbers[name] = len(data.candidates)
        data.candidates.append(Item(text, (), "", text))
        data.candidate_ids.append(name)
    grades = _grades(files["qrels"])
    for row in iterate_rows(files["queries"]):
        name, text = _first(row, QUERY_IDS), _first(row, TEXTS)
        instruction = str(row.get(task.get("instruction_field", "")) or "")
        wanted = grades.get(name, {}) if files["qrels"] else _gold(row)
        lost = [document for document in wanted if document not in numbers]
        if not text or not wanted or lost:
            reason = "has no text" if not text else "has no relevant document"
            reason = f"its document {lost[0]} is not in the corpus" if lost else reason
            data.problems.append(Problem(f"query {name}", reason))
            continue
        data.queries.append(Item(text, (), instruction, f"{instruction} {text}".strip()))
        data.query_ids.append(name)
        data.relevant.append(Relevant.of({numbers[d]: grade for d, grade in wanted.items()}))
    return data


def _find(task: Task, root: Path, part: str) -> list[Path]:
    name = task.get(part)
    if name is None:
        return []
    found = find_first(root, [home + name for home in HOMES])
    if not found:
        raise MissingFilesError(f"{name} is missing below {root}; see --check for commands")
    return found


def _grades(files: list[Path]) -> dict[str, dict[str, float]]:
    grades: dict[str, dict[str, float]] = defaultdict(dict)
    for row in iterate_rows(files):
        score = float(row.get("label", row.get("score", 1)))
        if score > 0:
            grades[_first(row, QREL_QUERIES)][_first(row, QREL_DOCUMENTS)] = score
    return grades


def _gold(row: Row) -> dict[str, float]:
    """Return the documents that a query's own row names as right."""
    ids = row.get("gold_ids") or row.get("gold_ids_long") or []
    ids = json.loads(ids) if isinstance(ids, str) else ids
    return {str(name): 1.0 for name in ids}


def _first(row: Row, names: tuple[str, ...]) -> str:
    """Return the first of some fields that a row has, as text."""
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), "")
