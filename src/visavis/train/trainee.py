"""The model as devices wrap it: every objective goes through one `forward`, so that data-parallel
and sharded wrappers see each use of a parameter. Knows no loss over batches and no data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visavis.embed.encoder import pooled
from visavis.errors import TrainError
from visavis.model.batch import PackedBatch
from visavis.model.vlm import VLM
from visavis.train.objectives import next_token_loss

LOSS_BLOCK = 2048  # positions whose scores over the vocabulary are in memory at a time


class Trainee(nn.Module):
    """A model that is trained.

    Attributes:
        autocast: entered around each pass and left after it, so that losses over vectors are
            computed in float32.
        sharded: whether processes gather parameters together, so that all must use the same.
    """

    def __init__(self, vlm: VLM) -> None:
        super().__init__()
        self.vlm = vlm
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.sharded = False

    def forward(
        self, batch: PackedBatch, want: Literal["loss", "vectors"], pooling: str = "last"
    ) -> Tensor:
        """Return the summed next-token loss of labelled positions, or unit vectors [B, D].

        Raises:
            TrainError: it is sharded and pools by the embedding head, whose passes differ.
        """
        if self.sharded and want == "vectors" and pooling == "head":
            raise TrainError(
                "a model with an embedding head cannot be trained sharded: its pictures skip the "
                "decoder. Launch without --use_fsdp."
            )
        with self.autocast():
            found = pooled(self.vlm, batch, pooling) if want == "vectors" else self._loss(batch)
        if torch.is_grad_enabled() and (self.sharded or not found.requires_grad):
            found = found + self._nothing()
        return found

    def _loss(self, batch: PackedBatch) -> Tensor:
        assert batch.labels is not None
        hidden = self.vlm(batch)[-1]  # [T, D]
        learned = (batch.labels != -100).nonzero()[:, 0]
        total = hidden.sum() * 0.0  # stays connected when nothing here is learned
        for rows in learned.split(LOSS_BLOCK):
            logits = self.vlm.decoder.logits(hidden[rows])
            total = total + next_token_loss(logits, batch.labels[rows])
        return total

    def _nothing(self) -> Tensor:
        """Return 0 with a gradient of zeros for what a batch may leave out, such as the connector
        where it has no pictures."""
        firsts = [
            parameter.flatten()[0].float() * 0.0
            for name, parameter in self.named_parameters()
            if parameter.requires_grad and not name.startswith("vlm.decoder.blocks.")
        ]
        return torch.stack(firsts).sum() if firsts else torch.zeros(())
