"""The decode step on CUDA: fixed shapes at fixed addresses, captured as CUDA graphs.

    fill       tokens, positions, slots, totals and pages of all sequences: one copy to the device
    compute    the whole decoder, captured once per number of sequences and of pages, both rounded
               up to a power of two, and replayed from then on

Lengths are data on the device, so nothing synchronises. The CPU can compute the same step eagerly;
tests compare it with `Decoder.forward`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from visavis.model.attention import SequenceLayout
from visavis.model.decoder import Decoder
from visavis.model.paged_kv_cache import PagedCache, PagePool, Paging, has_kernel

SHARE = 0.5  # of the memory that is free when a model first answers: for keys and values
_made: WeakKeyDictionary[Decoder, StaticDecoder] = WeakKeyDictionary()


class StaticDecoder:
    """Decode steps over a pool of pages, for any number of sequences."""

    def __init__(self, decoder: Decoder, pool: PagePool) -> None:
        self.pool, self.weights = pool, places(decoder)
        longest, device = decoder.config.context_length, pool.keys[0].device
        self.rotary = decoder.rope.table(longest, device, decoder.dtype)
        self.steps: dict[tuple[int, int], Step] = {}
        self.lock = threading.Lock()  # answers of several threads share the buffers

    @staticmethod
    def of(decoder: Decoder) -> StaticDecoder | None:
        """Return the decoder's own, made at first use; None where no kernel reads pages."""
        device, dtype, found = decoder.norm.weight.device, decoder.dtype, _made.get(decoder)
        if not has_kernel(device, dtype, decoder.config.head_dim):
            return None
        like = None if found is None else found.pool.keys[0]
        if found is None or like is None or (like.device, like.dtype) != (device, dtype):
            free, _ = torch.cuda.mem_get_info(device)
            budget = int(SHARE * free)
            pool = PagePool(decoder.config, dtype=dtype, device=device, max_bytes=budget)
            found = _made[decoder] = StaticDecoder(decoder, pool)
        if found.weights != (now := places(decoder)):  # graphs read them where they were
            found.weights, found.steps = now, {}
        return found

    def __call__(
        self,
        decoder: Decoder,
        caches: Sequence[PagedCache],
        tokens: Sequence[int],
        positions: Sequence[int],
    ) -> Tensor:
        """Extend each sequence by a token; return the scores of the next, float32 [B, vocab]."""
        for cache in caches:
            assert cache.pool is self.pool
            cache.reserve(cache.length + 1)
        assert max(positions) < len(self.rotary[0])
        with self.lock:
            widest = max(len(cache.pages) for cache in caches)
            key = rounded_up(len(caches)), rounded_up(widest)
            step = self.steps.get(key)
            if step is None:
                step = self.steps[key] = Step(self.pool, self.rotary, *key)
            step.fill(caches, tokens, positions)
            scores = step.run(decoder).narrow(0, 0, len(caches)).clone()
        for cache in caches:
            cache.advance(1)
        return scores


class Step:
    """The buffers of one step and, on CUDA, the graph that reads and writes them.

    Args:
        rotary: cosines and sines by position.
        size: sequences; those beyond the ones in hand are padding.
        width: pages of a sequence.
    """

    def __init__(
        self, pool: PagePool, rotary: tuple[Tensor, Tensor], size: int, width: int
    ) -> None:
        device = pool.keys[0].device
        self.pool, self.rotary, self.size, self.width = pool, rotary, size, width
        self.host = torch.zeros(size * (4 + width), dtype=torch.int32)
        self.inputs = self.host.to(device)
        self.starts = torch.arange(size + 1, dtype=torch.int32).to(device)
        self.held: list[list[int]] = [[] for _ in range(size)]  # what the host's table holds
        self.graph: torch.cuda.CUDAGraph | None = None
        self.scores: Tensor | None = None  # what the graph writes

    def fields(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens, positions, slots and totals [4, size], and pages [size, width]."""
        numbers, table = buffer.split((4 * self.size, self.width * self.size))
        return numbers.view(4, self.size), table.view(self.size, self.width)

    def fill(
        self, caches: Sequence[PagedCache], tokens: Sequence[int], positions: Sequence[int]
    ) -> None:
        numbers, table = self.fields(self.host)
        page, padding = self.pool.page, [0] * (self.size - len(caches))
        slots = [c.pages[c.length // page] * page + c.length % page for c in caches]
        totals = [cache.length + 1 for cache in caches]
        rows = (tokens, positions, slots, totals)
        numbers.copy_(torch.tensor([[*row, *padding] for row in rows]))
        numbers[3, len(caches) :] = 1  # padding reads one token, and writes to page 0
        for row, cache in enumerate(caches):
            if cache.pages != self.held[row]:
                self.held[row] = list(cache.pages)
                table[row, : len(cache.pages)] = torch.tensor(cache.pages)
        self.inputs.copy_(self.host)

    def run(self, decoder: Decoder) -> Tensor:
        """Return the scores of what was filled in, float32 [size, vocab]."""
        if not self.inputs.is_cuda:
            return self.compute(decoder)
        if self.graph is None:
            self.capture(decoder)
        assert self.graph is not None and self.scores is not None
        self.graph.replay()
        return self.scores

    def compute(self, decoder: Decoder) -> Tensor:
        numbers, table = self.fields(self.inputs)
        tokens, positions, slots, totals = numbers.unbind(0)
        sums = F.pad(totals.cumsum(0), (1, 0)).to(torch.int32)
        paging = Paging(self.pool, slots.long(), table, self.starts, sums, totals, 1, past=True)
        layout = SequenceLayout((1,) * self.size, paging=paging)
        cos, sin = (turns.index_select(0, positions) for turns in self.rotary)
        x = decoder.embed_tokens(tokens)
        for block in decoder.blocks:
            x = block(x, (cos, sin), layout)
        return decoder.logits(decoder.norm(x))

    def capture(self, decoder: Decoder) -> None:
        """Record the step; its first runs choose kernels and set memory aside. All of them write
        the same keys to the same slots."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                self.compute(decoder)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.scores = self.compute(decoder)
        self.graph = graph


def places(decoder: Decoder) -> tuple[object, ...]:
    """Return where the weights stand: a graph holds only while they stay there."""
    tensors = (*decoder.parameters(), *decoder.buffers())
    return tuple((tensor.data_ptr(), tensor.device, tensor.dtype) for tensor in tensors)


def rounded_up(number: int) -> int:
    """Return the next power of two."""
    return 1 << (number - 1).bit_length()
