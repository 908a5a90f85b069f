"""Fields of the web page's forms and addresses."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from urllib.parse import parse_qs

from starlette.datastructures import FormData, UploadFile

from visavis.errors import InputError
from visavis.index.filters import Filter


def texts(form: FormData) -> dict[str, str]:
    """Return the fields that are texts."""
    return {name: value for name, value in form.items() if isinstance(value, str)}


def parameters(query: str) -> dict[str, str]:
    """Return the fields of the query of an address."""
    try:
        return {key: values[-1] for key, values in parse_qs(query, max_num_fields=16).items()}
    except ValueError:
        raise InputError("the address has more than 16 fields") from None


async def uploaded(form: FormData, name: str) -> bytes | None:
    """Return an uploaded file; None: there is none.

    Raises:
        InputError: the field is a text.
    """
    upload = form.get(name)
    if isinstance(upload, str):
        raise InputError(f"{name} is a text, expected a file")
    return await upload.read() if isinstance(upload, UploadFile) else None


def number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a field that is a number, 0 or more.

    Raises:
        InputError: it is none, or missing without a default.
    """
    value = given.get(name, "")
    if not value and default is not None:
        return default
    if not (value.isascii() and value.isdigit() and len(value) <= 18):
        raise InputError(f"{name} is {value[:40]!r}, expected a number")
    return int(value)


def filter_of(given: Mapping[str, str]) -> Filter | None:
    """Return the filter of the fields kinds, folder, after and before; None: there are none.

    Days are those of the server's time zone; both ends belong to the range.

    Raises:
        InputError: a field has an unusable value.
    """
    kinds = tuple(kind for kind in given.get("kinds", "").split(",") if kind)
    after, before = _day(given, "after"), _day(given, "before")
    end = None if before is None else before + timedelta(days=1)
    found = Filter(
        kinds=kinds,
        folder=given.get("folder", ""),
        after=_seconds(after),
        before=_seconds(end),
    )
    return None if found == Filter() else found


def _day(given: Mapping[str, str], name: str) -> date | None:
    value = given.get(name, "")
    try:
        return date.fromisoformat(value) if value else None
    except ValueError:
        raise InputError(f"{name} is {value[:40]!r}, expected a day such as 2024-01-31") from None


def _seconds(day: date | None) -> float | None:
    return None if day is None else datetime.combine(day, time()).timestamp()
