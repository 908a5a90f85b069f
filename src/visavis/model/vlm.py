"""A vision-language model: tower, connector, decoder and, for some, an embedding head.

Composes the parts and nothing else: prompts, files, caches of features and sampling are elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from visavis.model.attention import Layout
from visavis.model.batch import PackedBatch
from visavis.model.config import VLMConfig
from visavis.model.connector import Connector
from visavis.model.decoder import Decoder
from visavis.model.fusion import select, splice
from visavis.model.head import EmbeddingHead
from visavis.model.kv_cache import KVCache
from visavis.model.towers import build_tower


class VLM(nn.Module):
    """Built with random weights; `checkpoints` fills them."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config.decoder)
        self.tower = build_tower(config.tower) if config.tower else None
        self.connector = Connector(config.connector) if config.connector else None
        self.head = EmbeddingHead(config.head, config.decoder.width) if config.head else None

    def cast(self, dtype: torch.dtype) -> VLM:
        """Set what the decoder's matmuls compute in; all else stays float32."""
        for module in self.decoder.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.to(dtype)
        return self

    def tower_features(self, pixels: Tensor) -> Tensor:
        """Return what the connector reads of images [N, 3, S, S]: [N, P, W]."""
        assert self.tower is not None
        return select(self.tower(pixels, self.config.select_layer), self.config)

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """Return the tokens that images [N, 3, S, S] become, [N, P', D]."""
        assert self.connector is not None
        return self.connector(self.tower_features(pixels))

    def embed_inputs(self, batch: PackedBatch) -> Tensor:
        """Return the decoder's input [T, D]: token embeddings with image tokens spliced in."""
        x = self.decoder.embed_tokens(batch.token_ids)
        if batch.image_positions is None:
            return x
        if batch.image_tokens is not None:
            image_tokens = batch.image_tokens
        elif batch.features is not None:
            assert self.connector is not None
            image_tokens = self.connector(batch.features)
        else:
            assert batch.pixels is not None
            image_tokens = self.image_tokens(batch.pixels)
        return splice(x, image_tokens, batch.image_positions)

    def forward(
        self,
        batch: PackedBatch,
        layers: Collection[int] = (-1,),
        caches: tuple[KVCache, ...] = (),
    ) -> dict[int, Tensor]:
        """Return hidden states of the named layers, each float32 [T, D] (see `Decoder.forward`)."""
        layout = Layout(batch.lengths, caches)
        return self.decoder(self.embed_inputs(batch), batch.positions, layout, layers)

    def embed(self, batch: PackedBatch) -> Tensor:
        """Return unit vectors, float32 [B, dim], through the embedding head."""
        assert self.head is not None and self.config.head is not None
        layers = self.config.head.layers
        found = self(batch, layers)
        hidden = torch.cat([found[layer] for layer in layers], -1)  # [T, layers * D]
        is_image = torch.zeros(batch.num_tokens, dtype=torch.bool, device=hidden.device)
        if batch.image_positions is not None:
            is_image[batch.image_positions] = True
        return self.head(hidden, batch.lengths, is_image)
