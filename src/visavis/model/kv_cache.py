"""KV cache of one sequence, for all layers. Grows by doubling."""

from __future__ import annotations

import torch
from torch import Tensor

from visavis.model.config import DecoderConfig


class KVCache:
    """Keys and values of the tokens of one sequence.

    Every layer is extended once per forward pass, layer 0 first; `length` counts the tokens of
    finished passes and moves when the last layer has been written (`advance`).
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        capacity: int = 256,
    ) -> None:
        self.length = 0
        self.keys: list[Tensor] = []  # each [kv_heads, capacity, head_dim]
        self.values: list[Tensor] = []
        for layer in range(config.num_layers):
            num_kv_heads = config.per_layer(config.num_kv_heads, layer)
            shape = (num_kv_heads, capacity, config.head_dim)
            self.keys.append(torch.empty(shape, dtype=dtype, device=device))
            self.values.append(torch.empty(shape, dtype=dtype, device=device))

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [L, kv_heads, head_dim]; return all of them so far.

        Those come heads first, [kv_heads, past + L, head_dim], as attention reads them.
        """
        length = key.shape[0]
        total = self.length + length
        if total > self.keys[layer].shape[1]:
            self._grow(layer, total)
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(1, self.length, length).copy_(key.transpose(0, 1))
        values.narrow(1, self.length, length).copy_(value.transpose(0, 1))
        return keys.narrow(1, 0, total), values.narrow(1, 0, total)

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens in all layers."""
        for layer in range(len(self.keys)):
            if length > self.keys[layer].shape[1]:
                self._grow(layer, length)

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` as part of the past, after all layers have been extended."""
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        assert 0 <= length <= self.length
        self.length = length

    def fork(self, length: int, capacity: int) -> KVCache:
        """Return a cache of its own with the first `length` tokens, and room for `capacity`."""
        assert 0 <= length <= self.length
        copy = object.__new__(KVCache)
        copy.length = length
        copy.keys, copy.values = [], []
        for stores, mine in ((copy.keys, self.keys), (copy.values, self.values)):
            for old in mine:
                new = old.new_empty(old.shape[0], max(capacity, length), old.shape[2])
                new[:, :length] = old[:, :length]
                stores.append(new)
        return copy

    def follow(self, other: KVCache, start: int) -> None:
        """Hold what `other` does, whose first `start` tokens are this one's too."""
        self.reserve(other.length)
        pairs = zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True)
        for mine, theirs in pairs:
            mine[:, start : other.length] = theirs[:, start : other.length]
        self.length = other.length

    @property
    def capacity(self) -> int:
        """How many tokens there is room for before it grows."""
        return self.keys[0].shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(store.nbytes for store in (*self.keys, *self.values))

    def _grow(self, layer: int, needed: int) -> None:
        for store in (self.keys, self.values):
            old = store[layer]
            new = old.new_empty(old.shape[0], max(needed, 2 * old.shape[1]), old.shape[2])
            new[:, : self.length] = old[:, : self.length]
            store[layer] = new
