"""Paged KV cache: a pool of pages, caches as lists of pages, and attention that reads them.

On CUDA in half precision one kernel follows each sequence's list of pages. Elsewhere the decode
step, one new token per sequence, uses plain operations of the same shapes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from visavis.errors import MemoryLimitError
from visavis.model.config import DecoderConfig
from visavis.model.kv_cache import KVCache


@dataclass(frozen=True)
class Paging:
    """Where one pass over the decoder writes and reads a pool; tensors on the pool's device.

    Args:
        slots: int64 [T], where each new token's key and value go.
        table: int32 [B, n], the pages of each sequence, then any.
        starts: int32 [B + 1], where each sequence's new tokens begin in the stream.
        key_starts: int32 [B + 1], the running sum of `totals`.
        totals: int32 [B], tokens of each sequence, the new ones included.
        longest: most new tokens of a sequence.
        past: whether a sequence may have tokens before the new ones.
    """

    pool: PagePool
    slots: Tensor
    table: Tensor
    starts: Tensor
    key_starts: Tensor
    totals: Tensor
    longest: int
    past: bool

    @staticmethod
    def of(caches: Sequence[PagedCache], lengths: Sequence[int]) -> Paging:
        """Make room for new tokens of each sequence and say where it is."""
        pairs = list(zip(caches, lengths, strict=True))
        for cache, length in pairs:
            cache.reserve(cache.length + length)
        widest = max(len(cache.pages) for cache in caches)
        totals = [cache.length + length for cache, length in pairs]
        pool = caches[0].pool

        def ints(values: list[int] | list[list[int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32).to(pool.keys[0].device)

        return Paging(
            pool,
            slots=torch.cat([cache.slots(length) for cache, length in pairs]),
            table=ints([c.pages + [0] * (widest - len(c.pages)) for c in caches]),
            starts=ints([0, *accumulate(lengths)]),
            key_starts=ints([0, *accumulate(totals)]),
            totals=ints(totals),
            longest=max(lengths),
            past=any(cache.length for cache in caches),
        )


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether `varlen_attn` takes keys of this kind there; it asks for an Ampere GPU."""
    half = dtype in (torch.bfloat16, torch.float16)
    if device.type != "cuda" or not half or head_dim % 8 or head_dim > 256:
        return False
    if not torch.cuda.is_available():
        return True  # tensors without numbers, to look at shapes
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend_paged(
    query: Tensor,  # [T, heads, head_dim]
    paging: Paging,
    *,
    layer: int,
    window: int = 0,
) -> Tensor:  # [T, heads, head_dim]
    """Attend causally within each sequence, all of whose keys and values are in the pool."""
    keys, values = paging.pool.keys[layer], paging.pool.values[layer]
    if not has_kernel(keys.device, keys.dtype, keys.shape[-1]):
        return _attend_step(query, paging, layer, window)
    from torch.nn.attention.varlen import varlen_attn

    # One token sees everything there is; without a mask, heads that share a key head are read once.
    plain = paging.longest == 1 and not window
    out = varlen_attn(
        query,
        keys,
        values,
        paging.starts,
        paging.key_starts,
        paging.longest,
        paging.table.shape[1] * paging.pool.page,
        window_size=(-1, -1) if plain else (window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != keys.shape[2],
        seqused_k=paging.totals,
        block_table=paging.table,
    )
    assert isinstance(out, Tensor)
    return out


def _attend_step(query: Tensor, paging: Paging, layer: int, window: int) -> Tensor:
    """One new token of each sequence, without a kernel: all pages of the table are read."""
    assert paging.longest == 1
    num, num_heads, head_dim = query.shape
    keys, values = paging.pool.read(layer, paging.table.flatten())
    num_kv_heads = keys.shape[1]
    k, v = (x.view(num, -1, num_kv_heads, head_dim).transpose(1, 2) for x in (keys, values))
    places, totals = torch.arange(k.shape[2], device=k.device), paging.totals[:, None]
    seen = places < totals
    if window:
        seen = seen & (places >= totals - window)
    grouped = query.view(num, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen[:, None, None])
    return out.reshape(query.shape)


PAGE = 256  # tokens; FlashAttention 2 reads pages of a multiple of this


class PagePool:
    """Pages of all layers, and who uses them. Page 0 is never given out: padding is written there.

    Args:
        max_bytes: what all pages may take together.
        page: tokens of a page.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: torch.dtype,
        max_bytes: int,
        device: torch.device | str = "cpu",
        page: int = PAGE,
    ) -> None:
        heads = [config.per_layer(config.num_kv_heads, i) for i in range(config.num_layers)]
        self.page = page
        self.page_bytes = 2 * page * sum(heads) * config.head_dim * dtype.itemsize
        self.num_pages = max_bytes // self.page_bytes
        if self.num_pages < 2:
            raise MemoryLimitError(
                f"{max_bytes} bytes are left for keys and values, expected at least two pages of "
                f"{page} tokens, {2 * self.page_bytes} bytes. Free memory of the device {device}, "
                "or use a smaller model."
            )
        # zeros: what no token was written to must not be infinite or not a number
        shapes = [(self.num_pages, page, num, config.head_dim) for num in heads]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.free = list(range(self.num_pages - 1, 0, -1))
        self.uses = [0] * self.num_pages  # sequences that hold each page
        self.lock = threading.RLock()  # pages also come back when a thread drops a cache

    def pages_of(self, length: int) -> int:
        """Return how many pages hold `length` tokens."""
        return -(-length // self.page)

    def take(self, count: int) -> list[int]:
        """Return free pages, now in use.

        Raises:
            MemoryLimitError: there are fewer.
        """
        with self.lock:
            if count > len(self.free):
                raise MemoryLimitError(
                    f"keys and values need {count} more pages of {self.page} tokens, but "
                    f"{len(self.free)} of {self.num_pages - 1} are free. Let fewer sequences grow "
                    "at a time (max_sequences), shorten prompts or answers (max_new_tokens), or "
                    "free memory of the device before the model first answers."
                )
            taken = [self.free.pop() for _ in range(count)]
            for page in taken:
                self.uses[page] = 1
            return taken

    def share(self, pages: Sequence[int]) -> list[int]:
        """Return pages in use, now used once more."""
        with self.lock:
            for page in pages:
                self.uses[page] += 1
            return list(pages)

    def give_back(self, pages: Sequence[int]) -> None:
        """Use pages once less; those that nobody uses are free."""
        with self.lock:
            for page in pages:
                self.uses[page] -= 1
                if not self.uses[page]:
                    self.free.append(page)

    def copy(self, source: int, target: int) -> None:
        for store in (*self.keys, *self.values):
            store.select(0, target).copy_(store.select(0, source))

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Write keys and values [T, kv_heads, head_dim] to slots, int64 [T]."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def read(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of pages, int [n], each [n * page, kv_heads, head_dim]."""
        keys = self.keys[layer].index_select(0, pages)
        return keys.flatten(0, 1), self.values[layer].index_select(0, pages).flatten(0, 1)


class PagedCache:
    """Keys and values of one sequence, in pages; has the interface of `KVCache`.

    A page that another cache uses too is copied before it is written. Pages go back to the pool
    with the cache.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool, self.length, self.pages = pool, 0, list[int]()

    def __del__(self) -> None:
        self.pool.give_back(self.pages)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values [L, kv_heads, head_dim]; return all of them so far, heads
        first [kv_heads, past + L, head_dim]."""
        total = self.length + len(key)
        self.reserve(total)
        self.pool.write(layer, self.slots(len(key)), key, value)
        pages = torch.tensor(self.pages[: self.pool.pages_of(total)], device=key.device)
        keys, values = self.pool.read(layer, pages)
        return keys[:total].transpose(0, 1), values[:total].transpose(0, 1)

    def reserve(self, length: int) -> None:
        """Hold pages for `length` tokens, and alone those that new tokens are written to."""
        pool, next_page = self.pool, self.length // self.pool.page
        if length > self.length and next_page < len(self.pages):
            shared = self.pages[next_page]  # only the first can be: `fork` shares nothing further
            if pool.uses[shared] > 1:
                (self.pages[next_page],) = pool.take(1)
                pool.copy(shared, self.pages[next_page])
                pool.give_back([shared])
        self.pages += pool.take(max(0, pool.pages_of(length) - len(self.pages)))

    def slots(self, count: int) -> Tensor:
        """Return where the next `count` tokens stand in the pool, int64 [count]."""
        page = self.pool.page
        places = torch.arange(self.length, self.length + count)
        slots = torch.tensor(self.pages)[places // page] * page + places % page
        return slots.to(self.pool.keys[0].device)

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` as part of the past, after all layers have been written."""
        self.length += num_tokens

    def truncate(self, length: int) -> None:
        """Forget everything after the first `length` tokens; pages without any go back."""
        assert 0 <= length <= self.length
        kept = self.pool.pages_of(length)
        self.pages, dropped = self.pages[:kept], self.pages[kept:]
        self.pool.give_back(dropped)
        self.length = length

    def fork(self, length: int, capacity: int) -> PagedCache:
        """Return a cache that begins with the first `length` tokens, with room for `capacity`.
        Whole pages are shared, at most one is copied."""
        assert 0 <= length <= self.length
        full = length // self.pool.page
        fork = PagedCache(self.pool)
        fork.pages = self.pool.share(self.pages[:full])
        fork.length = full * self.pool.page
        fork.reserve(max(capacity, length))
        if length > fork.length:
            self.pool.copy(self.pages[full], fork.pages[full])
        fork.length = length
        return fork

    @property
    def capacity(self) -> int:
        """How many tokens there is room for."""
        return len(self.pages) * self.pool.page

    @property
    def num_bytes(self) -> int:
        """Size of its pages in bytes, shared ones included."""
        return len(self.pages) * self.pool.page_bytes


Cache = KVCache | PagedCache
