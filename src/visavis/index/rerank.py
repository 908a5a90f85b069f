"""Late interaction over the first hits of a search, with a model that embeds an item as many
vectors (ColPali and its kin).

Only the hits are embedded, when they are found, and remembered by their content: no index of all
tokens is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from visavis.errors import InputError, VisavisError
from visavis.index.items import preview
from visavis.index.store import StoredItem
from visavis.inputs import Image, Prompt
from visavis.model.maxsim import maxsim

if TYPE_CHECKING:
    from visavis.embedder import Embedder

RERANKED = 100  # hits
PIXELS = 2048  # longer side of what is embedded of a page or image
_REMEMBERED = 300  # items whose vectors are kept, some 0.4 MB each


class Reranker:
    """Scores items against a query by MaxSim.

    Args:
        model: one that has many vectors.

    Raises:
        InputError: it has one vector for an item.
    """

    def __init__(self, model: Embedder) -> None:
        if not model.has_multi_vectors:
            raise InputError(
                f"{model.name} embeds an item as one vector, expected a model with a vector per "
                "token, such as ColQwen2, to rank by late interaction"
            )
        self.model = model
        self._known: OrderedDict[str, np.ndarray] = OrderedDict()

    def scores(self, query: Prompt, items: Sequence[StoredItem]) -> list[float | None]:
        """Return the mean over the query's vectors of the best cosine in each item; None of an
        item that cannot be read any more.

        Raises:
            InputError: the query is neither one text nor one image.
        """
        (wanted,) = self.model.embed_multi([query])
        found = [self._vectors(item) for item in items]
        return [None if one is None else maxsim(wanted, one) / len(wanted) for one in found]

    def _vectors(self, item: StoredItem) -> np.ndarray | None:
        if item.content not in self._known:
            try:
                shown = preview(item, PIXELS)
                document = Prompt.of(shown if isinstance(shown, str) else Image(shown))
                (vectors,) = self.model.embed_multi([document], documents=True)
            except VisavisError:
                return None
            self._known[item.content] = vectors
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(item.content)
        return self._known[item.content]
