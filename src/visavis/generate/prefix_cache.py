"""Prefix cache: keys and values of earlier prompts, for prompts that start with the same tokens.

Entries are keyed by token ids, and image tokens by the content of their image. Only prompts are
kept, not generated tokens, because decode steps use other kernels. Bounded in bytes; the least
recently used entry is dropped first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from visavis.model.paged_kv_cache import Cache

TokenKeys = tuple[Hashable, ...]  # one for each token of a prompt


class PrefixCache:
    """A bounded store of caches by what they hold.

    A stream that nobody reads on is collected at any moment, and what it read is kept then: so
    nothing here goes through the entries themselves.
    """

    def __init__(self, max_bytes: int = 256 * 2**20) -> None:
        self.max_bytes = max_bytes
        self.entries: OrderedDict[TokenKeys, Cache] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(cache.num_bytes for cache in list(self.entries.values()))

    def begin(self, keys: TokenKeys, capacity: int, chunk: int) -> Cache | None:
        """Return a new cache of the longest known prefix in whole chunks, None if there is none.

        It never holds the whole prompt: the last token is always computed, for its logits.

        Args:
            capacity: tokens that the new cache has room for.
            chunk: tokens of a forward pass in which prompts are computed; a prefix ends after a
                multiple of it.
        """
        best, longest = None, 0
        for known, cache in list(self.entries.items()):
            length = min(common(known, keys), len(keys) - 1) // chunk * chunk
            if length > longest:
                best, longest = (known, cache), length
        if best is None:
            return None
        if best[0] in self.entries:
            self.entries.move_to_end(best[0])
        return best[1].fork(longest, capacity)

    def keep(self, keys: TokenKeys, cache: Cache) -> None:
        """Keep what was read of a prompt; `cache` may hold more and is not used by others again."""
        cache.truncate(len(keys))
        for known in list(self.entries):
            if common(known, keys) == len(known):
                self.entries.pop(known, None)  # the new one holds all of it
        self.entries[keys] = cache
        while self.num_bytes > self.max_bytes and self.entries:
            self.entries.popitem(last=False)


def common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Return how many tokens two prompts have in common from their start."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)
