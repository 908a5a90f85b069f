"""What has been computed for an image is kept by the hash of its content, within a byte budget.

Least recently used entries go first; a folder behind it may hold more. Knows tensors and keys,
nothing of models.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from visavis.processing.feature_folder import FeatureFolder


class FeatureCache:
    """A bounded map from content hash to tensors.

    Args:
        folder: where all of it is kept too, for the next process; None: nowhere.
    """

    def __init__(
        self, max_bytes: int = 128 * 2**20, *, folder: FeatureFolder | None = None
    ) -> None:
        self.max_bytes, self.folder = max_bytes, folder
        self.num_bytes = 0
        self.entries: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()

    def get(self, key: str) -> tuple[Tensor, ...] | None:
        """Return the tensors of a key and mark it as used, or None."""
        if key not in self.entries:
            found = self.folder.get(key) if self.folder is not None else None
            if found is not None:
                self._remember(key, found)
            return found
        self.entries.move_to_end(key)
        return self.entries[key]

    def put(self, key: str, value: tuple[Tensor, ...]) -> None:
        """Keep tensors; drop the least recently used ones that no longer fit."""
        self._remember(key, value)
        if self.folder is not None:
            self.folder.put(key, value)

    def _remember(self, key: str, value: tuple[Tensor, ...]) -> None:
        if key in self.entries:
            self.num_bytes -= _num_bytes(self.entries.pop(key))
        self.entries[key] = value
        self.num_bytes += _num_bytes(value)
        while self.num_bytes > self.max_bytes and len(self.entries) > 1:
            _, dropped = self.entries.popitem(last=False)
            self.num_bytes -= _num_bytes(dropped)


def _num_bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
