"""Metrics of probabilities: soft Dice, Brier score, expected calibration error. Arrays or tensors in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["PROBABILITY_COLUMNS", "Reliability", "probability_scores", "reliability"]

Array = NDArray[Any]
BINS = 15
CHUNK = 1 << 20  # voxels looked at together
PROBABILITY_COLUMNS = ("soft_dice", "brier", "ece")


@dataclass(frozen=True)
class Reliability:
    """How probabilities of one structure compare with what is true.

    Attributes
    ----------
    count, probability, truth : (bins,) arrays
        Voxels whose probability lies in each of the equal parts of 0..1, the sum of their probabilities, and how many of
        them belong to the structure.
    product, squared, error : float
        Sums over voxels of probability x truth, probability squared, and squared difference of the two.
    """

    count: Array
    probability: Array
    truth: Array
    product: float
    squared: float
    error: float

    @property
    def soft_dice(self) -> float:
        """2 sum(p t) / (sum(p^2) + sum(t)) [1]_, Dice for a p of 0 and 1; NaN where nothing is predicted or true.

        .. [1] Milletari et al., V-Net, 3DV 2016, doi:10.1109/3DV.2016.79
        """
        size = self.squared + float(self.truth.sum())
        return 2 * self.product / size if size > 0 else float("nan")

    @property
    def brier(self) -> float:
        """Mean squared difference between probability and truth [1]_; NaN without voxels.

        .. [1] Brier, Mon Weather Rev 1950, doi:10.1175/1520-0493(1950)078<0001:VOFEIT>2.0.CO;2
        """
        voxels = int(self.count.sum())
        return self.error / voxels if voxels else float("nan")

    @cached_property
    def ece(self) -> float:
        """Expected calibration error [1]_: mean over voxels of |mean probability - share that is true| in their bin.

        .. [1] Naeini et al., AAAI 2015, doi:10.1609/aaai.v29i1.9602
        """
        voxels = int(self.count.sum())
        return float(np.abs(self.probability - self.truth).sum() / voxels) if voxels else float("nan")


def reliability(
    probabilities: Array | torch.Tensor,
    reference: Array | torch.Tensor,
    *,
    within: Array | torch.Tensor | None = None,
    bins: int = BINS,
) -> Reliability:
    """Count the voxels of one structure by their probability.

    Parameters
    ----------
    probabilities : (*spatial) floats in 0..1
    reference : (*spatial) bool
    within : (*spatial) bool, optional
        Where to look; everywhere by default. Most voxels of a scan are background that everyone gets right, which makes
        the Brier score and the calibration error small: give the body, or the surroundings of the structure, to see more.
    bins : int
        Equal parts of 0..1; a value on a limit belongs to the part above it.

    Raises
    ------
    ValueError
        If shapes differ or values are not probabilities.

    Notes
    -----
    One pass, O(voxels), in pieces of 1 M voxels; tensors stay on their device.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    p, t = _tensor(probabilities), _tensor(reference)
    w = None if within is None else _tensor(within).reshape(-1)
    if p.shape != t.shape or (w is not None and w.numel() != p.numel()):
        raise ValueError(f"probabilities and reference must have one shape, got {tuple(p.shape)} and {tuple(t.shape)}")
    if not p.is_floating_point() or t.dtype != torch.bool:
        raise TypeError(f"probabilities must be floats and the reference bool, got {p.dtype} and {t.dtype}")
    table = torch.zeros(3, bins, dtype=torch.float64, device=p.device)
    sums = torch.zeros(3, dtype=torch.float64, device=p.device)
    p, t = p.reshape(-1), t.reshape(-1)
    for start in range(0, p.numel(), CHUNK):
        piece = slice(start, start + CHUNK)
        soft, true = p[piece].double(), t[piece]
        if w is not None:
            soft, true = soft[w[piece]], true[w[piece]]
        if not soft.numel():
            continue
        low, high = (float(v) for v in torch.aminmax(soft))
        if not (low >= -1e-6 and high <= 1 + 1e-6):
            raise ValueError(f"probabilities must lie between 0 and 1, got {low:g} to {high:g}")
        hard = true.double()
        place = (soft * bins).long().clamp_(0, bins - 1)
        for row, weights in enumerate((None, soft, hard)):
            table[row] += torch.bincount(place, weights, bins)
        sums += torch.stack([(soft * hard).sum(), (soft * soft).sum(), ((soft - hard) ** 2).sum()])
    count, probability, truth = table.cpu().numpy()
    product, squared, error = sums.tolist()
    return Reliability(count, probability, truth, product, squared, error)


def _tensor(values: Array | torch.Tensor) -> torch.Tensor:
    """The values without a copy, except of read-only arrays, which torch does not take as they are."""
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()
    return torch.as_tensor(values)


def probability_scores(
    probabilities: Array | torch.Tensor,
    reference: Array | torch.Tensor,
    labels: Sequence[int] | None = None,
    *,
    within: Array | torch.Tensor | None = None,
    bins: int = BINS,
) -> list[dict[str, float]]:
    """Soft Dice, Brier score and expected calibration error of each structure.

    Parameters
    ----------
    probabilities : (S, *spatial) floats in 0..1
        One layer per structure.
    reference : (S, *spatial) bool, or (*spatial) integers with ``labels``
        One mask per structure (they may overlap), or a label map.
    labels : sequence of S int, optional
        The number of each layer in the label map.
    within, bins
        As in :func:`reliability`.

    Returns
    -------
    list of S dict
        Keys soft_dice, brier, ece.
    """
    count = len(reference) if labels is None else len(labels)
    if len(probabilities) != count:
        raise ValueError(f"probabilities must have one layer per structure, got {len(probabilities)} for {count}")
    rows = []
    for n in range(count):
        truth = reference[n] if labels is None else reference == labels[n]
        found = reliability(probabilities[n], truth, within=within, bins=bins)
        rows.append({name: float(getattr(found, name)) for name in PROBABILITY_COLUMNS})
    return rows
