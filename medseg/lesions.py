"""Metrics of lesions and instances: which are found, missed, made up, merged or split; panoptic quality.

Arrays in, numbers out, in 2D and 3D. Lesions are the connected components of a mask, or the numbers of an instance map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = [
    "LESION_COLUMNS",
    "LesionMatch",
    "Lesions",
    "Pair",
    "components",
    "detection",
    "match_lesions",
    "sensitivity_by_size",
]

Array = NDArray[Any]
Rule = Literal["iou", "optimal", "overlap"]
Connectivity = Literal[6, 18, 26]
RANK = {6: 1, 18: 2, 26: 3}  # neighbours that share a face, an edge, a corner
MOSTLY = 0.5  # a lesion lies in another when more than this share of its voxels does
SIZES_MM3 = (10.0, 100.0, 1000.0)
LESION_COLUMNS = (
    "lesions", "reference_lesions", "lesions_found", "lesions_missed", "false_positives", "lesion_f1",
    "lesion_sensitivity", "lesion_precision", "sq", "rq", "pq", "merges", "splits",
)  # fmt: skip


@dataclass(frozen=True)
class Lesions:
    """What a lesion is and when it is found.

    Attributes
    ----------
    rule : {"iou", "optimal", "overlap"}
        - "iou": one to one, the pair with the highest IoU first, as long as it is at least ``min_iou`` [1]_.
        - "optimal": the one-to-one pairs, each with an IoU of at least ``min_iou``, whose IoUs have the largest sum.
        - "overlap": every lesion that shares a voxel with one of the other side, many to many; without panoptic quality.
    min_iou : float
        Least IoU of a pair (a shared voxel is always needed). From above 0.5 on, the first two rules are one.
    connectivity : {26, 18, 6}
        Voxels that touch by a corner, an edge or a face are one lesion; in 2D 26 and 18 mean 8 and 6 means 4.
    sizes_mm3 : sequence of float (mm3)
        Limits, rising, between the classes of size of :meth:`LesionMatch.by_size`.

    References
    ----------
    .. [1] Kirillov et al., Panoptic Segmentation, CVPR 2019, doi:10.1109/CVPR.2019.00963
    """

    rule: Rule = "iou"
    min_iou: float = 0.5
    connectivity: Connectivity = 26
    sizes_mm3: Sequence[float] = SIZES_MM3

    def __post_init__(self) -> None:
        if self.rule not in ("iou", "optimal", "overlap"):
            raise ValueError(f"rule must be 'iou', 'optimal' or 'overlap', got {self.rule!r}")
        if not 0 <= self.min_iou <= 1:
            raise ValueError(f"min_iou must lie between 0 and 1, got {self.min_iou}")
        if self.connectivity not in RANK:
            raise ValueError(f"connectivity must be 26, 18 or 6, got {self.connectivity}")
        if list(self.sizes_mm3) != sorted(set(self.sizes_mm3)) or any(s <= 0 for s in self.sizes_mm3):
            raise ValueError(f"sizes_mm3 must be positive and rise, got {tuple(self.sizes_mm3)}")


class Pair(NamedTuple):
    """Two lesions that share voxels: their numbers, the voxels shared, and the IoU."""

    reference: int
    prediction: int
    voxels: int
    iou: float


@dataclass(frozen=True)
class LesionMatch:
    """The lesions of both sides of one case and how they go together.

    Attributes
    ----------
    prediction, reference : mapping of number to voxels
        Every lesion of each side.
    touching : tuple of Pair
        All pairs that share a voxel.
    pairs : tuple of Pair
        Those that count as found, by the rule.
    voxel_mm3 : float (mm3)
    how : Lesions
    """

    prediction: dict[int, int]
    reference: dict[int, int]
    touching: tuple[Pair, ...]
    pairs: tuple[Pair, ...]
    voxel_mm3: float
    how: Lesions

    @cached_property
    def found(self) -> frozenset[int]:
        """Numbers of the reference lesions that are found."""
        return frozenset(p.reference for p in self.pairs)

    @property
    def missed(self) -> tuple[int, ...]:
        """Numbers of the reference lesions that are not found."""
        return tuple(n for n in self.reference if n not in self.found)

    @cached_property
    def false_positives(self) -> tuple[int, ...]:
        """Numbers of the predicted lesions that find nothing."""
        right = {p.prediction for p in self.pairs}
        return tuple(n for n in self.prediction if n not in right)

    @cached_property
    def merges(self) -> dict[int, tuple[int, ...]]:
        """Predicted lesions in which two or more reference lesions mostly lie, with the numbers of these."""
        return _gathered((p.prediction, p.reference) for p in self.touching if self._lies(p, self.reference[p[0]]))

    @cached_property
    def splits(self) -> dict[int, tuple[int, ...]]:
        """Reference lesions in which two or more predicted lesions mostly lie, with the numbers of these."""
        return _gathered((p.reference, p.prediction) for p in self.touching if self._lies(p, self.prediction[p[1]]))

    @staticmethod
    def _lies(pair: Pair, voxels: int) -> bool:
        return pair.voxels > MOSTLY * voxels

    def scores(self) -> dict[str, float]:
        """The metrics of this case alone: see :func:`detection`."""
        return detection([self])

    def by_size(self) -> list[dict[str, float]]:
        """Sensitivity by size of the reference lesion: as :func:`detection` has it under "by_size"."""
        return sensitivity_by_size([self])


# ---------------------------------------------------------------------------------------------------------------------
# Finding and matching


def components(mask: Array, connectivity: Connectivity = 26) -> Array:
    """Number the connected components of a mask.

    Parameters
    ----------
    mask : (*spatial) bool, 1 to 3 axes
    connectivity : {26, 18, 6}
        As in :class:`Lesions`.

    Returns
    -------
    (*spatial) array of int32
        0 outside, 1, 2, ... in the order in which the components are met. O(voxels).
    """
    if connectivity not in RANK:
        raise ValueError(f"connectivity must be 26, 18 or 6, got {connectivity}")
    numbered = np.zeros(mask.shape, np.int32)
    ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, min(RANK[connectivity], mask.ndim)), numbered)
    return numbered


def match_lesions(
    prediction: Array, reference: Array, spacing: Sequence[float], how: Lesions | None = None
) -> LesionMatch:
    """Find the lesions of both sides and match them.

    Parameters
    ----------
    prediction, reference : (*spatial) bool or integers, 1 to 3 axes
        Masks, whose connected components are the lesions; or instance maps, whose values above 0 are.
    spacing : sequence of float (mm)
        Distance between voxels along each axis.
    how : Lesions, optional

    Notes
    -----
    O(voxels) in the box around both, and 12 bytes for each of these; the optimal matching is made group by group of
    lesions that touch, so its cost grows with the largest group.
    """
    how = how or Lesions()
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction and reference must have one shape, got {prediction.shape} and {reference.shape}")
    if len(spacing) != prediction.ndim or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing must be {prediction.ndim} positive numbers (mm), got {tuple(spacing)}")
    box = _box(prediction, reference)
    p, r = (_numbered(a[box], name, how) for a, name in ((prediction, "prediction"), (reference, "reference")))
    p_numbers, p_sizes = _sizes(p)
    r_numbers, r_sizes = _sizes(r)
    touching = _touching(p, r, dict(zip(p_numbers, p_sizes, strict=True)), dict(zip(r_numbers, r_sizes, strict=True)))
    close = [t for t in touching if t.iou >= how.min_iou]
    pairs = {"iou": _greedy, "optimal": _optimal}[how.rule](close) if how.rule != "overlap" else touching
    return LesionMatch(
        dict(zip(p_numbers, p_sizes, strict=True)), dict(zip(r_numbers, r_sizes, strict=True)),
        tuple(touching), tuple(pairs), float(np.prod(spacing)), how,
    )  # fmt: skip


def _box(prediction: Array, reference: Array) -> tuple[slice, ...]:
    """The box around what is not 0 in either map."""
    box = []
    for axis in range(prediction.ndim):
        others = tuple(a for a in range(prediction.ndim) if a != axis)
        at = np.flatnonzero(prediction.any(axis=others) | reference.any(axis=others))
        box.append(slice(int(at[0]), int(at[-1]) + 1) if at.size else slice(0, 0))
    return tuple(box)


def _numbered(lesions: Array, name: str, how: Lesions) -> Array:
    if lesions.dtype == bool:
        return components(lesions, how.connectivity)
    if lesions.dtype.kind not in "ui":
        raise TypeError(f"{name} must be a mask of bool or an instance map of integers, got {lesions.dtype}")
    if lesions.size and lesions.min() < 0:
        raise ValueError(f"numbers of instances must not be negative, got {lesions.min()} in the {name}")
    return lesions


def _sizes(numbered: Array) -> tuple[list[int], list[int]]:
    numbers, sizes = np.unique(numbered[numbered > 0], return_counts=True)
    return numbers.tolist(), sizes.tolist()


def _touching(p: Array, r: Array, p_size: dict[int, int], r_size: dict[int, int]) -> list[Pair]:
    """All pairs of lesions that share voxels, by reference number."""
    both = (p > 0) & (r > 0)
    couples, counts = np.unique(np.stack([r[both], p[both]], axis=1).astype(np.int64), axis=0, return_counts=True)
    return [
        Pair(a, b, n, n / (r_size[a] + p_size[b] - n))
        for (a, b), n in zip(couples.tolist(), counts.tolist(), strict=True)
    ]


def _greedy(close: Sequence[Pair]) -> list[Pair]:
    """One to one, the highest IoU first; among equals the lower numbers."""
    taken_r: set[int] = set()
    taken_p: set[int] = set()
    pairs = []
    for pair in sorted(close, key=lambda t: (-t.iou, t.reference, t.prediction)):
        if pair.reference not in taken_r and pair.prediction not in taken_p:
            pairs.append(pair)
            taken_r.add(pair.reference)
            taken_p.add(pair.prediction)
    return sorted(pairs)


def _optimal(close: Sequence[Pair]) -> list[Pair]:
    """One to one with the largest sum of IoUs; groups that do not touch are solved apart."""
    if not close:
        return []
    rows = {n: i for i, n in enumerate(dict.fromkeys(t.reference for t in close))}
    columns = {n: i for i, n in enumerate(dict.fromkeys(t.prediction for t in close))}
    at = ([rows[t.reference] for t in close], [len(rows) + columns[t.prediction] for t in close])
    nodes = len(rows) + len(columns)
    group_of = connected_components(coo_array((np.ones(len(close)), at), (nodes, nodes)), directed=False)[1]
    groups: dict[int, list[Pair]] = {}
    for pair in close:
        groups.setdefault(int(group_of[rows[pair.reference]]), []).append(pair)
    return sorted(pair for group in groups.values() for pair in _assigned(group))


def _assigned(group: Sequence[Pair]) -> list[Pair]:
    if len(group) == 1:
        return list(group)
    references = list(dict.fromkeys(t.reference for t in group))
    predictions = list(dict.fromkeys(t.prediction for t in group))
    by_place = {(references.index(t.reference), predictions.index(t.prediction)): t for t in group}
    gain = np.zeros((len(references), len(predictions)))
    for place, pair in by_place.items():
        gain[place] = pair.iou
    chosen = zip(*(a.tolist() for a in linear_sum_assignment(gain, maximize=True)), strict=True)
    return [by_place[place] for place in chosen if place in by_place]


def _gathered(couples: Iterable[tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    """The second numbers by the first, where there are two or more."""
    found: dict[int, list[int]] = {}
    for key, value in couples:
        found.setdefault(key, []).append(value)
    return {key: tuple(values) for key, values in found.items() if len(values) > 1}


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def detection(matches: Sequence[LesionMatch]) -> dict[str, float]:
    """Metrics of detection and panoptic quality, counted over all lesions of one or more cases.

    Parameters
    ----------
    matches : sequence of LesionMatch
        One per case (or per class, to have all classes together).

    Returns
    -------
    dict
        Counts: lesions (predicted), reference_lesions, lesions_found and lesions_missed (of the reference),
        false_positives (of the prediction), merges, splits. lesion_sensitivity = found / reference lesions (NaN where
        there are none), lesion_precision = right / predicted lesions (0 where all are missed), lesion_f1 their harmonic
        mean. For the rules that match one to one, PQ = SQ x RQ [1]_ : sq is the mean IoU of the pairs, rq equals
        lesion_f1, TP / (TP + FP / 2 + FN / 2). All are NaN where neither side has a lesion; F1, RQ and PQ are 0 where
        one side alone has.

    References
    ----------
    .. [1] Kirillov et al., Panoptic Segmentation, CVPR 2019, doi:10.1109/CVPR.2019.00963
    """
    predicted = sum(len(m.prediction) for m in matches)
    references = sum(len(m.reference) for m in matches)
    found = sum(len(m.found) for m in matches)
    false = sum(len(m.false_positives) for m in matches)
    right = predicted - false
    nan = float("nan")
    sensitivity = found / references if references else nan
    precision = right / predicted if predicted else (0.0 if references else nan)
    if not predicted and not references:
        f1 = nan
    else:
        f1 = 2 * sensitivity * precision / (sensitivity + precision) if found and right else 0.0
    ious = [p.iou for m in matches for p in m.pairs]
    one_to_one = all(m.how.rule != "overlap" for m in matches)
    sq = float(np.mean(ious)) if ious and one_to_one else nan
    rq = f1 if one_to_one else nan
    return {
        "lesions": predicted,
        "reference_lesions": references,
        "lesions_found": found,
        "lesions_missed": references - found,
        "false_positives": false,
        "lesion_f1": f1,
        "lesion_sensitivity": sensitivity,
        "lesion_precision": precision,
        "sq": sq,
        "rq": rq,
        "pq": sq * rq if ious else rq,
        "merges": sum(len(m.merges) for m in matches),
        "splits": sum(len(m.splits) for m in matches),
    }


def sensitivity_by_size(matches: Sequence[LesionMatch]) -> list[dict[str, float]]:
    """Sensitivity by volume of the reference lesion, over one or more cases matched in the same way.

    Returns
    -------
    list of dict
        One per class of size, from_mm3 <= volume < to_mm3 (infinite in the last), with reference_lesions,
        lesions_found and lesion_sensitivity (NaN where the class is empty).
    """
    if len({(m.how.rule, m.how.min_iou, tuple(m.how.sizes_mm3)) for m in matches}) > 1:
        raise ValueError("cases must be matched in the same way, got several ways")
    limits = [0.0, *(matches[0].how.sizes_mm3 if matches else SIZES_MM3), float("inf")]
    volumes = np.array([n * m.voxel_mm3 for m in matches for n in m.reference.values()])
    found = np.array([n in m.found for m in matches for n in m.reference], bool)
    place = np.searchsorted(limits, volumes * (1 + 1e-9), side="right") - 1  # 30 x 0.1 mm3 is 3 mm3
    rows = []
    for n, (low, high) in enumerate(pairwise(limits)):
        own = found[place == n]
        share = float(own.mean()) if own.size else float("nan")
        rows.append({
            "from_mm3": low, "to_mm3": high, "reference_lesions": int(own.size), "lesions_found": int(own.sum()),
            "lesion_sensitivity": share,
        })  # fmt: skip
    return rows
