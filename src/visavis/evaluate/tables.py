"""Data files as rows: parquet, Arrow, JSON, JSON lines, CSV and TSV. Values of images stay in the
file until they are needed."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from visavis.data.readers import open_rows
from visavis.errors import InputError, VisavisError

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".json", ".csv", ".tsv")


def read_rows(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the rows of files, one file after another.

    Raises:
        InputError: a file is damaged, or of another kind.
    """
    return list(iterate_rows(paths))


def iterate_rows(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the rows of files; see `read_rows`."""
    for path in paths:
        if path.suffix in (".csv", ".tsv"):
            yield from _separated(path)
            continue
        try:
            rows = open_rows([path])
            for number in range(len(rows)):
                yield rows[number]
        except VisavisError as error:
            raise InputError(str(error)) from error
        except OSError as error:
            raise InputError(f"cannot read {path}: {error}; copy the file again") from error


def _separated(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # an image in base64 is one field; a file has a size limit
    delimiter = "\t" if path.suffix == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, delimiter=delimiter, strict=True):
                if None in row or None in row.values():
                    raise InputError(
                        f"{path.name} has a row of another length than its header, after "
                        f"{str(next(iter(row.values())))[:40]!r}; the file is cut off or not "
                        f"separated by {'tabs' if delimiter == chr(9) else 'commas'}"
                    )
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {error}; expected UTF-8 {path.suffix}") from error


def find_first(root: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files of the first pattern below `root` that matches any, sorted."""
    for pattern in patterns:
        found = sorted(path for path in root.glob(pattern) if path.is_file())
        if found:
            return found
    return []
