"""Text towers: the text side of a dual encoder, beside a decoder (BERT) or without one (CLIP,
SigLIP). All take a packed stream.

Devlin et al., "BERT" (2019): learned positions, post-norm blocks, exact GELU. Pooling is the mean
over all tokens, `[CLS]` and `[SEP]` included, as sentence-transformers' mean pooling computes it.
BERT takes a stream without padding; SigLIP's tower was trained on texts filled up with padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visavis.model.attention import SequenceLayout, attend
from visavis.model.config import BertConfig, TextTowerConfig
from visavis.model.embedder_config import ClipTextConfig, GemmaEncoderConfig
from visavis.model.embedding_head import mean_per_group
from visavis.model.gemma_encoder import GemmaEncoder
from visavis.model.layers import Embedding, Linear
from visavis.model.vision.vit import ViTBlock


class BertBlock(nn.Module):
    """Bidirectional attention, then a feed-forward; each is added and normalised."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.attn_norm = nn.LayerNorm(width, config.norm_eps)
        self.up, self.down = Linear(width, config.ffn_width), Linear(config.ffn_width, width)
        self.ffn_norm = nn.LayerNorm(width, config.norm_eps)

    def forward(self, x: Tensor, layout: SequenceLayout) -> Tensor:  # [T, W]
        q, k, v = self.qkv(x).view(len(x), 3 * self.num_heads, -1).chunk(3, 1)
        mixed = attend(q, k, v, layout, causal=False).reshape(x.shape)
        x = self.attn_norm(x + self.out(mixed))
        return self.ffn_norm(x + self.down(F.gelu(self.up(x))))


class BertEncoder(nn.Module):
    """Token embeddings, learned positions and blocks."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.zeros(config.context_length, config.width))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.blocks = nn.ModuleList(BertBlock(config) for _ in range(config.num_layers))

    def forward(self, token_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return a unit vector per text, the mean of its last hidden states, float32 [B, W].

        `[CLS]` and `[SEP]` are added here. A text longer than the context is read in windows, and
        its vector is the mean over the tokens of all of them.

        Args:
            token_ids: int64 [T], texts without special tokens, one after another.
            lengths: tokens of each text, at least 1; they sum to T.
        """
        config, room = self.config, self.config.window - 2
        first, last = token_ids.new_tensor([config.cls_id]), token_ids.new_tensor([config.sep_id])
        windows: list[Tensor] = []
        owners: list[int] = []
        for owner, text in enumerate(token_ids.split(list(lengths))):
            for window in text.split(room):
                windows.append(torch.cat((first, window, last)))
                owners += [owner] * (len(window) + 2)
        layout = SequenceLayout(tuple(map(len, windows)))
        places = torch.cat([torch.arange(len(one), device=token_ids.device) for one in windows])
        x = self.norm(self.embed(torch.cat(windows)) + self.positions[places])
        for block in self.blocks:
            x = block(x, layout)
        found, _ = mean_per_group(x, token_ids.new_tensor(owners), len(lengths))
        return F.normalize(found.float(), dim=-1)


class ClipTextEncoder(nn.Module):
    """The text tower of CLIP or SigLIP: pre-norm blocks; one token's state stands for the text."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.zeros(config.context_length, config.width))
        self.blocks = nn.ModuleList(ViTBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)

    def forward(self, token_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Return the state of the token that stands for each text, float32 [B, W].

        Args:
            token_ids: int64 [T], texts with special and padding tokens, one after another.
            lengths: tokens of each text, at least 1; they sum to T.
        """
        counts = list(lengths)
        places = torch.cat([torch.arange(n, device=token_ids.device) for n in counts])
        x = self.embed(token_ids) + self.positions[places]
        layout = SequenceLayout(tuple(counts))
        for block in self.blocks:
            x = block(x, layout, causal=self.config.causal)
        chosen = [self._chosen(own) for own in token_ids.split(counts)]
        starts = torch.tensor([0, *counts[:-1]], device=x.device).cumsum(0)
        found: Tensor = self.norm(x[starts + torch.stack(chosen)])
        return found.float()

    def _chosen(self, token_ids: Tensor) -> Tensor:
        """Return the place of the token that stands for a text."""
        if self.config.pooling == "last":
            return token_ids.new_tensor(len(token_ids) - 1)
        ends = self.config.pooling == "eos"
        marked = (token_ids == self.config.eos_id).int() if ends else token_ids
        return marked.argmax()  # the first of several


def build_text_tower(config: TextTowerConfig) -> BertEncoder | ClipTextEncoder | GemmaEncoder:
    """Return the (randomly initialised) text tower that a config describes."""
    if isinstance(config, GemmaEncoderConfig):
        return GemmaEncoder(config)
    return BertEncoder(config) if isinstance(config, BertConfig) else ClipTextEncoder(config)
