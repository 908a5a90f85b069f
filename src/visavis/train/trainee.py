"""The model as devices wrap it: every objective goes through one `forward`, so that data-parallel
and sharded wrappers see each use of a parameter. Knows no loss over batches and no data."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from visavis.embed.encoder import pooled
from visavis.model.batch import PackedBatch
from visavis.model.vlm import VLM
from visavis.train.objectives import next_token_loss

LOSS_BLOCK = 2048  # positions whose scores over the vocabulary are in memory at a time


class Trainee(nn.Module):
    """A model that is trained."""

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm

    def forward(
        self, batch: PackedBatch, want: Literal["loss", "vectors"], pooling: str = "last"
    ) -> Tensor:
        """Return the summed next-token loss of labelled positions, or unit vectors [B, D]."""
        if want == "vectors":
            return pooled(self.vlm, batch, pooling)
        assert batch.labels is not None
        hidden = self.vlm(batch)[-1]  # [T, D]
        learned = (batch.labels != -100).nonzero()[:, 0]
        total = hidden.sum() * 0.0  # stays connected when nothing here is learned
        for rows in learned.split(LOSS_BLOCK):
            logits = self.vlm.decoder.logits(hidden[rows])
            total = total + next_token_loss(logits, batch.labels[rows])
        return total
