"""Features of classes no photo covers, out of the tower's own ImageNet classifier.

The mean feature of a class lies where within-class scatter C carries its classifier weight w_c
(linear discriminant analysis: w_c ~ C^-1 (mean_c - mean)). So adding k C (w_c - mean w) to real
features makes pictures' features that the classifier, and people's photos, call that class. This
grounds a thousand names in vectors the tower does produce. Knows no names and no objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visavis.checkpoints.efficientnet import Classifier

STRENGTH = 8.0  # such features are as long as real ones; 0.55 of them get their class at top 1
MAX_FEATURE = 6.0  # ReLU6


def class_shifts(classifier: Classifier, means: Tensor) -> Tensor:
    """Return what to add to a mean feature to make it of each class, [classes, W].

    Args:
        means: mean features of real pictures [N, W].
    """
    centred = means - means.mean(0)
    scatter = centred.T @ centred / len(means)
    weight = classifier.weight.float()
    return STRENGTH * (weight - weight.mean(0)) @ scatter


def class_grids(shifts: Tensor, grids: Tensor, mean: Tensor, generator: torch.Generator) -> Tensor:
    """Return a grid of features for each class, [classes, P, W].

    Args:
        shifts: [classes, W].
        grids: features of real pictures to start from [classes, P, W].
        mean: mean feature over all pictures [W].
        generator: draws how strongly each class, and each patch, is shifted.
    """
    strength = 0.7 + 0.6 * torch.rand(len(shifts), 1, 1, generator=generator)
    spread = 0.5 + torch.rand(len(shifts), grids.shape[1], 1, generator=generator)
    mixed = 0.5 * grids + 0.5 * mean + strength * spread * shifts[:, None]
    return mixed.clamp(0, MAX_FEATURE)
