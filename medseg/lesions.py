"""Metrics of lesions and instances: which are found, missed, made up, merged or split; panoptic quality.

Arrays in, numbers out, in 2D and 3D. Lesions are the connected components of a mask, or the numbers of an instance map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medseg.matching import (
    RANK,
    Connectivity,
    Pair,
    Regions,
    components,
    greedy_pairs,
    optimal_pairs,
    overlapping_pairs,
)

__all__ = [
    "LesionMatch",
    "Lesions",
    "Pair",
    "components",
    "detection",
    "instance_precision",
    "lesion_rows",
    "match_lesions",
    "sensitivity_by_size",
]

Array = NDArray[Any]
Rule = Literal["iou", "optimal", "overlap"]
MOSTLY = 0.5  # a lesion lies in another when more than this share of its voxels does
SIZES_MM3 = (10.0, 100.0, 1000.0)
AP_IOUS = tuple(n / 100 for n in range(50, 100, 5))


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
    instances : bool
        For :func:`medseg.evaluate`: label maps hold the numbers of instances, all of one kind (cells, say), rather than of
        structures; each is one "lesion".

    References
    ----------
    .. [1] Kirillov et al., Panoptic Segmentation, CVPR 2019, doi:10.1109/CVPR.2019.00963
    """

    rule: Rule = "iou"
    min_iou: float = 0.5
    connectivity: Connectivity = 26
    sizes_mm3: Sequence[float] = SIZES_MM3
    instances: bool = False

    def __post_init__(self) -> None:
        if self.rule not in ("iou", "optimal", "overlap"):
            raise ValueError(f"rule must be 'iou', 'optimal' or 'overlap', got {self.rule!r}")
        if not 0 <= self.min_iou <= 1:
            raise ValueError(f"min_iou must lie between 0 and 1, got {self.min_iou}")
        if self.connectivity not in RANK:
            raise ValueError(f"connectivity must be 26, 18 or 6, got {self.connectivity}")
        if list(self.sizes_mm3) != sorted(set(self.sizes_mm3)) or any(s <= 0 for s in self.sizes_mm3):
            raise ValueError(f"sizes_mm3 must be positive and rise, got {tuple(self.sizes_mm3)}")


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
    prediction_centres, reference_centres : mapping of number to index
        Mean index of the voxels of each lesion, in the arrays that were matched.
    """

    prediction: dict[int, int]
    reference: dict[int, int]
    touching: tuple[Pair, ...]
    pairs: tuple[Pair, ...]
    voxel_mm3: float
    how: Lesions
    prediction_centres: dict[int, tuple[float, ...]] = field(default_factory=dict)
    reference_centres: dict[int, tuple[float, ...]] = field(default_factory=dict)

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
        """The metrics of this case alone: see :func:`detection`; with sensitivity and lesions of the reference by size."""
        found = detection([self])
        for row in self.by_size():
            for key in ("lesion_sensitivity", "reference_lesions"):
                found[f"{key.removeprefix('lesion_')}_{_size(row['from_mm3'], row['to_mm3'])}"] = row[key]
        return found

    def by_size(self) -> list[dict[str, float]]:
        """Sensitivity by size of the reference lesion: see :func:`sensitivity_by_size`."""
        return sensitivity_by_size([self])


# ---------------------------------------------------------------------------------------------------------------------
# Finding and matching


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
    O(voxels) in the box around both; about 12 bytes for each of these, and 60 for each voxel of a lesion. The optimal
    matching is made group by group of lesions that touch, so its cost grows with the largest group.
    """
    how = how or Lesions()
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction and reference must have one shape, got {prediction.shape} and {reference.shape}")
    if len(spacing) != prediction.ndim or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing must be {prediction.ndim} positive numbers (mm), got {tuple(spacing)}")
    box = _box(prediction, reference)
    p, r = (
        Regions.of(_numbered(a[box], name, how)) for a, name in ((prediction, "prediction"), (reference, "reference"))
    )
    touching = overlapping_pairs(p, r, [s.stop - s.start for s in box])
    close = [t for t in touching if t.iou >= how.min_iou]
    pairs = {"iou": greedy_pairs, "optimal": optimal_pairs}[how.rule](close) if how.rule != "overlap" else touching
    start = np.array([s.start for s in box], float)
    (p_size, p_centre), (r_size, r_centre) = (_by_number(side, start) for side in (p, r))
    return LesionMatch(
        p_size, r_size, tuple(touching), tuple(pairs), float(np.prod(spacing)), how, p_centre, r_centre
    )  # fmt: skip


def _by_number(side: Regions, start: Array) -> tuple[dict[int, int], dict[int, tuple[float, ...]]]:
    """Voxels and centre of each region, the centre in an array where the box begins at ``start``."""
    numbers, centres = side.numbers.tolist(), map(tuple, (side.centres + start).tolist())
    return dict(zip(numbers, side.voxels.tolist(), strict=True)), dict(zip(numbers, centres, strict=True))


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
        lesion_f1, TP / (TP + FP / 2 + FN / 2). ap50, ap75 and ap are :func:`instance_precision` at an IoU of 0.5 and
        0.75 and its mean over 0.5, 0.55 ... 0.95. All are NaN where neither side has a lesion; F1, RQ, PQ and AP are 0
        where one side alone has.

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
        "ap50": instance_precision(matches, 0.5),
        "ap75": instance_precision(matches, 0.75),
        "ap": float(np.mean([instance_precision(matches, least) for least in AP_IOUS])),
        "merges": sum(len(m.merges) for m in matches),
        "splits": sum(len(m.splits) for m in matches),
    }


def instance_precision(matches: Sequence[LesionMatch], min_iou: float) -> float:
    """TP / (TP + FP + FN) over all lesions, matched one to one with at least this IoU (whatever their rule says) [1]_.

    What is called the average precision of instances that have no score of confidence, as in the 2018 Data Science Bowl.

    References
    ----------
    .. [1] Caicedo et al., Nat Methods 2019, doi:10.1038/s41592-019-0612-7
    """
    right = sum(len(greedy_pairs([t for t in m.touching if t.iou >= min_iou])) for m in matches)
    all_of_them = sum(len(m.prediction) + len(m.reference) for m in matches) - right
    return right / all_of_them if all_of_them else float("nan")


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


def _size(low: float, high: float) -> str:
    """End of the columns of a class of size: to_10_mm3, 10_to_100_mm3, from_1000_mm3."""
    ends = [f"{low:g}_" if low > 0 and high < np.inf else "", f"to_{high:g}" if high < np.inf else f"from_{low:g}"]
    return f"{''.join(ends)}_mm3"


def lesion_rows(match: LesionMatch, affine: Array) -> list[dict[str, Any]]:
    """One row per lesion of either side: where it is, how large, and what became of it.

    Parameters
    ----------
    match : LesionMatch
    affine : (4, 4) float
        From index to RAS+ mm.

    Returns
    -------
    list of dict
        Keys side, lesion (its number), volume_mm3, x_mm, y_mm, z_mm (centre), outcome ("found", "missed", "right" or
        "false positive"), partners (numbers on the other side), iou (the best with these), note (merges and splits).
    """
    partners: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for pair in match.pairs:
        partners.setdefault(("reference", pair.reference), []).append((pair.prediction, pair.iou))
        partners.setdefault(("prediction", pair.prediction), []).append((pair.reference, pair.iou))
    notes: dict[tuple[str, int], list[str]] = {}
    for one, several, verb, side, other in (
        *((n, m, "merges", "prediction", "reference") for n, m in match.merges.items()),
        *((n, m, "is split into", "reference", "prediction") for n, m in match.splits.items()),
    ):
        notes.setdefault((side, one), []).append(f"{verb} {other} {', '.join(map(str, several))}")
        for part in several:
            passive = "is merged with others in" if verb == "merges" else "is a part of the split"
            notes.setdefault((other, part), []).append(f"{passive} {side} {one}")
    sides = (
        ("reference", match.reference, match.reference_centres, ("found", "missed")),
        ("prediction", match.prediction, match.prediction_centres, ("right", "false positive")),
    )
    rows = []
    for side, sizes, centres, outcomes in sides:
        for number, voxels in sizes.items():
            x, y, z = (affine[:3, :3] @ centres[number] + affine[:3, 3]).tolist()
            mates = partners.get((side, number), [])
            rows.append({
                "side": side, "lesion": number, "volume_mm3": voxels * match.voxel_mm3, "x_mm": x, "y_mm": y, "z_mm": z,
                "outcome": outcomes[not mates], "partners": " ".join(str(n) for n, _ in mates),
                "iou": max((iou for _, iou in mates), default=0.0), "note": "; ".join(notes.get((side, number), [])),
            })  # fmt: skip
    return rows
