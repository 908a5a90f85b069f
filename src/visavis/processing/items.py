"""The items of a call: lists of what `Prompt.of` takes, their names in messages, their batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visavis.errors import InputError
from visavis.inputs import Prompt
from visavis.processing.collate import batches
from visavis.processing.prompt_encoder import PreparedPrompt
from visavis.utils import track

DEFAULT_BATCH_TOKENS = 2048


def list_items(items: Any) -> list[Any]:
    """Return the items of `Model.embed` as a list; one item is a list of one."""
    is_image = isinstance(items, np.ndarray) and items.ndim in (2, 3)
    return list(items) if isinstance(items, list | tuple | np.ndarray) and not is_image else [items]


def list_prompts(prompts: Iterable[Any]) -> list[Any]:
    """Return prompts as a list.

    Raises:
        InputError: they are one prompt.
    """
    if isinstance(prompts, str | bytes | Mapping):
        raise InputError(f"prompts are one {type(prompts).__name__}, expected a list of prompts.")
    return list(prompts)


def name_item(item: Any) -> str:
    """Return the name of an item in messages: its files and the start of its text."""
    prompt = Prompt.of(item)
    parts = [part for message in prompt.messages for part in message.parts]
    sources = [getattr(part, "source", None) for part in parts]
    files = [str(source) for source in sources if isinstance(source, str | Path)]
    text = " ".join(prompt.text.split())
    shown = [*files, repr(text if len(text) <= 40 else f"{text[:40]}…")] if text else files
    return " + ".join(shown) or "an image"


def embedding_batches(
    prepared: Sequence[PreparedPrompt], batch_tokens: int | None, progress: bool
) -> Iterator[list[int]]:
    """Yield the numbers of the items of each batch, and show a bar.

    Args:
        batch_tokens: tokens per forward pass; None: DEFAULT_BATCH_TOKENS.

    Raises:
        InputError: `batch_tokens` is below 1.
    """
    batch_tokens = DEFAULT_BATCH_TOKENS if batch_tokens is None else batch_tokens
    if batch_tokens < 1:
        raise InputError(f"batch_tokens is {batch_tokens}, expected 1 or more.")
    groups = list(batches([len(one.token_ids) for one in prepared], batch_tokens))
    return track(groups, "embedding", weights=[len(group) for group in groups], show=progress)
