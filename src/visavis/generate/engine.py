"""Continuous batching: prompts are prefilled, then each step adds a token to every sequence.

    waiting ──► prefill, one prompt at a time ──► active, at most `max_sequences` ──► done
                (its prefix is taken from            one pass of the decoder a step
                 the prefix cache)                   for all of them, each with its own cache

Finished sequences leave and waiting ones enter between two steps. On the CPU each sequence has the
logits that it has alone, bitwise. On CUDA the caches are pages of one pool and a step is one graph
(`model/cuda_graphs.py`); a prompt without free pages waits until a sequence has ended. A single
active sequence may add several tokens a step with prompt lookup decoding (`prompt_lookup.py`).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from visavis.errors import InputError, MemoryLimitError, NonFiniteError
from visavis.generate.beam_search import BeamSearch
from visavis.generate.prefix_cache import PrefixCache, TokenKeys
from visavis.generate.prompt_lookup import PromptLookup
from visavis.memory import enough_memory
from visavis.model.attention import SequenceLayout
from visavis.model.batch import PackedBatch
from visavis.model.cpu_decode import FusedDecodeStep, can_flatten, is_row_by_row
from visavis.model.cuda_graphs import StaticDecoder
from visavis.model.kv_cache import KVCache
from visavis.model.paged_kv_cache import Cache, PagedCache
from visavis.model.quantized_linear import packed_kernels
from visavis.model.vlm import VLM
from visavis.processing.collate import pack
from visavis.processing.image_encoder import ImageEncoder
from visavis.processing.prompt_encoder import PreparedPrompt

GROWTH = 512  # tokens of an answer that a cache has room for from the start
# A forward pass over part of a prompt starts at a multiple of this many tokens and ends at the
# next multiple, or at the prompt's end. A token's rounding in bfloat16 depends on the shapes of the
# pass it is in; so it has the same pass whether the tokens before it were cached or not.
CHUNK = 64
CUDA_CHUNK = 512


@dataclass(eq=False)
class GeneratedSequence:
    """One prompt and its answer.

    Args:
        prompt: prepared, its images are encoded when its turn comes; or a batch of one sequence
            on the device.
        sample: the next token of scores [vocab].
        max_new_tokens: end after this many.
        stop_ids: tokens that end the answer; they are not part of it.
        search: finds the answer instead of `sample`, in one step.
        token_keys: of the prompt's tokens, for the prefix cache; empty: do not use it.
        num_reused: tokens of the prompt that were taken from the prefix cache.
        position_offset: by how much a token's position exceeds the number of tokens before it,
            with M-RoPE.
    """

    prompt: PreparedPrompt | PackedBatch
    sample: Callable[[Tensor], int]
    max_new_tokens: int
    stop_ids: frozenset[int]
    search: BeamSearch | None = None
    token_keys: TokenKeys = ()
    tokens: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_reused: int = 0
    done: bool = False
    error: Exception | None = None  # what ended it, where something of its own went wrong
    cache: Cache | None = None
    lookup: PromptLookup | None = None  # where guesses can be checked
    position_offset: int = 0

    def stop(self) -> None:
        """End the answer here; its memory is returned at the next step."""
        self.done = True


class Engine:
    """Grows sequences together. Used by one thread at a time.

    Args:
        images: encodes the images of prepared prompts; None: there are none.
        max_sequences: how many grow at the same time; the rest wait.
        prefixes: prompts read before; None: each is read whole.
        graphs: decode from pages by captured graphs on CUDA; they stay in memory afterwards.

    Raises:
        InputError: `max_sequences` is below 1.
    """

    def __init__(
        self,
        vlm: VLM,
        images: ImageEncoder | None = None,
        *,
        max_sequences: int = 16,
        prefixes: PrefixCache | None = None,
        graphs: bool = True,
    ) -> None:
        if max_sequences < 1:
            raise InputError(f"max_sequences is {max_sequences}, expected 1 or more.")
        self.vlm, self.images = vlm, images
        self.max_sequences, self.prefixes, self.graphs = max_sequences, prefixes, graphs
        self.waiting: deque[GeneratedSequence] = deque()
        self.active: list[GeneratedSequence] = []
        self.flat: tuple[KVCache, FusedDecodeStep] | None = None
        self.full = False  # a prompt waits for pages
        self.guesses, self.chunk = False, CHUNK
        if vlm.config.has_decoder:  # else no prompt is ever added
            self.guesses = is_row_by_row(vlm.decoder)
            # The compiled kernels round a token alike in any pass: prompts need no chunks.
            chunk = CUDA_CHUNK if vlm.decoder.norm.weight.is_cuda else CHUNK
            self.chunk = 1 if vlm.decoder.compiled is not None else chunk

    @cached_property
    def static(self) -> StaticDecoder | None:
        """The decoder on CUDA, where a kernel reads pages; None elsewhere."""
        return StaticDecoder.of(self.vlm.decoder) if self.graphs else None

    def add(self, sequence: GeneratedSequence) -> None:
        """Let a sequence wait for its turn."""
        self.waiting.append(sequence)

    @torch.inference_mode()
    def step(self) -> list[GeneratedSequence]:
        """Read a waiting prompt if there is room, else grow all by a token; return who grew or
        ended.

        What goes wrong in reading a sequence's prompt or choosing its token ends that one
        (`GeneratedSequence.error`); what goes wrong in growing them all is raised.
        """
        self._drop_done()
        if self.waiting and len(self.active) < self.max_sequences and not self.full:
            sequence = self.waiting.popleft()
            if sequence.done:
                return []
            with _on_its_own(sequence):
                try:
                    scores = self._prefill(sequence)
                except MemoryLimitError:
                    if not self.active:
                        raise
                    self.waiting.appendleft(sequence)
                    self.full = True
                    return []
                self.active.append(sequence)
                if sequence.search is None:
                    self._take(sequence, scores)
                    return [sequence]
                with enough_memory(
                    f"searching with {sequence.search.beams.number} beams",
                    "Use fewer beams, or a shorter prompt.",
                ):
                    self._search(sequence, sequence.search, scores)
            return [sequence]
        if not self.active:
            return []
        grown = list(self.active)
        with enough_memory(
            f"growing {len(grown)} answers, {sum(c.length for c in _caches(grown))} tokens in all",
            "Let fewer grow at a time (max_sequences), or use shorter prompts.",
        ):
            if len(grown) == 1:
                self._one(grown[0])
                return grown
            scores = self._several(grown)
        for sequence, row in zip(grown, scores, strict=True):
            with _on_its_own(sequence):
                self._take(sequence, row)
        return grown

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active)

    def run(self, sequences: Iterable[GeneratedSequence]) -> Iterator[GeneratedSequence]:
        """Yield each sequence whenever it has a new token or has ended, until all have ended.

        Leaving the iteration early frees the memory of unfinished sequences. An error that ends a
        sequence is raised.
        """
        mine = list(sequences)
        for sequence in mine:
            self.add(sequence)
        try:
            while self.busy:
                for sequence in self.step():
                    if sequence.error is not None:
                        raise sequence.error
                    yield sequence
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
            self.full = False
            cache, sequence.cache = sequence.cache, None
            if self.flat is not None and cache is self.flat[0]:
                self.flat = None
            if self.prefixes is not None and sequence.token_keys and cache is not None:
                whole = len(sequence.token_keys) // self.chunk * self.chunk
                if whole:
                    self.prefixes.keep(sequence.token_keys[:whole], cache)

    def _prefill(self, sequence: GeneratedSequence) -> Tensor:
        """Read a prompt; return the scores of its last position, float32 [vocab]."""
        decoder, batch = self.vlm.decoder, self._packed(sequence.prompt)
        sequence.num_prompt_tokens = batch.num_tokens
        # With M-RoPE an image takes fewer positions than tokens.
        sequence.position_offset = int(batch.positions.max()) + 1 - batch.num_tokens
        if self.guesses:
            sequence.lookup = PromptLookup(batch.token_ids.tolist())
        capacity = batch.num_tokens + min(sequence.max_new_tokens, GROWTH)
        capacity = -(-capacity // CHUNK) * CHUNK  # heads start at aligned addresses
        cache: Cache | None = None
        with enough_memory(
            f"reading a prompt of {batch.num_tokens} tokens ({sum(batch.image_counts)} of them of "
            f"{len(batch.image_counts)} images)",
            "Shorten it, use fewer or smaller images, or load the model with a smaller precision.",
        ):
            self._make_room(capacity)
            if self.prefixes is not None and sequence.token_keys:
                cache = self.prefixes.begin(sequence.token_keys, capacity, self.chunk)
            if cache is not None:
                sequence.num_reused = cache.length
            elif self.static is not None:
                cache = PagedCache(self.static.pool)
                cache.reserve(capacity)
            else:
                cache = KVCache(
                    decoder.config,
                    dtype=decoder.dtype,
                    device=batch.token_ids.device,
                    capacity=capacity,
                )
            batch = self.vlm.resolve_images(batch)
            step = self.chunk if self.chunk > 1 else batch.num_tokens
            for start in range(cache.length, batch.num_tokens, step):
                part = batch.between(start, min(start + step, batch.num_tokens))
                hidden = self.vlm(part, caches=(cache,))[-1]
            with packed_kernels():  # always one row
                scores = decoder.logits(hidden[-1:])[0]
        sequence.cache = cache
        return scores

    def _packed(self, prompt: PreparedPrompt | PackedBatch) -> PackedBatch:
        if isinstance(prompt, PackedBatch):
            return prompt
        if self.images is not None:
            return self.images.pack([prompt])
        if prompt.images:
            raise InputError("the prompt holds images, but the engine has no image encoder")
        return pack([prompt]).to(self.vlm.decoder.norm.weight.device)

    def _make_room(self, *lengths: int) -> None:
        """Drop cached prefixes while there are too few free pages for these lengths."""
        if self.static is None or self.prefixes is None:
            return
        pool, known = self.static.pool, self.prefixes.entries
        while known and len(pool.free) < sum(map(pool.pages_of, lengths)):
            known.popitem(last=False)

    def _take(self, sequence: GeneratedSequence, scores: Tensor) -> None:
        """Choose a sequence's next token, or end it."""
        _check_finite(scores, len(sequence.tokens))
        token = sequence.sample(scores)
        if token in sequence.stop_ids:
            sequence.done = True
            return
        sequence.tokens.append(token)
        if sequence.lookup is not None:
            sequence.lookup.say(token)
        sequence.done = len(sequence.tokens) >= sequence.max_new_tokens

    def _search(self, sequence: GeneratedSequence, search: BeamSearch, scores: Tensor) -> None:
        """Find a sequence's answer, of the scores of its first token."""
        cache, start = sequence.cache, sequence.num_prompt_tokens
        assert cache is not None
        caches, scores = [cache], scores[None]
        _check_finite(scores, 0)
        while parents := search.take(scores):
            free = [one for number, one in enumerate(caches) if number not in parents]
            following = []
            for number, parent in enumerate(parents):
                one = caches[parent]
                if parent in parents[:number]:  # another beam has it already
                    self._make_room(one.capacity)
                    spare = free.pop() if free else None
                    if isinstance(one, KVCache) and isinstance(spare, KVCache):
                        spare.follow(one, start)  # it has the prompt
                        one = spare
                    else:
                        one = one.fork(one.length, one.capacity)
                following.append(one)
            caches = following
            beams = zip(search.tokens, caches, strict=True)
            scores = self._several(
                [replace(sequence, tokens=tokens, cache=one) for tokens, one in beams]
            )
            _check_finite(scores, len(search.tokens[0]))
        sequence.tokens, sequence.cache, sequence.done = search.best, caches[0], True

    def _one(self, sequence: GeneratedSequence) -> None:
        """Extend the only sequence by one token, or by as many as were guessed right."""
        decoder, cache = self.vlm.decoder, sequence.cache
        assert cache is not None
        if not isinstance(cache, KVCache) or not can_flatten(decoder):
            scores = self._several([sequence])[0]
            with _on_its_own(sequence):
                self._take(sequence, scores)
            return
        if self.flat is None or self.flat[0] is not cache:
            self.flat = (cache, FusedDecodeStep(decoder, cache, sequence.position_offset))
        draft = sequence.lookup.draft() if sequence.lookup is not None else []
        past = cache.length
        scores = self.flat[1].several((sequence.tokens[-1], *draft))
        for row, guess in zip(scores, (*draft, None), strict=True):
            with _on_its_own(sequence):
                self._take(sequence, row)
            past += 1
            if sequence.done or sequence.tokens[-1] != guess:
                break
        cache.truncate(past)

    def _several(self, sequences: list[GeneratedSequence]) -> Tensor:
        """Extend each sequence by its last token; return the scores of the next, [B, vocab]."""
        decoder = self.vlm.decoder
        caches = _caches(sequences)
        tokens = [one.tokens[-1] for one in sequences]
        places = [c.length + one.position_offset for c, one in zip(caches, sequences, strict=True)]
        if self.static is not None:
            self._make_room(*[1] * len(sequences))  # at most a page each
            paged = [cache for cache in caches if isinstance(cache, PagedCache)]
            return self.static(decoder, paged, tokens, places)
        device = decoder.norm.weight.device
        if decoder.compiled is not None:
            x = decoder.embed_tokens(torch.tensor(tokens))
            return decoder.compiled.scores(x, torch.tensor(places), caches)
        with packed_kernels():
            layout = SequenceLayout((1,) * len(sequences), caches)
            x = decoder.embed_tokens(torch.tensor(tokens, device=device))
            hidden = decoder(x, torch.tensor(places, device=device), layout)[-1]
            return decoder.logits(hidden)


def _caches(sequences: Iterable[GeneratedSequence]) -> tuple[Cache, ...]:
    return tuple(one.cache for one in sequences if one.cache is not None)


def _check_finite(scores: Tensor, num_tokens: int) -> None:
    """Raise `NonFiniteError` unless all scores are finite, after that many tokens of an answer."""
    if math.isfinite(float(scores.sum())):  # a sum costs less than a test of each score
        return
    wrong = ~scores.isfinite()
    if wrong.any():
        raise NonFiniteError(
            f"{int(wrong.sum())} of {wrong.numel()} logits are NaN or infinite after {num_tokens} "
            "tokens of the answer. The weights are damaged, or overflow in this precision: try "
            "precision='f32', or other weights."
        )


@contextmanager
def _on_its_own(sequence: GeneratedSequence) -> Iterator[None]:
    """Let an error end this sequence and no other."""
    try:
        yield
    except Exception as error:
        sequence.done, sequence.error = True, error


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
    sequence = GeneratedSequence(batch, sample, max_new_tokens, stop_ids)
    # Training follows one answer: no pool of pages may stay in memory.
    engine, shown = Engine(vlm, graphs=False), 0
    for _ in engine.run([sequence]):
        yield from sequence.tokens[shown:]
        shown = len(sequence.tokens)
