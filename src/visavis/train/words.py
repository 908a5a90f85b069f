"""A linear connector that starts out speaking: mean features to mean word embeddings.

Ridge regression from a picture's mean feature to the mean token embedding of the content words
people wrote about it. A language model reads such tokens as words from the first step on; started
from vectors that only agree with text states it ignored them for hundreds of steps (dev/LOG.md).
Closed form: seconds. Knows no objective.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from visavis.data.records import Record

MAX_WORDS = 24
RIDGE = 300.0
_FUNCTION_WORDS = (
    "a an the of in on at and or with is are to from by for its it this that as their his her be "
    "which shows show showing photo photograph image picture there two three one what color shape "
    "does not contain yes no present"
)
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_WORD = re.compile(r"[a-z]+")


def content_words(record: Record) -> list[str]:
    """Return the words that say what a record's picture shows, at most MAX_WORDS."""
    text = " ".join((record.caption, *record.also[:1]))
    if not text.strip():  # questions only: the answers name things
        text = " ".join(dict.fromkeys(answer for _, answer in record.questions))
    words = [word for word in _WORD.findall(text.lower()) if word not in FUNCTION_WORDS]
    return words[:MAX_WORDS]


def word_targets(records: Sequence[Record], tokenizer: Tokenizer, embeddings: Tensor) -> Tensor:
    """Return the mean token embedding of each record's content words, [N, D]; zero if none."""
    targets = torch.zeros(len(records), embeddings.shape[1])
    for number, record in enumerate(records):
        words = content_words(record)
        if words:
            pieces = tokenizer.encode_batch([f" {word}" for word in words])
            ids = [token for piece in pieces for token in piece.ids]
            targets[number] = embeddings[ids].float().mean(0)
    return targets


def fit_words(means: Tensor, targets: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight [D, W] and bias [D] of the map from mean features to image tokens.

    Targets are centred and made equally long first, so that rare words count as much as common
    ones. Tokens come out centred and as spread as the decoder's own embeddings.

    Args:
        means: mean features [N, W].
        targets: mean word embeddings [N, D]; rows of zeros are left out.
        embeddings: token embeddings of the decoder [vocab, D].
    """
    known = targets.abs().sum(1) > 0
    means, targets = means[known], targets[known]
    wanted = F.normalize(targets - targets.mean(0), dim=1)
    centre, deviation = means.mean(0), means.std(0) + 0.02
    x = (means - centre) / deviation
    gram = x.T @ x + RIDGE * torch.eye(x.shape[1])
    solution = torch.linalg.solve(gram, x.T @ wanted)  # [W, D]
    scale = embeddings.float().std() / (x @ solution).std(0).mean()
    weight = scale * (solution / deviation[:, None]).T
    return weight, -weight @ centre
