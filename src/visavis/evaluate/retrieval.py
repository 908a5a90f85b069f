"""Recall at k between pictures and texts, both ways.

A query's rank is one plus the number of candidates that score strictly higher than its best
right one; ties therefore count for the model, as in the field's usual scripts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from visavis.api import Model
from visavis.data.datasets import Record
from visavis.inputs import Image

RANKS = (1, 5, 10)


def recall(similarity: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Return recall at 1, 5, 10.

    Args:
        similarity: [queries, candidates].
        right: bool [queries, candidates], which candidates answer which query.
    """
    best = np.where(right, similarity, -np.inf).max(1, keepdims=True)
    ranks = 1 + ((similarity > best) & ~right).sum(1)
    return {f"R@{k}": round(float((ranks <= k).mean()), 4) for k in RANKS}


def retrieval(model: Model, records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Return recall of pictures by text and of texts by picture."""
    texts = [
        (number, text) for number, r in enumerate(records) for text in r.captions or (r.caption,)
    ]
    owner = np.array([number for number, _ in texts])
    pictures = model.embed([Image(record.image) for record in records])
    words = model.embed([text for _, text in texts])
    similarity = words @ pictures.T  # [texts, pictures]
    right = owner[:, None] == np.arange(len(records))[None]
    return {
        "text_to_image": recall(similarity, right),
        "image_to_text": recall(similarity.T, right.T),
    }
