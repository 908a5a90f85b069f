"""A linear connector, preceded by the words of a list that fit the image best.

An image's embedding vector is compared with the vectors of a fixed list of words (things, animals,
people, places). The nearest words, spelled in the decoder's own tokens and separated by commas,
stand before the tokens of a linear connector, so a language model reads names from the first step.
With a margin, words clearly farther than the nearest are left out: a few words mean a sure image.
Works only in a model whose embedding head reads the vision tower: the vector comes from there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from visavis.model.config import ConnectorConfig
from visavis.model.connectors.mlp import MLP

SPELLING = 8  # tokens of one word at most, its comma included


class Words(MLP):
    """`num_queries` tokens of spelled words, then those of a linear layer over folded patches."""

    word_vectors: Tensor  # unit vectors [num_words, word_width]
    word_ids: Tensor  # int32 [num_words, SPELLING], the decoder's tokens of "word,", -1 behind
    pad_id: Tensor  # int32 [1], stands where no further word fits

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__(config)
        shape = (config.num_words, config.word_width)
        self.register_buffer("word_vectors", torch.zeros(shape))
        self.register_buffer("word_ids", torch.full((shape[0], SPELLING), -1, dtype=torch.int32))
        self.register_buffer("pad_id", torch.zeros(1, dtype=torch.int32))

    def forward(  # type: ignore[override]  # it needs more than features
        self, features: Tensor, vectors: Tensor, embed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Return image tokens [V, num_queries + n, D].

        Args:
            features: of the vision tower [V, P, W].
            vectors: embedding vectors of the same images [V, word_width], of any length.
            embed: from token ids to the decoder's embeddings.
        """
        seen = super().forward(features)
        ids = self.spelled(vectors)
        words = embed(ids.flatten()).unflatten(0, ids.shape)  # [V, num_queries, D]
        return torch.cat((words.to(seen.dtype), seen), 1)

    def spelled(self, vectors: Tensor) -> Tensor:
        """Return the tokens of the nearest words, best first, int64 [V, num_queries]."""
        scores = F.normalize(vectors, dim=-1) @ self.word_vectors.T  # [V, num_words]
        room = self.config.num_queries
        best, order = scores.topk(min(room, scores.shape[1]), -1)
        ids = self.word_ids[order].long()  # [V, room, SPELLING]
        ends = (ids >= 0).sum(-1).cumsum(-1)  # [V, room]
        fits = ends <= room  # whole words only
        if self.config.word_margin:
            fits &= best >= best[:, :1] - self.config.word_margin
        kept = (ids >= 0) & fits[..., None]
        found = self.pad_id.long().repeat(len(ids), room)
        for row, (own, mask) in enumerate(zip(ids, kept, strict=True)):
            chosen = own[mask]
            found[row, : len(chosen)] = chosen
        return found

    @staticmethod
    def num_tokens(config: ConnectorConfig, num_patches: int) -> int:
        return config.num_queries + MLP.num_tokens(config, num_patches)
