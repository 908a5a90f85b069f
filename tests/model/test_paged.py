"""Caches in pages are plain caches that share: same numbers, no page lost, none overwritten."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visavis.errors import MemoryLimitError
from visavis.model.attention import SequenceLayout
from visavis.model.config import DecoderConfig
from visavis.model.decoder import Decoder
from visavis.model.kv_cache import KVCache
from visavis.model.paged_kv_cache import PagedCache, PagePool

CONFIG = DecoderConfig(40, 24, 2, (4, 6), (2, 3), 8, 16, 64)  # heads differ by layer
PAGE = 4


def pool_of(num_pages: int, config: DecoderConfig = CONFIG) -> PagePool:
    page_bytes = PagePool(config, dtype=torch.float32, max_bytes=1 << 20, page=PAGE).page_bytes
    limit = num_pages * page_bytes
    return PagePool(config, dtype=torch.float32, max_bytes=limit, page=PAGE)


def write(cache: PagedCache, values: list[float]) -> None:
    """Extend all layers by tokens whose keys and values are numbers."""
    for layer, heads in enumerate(CONFIG.num_kv_heads):  # type: ignore[arg-type]
        key = torch.tensor(values)[:, None, None].expand(-1, heads, CONFIG.head_dim)
        cache.extend(layer, key, -key)
    cache.advance(len(values))


def held(cache: PagedCache) -> list[float]:
    """Return the numbers that a cache holds, the same in all layers."""
    found = []
    pages = torch.tensor(cache.pages, dtype=torch.int64)
    for layer in range(CONFIG.num_layers):
        keys, values = cache.pool.read(layer, pages)
        assert torch.equal(keys, -values)
        found.append(keys[: cache.length, 0, 0].tolist())
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("window", [0, 5])
def test_scores_are_those_of_a_plain_cache(window: int) -> None:
    torch.manual_seed(0)
    config = DecoderConfig(40, 24, 2, (4, 6), (2, 3), 8, 16, 64, sliding_window=window)
    decoder = Decoder(config).eval()
    plain = KVCache(config, dtype=torch.float32, capacity=2)
    paged = PagedCache(pool_of(8, config))

    def scores(cache: KVCache | PagedCache, ids: list[int]) -> Tensor:
        positions = torch.arange(cache.length, cache.length + len(ids))
        layout = SequenceLayout.of((len(ids),), (cache,))
        return decoder.logits(
            decoder(decoder.embed_tokens(torch.tensor(ids)), positions, layout)[-1]
        )

    with torch.inference_mode():
        for ids in ([1, 2, 3, 4, 5, 6, 7], [8], [9], [10, 11, 12]):
            assert torch.equal(scores(paged, ids), scores(plain, ids))
    assert paged.length == plain.length == 12 and len(paged.pages) == 3


def test_a_fork_shares_whole_pages_and_copies_one_at_most() -> None:
    pool = pool_of(12)
    cache = PagedCache(pool)
    write(cache, [float(n) for n in range(11)])
    fork = cache.fork(10, 10)
    assert fork.pages[:2] == cache.pages[:2] and len(set(fork.pages) - set(cache.pages)) == 1
    assert cache.fork(8, 8).pages == cache.pages[:2]
    write(fork, [70.0])
    write(cache, [80.0])
    assert held(fork) == [*range(10), 70] and held(cache) == [*range(11), 80]


def test_a_shared_page_is_copied_before_it_is_written() -> None:
    pool = pool_of(12)
    cache = PagedCache(pool)
    write(cache, [0.0, 1.0, 2.0, 3.0])
    fork = cache.fork(4, 4)
    cache.truncate(2)
    write(cache, [50.0])
    assert held(fork) == [0, 1, 2, 3] and held(cache) == [0, 1, 50]


def test_pages_go_back() -> None:
    pool = pool_of(6)
    cache = PagedCache(pool)
    cache.reserve(20)
    assert pool.free == [] and cache.num_bytes == 5 * pool.page_bytes
    write(cache, [1.0] * 5)
    cache.truncate(5)
    fork = cache.fork(4, 4)
    assert len(pool.free) == 3
    del cache
    assert len(pool.free) == 4 and held(fork) == [1] * 4
    del fork
    assert sorted(pool.free) == [1, 2, 3, 4, 5] and not any(pool.uses)


def test_running_out_says_what_to_lower_and_loses_nothing() -> None:
    pool = pool_of(4)
    cache = PagedCache(pool)
    write(cache, [1.0] * 6)
    with pytest.raises(MemoryLimitError, match=r"2 more pages.*1 of 3 are free.*max_new_tokens"):
        cache.reserve(16)
    with pytest.raises(MemoryLimitError):
        cache.fork(6, 16)
    assert len(pool.free) == 1 and held(cache) == [1] * 6
    with pytest.raises(MemoryLimitError, match="at least two pages"):
        pool_of(1)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_whatever_is_done_caches_keep_apart(steps: list[tuple[int, int, int]]) -> None:
    pool = pool_of(30)
    caches: list[tuple[PagedCache, list[float]]] = [(PagedCache(pool), [])]
    number = 0.0
    for what, which, amount in steps:
        cache, expected = caches[which % len(caches)]
        if what == 0 and len(expected) < 12:
            new = [number := number + 1 for _ in range(1 + amount % 4)]
            write(cache, new)
            expected += new
        elif what == 1:
            length = amount % (len(expected) + 1)
            cache.truncate(length)
            del expected[length:]
        elif what == 2 and len(caches) < 5:
            length = amount % (len(expected) + 1)
            caches.append((cache.fork(length, length + amount), expected[:length]))
        elif what == 3 and len(caches) > 1:
            caches.pop(which % len(caches))
        del cache
        assert [held(one) for one, _ in caches] == [numbers for _, numbers in caches]
        used = {page for one, _ in caches for page in one.pages}
        assert {page for page, uses in enumerate(pool.uses) if uses} == used
        assert len(pool.free) == pool.num_pages - 1 - len(used)
