"""The loss against numbers worked out by hand and against scikit-like formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medseg.losses import IGNORE, DeepSupervision, DiceBCELoss


def by_hand(logits: np.ndarray, target: np.ndarray) -> float:
    """Dice + cross-entropy of (B, K, N) logits and (B, N) classes, in numpy, class by class."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    known = target != IGNORE
    picked = [-np.log(p[b, target[b, n], n]) for b, n in zip(*np.nonzero(known), strict=True)]
    dice = []
    for k in range(1, logits.shape[1]):
        truth = (target == k) & known
        prob = p[:, k] * known
        dice.append((2 * prob[truth].sum() + 1e-5) / (prob.sum() + truth.sum() + 1e-5))
    return float(np.mean(picked) + 1 - np.mean(dice))


@pytest.mark.parametrize("ignored", [0, 3])
def test_exclusive_equals_numpy(ignored: int) -> None:
    generator = np.random.default_rng(0)
    logits, target = generator.normal(size=(2, 3, 11)), generator.integers(0, 3, (2, 11))
    target[1, :ignored] = IGNORE
    loss = DiceBCELoss()(torch.from_numpy(logits).view(2, 3, 11, 1), torch.from_numpy(target).view(2, 11, 1))
    assert float(loss) == pytest.approx(by_hand(logits, target), abs=1e-5)


def test_overlapping_equals_bce_and_dice_by_hand() -> None:
    logits = torch.tensor([[[2.0, -1.0], [0.0, 3.0]]]).view(1, 2, 2, 1)
    target = torch.tensor([[[1, 0], [0, 1]]]).view(1, 2, 2, 1)
    p = 1 / (1 + np.exp(-np.array([[2.0, -1.0], [0.0, 3.0]])))
    bce = -np.mean([np.log(p[0, 0]), np.log(1 - p[0, 1]), np.log(1 - p[1, 0]), np.log(p[1, 1])])
    dice = np.mean([2 * p[0, 0] / (p[0].sum() + 1), 2 * p[1, 1] / (p[1].sum() + 1)])
    assert float(DiceBCELoss(exclusive=False)(logits, target)) == pytest.approx(bce + 1 - dice, abs=1e-4)


def test_perfect_prediction_costs_nothing_and_ignored_voxels_have_no_gradient() -> None:
    target = torch.tensor([[0, 1, 2, IGNORE]])
    logits = torch.zeros(1, 3, 4)
    logits[0, [0, 1, 2], [0, 1, 2]] = 50.0
    logits.requires_grad_()
    loss = DiceBCELoss()(logits, target)
    loss.backward()
    assert float(loss) == pytest.approx(0, abs=1e-4)
    wrong = torch.randn(1, 3, 4, requires_grad=True)
    DiceBCELoss()(wrong, target).backward()
    assert wrong.grad[..., 3].abs().max() == 0
    assert wrong.grad[..., :3].abs().min() > 0


def test_deep_supervision_weighs_finer_levels_more() -> None:
    class Record(torch.nn.Module):
        def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            assert logits.shape[2:] == target.shape[1:]
            return logits.mean()

    levels = [torch.full((1, 2, 8, 6), 1.0), torch.full((1, 2, 4, 3), 10.0), torch.full((1, 2, 2, 2), 100.0)]
    total = DeepSupervision(Record())(levels, torch.zeros(1, 8, 6, dtype=torch.long))
    assert float(total) == pytest.approx((4 * 1 + 2 * 10 + 1 * 100) / 7)


def test_coarse_targets_are_the_nearest_voxels() -> None:
    class Keep(torch.nn.Module):
        seen: list[torch.Tensor] = []

        def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            self.seen.append(target)
            return logits.sum()

    target = torch.arange(8).view(1, 8, 1)
    keep = Keep()
    DeepSupervision(keep)([torch.zeros(1, 2, 8, 1), torch.zeros(1, 2, 4, 1)], target)
    assert keep.seen[1].flatten().tolist() == [1, 3, 5, 7]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="target must have shape"):
        DiceBCELoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="target must have shape"):
        DiceBCELoss(exclusive=False)(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))
