"""Vision-language model: vision tower, connector, decoder and an optional embedding head; or a dual
encoder without decoder: vision tower, text tower and head.

Prompts, files, feature caches and sampling are in other parts of the package.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.attention import SequenceLayout
from visavis.model.batch import PackedBatch
from visavis.model.config import VLMConfig
from visavis.model.connectors import build_connector
from visavis.model.connectors.mlp import MLP
from visavis.model.connectors.words import Words
from visavis.model.decoder import Decoder, DeepStack
from visavis.model.embedding_head import DualHead, EmbeddingHead, mean_per_group
from visavis.model.gemma_encoder import GemmaEncoder
from visavis.model.image_input import ImageGrid, ImageInput
from visavis.model.image_tokens import (
    Separators,
    count_tokens,
    merge_image_features,
    pack_image_features,
    select,
)
from visavis.model.layers import Linear
from visavis.model.paged_kv_cache import Cache
from visavis.model.text_tower import BertEncoder, ClipTextEncoder, build_text_tower
from visavis.model.vision import build_tower

TOWER_BATCH = 4  # views per forward of the vision tower on the CPU

# Tokens [n, D] and mean feature [W] of one image or video; with DeepStack [n, (1 + K) D], what is
# added after each of the first K blocks beside the tokens.
ImageFeatures = tuple[Tensor, Tensor]


class VLM(nn.Module):
    """Built with random weights; `checkpoints` fills them."""

    def __init__(self, config: VLMConfig) -> None:
        super().__init__()
        self.config = config
        if config.has_decoder:
            self.decoder = Decoder(config.decoder)
        self.tower = build_tower(config.tower) if config.tower else None
        self.connector = build_connector(config.connector) if config.connector else None
        self.head, self.dual_head = None, None
        if config.head is not None and config.head.scores:
            self.dual_head = DualHead(config.head)
        elif config.head is not None:
            self.head = EmbeddingHead(config.head, config.decoder.width)
        self.text_tower = build_text_tower(config.text_tower) if config.text_tower else None
        dim = config.multi_vector_dim
        self.multi_vector_head = Linear(config.decoder.width, dim) if dim else None
        newline = config.merge.newline
        self.image_newline = nn.Parameter(torch.zeros(config.decoder.width)) if newline else None
        hd = config.connector if config.merge.kind == "hd" else None
        self.separators = Separators(hd.in_width * hd.shuffle**2) if hd else None

    def cast(self, dtype: torch.dtype) -> VLM:
        """Set what the decoder's matmuls compute in; all else stays float32."""
        for module in self.decoder.modules() if self.config.has_decoder else ():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.to(dtype)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The number type of the decoder's matrix products; of a dual encoder, its text tower's."""
        if self.config.has_decoder:
            return self.decoder.dtype
        assert self.text_tower is not None
        return next(self.text_tower.parameters()).dtype

    def tower_features(self, pixels: Tensor) -> Tensor:
        """Return the selected tower features of views [V, 3, S, S]: float32 [V, P, W]."""
        assert self.tower is not None
        dtype = next(self.tower.parameters()).dtype
        pixels = pixels.to(dtype, memory_format=torch.channels_last)  # a third faster on the CPU
        return select(self.tower(pixels, self.config.select_layer), self.config).float()

    def see(self, visuals: Sequence[ImageInput]) -> list[ImageFeatures]:
        """Return the image tokens and mean tower features of images and videos."""
        if self.dual_head is not None:
            return self._see_vectors(visuals, self.dual_head)
        if self.config.tower is not None and self.config.tower.any_resolution:
            return self._see_patches(visuals)
        views = torch.cat([visual.pixels for visual in visuals])
        # on the CPU larger batches fall out of the cache
        chunks = views.split(TOWER_BATCH) if views.device.type == "cpu" else (views,)
        features = torch.cat([self.tower_features(chunk) for chunk in chunks])
        return self.connect(features, [visual.shape for visual in visuals])

    def _see_vectors(self, visuals: Sequence[ImageInput], head: DualHead) -> list[ImageFeatures]:
        """Return a dual encoder's vector of each image or video, which is its one token too: the
        mean of the unit vectors of its views (CLIP4Clip, Luo et al. 2021, for videos)."""
        tower: Any = self.tower
        dtype = next(tower.parameters()).dtype
        pixels = torch.cat([visual.pixels for visual in visuals]).to(dtype)
        shapes = [visual.shape for visual in visuals]
        if self.config.tower is not None and self.config.tower.any_resolution:
            grids = [(shape.frames, shape.rows, shape.columns) for shape in shapes]
            features = tower.pooled(pixels, grids)
            counts = [shape.frames for shape in shapes]
        else:
            chunks = pixels.split(TOWER_BATCH) if pixels.device.type == "cpu" else (pixels,)
            features = torch.cat([tower.pooled(chunk) for chunk in chunks])
            counts = [shape.views for shape in shapes]
        means = [own.mean(0) for own in head.images(features.float()).split(counts)]
        return [(mean[None], mean) for mean in means]

    def _see_patches(self, visuals: Sequence[ImageInput]) -> list[ImageFeatures]:
        """See images and videos of any size: their patches stand in one stream."""
        assert self.tower is not None and self.connector is not None
        shapes = [visual.shape for visual in visuals]
        patches = torch.cat([visual.pixels for visual in visuals])  # [P, C]
        grids = [(shape.frames, shape.rows, shape.columns) for shape in shapes]
        dtype = next(self.tower.parameters()).dtype
        features = self.tower(patches.to(dtype), grids).float()  # [P, W]
        tokens = self.connector(features[None])[0]
        counts = [count_tokens(self.config, shape) for shape in shapes]
        last = features[:, : self.config.tower.width] if self.config.tower else features
        means = [own.mean(0) for own in last.split([len(one.pixels) for one in visuals])]
        return list(zip(tokens.split(counts), means, strict=True))

    def connect(self, features: Tensor, shapes: Sequence[ImageGrid]) -> list[ImageFeatures]:
        """Return image tokens and mean features from the tower features [V, P, W] of all views."""
        assert self.connector is not None
        views = [shape.views for shape in shapes]
        tokens = self._image_tokens(features).split(views)
        merge, newline = self.config.merge, self.image_newline
        if self.separators is not None:
            assert isinstance(self.connector, MLP)
            newline = self.connector.layers(self.separators())  # [2, D]
        return [
            (pack_image_features(own, shape, merge, newline), seen.mean((0, 1)))
            for own, seen, shape in zip(tokens, features.split(views), shapes, strict=True)
        ]

    def _image_tokens(self, features: Tensor) -> Tensor:
        """Return the connector's tokens [V, n, D] of features [V, P, W]."""
        if isinstance(self.connector, Words):
            assert self.head is not None
            vectors = self.head.image(features.mean(1))
            return self.connector(features, vectors, self.decoder.embed_tokens)
        assert self.connector is not None
        tokens: Tensor = self.connector(features)
        return tokens

    def resolve_images(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch with the tokens and mean features of its images computed."""
        if batch.image_positions is None or batch.image_tokens is not None:
            return batch
        if batch.features is not None:  # each image is one view
            seen = self.connect(batch.features, [ImageGrid()] * len(batch.features))
        else:
            seen = self.see(batch.visuals)
        return replace(
            batch,
            image_tokens=torch.cat([tokens for tokens, _ in seen]),
            image_counts=tuple(len(tokens) for tokens, _ in seen),
            image_means=torch.stack([mean for _, mean in seen]),
        )

    def embed_inputs(self, batch: PackedBatch) -> tuple[Tensor, DeepStack | None]:
        """Return the decoder's input [T, D], token embeddings with image tokens spliced in, and
        what is added to the outputs of its first blocks where the model has DeepStack."""
        x = self.decoder.embed_tokens(batch.token_ids)
        batch = self.resolve_images(batch)
        if batch.image_positions is None:
            return x, None
        assert batch.image_tokens is not None
        first, *others = batch.image_tokens.split(x.shape[-1], -1)
        deepstack = DeepStack(batch.image_positions, tuple(others)) if others else None
        return merge_image_features(x, first, batch.image_positions), deepstack

    def forward(
        self,
        batch: PackedBatch,
        layers: Collection[int] = (-1,),
        caches: tuple[Cache, ...] = (),
    ) -> dict[int, Tensor]:
        """Return hidden states of the named layers, each float32 [T, D] (see `Decoder.forward`)."""
        layout = SequenceLayout.of(batch.lengths, caches)
        x, deepstack = self.embed_inputs(batch)
        return self.decoder(x, batch.positions, layout, layers, deepstack)

    def embed(self, batch: PackedBatch) -> Tensor:
        """Return unit vectors, float32 [B, dim], through the embedding head."""
        if self.dual_head is not None:
            return self._embed_dual(batch, self.dual_head)
        if isinstance(self.text_tower, GemmaEncoder):
            return self._embed_gemma(batch, self.text_tower)
        assert self.head is not None and self.config.head is not None
        batch, num = self.resolve_images(batch), len(batch.lengths)
        is_image, owners = batch.is_image, batch.owners
        if not self.config.head.tower_width:
            hidden = self.head_states(batch)
            return self.head(
                mean_per_group(hidden[~is_image], owners[~is_image], num),
                mean_per_group(hidden[is_image], owners[is_image], num),
            )
        features = batch.image_means
        if features is None:
            features = torch.zeros(0, self.config.head.tower_width, device=owners.device)
        has_text = torch.zeros(num, dtype=torch.bool, device=owners.device)
        has_text[owners[~is_image]] = True
        text = torch.zeros(num, self.head.text.in_features, device=owners.device)
        if has_text.any():  # pictures alone do not pass the decoder
            kept = batch.select(has_text)
            chosen = ~kept.is_image
            if isinstance(self.text_tower, BertEncoder):
                counts = torch.bincount(kept.owners[chosen]).tolist()
                means = self.text_tower(kept.token_ids[chosen], counts)
            else:
                hidden = self.head_states(kept)[chosen]
                means, _ = mean_per_group(hidden, kept.owners[chosen], len(kept.lengths))
            text = text.index_copy(0, has_text.nonzero()[:, 0], means)
        pooled = mean_per_group(features, batch.image_owners, num)
        return self.head((text, has_text[:, None].float()), pooled)

    def _embed_dual(self, batch: PackedBatch, head: DualHead) -> Tensor:
        """Return unit vectors of texts and of images; no sequence has both."""
        assert isinstance(self.text_tower, ClipTextEncoder)
        batch, num = self.resolve_images(batch), len(batch.lengths)
        is_text = torch.ones(num, dtype=torch.bool, device=batch.token_ids.device)
        found = torch.zeros(num, head.config.dim, device=batch.token_ids.device)
        if batch.image_means is not None:
            owners = batch.image_owners
            is_text[owners] = False
            found = mean_per_group(batch.image_means, owners, num)[0]
        if is_text.any():
            texts = batch.select(is_text)
            states = self.text_tower(texts.token_ids, texts.lengths)
            found = found.index_copy(0, is_text.nonzero()[:, 0], head.texts(states))
        return F.normalize(found, dim=-1)

    def _embed_gemma(self, batch: PackedBatch, encoder: GemmaEncoder) -> Tensor:
        """Return unit vectors of texts with image tokens among them: the mean of all tokens."""
        batch = self.resolve_images(batch)
        x = encoder.embed_tokens(batch.token_ids.masked_fill(batch.is_image, 0))
        if batch.image_positions is not None:
            assert batch.image_tokens is not None
            x = merge_image_features(x, batch.image_tokens, batch.image_positions)
        hidden = encoder(x, batch.lengths).float()
        found, _ = mean_per_group(hidden, batch.owners, len(batch.lengths))
        return F.normalize(found, dim=-1)

    def head_states(self, batch: PackedBatch) -> Tensor:
        """Return the hidden states that the embedding head reads, side by side, [T, layers * D]."""
        assert self.config.head is not None
        layers = self.config.head.layers
        found = self(batch, layers)
        return torch.cat([found[layer] for layer in layers], -1)
