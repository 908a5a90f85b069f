"""Decoding: prompts are read, then every sequence in hand grows by one token a step.

    waiting ──► prefill, one prompt at a time ──► active, at most `max_sequences` ──► done
                (what is known of it is taken        one pass of the decoder a step
                 from the prefix cache)              for all of them, each with its own cache

A finished sequence leaves and a waiting one enters between two steps. Each sequence gets what it
would get alone. Takes token ids and yields token ids; knows nothing of tokenizers or templates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from visavis.generate.prefix import Names, PrefixCache
from visavis.model.attention import Layout
from visavis.model.batch import PackedBatch
from visavis.model.decode import FlatStep, can_flatten
from visavis.model.kv_cache import KVCache
from visavis.model.quantized import packed_kernels
from visavis.model.vlm import VLM

GROWTH = 512  # tokens of an answer that a cache has room for from the start


@dataclass(eq=False)
class Generation:
    """One prompt and its answer.

    Args:
        prompt: makes the packed prompt (one sequence, on the device) when its turn comes.
        sample: the next token of scores [vocab].
        max_new_tokens: end after this many.
        stop_ids: tokens that end the answer; they are not part of it.
        names: of the prompt's tokens, to share what was read (see `prefix.py`); empty: do not.
    """

    prompt: Callable[[], PackedBatch]
    sample: Callable[[Tensor], int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    names: Names = ()
    tokens: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_reused: int = 0  # of those, taken from the prefix cache
    done: bool = False
    cache: KVCache | None = None
    ahead: int = 0  # by how much a token's position exceeds the number of tokens before it

    def stop(self) -> None:
        """End the answer here; its memory is returned at the next step."""
        self.done = True


class Engine:
    """Grows sequences together. Used by one thread at a time.

    Args:
        max_sequences: how many grow at the same time; the rest wait.
        prefixes: prompts read before; None: each is read whole.
    """

    def __init__(
        self, vlm: VLM, *, max_sequences: int = 16, prefixes: PrefixCache | None = None
    ) -> None:
        self.vlm, self.max_sequences, self.prefixes = vlm, max_sequences, prefixes
        self.waiting: deque[Generation] = deque()
        self.active: list[Generation] = []
        self.flat: tuple[KVCache, FlatStep] | None = None

    def add(self, sequence: Generation) -> None:
        """Let a sequence wait for its turn."""
        self.waiting.append(sequence)

    @torch.inference_mode()
    def step(self) -> list[Generation]:
        """Read a waiting prompt if there is room, else grow all by a token; return who grew or
        ended."""
        self._drop_done()
        if self.waiting and len(self.active) < self.max_sequences:
            sequence = self.waiting.popleft()
            if sequence.done:
                return []
            try:
                self._take(sequence, self._prefill(sequence))
            except BaseException:
                sequence.done, sequence.cache = True, None
                raise
            self.active.append(sequence)
            return [sequence]
        if not self.active:
            return []
        grown = list(self.active)
        scores = self._one(grown[0])[None] if len(grown) == 1 else self._several(grown)
        for sequence, row in zip(grown, scores, strict=True):
            self._take(sequence, row)
        return grown

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active)

    def run(self, sequences: Iterable[Generation]) -> Iterator[Generation]:
        """Yield each sequence whenever it has grown or ended, until all have ended.

        Leaving the iteration early returns the memory of those that have not.
        """
        mine = list(sequences)
        for sequence in mine:
            self.add(sequence)
        try:
            while self.busy:
                yield from self.step()
        finally:
            for sequence in mine:
                sequence.stop()
            self.drop()

    def drop(self) -> None:
        """Return the memory of sequences that have ended, and forget those that still wait."""
        self.waiting = deque(one for one in self.waiting if not one.done)
        self._drop_done()

    def _drop_done(self) -> None:
        for sequence in [one for one in self.active if one.done]:
            self.active.remove(sequence)
            cache, sequence.cache = sequence.cache, None
            if self.flat is not None and cache is self.flat[0]:
                self.flat = None
            if self.prefixes is not None and sequence.names and cache is not None:
                self.prefixes.keep(sequence.names, cache)

    def _prefill(self, sequence: Generation) -> Tensor:
        """Read a prompt; return the scores of its last position, float32 [vocab]."""
        decoder, batch = self.vlm.decoder, sequence.prompt()
        sequence.num_prompt_tokens = batch.num_tokens
        # With M-RoPE an image takes fewer positions than tokens.
        sequence.ahead = int(batch.positions.max()) + 1 - batch.num_tokens
        capacity = batch.num_tokens + min(sequence.max_new_tokens, GROWTH)
        cache = None
        if self.prefixes is not None and sequence.names:
            cache = self.prefixes.begin(sequence.names, capacity)
        if cache is not None:
            sequence.num_reused = cache.length
            batch = self.vlm.resolve_images(batch).after(cache.length)
        else:
            cache = KVCache(
                decoder.config,
                dtype=decoder.dtype,
                device=batch.token_ids.device,
                capacity=capacity,
            )
        sequence.cache = cache
        hidden = self.vlm(batch, caches=(cache,))[-1]
        with packed_kernels():  # always one row
            return decoder.logits(hidden[-1:])[0]

    def _take(self, sequence: Generation, scores: Tensor) -> None:
        """Choose a sequence's next token, or end it."""
        token = sequence.sample(scores)
        if token in sequence.stop_ids:
            sequence.done = True
            return
        sequence.tokens.append(token)
        sequence.done = len(sequence.tokens) >= sequence.max_new_tokens

    def _one(self, sequence: Generation) -> Tensor:
        """Extend the only sequence by one token; return the scores of the next, float32 [vocab]."""
        decoder, cache = self.vlm.decoder, sequence.cache
        assert cache is not None
        if not can_flatten(decoder):
            return self._several([sequence])[0]
        if self.flat is None or self.flat[0] is not cache:
            self.flat = (cache, FlatStep(decoder, cache, sequence.ahead))
        return self.flat[1](sequence.tokens[-1])

    def _several(self, sequences: list[Generation]) -> Tensor:
        """Extend each sequence by its last token; return the scores of the next, [B, vocab]."""
        decoder = self.vlm.decoder
        caches = tuple(one.cache for one in sequences if one.cache is not None)
        device = caches[0].keys[0].device
        tokens = torch.tensor([one.tokens[-1] for one in sequences], device=device)
        places = [c.length + one.ahead for c, one in zip(caches, sequences, strict=True)]
        with packed_kernels():
            layout = Layout((1,) * len(sequences), caches)
            x = decoder.embed_tokens(tokens)
            hidden = decoder(x, torch.tensor(places, device=device), layout)[-1]
            return decoder.logits(hidden)


def generate(
    vlm: VLM,
    batch: PackedBatch,
    sample: Callable[[Tensor], int],
    *,
    max_new_tokens: int,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    """Yield new token ids of one sequence until a stop id (not yielded) or the limit.

    The first token arrives when the prompt has been read; stopping the iteration frees the cache.
    """
    sequence = Generation(lambda: batch, sample, max_new_tokens, stop_ids)
    shown = 0
    for _ in Engine(vlm).run([sequence]):
        yield from sequence.tokens[shown:]
        shown = len(sequence.tokens)
