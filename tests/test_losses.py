"""The loss against numbers worked out by hand, numpy, and a loop over voxels whose gradient is taken numerically."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    assert loss.item() == pytest.approx(0, abs=1e-4)
    wrong = torch.randn(1, 3, 4, requires_grad=True)
    DiceBCELoss()(wrong, target).backward()
    assert wrong.grad[..., 3].abs().max() == 0
    assert wrong.grad[..., :3].abs().min() > 0


def test_deep_supervision_weighs_finer_levels_more() -> None:
    class Record(torch.nn.Module):
        def forward(self, logits: torch.Tensor, target: torch.Tensor, known: None) -> torch.Tensor:
            assert logits.shape[2:] == target.shape[1:]
            return logits.mean()

    levels = [torch.full((1, 2, 8, 6), 1.0), torch.full((1, 2, 4, 3), 10.0), torch.full((1, 2, 2, 2), 100.0)]
    total = DeepSupervision(Record())(levels, torch.zeros(1, 8, 6, dtype=torch.long))
    assert float(total) == pytest.approx((4 * 1 + 2 * 10 + 1 * 100) / 7)


def test_coarse_targets_are_the_nearest_voxels() -> None:
    target = torch.arange(8).view(1, 8, 1)
    keep = Keep()
    DeepSupervision(keep)([torch.zeros(1, 2, 8, 1), torch.zeros(1, 2, 4, 1)], target)
    assert keep.seen[1].flatten().tolist() == [1, 3, 5, 7]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="target must have shape"):
        DiceBCELoss()(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="target must have shape"):
        DiceBCELoss(exclusive=False)(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))


# --- structures that nobody drew, soft targets, and gradients


def loop_exclusive(logits: np.ndarray, target: np.ndarray, known: np.ndarray) -> float:
    """The loss of (B, K, N) logits, voxel by voxel in plain Python."""
    samples, classes, voxels = logits.shape
    entropy, counted = 0.0, 0
    overlap, size = [0.0] * classes, [0.0] * classes
    for b in range(samples):
        for n in range(voxels):
            t = int(target[b, n])
            if t == IGNORE:
                continue
            weights = [math.exp(x) for x in logits[b, :, n]]
            p = [w / sum(weights) for w in weights]
            right = p[t]
            if t == 0:
                right += sum(p[c] for c in range(1, classes) if not known[b, c - 1])
            entropy, counted = entropy - math.log(right), counted + 1
            for c in range(1, classes):
                if known[b, c - 1]:
                    overlap[c] += p[c] * (t == c)
                    size[c] += p[c] + (t == c)
    seen = [c for c in range(1, classes) if known[:, c - 1].any()]
    dice = [1 - (2 * overlap[c] + 1e-5) / (size[c] + 1e-5) for c in seen]
    return entropy / max(1, counted) + (sum(dice) / len(dice) if dice else 0.0)


def loop_overlapping(logits: np.ndarray, target: np.ndarray, known: np.ndarray) -> float:
    samples, channels, voxels = logits.shape
    entropy, counted = 0.0, 0
    overlap, size = [0.0] * channels, [0.0] * channels
    for b in range(samples):
        for c in range(channels):
            for n in range(voxels):
                t = float(target[b, c, n])
                if t == IGNORE or not known[b, c]:
                    continue
                p = 1 / (1 + math.exp(-logits[b, c, n]))
                entropy, counted = entropy - t * math.log(p) - (1 - t) * math.log(1 - p), counted + 1
                overlap[c] += min(p, t)
                size[c] += p + t
    dice = [1 - (2 * overlap[c] + 1e-5) / (size[c] + 1e-5) for c in range(channels) if known[:, c].any()]
    return entropy / max(1, counted) + (sum(dice) / len(dice) if dice else 0.0)


def slopes(function: object, logits: np.ndarray, *rest: np.ndarray) -> np.ndarray:
    """The gradient by central differences."""
    out, step = np.zeros_like(logits), 1e-5
    for index in np.ndindex(logits.shape):
        up, down = logits.copy(), logits.copy()
        up[index] += step
        down[index] -= step
        out[index] = (function(up, *rest) - function(down, *rest)) / (2 * step)  # type: ignore[operator]
    return out


def value_and_gradient(
    exclusive: bool, logits: np.ndarray, target: np.ndarray, known: np.ndarray | None, shape: tuple[int, ...]
) -> tuple[float, np.ndarray]:
    x = torch.from_numpy(logits).view(*logits.shape[:2], *shape).requires_grad_()
    t = torch.from_numpy(target).view(*target.shape[:-1], *shape)
    loss = DiceBCELoss(exclusive)(x, t, None if known is None else torch.from_numpy(known))
    loss.backward()
    assert x.grad is not None
    return loss.item(), x.grad.reshape(logits.shape).numpy()


SHAPES = [(5,), (3, 2), (1, 2, 3)]


@given(seed=st.integers(0, 10_000), shape=st.sampled_from(SHAPES), classes=st.integers(2, 5))
def test_partial_labels_equal_a_loop_over_voxels(seed: int, shape: tuple[int, ...], classes: int) -> None:
    generator = np.random.default_rng(seed)
    voxels = math.prod(shape)
    logits = generator.normal(0, 2, (2, classes, voxels))
    target = generator.integers(-1, classes, (2, voxels))
    known = generator.random((2, classes - 1)) < 0.6
    loss, gradient = value_and_gradient(True, logits, target, known, shape)
    assert loss == pytest.approx(loop_exclusive(logits, target, known), abs=1e-9)
    assert np.allclose(gradient, slopes(loop_exclusive, logits, target, known), atol=1e-7)


@given(seed=st.integers(0, 10_000), shape=st.sampled_from(SHAPES), channels=st.integers(1, 4), soft=st.booleans())
def test_layers_equal_a_loop_over_voxels(seed: int, shape: tuple[int, ...], channels: int, soft: bool) -> None:
    generator = np.random.default_rng(seed)
    size = (2, channels, math.prod(shape))
    logits = generator.normal(0, 2, size)
    target = generator.random(size).round(3) if soft else generator.integers(0, 2, size)
    target[generator.random(size) < 0.2] = IGNORE
    known = generator.random((2, channels)) < 0.6
    loss, gradient = value_and_gradient(False, logits, target, known, shape)
    assert loss == pytest.approx(loop_overlapping(logits, target, known), abs=1e-9)
    assert np.allclose(gradient, slopes(loop_overlapping, logits, target, known), atol=1e-7)


@given(seed=st.integers(0, 10_000), exclusive=st.booleans())
def test_an_unknown_structure_has_no_say(seed: int, exclusive: bool) -> None:
    """Moving probability between background and an unknown class costs nothing; a known one is as if alone."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(1, 3, 7))
    target = generator.integers(0, 2, (1, 7)) if exclusive else generator.integers(0, 2, (1, 3, 7))
    known = np.array([[True, False]]) if exclusive else np.array([[True, True, False]])
    loss, gradient = value_and_gradient(exclusive, logits, target, known, (7,))
    if exclusive:
        merged = np.stack([np.logaddexp(logits[:, 0], logits[:, 2]), logits[:, 1]], 1)  # two classes in all
        assert loss == pytest.approx(loop_exclusive(merged, target, np.array([[True]])), abs=1e-9)
    else:
        alone = value_and_gradient(False, logits[:, :2].copy(), target[:, :2].copy(), None, (7,))
        assert loss == pytest.approx(alone[0], abs=1e-9)
        assert np.allclose(gradient[:, :2], alone[1])
        assert np.abs(gradient[:, 2]).max() == 0


@given(seed=st.integers(0, 10_000))
def test_all_known_is_the_ordinary_loss_and_none_known_teaches_nothing_of_structures(seed: int) -> None:
    generator = np.random.default_rng(seed)
    logits, target = generator.normal(size=(2, 4, 6)), generator.integers(-1, 4, (2, 6))
    every = value_and_gradient(True, logits, target, np.ones((2, 3), bool), (6,))
    plain = value_and_gradient(True, logits, target, None, (6,))
    assert every[0] == plain[0]
    assert np.array_equal(every[1], plain[1])
    loss, gradient = value_and_gradient(True, logits, np.zeros((2, 6), int), np.zeros((2, 3), bool), (6,))
    assert loss == pytest.approx(0, abs=1e-12)
    assert np.abs(gradient).max() < 1e-12


@given(share=st.floats(0.05, 0.95))
def test_a_soft_target_is_met_best_by_its_own_share(share: float) -> None:
    target = torch.full((1, 1, 4), share, dtype=torch.float64)
    grid = torch.linspace(0.01, 0.99, 197, dtype=torch.float64)
    losses = [DiceBCELoss(exclusive=False)(p.logit().expand(1, 1, 4), target).item() for p in grid]
    assert abs(grid[int(np.argmin(losses))].item() - share) < 0.006


def test_extreme_logits_stay_finite_where_structures_are_unknown() -> None:
    logits = torch.tensor([[[-300.0, 0.0], [300.0, 0.0], [-200.0, 400.0]]], requires_grad=True)
    loss = DiceBCELoss()(logits, torch.zeros(1, 2, dtype=torch.long), torch.tensor([[True, False]]))
    loss.backward()
    assert loss.item() == pytest.approx((500 + 0) / 2 + 1, rel=1e-3)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_half_precision_and_channels_last_give_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 5, 4, generator=generator).bfloat16()
    target = torch.randint(-1, 3, (2, 6, 5, 4), generator=generator)
    known = torch.tensor([[True, False], [True, True]])
    plain = DiceBCELoss()(logits.float(), target, known)
    last = logits.to(memory_format=torch.channels_last_3d).requires_grad_()
    loss = DiceBCELoss()(last, target, known)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert last.grad is not None
    assert last.grad.dtype == torch.bfloat16


class Keep(torch.nn.Module):
    """Remembers the targets it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.known: list[torch.Tensor | None] = []

    def forward(self, logits: torch.Tensor, target: torch.Tensor, known: torch.Tensor | None) -> torch.Tensor:
        self.seen.append(target)
        self.known.append(known)
        return logits.sum()


def test_coarse_layers_are_means_of_what_counts() -> None:
    generator = np.random.default_rng(0)
    target = generator.random((2, 3, 6, 4)).astype(np.float32)
    target[generator.random(target.shape) < 0.4] = IGNORE
    keep, known = Keep(), torch.tensor([[True, False, True], [True, True, True]])
    levels = [torch.zeros(2, 3, 6, 4), torch.zeros(2, 3, 3, 2), torch.zeros(2, 3, 1, 2)]
    DeepSupervision(keep)(levels, torch.from_numpy(target), known)
    assert all(k is known for k in keep.known)
    for seen, (a, b) in zip(keep.seen[1:], [(2, 2), (6, 2)], strict=True):
        for index in np.ndindex(*seen.shape):
            i, j = index[2] * a, index[3] * b
            block = target[index[0], index[1], i : i + a, j : j + b]
            inside = block[block != IGNORE]
            expected = inside.mean() if inside.size >= block.size / 2 else IGNORE
            assert seen[index].item() == pytest.approx(expected, abs=1e-5)


def test_coarse_hard_layers_are_nearest_voxels_of_the_same_layer() -> None:
    target = torch.arange(2 * 3 * 8 * 6).view(2, 3, 8, 6)
    keep = Keep()
    DeepSupervision(keep)([torch.zeros(2, 3, 8, 6), torch.zeros(2, 3, 4, 6)], target)
    assert torch.equal(keep.seen[1], target[:, :, 1::2])


def test_known_must_fit_the_logits() -> None:
    with pytest.raises(ValueError, match=r"known must have shape \(1, 2\), got \(1, 3\)"):
        DiceBCELoss()(torch.zeros(1, 3, 4), torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
