"""Reranking with a loaded model: how likely each document fits a query, read together.

A reranker is a chat model that was trained to answer "yes" or "no" (Qwen3-VL-Reranker). The score
is the probability of "yes" among the two: sigmoid((W_yes - W_no) · h), where h is the hidden state
from which the answer's first token is chosen and W the rows of the output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from visavis.embedder import Embedder
from visavis.errors import InputError, NonFiniteError
from visavis.inputs import Message, Prompt, Text
from visavis.processing.images import ContentHasher
from visavis.processing.items import embedding_batches, list_items, name_item
from visavis.processing.prompt_encoder import PreparedPrompt

SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
DEFAULT_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
ANSWERS = ("yes", "no")


@dataclass(repr=False, eq=False)
class Reranker(Embedder):
    """A checkpoint that embeds or reranks, as its profile says."""

    @property
    def is_reranker(self) -> bool:
        """Whether it scores pairs (`rerank`) and gives no vectors."""
        return bool(self.profile.reranker)

    @property
    def embedding_dim(self) -> int:
        """The length of a vector of `embed`.

        Raises:
            InputError: the model gives an item many vectors or none.
        """
        if self.is_reranker:
            raise InputError(
                f"{self.name} scores a document for a query and gives no vectors: use rerank, or "
                "a model that embeds."
            )
        return super().embedding_dim

    def rerank(
        self,
        query: Any,
        documents: Any,
        *,
        instruction: str | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Return how likely each document fits a query, float32 [N] between 0 and 1, in order.

        Args:
            query: what `Prompt.of` takes: a text, an image, a video, or several of them.
            documents: a list of such items.
            instruction: what is looked for; None: Qwen's "retrieve relevant candidates that answer
                the query".
            batch_tokens: see `embed`.
            progress: show a bar on stderr.

        Raises:
            InputError: the model is no reranker, or an item cannot be used.
            ImageError, ContextLengthError, OutOfMemoryError, NonFiniteError: see `embed`.
        """
        listed, hasher = list_items(documents), ContentHasher()
        asked = Prompt.of(query)
        prepared = [self.prepare_pair(asked, Prompt.of(one), instruction, hasher) for one in listed]
        scores = np.empty(len(prepared), np.float32)
        for group in embedding_batches(prepared, batch_tokens, progress):
            scores[group] = self.score_prepared([prepared[i] for i in group])
            for number in group:
                if not np.isfinite(scores[number]):
                    raise NonFiniteError(
                        f"document {number + 1} of {len(listed)} ({name_item(listed[number])}): "
                        f"its score is not a number. The weights of {self.name} are damaged, or "
                        "overflow in this precision: try precision='f32', or other weights."
                    )
        return scores

    def prepare_pair(
        self,
        query: Prompt,
        document: Prompt,
        instruction: str | None = None,
        hasher: ContentHasher | None = None,
    ) -> PreparedPrompt:
        """Return a query and a document that `score_prepared` takes; for servers.

        Raises:
            InputError, ImageError, ContextLengthError: see `rerank`.
        """
        if not self.is_reranker:
            raise InputError(
                f"{self.name} is not known to be a reranker: name its profile, "
                "visavis.load(…, profile='qwen3-vl-reranker'), or compare the vectors of embed."
            )
        parts = [
            Text(f"<Instruct>: {instruction or DEFAULT_INSTRUCTION}<Query>:"),
            *self._contents(query, hasher),
            Text("\n<Document>:"),
            *self._contents(document, hasher),
        ]
        system = Message("system", (Text(SYSTEM),))
        return self.encoder.chat(Prompt((system, Message("user", tuple(parts)))))

    def score_prepared(self, prepared: Sequence[PreparedPrompt]) -> np.ndarray:
        """Return the score of each pair, float32 [N], computed in one batch.

        Raises:
            ImageError: an image cannot be read.
            OutOfMemoryError: the batch does not fit.
        """
        batch = self.image_encoder.pack(prepared)
        with self._enough_memory(batch), torch.inference_mode():
            hidden = self.vlm(batch)[-1]  # [T, D]
            ends = torch.tensor(batch.lengths, device=hidden.device).cumsum(0) - 1
            logits = self.vlm.decoder.logits(hidden[ends])[:, self._answer_ids]  # [N, 2]
            return (logits[:, 0] - logits[:, 1]).sigmoid().cpu().numpy()

    def embed_prepared(self, prepared: Sequence[PreparedPrompt]) -> np.ndarray:
        """Return one unit vector per prepared item, float32 [N, D], computed in one batch; of a
        reranker the score of each pair, [N, 1].

        Raises:
            ImageError: an image cannot be read.
            OutOfMemoryError: the batch does not fit.
        """
        if self.is_reranker:
            return self.score_prepared(prepared)[:, None]
        return super().embed_prepared(prepared)

    def _contents(self, prompt: Prompt, hasher: ContentHasher | None) -> list[Any]:
        """Return the parts of an item as its model reads them: what is looked at, then the text."""
        found = self._identified(prompt, hasher)
        return [*found.visuals, *([Text(found.text)] if found.text else [])]

    @property
    def _answer_ids(self) -> list[int]:
        ids = [self.tokenizer.token_to_id(answer) for answer in ANSWERS]
        known = [number for number in ids if number is not None]
        if len(known) < len(ANSWERS):
            raise InputError(
                f"the tokenizer of {self.name} has no tokens {' and '.join(map(repr, ANSWERS))}, "
                "which a reranker answers with; this profile belongs to another model."
            )
        return known
