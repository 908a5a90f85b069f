"""Embedding with a loaded model: one unit vector per item, or one per token.

`visavis.Model` adds chat to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from visavis.checkpoints.checkpoint import Checkpoint
from visavis.errors import InputError, NonFiniteError
from visavis.inputs import Prompt
from visavis.memory import enough_memory
from visavis.model.batch import PackedBatch
from visavis.model.pooling import (
    cut,
    embed_batch,
    embed_multi_batch,
    embedding_dim,
    kept_dim,
    unusable_rows,
)
from visavis.processing.image_encoder import ImageEncoder
from visavis.processing.images import ContentHasher
from visavis.processing.items import embedding_batches, list_items, name_item
from visavis.processing.pdf import expand
from visavis.processing.prompt_encoder import PreparedPrompt, PromptEncoder


@dataclass(repr=False, eq=False)
class Embedder(Checkpoint):
    """A checkpoint that embeds.

    Attributes:
        image_encoder: encodes images; `image_encoder.cache` keeps their features.
    """

    def __post_init__(self) -> None:
        self.image_encoder = ImageEncoder(self.vlm, self.processor)

    @cached_property
    def encoder(self) -> PromptEncoder:
        """Turns prompts into ids; made once, with its chat template compiled once."""
        return super().encoder

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.image_encoder.device

    @property
    def embedding_dim(self) -> int:
        """The length of a vector of `embed`.

        Raises:
            InputError: the model gives an item many vectors and not one.
        """
        if self.has_multi_vectors:
            raise InputError(
                f"{self.name} embeds an item as many vectors, one per token, expected one for the "
                "whole item: use embed_multi, and visavis.maxsim to compare two items, or another "
                "model."
            )
        return embedding_dim(self.vlm, self.profile.pooling)

    @property
    def takes_images(self) -> bool:
        return self.vlm.tower is not None

    @property
    def has_multi_vectors(self) -> bool:
        """Whether it embeds an item as a vector per token (`embed_multi`) and not as one."""
        return self.profile.pooling == "multi"

    def embed(
        self,
        items: Any,
        *,
        instruction: str | None = None,
        dim: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Return one unit vector per item, float32 [N, D], in the order of the items.

        Args:
            items: a list of what `Prompt.of` takes (a str is text, a Path an image, or by its
                suffix a video or document), or one item. A document is one item of all its pages.
            instruction: what the vectors are for; joined to each item's text as the model's
                profile says.
            dim: keep only the first `dim` numbers, normalised again.
            batch_tokens: tokens per forward pass; more is faster until memory runs out.
            progress: show a bar on stderr.

        Raises:
            InputError, ImageError: an item cannot be used; the message names it.
            ContextLengthError: an item is longer than the model's context.
            OutOfMemoryError: the message says what for, and what would take less.
            NonFiniteError: a vector holds NaN or infinity; the message names its item.
        """
        dim = kept_dim(dim, self.embedding_dim)
        listed, hasher = list_items(items), ContentHasher()
        prepared = [self.prepare(Prompt.of(item), instruction, hasher) for item in listed]
        vectors = np.empty((len(prepared), dim), np.float32)
        for group in embedding_batches(prepared, batch_tokens, progress):
            found = self.embed_prepared([prepared[i] for i in group])
            vectors[group] = cut(torch.from_numpy(found), dim).numpy()
            self._check_finite(vectors[group], listed, group)
        return vectors

    def embed_multi(
        self,
        items: Any,
        *,
        documents: bool = False,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> list[np.ndarray]:
        """Return the unit vectors of every token of each item, float32 [tokens, D], in order.

        `visavis.maxsim` compares two of them. An image is a document; a text is a query, unless
        `documents` says that it is one to be found.

        Args:
            items: see `embed`; each is one text or one image.
            documents: texts are documents: no query prefix and no augmentation tokens.
            batch_tokens: see `embed`.
            progress: show a bar on stderr.

        Raises:
            InputError: the model has no multi-vector head, or an item is of another kind.
            ImageError, ContextLengthError, OutOfMemoryError, NonFiniteError: see `embed`.
        """
        listed, hasher = list_items(items), ContentHasher()
        if not self.has_multi_vectors:
            raise InputError(
                f"{self.name} embeds an item as one vector and has no multi-vector head: use "
                "embed, or a model such as ColPali or ColQwen2."
            )
        prepared = [
            self.prepare(Prompt.of(item), hasher=hasher, document=documents) for item in listed
        ]
        found: list[np.ndarray] = [np.empty(0)] * len(prepared)
        for group in embedding_batches(prepared, batch_tokens, progress):
            batch = self.embed_multi_prepared([prepared[i] for i in group])
            for number, vectors in zip(group, batch, strict=True):
                self._check_finite(vectors, listed, [number] * len(vectors))
                found[number] = vectors
        return found

    def prepare(
        self,
        prompt: Prompt,
        instruction: str | None = None,
        hasher: ContentHasher | None = None,
        *,
        document: bool = False,
    ) -> PreparedPrompt:
        """Return an item that `embed_prepared` or `embed_multi_prepared` takes; for servers, which
        batch items of their own.

        Raises:
            InputError, ImageError, ContextLengthError: see `embed` and `embed_multi`.
        """
        identified = self._identified(prompt, hasher)
        return self.encoder.item(identified, instruction, document=document)

    def embed_prepared(self, prepared: Sequence[PreparedPrompt]) -> np.ndarray:
        """Return one unit vector per prepared item, float32 [N, D], computed in one batch.

        Raises:
            ImageError: an image cannot be read.
            OutOfMemoryError: the batch does not fit.
        """
        batch = self.image_encoder.pack(prepared)
        with self._enough_memory(batch):
            return embed_batch(self.vlm, batch, self.profile.pooling).cpu().numpy()

    def classify(self, images: Sequence[Any], texts: Sequence[str]) -> np.ndarray:
        """Return how likely each text belongs to each image, float32 [images, texts].

        By the checkpoint's own scale: of CLIP a softmax over the texts, so that each row sums to
        1; of SigLIP a sigmoid for each pair, so that none or several texts may fit.

        Args:
            images: what `embed` takes, without text.
            texts: labels or captions, such as "a photo of a cat".

        Raises:
            InputError, ImageError, ContextLengthError: see `embed`; or the model is no CLIP or
                SigLIP.
        """
        head = self.vlm.dual_head
        if head is None:
            raise InputError(
                f"{self.name} has no scale that makes probabilities of its cosines; CLIP, SigLIP "
                "and MetaCLIP checkpoints have one. Compare vectors of embed instead."
            )
        seen, read = self.embed(list(images)), self.embed(list(texts))
        with torch.inference_mode():
            cosines = torch.from_numpy(seen @ read.T).to(self.device)
            return head.probabilities(cosines).cpu().numpy()

    def embed_multi_prepared(self, prepared: Sequence[PreparedPrompt]) -> list[np.ndarray]:
        """Return the unit vectors of each prepared item, float32 [tokens, D], of one batch.

        Raises:
            ImageError, OutOfMemoryError: see `embed_prepared`.
        """
        batch = self.image_encoder.pack(prepared)
        with self._enough_memory(batch):
            return [one.cpu().numpy() for one in embed_multi_batch(self.vlm, batch)]

    def _check_finite(
        self, vectors: np.ndarray, items: Sequence[Any], numbers: Sequence[int]
    ) -> None:
        """Raise `NonFiniteError` if a vector, of the item of that number, is no unit vector."""
        wrong = [numbers[row] for row in np.flatnonzero(unusable_rows(vectors)).tolist()]
        if wrong:
            others = f" and {len(wrong) - 1} more of its batch" if len(wrong) > 1 else ""
            raise NonFiniteError(
                f"item {wrong[0] + 1} of {len(items)} ({name_item(items[wrong[0]])}){others}: its "
                "vector holds NaN or infinite numbers, or only zeros, expected a vector of length "
                f"1. The weights of {self.name} are damaged, or overflow in this precision: try "
                "precision='f32', or other weights."
            )

    def _enough_memory(self, batch: PackedBatch) -> AbstractContextManager[None]:
        return enough_memory(
            f"embedding {len(batch.lengths)} items of {batch.num_tokens} tokens, "
            f"{len(batch.image_counts)} images",
            "Use a smaller batch (batch_tokens), or shorten what is long.",
        )

    def _identified(self, prompt: Prompt, hasher: ContentHasher | None = None) -> Prompt:
        """Return a prompt with its documents as pages, and the content of its images known."""
        prompt = expand(prompt)
        if prompt.visuals and not self.takes_images:
            return prompt  # the prompt encoder refuses it
        return (hasher or ContentHasher()).identify(prompt)
