"""Memory that runs out, in words: what was being done, and what would take less; and memory that is
not needed any more.

Knows the errors of Python and PyTorch by their names; imports no torch.
"""

from __future__ import annotations

import ctypes
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from visavis.errors import OutOfMemoryError


@contextmanager
def enough_memory(doing: str, instead: str) -> Iterator[None]:
    """Run a block; an error of the allocator becomes one that says what was being done.

    Args:
        doing: what the block does, after "while".
        instead: what to do about it, a sentence.

    Raises:
        OutOfMemoryError: the block ran out of memory. What it held is returned first.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they would keep alive what they held
        said = str(error).strip().partition("\n")[0]
        raise OutOfMemoryError(
            f"memory ran out while {doing}{f' ({said})' if said else ''}. {instead}"
        ) from error


def ran_out(error: BaseException) -> bool:
    """Return whether an error says that there is no more memory, of the machine or of its GPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "you tried to allocate" in str(error)


def give_back() -> None:
    """Let the C library return freed memory to the system, where it can; else it keeps some."""
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
