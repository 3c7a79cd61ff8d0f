"""Losses: soft Dice plus cross-entropy, with voxels that do not count.

Tensors in, tensors out; any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["IGNORE", "DeepSupervision", "DiceBCELoss"]

IGNORE = -1  # target of voxels that do not count: padding, and what nobody labelled


class DiceBCELoss(nn.Module):
    """Soft Dice plus cross-entropy, equally weighted.

    Dice is averaged over the structures (never the background) and pooled over the batch, so that a structure that is
    missing from one patch does not upset its gradient. For exclusive structures the probabilities are a softmax over
    K channels, channel 0 the background, and cross-entropy is the categorical form of BCE; for structures that may
    overlap they are sigmoids and each channel has its own BCE.

    Parameters
    ----------
    exclusive : bool
        Softmax and class targets (B, *S), or sigmoid and layered targets (B, K, *S).

    References
    ----------
    Milletari et al. (2016), doi:10.1109/3DV.2016.79; Isensee et al. (2021), doi:10.1038/s41592-020-01008-z.
    """

    def __init__(self, exclusive: bool = True) -> None:
        super().__init__()
        self.exclusive = exclusive

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of logits (B, K, *S) for integer targets; a target of -1 (``IGNORE``) does not count.

        Returns
        -------
        () tensor, at least 0 up to rounding; 0 when the prediction is perfect.
        """
        logits = logits.float()
        if self.exclusive:
            if target.shape != logits.shape[:1] + logits.shape[2:]:
                raise ValueError(f"target must have shape (B, *S) of {tuple(logits.shape)}, got {tuple(target.shape)}")
            known = target != IGNORE
            safe = target.clamp(min=0).long()
            entropy = F.cross_entropy(logits, safe, reduction="none")
            entropy = (entropy * known).sum() / known.sum().clamp(min=1)
            probabilities = logits.softmax(1)[:, 1:] * known[:, None]
            classes = torch.arange(1, logits.shape[1], device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
            truth = (safe[:, None] == classes) & known[:, None]
        else:
            if target.shape != logits.shape:
                raise ValueError(f"target must have shape {tuple(logits.shape)}, got {tuple(target.shape)}")
            known = target != IGNORE
            truth = (target > 0) & known
            entropy = F.binary_cross_entropy_with_logits(logits, truth.float(), reduction="none")
            entropy = (entropy * known).sum() / known.sum().clamp(min=1)
            probabilities = logits.sigmoid() * known
        axes = (0, *range(2, logits.ndim))
        truth_f = truth.to(probabilities.dtype)
        both = (probabilities * truth_f).sum(axes)
        total = probabilities.sum(axes) + truth_f.sum(axes)
        dice = (2 * both + 1e-5) / (total + 1e-5)
        return entropy + 1 - dice.mean()


class DeepSupervision(nn.Module):
    """A loss over logits of several resolutions, the finer ones weighing more.

    Weights halve from one resolution to the next and sum to 1. Targets are brought to each resolution by nearest
    neighbour.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        """Loss of logits [(B, K, *S), (B, K, *S/2), ...] for a target of the finest resolution."""
        weights = torch.tensor([0.5**level for level in range(len(logits))])
        total = logits[0].new_zeros((), dtype=torch.float32)
        for weight, level in zip((weights / weights.sum()).tolist(), logits, strict=True):
            total = total + weight * self.loss(level, _nearest(target, level.shape[2:]))
        return total


def _nearest(target: Tensor, size: Sequence[int]) -> Tensor:
    """Target (B, [K,] *S) at the voxel centres nearest to those of a coarser grid."""
    first = target.ndim - len(size)
    for axis, n in enumerate(size, start=first):
        old = target.shape[axis]
        if old != n:
            index = ((torch.arange(n, device=target.device) + 0.5) * old / n).long().clamp(max=old - 1)
            target = target.index_select(axis, index)
    return target
