"""Losses: soft Dice plus cross-entropy, with voxels and structures that do not count.

Tensors in, tensors out; any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["IGNORE", "DeepSupervision", "DiceBCELoss"]

IGNORE = -1  # target of voxels that do not count: padding, and what nobody labelled
_SMOOTH = 1e-5


class DiceBCELoss(nn.Module):
    """Soft Dice plus cross-entropy, equally weighted.

    Dice is averaged over the structures (never the background) and pooled over the batch, so that a structure that is
    missing from one patch does not upset its gradient. For exclusive structures the probabilities are a softmax over
    K channels, channel 0 the background, and cross-entropy is the categorical form of BCE; for structures that may
    overlap they are sigmoids, each channel has its own BCE, and targets may be soft (shares of 0..1).

    Where a structure is unknown in a sample (nobody drew it there), nothing is learnt about it from that sample. Of
    exclusive structures a background voxel may then be background or any of the unknown ones: its cross-entropy is that
    of the sum of their probabilities (marginal loss); voxels of drawn structures keep theirs, for they are certainly
    none of the unknown. Dice pools each structure over the samples in which it is known. Channels of overlapping
    structures simply do not count where unknown.

    Parameters
    ----------
    exclusive : bool
        Softmax and class targets (B, *S), or sigmoid and layered targets (B, K, *S).
    together : callable, optional
        Sums a tensor over the processes that share a batch, with its gradient: the loss is then that of the whole batch
        in each of them.

    Notes
    -----
    The intersection of a soft target t and a probability p is min(p, t), which is p t for t of 0 or 1: other than with
    the product, the loss of a soft target is least where p = t. Time and memory grow linearly with B K voxels.

    References
    ----------
    Milletari et al. (2016), doi:10.1109/3DV.2016.79; Isensee et al. (2021), doi:10.1038/s41592-020-01008-z.
    Unknown structures: Shi et al. (2021), doi:10.1016/j.media.2021.101979; Fang and Yan (2020),
    doi:10.1109/TMI.2020.3001036. Soft targets: Wang et al. (2023), doi:10.48550/arXiv.2303.16296.
    """

    def __init__(self, exclusive: bool = True, together: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.exclusive = exclusive
        self.together = together or _alone

    def forward(self, logits: Tensor, target: Tensor, known: Tensor | None = None) -> Tensor:
        """The loss.

        Parameters
        ----------
        logits : (B, K, *S) tensor
            Of any floating type; the arithmetic is in float32 at least.
        target : (B, *S) tensor of integers, or (B, K, *S) tensor
            Classes 0..K-1, or a layer of 0..1 per channel; ``IGNORE`` where a voxel does not count.
        known : (B, K - 1) or (B, K) bool tensor, optional
            Which structures were drawn in each sample, the background never among them; all where None. Best on the
            CPU: what it says decides how much is computed.

        Returns
        -------
        () tensor, at least 0 up to rounding; 0 when the prediction is perfect and no target is soft.

        Raises
        ------
        ValueError
            If shapes do not fit each other.
        """
        wanted = logits.shape[:1] + logits.shape[2:] if self.exclusive else logits.shape
        if target.shape != wanted:
            form = "(B, *S)" if self.exclusive else "(B, K, *S)"
            raise ValueError(
                f"target must have shape {form} of logits {tuple(logits.shape)}, got {tuple(target.shape)}"
            )
        structures = logits.shape[1] - self.exclusive
        if known is not None:
            if known.shape != (len(logits), structures):
                raise ValueError(f"known must have shape {(len(logits), structures)}, got {tuple(known.shape)}")
            known = known.bool().cpu()
            known = None if bool(known.all()) else known
        part = _exclusive if self.exclusive else _overlapping
        return part(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, known, self.together)


def _alone(values: Tensor) -> Tensor:
    return values


def _exclusive(logits: Tensor, target: Tensor, known: Tensor | None, together: Callable[[Tensor], Tensor]) -> Tensor:
    classes = logits.shape[1]
    # Classes first and voxels together: a softmax across channels that lie side by side takes several times as long.
    log_p = logits.movedim(1, 0).reshape(classes, len(logits), -1).log_softmax(0)
    target = target.reshape(len(logits), -1)
    counts = (target != IGNORE).to(log_p.dtype)
    picked = log_p.gather(0, target.clamp(min=0).long()[None])[0]
    if known is not None:
        picked = torch.stack(
            [_marginal(*sample) for sample in zip(log_p.unbind(1), target, picked, known, strict=True)]
        )
    entropy, count = together(torch.stack([-(picked * counts).sum(), counts.sum()]))
    small = target.to(torch.int16)  # compared once per class
    overlaps, sizes = [], []
    for c, p in enumerate(log_p.exp().unbind(0)[1:], start=1):
        truth, weight = (small == c).to(p.dtype), counts
        if known is not None and not bool(known[:, c - 1].all()):
            drawn = known[:, c - 1, None].to(logits.device)
            truth, weight = truth * drawn, counts * drawn
        overlaps.append((p * truth).sum())
        sizes.append((p * weight).sum() + truth.sum())
    if not overlaps:
        raise ValueError("logits must have a channel for the background and one per structure, got 1 channel")
    return entropy / count.clamp(min=1) + _dice_loss(torch.stack(overlaps), torch.stack(sizes), known, together)


def _marginal(log_p: Tensor, target: Tensor, picked: Tensor, known: Tensor) -> Tensor:
    """Log probabilities (N,) of what the voxels of one sample may be: of background, any unknown structure, too."""
    if bool(known.all()):
        return picked
    unknown = [0, *(c for c, drawn in enumerate(known.tolist(), start=1) if not drawn)]
    return torch.where(target == 0, log_p[unknown].logsumexp(0), picked)


def _overlapping(logits: Tensor, target: Tensor, known: Tensor | None, together: Callable[[Tensor], Tensor]) -> Tensor:
    logits, target = logits.flatten(2), target.flatten(2)
    weight = (target >= 0).to(logits.dtype)
    if known is not None:
        weight = weight * known[:, :, None].to(logits.device)
    truth = target.to(logits.dtype).clamp(0, 1)
    entropy = F.binary_cross_entropy_with_logits(logits, truth, weight, reduction="sum")
    entropy, count = together(torch.stack([entropy, weight.sum()]))
    p, truth = logits.sigmoid() * weight, truth * weight
    overlap = torch.minimum(p, truth) if target.is_floating_point() else p * truth
    dice = _dice_loss(overlap.sum((0, 2)), (p + truth).sum((0, 2)), known, together)
    return entropy / count.clamp(min=1) + dice


def _dice_loss(overlap: Tensor, size: Tensor, known: Tensor | None, together: Callable[[Tensor], Tensor]) -> Tensor:
    """1 - Dice, the mean over the structures that are known in any sample; 0 where none is."""
    seen = torch.ones_like(size) if known is None else known.any(0).to(size)
    overlap, size, seen = together(torch.stack([overlap, size, seen]))
    loss = 1 - (2 * overlap + _SMOOTH) / (size + _SMOOTH)
    seen = seen.clamp(max=1)
    return (loss * seen).sum() / seen.sum().clamp(min=1)


class DeepSupervision(nn.Module):
    """A loss over logits of several resolutions, the finer ones weighing more.

    Weights halve from one resolution to the next and sum to 1. Targets are brought to each resolution: whole numbers
    (classes, hard layers) by nearest neighbour, floating-point layers by their mean over the voxels that count, ignored
    where less than half of the volume does.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Sequence[Tensor], target: Tensor, known: Tensor | None = None) -> Tensor:
        """Loss of logits [(B, K, *S), (B, K, *S/2), ...] for a target of the finest resolution.

        ``target`` (B, [K,] *S) and ``known`` are as in :meth:`DiceBCELoss.forward`.
        """
        weights = torch.tensor([0.5**level for level in range(len(logits))])
        total = logits[0].new_zeros((), dtype=torch.float32)
        for weight, level in zip((weights / weights.sum()).tolist(), logits, strict=True):
            total = total + weight * self.loss(level, _coarser(target, level.shape[2:]), known)
        return total


def _coarser(target: Tensor, size: Sequence[int]) -> Tensor:
    """Target (B, [K,] *S) on a coarser grid over the same box."""
    first = target.ndim - len(size)
    if target.shape[first:] == torch.Size(size):
        return target
    if target.is_floating_point() and first == 2:
        counts = (target >= 0).float()
        share = F.interpolate(counts, tuple(size), mode="area")
        mean = F.interpolate(target.float() * counts, tuple(size), mode="area") / share.clamp(min=1e-6)
        return torch.where(share >= 0.5, mean, float(IGNORE))
    for axis, n in enumerate(size, start=first):
        old = target.shape[axis]
        if old != n:
            index = ((torch.arange(n, device=target.device) + 0.5) * old / n).long().clamp(max=old - 1)
            target = target.index_select(axis, index)
    return target
