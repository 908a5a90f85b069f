"""Base class of connectors."""

from __future__ import annotations

from torch import Tensor, nn

from visavis.model.config import ConnectorConfig


class Connector(nn.Module):
    """Built from its config; features [V, P, W] in, tokens [V, n, D] in the decoder's width out."""

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def num_tokens(config: ConnectorConfig, num_patches: int) -> int:
        """Return n, which must follow from numbers alone: prompts are counted before any pixel."""
        return num_patches
