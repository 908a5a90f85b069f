"""The contrastive loss against golden numbers of LLaVE's formula."""

from __future__ import annotations

import pytest
import torch

from visavis.train.tasks.contrastive import hardness_weighted_infonce, loss_of_similarities

SIMILARITY = torch.tensor([[0.60, 0.50, 0.10], [0.20, 0.55, 0.52], [-0.10, 0.30, 0.40]])


@pytest.mark.parametrize(
    ("scale", "alpha", "forward", "backward"),
    [
        (50, 0, 0.07161467, 2.02712296),
        (50, 0.5, 0.09019238, 2.12070663),
        (50, 9, 1.26345556, 4.26898588),
        (20, 9, 2.59298274, 3.53851973),
    ],
)
def test_golden_losses(scale: float, alpha: float, forward: float, backward: float) -> None:
    losses = loss_of_similarities(SIMILARITY, logit_scale=scale, alpha=alpha)
    assert losses.tolist() == pytest.approx([forward, backward], abs=2e-6)


def test_golden_gradient() -> None:
    similarity = SIMILARITY.clone().requires_grad_()
    loss_of_similarities(similarity, logit_scale=50, alpha=9).mean().backward()
    golden = [[-3.1462, 10.4861, 0], [0, -15.3406, 16.3338], [0, 0.7594, -9.0925]]
    assert similarity.grad is not None
    assert torch.allclose(similarity.grad, torch.tensor(golden), atol=6e-5)


def test_excluded_pairs_are_no_negatives() -> None:
    """Two records of one class: the loss is as if the other were not there."""
    vectors = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    excluded = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    plain = hardness_weighted_infonce(queries, vectors, logit_scale=20, alpha=0)
    masked = hardness_weighted_infonce(queries, vectors, logit_scale=20, alpha=0, excluded=excluded)
    assert masked < plain
    nothing = torch.eye(3, dtype=torch.bool)
    same = hardness_weighted_infonce(queries, vectors, logit_scale=20, alpha=0, excluded=nothing)
    assert same == plain
