"""A vision-language model: tower, connector, decoder and, for some, an embedding head.

Composes the parts and nothing else: prompts, files, caches of features and sampling are elsewhere.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

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
        """Return what the connector reads of images [N, 3, S, S]: float32 [N, P, W]."""
        assert self.tower is not None
        dtype = next(self.tower.parameters()).dtype
        pixels = pixels.to(dtype, memory_format=torch.channels_last)  # a third faster on the CPU
        return select(self.tower(pixels, self.config.select_layer), self.config).float()

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return what images [N, 3, S, S] become: tokens [N, P', D], mean features [N, W]."""
        assert self.connector is not None
        features = self.tower_features(pixels)
        return self.connector(features), features.mean(1)

    def resolve_images(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch with the tokens and mean features of its images computed."""
        if batch.image_positions is None or batch.image_tokens is not None:
            return batch
        if batch.features is not None:
            assert self.connector is not None
            tokens, means = self.connector(batch.features), batch.features.mean(1)
        else:
            assert batch.pixels is not None
            tokens, means = self.see(batch.pixels)
        return replace(batch, image_tokens=tokens, image_means=means)

    def embed_inputs(self, batch: PackedBatch) -> Tensor:
        """Return the decoder's input [T, D]: token embeddings with image tokens spliced in."""
        x = self.decoder.embed_tokens(batch.token_ids)
        batch = self.resolve_images(batch)
        if batch.image_positions is None:
            return x
        assert batch.image_tokens is not None
        return splice(x, batch.image_tokens, batch.image_positions)

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
        batch = self.resolve_images(batch)
        found = self(batch, layers)
        hidden = torch.cat([found[layer] for layer in layers], -1)  # [T, layers * D]
        is_image = torch.zeros(batch.num_tokens, dtype=torch.bool, device=hidden.device)
        tower_means = None
        if batch.image_positions is not None:
            is_image[batch.image_positions] = True
            if self.config.head.tower_width:
                tower_means = means_per_sequence(batch)
        return self.head(hidden, batch.lengths, is_image, tower_means)


def means_per_sequence(batch: PackedBatch) -> Tensor:
    """Return the mean over each sequence's images of their mean features, [B, W]."""
    assert batch.image_means is not None and batch.image_positions is not None
    means = batch.image_means
    firsts = batch.image_positions.view(len(means), -1)[
        :, 0
    ].contiguous()  # where each image starts
    ends = torch.tensor(batch.lengths, device=means.device).cumsum(0)
    owner = torch.bucketize(firsts, ends, right=True)
    sums = means.new_zeros(len(ends), means.shape[1]).index_add(0, owner, means)
    return sums / torch.bincount(owner, minlength=len(ends)).clamp(min=1)[:, None]
