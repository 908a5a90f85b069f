"""Pooling: hidden states of packed sequences to unit vectors.

Four kinds: the trained embedding head, the last token, the first token, the mean of all tokens.
Multi-vector models (ColPali) keep a vector per token instead.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visavis.errors import InputError
from visavis.model.batch import PackedBatch
from visavis.model.embedder_config import GemmaEncoderConfig
from visavis.model.embedding_head import mean_per_group
from visavis.model.vlm import VLM


@torch.inference_mode()
def embed_batch(vlm: VLM, batch: PackedBatch, pooling: str) -> Tensor:
    """Return unit vectors, float32 [B, D], without gradients."""
    return pooled(vlm, batch, pooling)


def pooled(vlm: VLM, batch: PackedBatch, pooling: str) -> Tensor:
    """Return unit vectors, float32 [B, D]."""
    if pooling == "head":
        return vlm.embed(batch)
    hidden = vlm(batch)[-1]  # [T, D], after the final norm
    if pooling == "mean":
        found, _ = mean_per_group(hidden, batch.owners, len(batch.lengths))
    else:
        lengths = torch.tensor(batch.lengths, device=hidden.device)
        ends = lengths.cumsum(0)
        found = hidden[ends - lengths if pooling == "first" else ends - 1]
    return F.normalize(found, dim=-1)


@torch.inference_mode()
def embed_multi_batch(vlm: VLM, batch: PackedBatch) -> list[Tensor]:
    """Return unit vectors of every token, float32 [tokens, D] per sequence, without gradients."""
    assert vlm.multi_vector_head is not None
    vectors = vlm.multi_vector_head(vlm(batch)[-1])  # [T, D]
    return list(F.normalize(vectors, dim=-1).split(batch.lengths))


def unusable_rows(vectors: np.ndarray) -> np.ndarray:
    """Return which rows [N, D] are no unit vectors: they hold NaN or infinity, or only zeros, to
    which dividing by an infinite norm leads; bool [N]."""
    unusable: np.ndarray = ~(np.isfinite(vectors).all(1) & vectors.any(1))
    return unusable


def embedding_dim(vlm: VLM, pooling: str) -> int:
    """Return the length of a model's vectors before any cut."""
    if isinstance(vlm.config.text_tower, GemmaEncoderConfig):
        return vlm.config.text_tower.dim
    if pooling == "head":
        assert vlm.config.head is not None
        return vlm.config.head.dim
    if pooling == "multi":
        return vlm.config.multi_vector_dim
    return vlm.config.decoder.width


def kept_dim(dim: int | None, whole: int) -> int:
    """Return how many numbers of a vector are kept; None keeps all.

    Raises:
        InputError: `dim` is not between 1 and the vectors' length.
    """
    if dim is None:
        return whole
    if not 1 <= dim <= whole:
        raise InputError(
            f"dim is {dim}, but this model's vectors have {whole} numbers; choose 1 to {whole}."
        )
    return dim


def cut(vectors: Tensor, dim: int) -> Tensor:
    """Keep the first `dim` numbers and normalise again (Matryoshka, Kusupati et al. 2022)."""
    return vectors if dim == vectors.shape[1] else F.normalize(vectors[:, :dim], dim=-1)
