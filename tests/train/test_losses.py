"""Losses against golden numbers of LLaVE's formula, and against sentence-transformers' own."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from visavis.train.losses import Contrast, FalseNegatives, contrastive_loss, row_losses

SIMILARITY = torch.tensor([[0.60, 0.50, 0.10], [0.20, 0.55, 0.52], [-0.10, 0.30, 0.40]])


def unit(num: int, seed: int, width: int = 8) -> torch.Tensor:
    rows = torch.randn(num, width, generator=torch.Generator().manual_seed(seed))
    return F.normalize(rows, dim=-1)


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
    settings = Contrast(alpha=alpha)
    one_way = row_losses(SIMILARITY, settings, scale=scale).mean()
    other_way = row_losses(SIMILARITY.T, settings, scale=scale).mean()
    assert float(one_way) == pytest.approx(forward, abs=2e-6)
    assert float(other_way) == pytest.approx(backward, abs=2e-6)


def test_golden_gradient() -> None:
    similarity = SIMILARITY.clone().requires_grad_()
    for side in (similarity, similarity.T):
        (row_losses(side, Contrast(alpha=9), scale=50).mean() / 2).backward()
    golden = [[-3.1462, 10.4861, 0], [0, -15.3406, 16.3338], [0, 0.7594, -9.0925]]
    assert similarity.grad is not None
    assert torch.allclose(similarity.grad, torch.tensor(golden), atol=6e-5)


def test_excluded_pairs_are_as_if_absent() -> None:
    queries, targets = unit(3, 0), unit(5, 1)
    excluded = torch.zeros(3, 5, dtype=torch.bool)
    excluded[:, 4] = True  # a hard negative nobody may push away
    excluded[0, 0] = True  # a positive stays one
    masked = contrastive_loss(queries, targets, Contrast(), scale=20, excluded=excluded)
    absent = contrastive_loss(queries, targets[:4], Contrast(), scale=20)
    torch.testing.assert_close(masked, absent)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        (Contrast(margin=0.1), [0.6, 0.55, 0.2]),  # 0.75 is above 0.6 + 0.1
        (Contrast(ratio=0.9), [0.6, 0.2]),  # 0.55 is above 0.9 * 0.6
    ],
)
def test_negatives_too_similar_to_be_negatives(settings: Contrast, kept: list[float]) -> None:
    similarity = torch.tensor([[0.6, 0.75, 0.55, 0.2]])
    loss = row_losses(similarity, settings, scale=10)[0]
    expected = F.cross_entropy(torch.tensor([kept]) * 10, torch.tensor([0]))
    torch.testing.assert_close(loss, expected)


def test_matryoshka_is_the_mean_over_cut_vectors() -> None:
    queries, targets = unit(4, 0), unit(6, 1)
    found = contrastive_loss(queries, targets, Contrast(dims=(8, 4)), scale=20)
    half = [F.normalize(x[:, :4], dim=-1) for x in (queries, targets)]
    parts = [
        contrastive_loss(queries, targets, Contrast(), scale=20),
        contrastive_loss(half[0], half[1], Contrast(), scale=20),
    ]
    torch.testing.assert_close(found, torch.stack(parts).mean())


def test_half_precision_vectors_are_compared_in_float32() -> None:
    queries, targets = unit(4, 0).bfloat16(), unit(4, 1).bfloat16()
    found = contrastive_loss(queries, targets, Contrast(True), scale=50)
    assert found.dtype == torch.float32
    expected = contrastive_loss(queries.float(), targets.float(), Contrast(True), scale=50)
    assert found == expected


@pytest.mark.parametrize("symmetric", [False, True])
def test_blocks_of_rows_change_nothing(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets = unit(7, 0).requires_grad_(), unit(12, 1)
    excluded = torch.rand(7, 12, generator=torch.Generator().manual_seed(3)) < 0.3
    settings = Contrast(symmetric, 3.0, margin=0.5, dims=(8, 5))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        loss = contrastive_loss(queries, targets, settings, scale=20, excluded=excluded)
        return loss, torch.autograd.grad(loss, queries)[0]

    whole = run()
    monkeypatch.setattr("visavis.train.losses.CELLS", 3 * 12)
    for found, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_false_negatives_are_those_of_the_same_query_or_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = {
        "queries": [0, 1, 2, 0, 4, 5, 6],  # 0 and 3 ask the same
        "groups": [0, 1, 2, 3, 1, 5, 6],  # 1 and 4 are one group
        "targets": [0, 1, 2, 3, 4, 0, 6, 3, 4, 9, 0, 11],  # 5 has the target of 0
    }
    rule = FalseNegatives(**{name: torch.tensor(one) for name, one in keys.items()})
    queries, groups, contents = keys.values()
    matrix = torch.zeros(7, 12, dtype=torch.bool)
    for i, j in itertools.product(range(7), range(12)):
        right = {
            contents[k] for k in range(7) if queries[i] == queries[k] or groups[i] == groups[k]
        }
        matrix[i, j] = contents[j] in right
    assert torch.equal(rule.of_queries(slice(0, 7)), matrix)
    assert torch.equal(rule.of_queries(slice(2, 5)), matrix[2:5])
    assert torch.equal(rule.of_targets(slice(0, 7)), matrix[:, :7].T)
    assert not torch.equal(matrix[:, :7], matrix[:, :7].T), "directions differ in this example"

    monkeypatch.setattr("visavis.train.losses.CELLS", 3 * 12)
    vectors, targets = unit(7, 0), unit(12, 1)
    found, expected = (
        contrastive_loss(vectors, targets, Contrast(True, 9.0), scale=20, excluded=excluded)
        for excluded in (rule, matrix)
    )
    assert found == expected


@pytest.mark.parity
@pytest.mark.parametrize("alpha", [0.0, 9.0])
def test_infonce_with_hard_negatives_is_the_peers(alpha: float) -> None:
    from sentence_transformers.sentence_transformer import losses

    queries, positives, negatives = unit(4, 0), unit(4, 1), unit(4, 2)
    mode = {"hardness_mode": "all_negatives", "hardness_strength": alpha} if alpha else {}
    peer = losses.CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()), scale=20.0, **mode
    )
    theirs = peer.calculate_loss([[queries], [positives], [negatives]])
    targets = torch.cat((positives, negatives))
    torch.testing.assert_close(
        contrastive_loss(queries, targets, Contrast(alpha=alpha), scale=20), theirs
    )


@pytest.mark.parity
def test_both_directions_are_the_peers() -> None:
    from sentence_transformers.sentence_transformer import losses

    queries, targets = unit(4, 0), unit(4, 1)
    peer = losses.CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()),
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    theirs = peer.calculate_loss([[queries], [targets]])
    ours = contrastive_loss(queries, targets, Contrast(symmetric=True), scale=20)
    torch.testing.assert_close(ours, theirs)


def test_hardness_weighting_turns_the_gradient_to_hard_negatives() -> None:
    """A negative's share of the push is its share of the softmax, which alpha sharpens."""
    shares = []
    for alpha in (0.0, 9.0):
        similarity = torch.tensor([[0.8, 0.7, 0.3, 0.1, -0.2]], requires_grad=True)
        row_losses(similarity, Contrast(alpha=alpha), scale=5.0).sum().backward()
        pushed = similarity.grad[0, 1:]  # type: ignore[index]
        shares.append(float(pushed[0] / pushed.sum()))
    easy = torch.tensor([0.7, 0.3, 0.1, -0.2])
    expected = [float((k * easy).softmax(0)[0]) for k in (5.0, 14.0)]
    assert shares == pytest.approx(expected, abs=1e-5)
    assert shares[0] < 0.9 < 0.99 < shares[1]
