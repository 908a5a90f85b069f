"""Questions of a benchmark: what is asked, about which images, and what is right."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visavis.evaluate.items import Item, Problem
from visavis.inputs import Image


@dataclass(frozen=True)
class Question:
    """One question.

    Args:
        id: unique in its task.
        text: the whole prompt, its suffix included.
        truth: what the scorer compares with: answers, labels, options.
    """

    id: str
    text: str
    images: tuple[Image, ...] = ()
    truth: dict[str, Any] = field(default_factory=dict, hash=False)

    def key(self) -> str:
        """Return 32 hex digits of what is asked."""
        item = Item(self.text, self.images)
        text = json.dumps([self.id, item.key()])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass
class VqaData:
    """The questions of a task.

    Args:
        problems: records left out, each with the reason.
        sources: files that were read.
        notes: what was found out while reading.
        files: other files of the layout that submissions need.
    """

    questions: list[Question] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    sources: list[Path] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
