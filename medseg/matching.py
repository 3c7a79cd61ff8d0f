"""Connected components of masks, and which of two sets of numbered regions go together. Arrays in, numbers out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

__all__ = ["Connectivity", "Pair", "Regions", "components", "greedy_pairs", "optimal_pairs", "overlapping_pairs"]

Array = NDArray[Any]
Connectivity = Literal[6, 18, 26]
RANK = {6: 1, 18: 2, 26: 3}  # neighbours that share a face, an edge, a corner
SPARSE = 1 << 22  # numbers, or pairs of them, beyond which they are sorted instead of counted


class Pair(NamedTuple):
    """Two regions that share voxels: their numbers, the voxels shared, and the IoU."""

    reference: int
    prediction: int
    voxels: int
    iou: float


class Regions(NamedTuple):
    """The regions of one array: where their voxels are and to which region each belongs.

    Attributes
    ----------
    at : (V,) flat index of the voxels that are not 0
    place : (V,) index into ``numbers``
    numbers : (N,) the values, rising
    voxels : (N,) how many voxels each has
    centres : (N, axes) mean index
    """

    at: Array
    place: Array
    numbers: Array
    voxels: Array
    centres: Array

    @classmethod
    def of(cls, numbered: Array) -> Regions:
        """Regions of an array of integers, O(voxels)."""
        numbered = np.ascontiguousarray(numbered)
        at = np.flatnonzero(numbered)
        values = numbered.reshape(-1)[at]
        numbers, place, voxels = _counted(values)
        weights = np.maximum(voxels, 1)
        centres = [np.bincount(place, c, len(numbers)) / weights for c in np.unravel_index(at, numbered.shape)]
        return cls(at, place, numbers, voxels, np.stack(centres, axis=1))


def components(mask: Array, connectivity: Connectivity = 26) -> Array:
    """Number the connected components of a mask.

    Parameters
    ----------
    mask : (*spatial) bool, 1 to 3 axes
    connectivity : {26, 18, 6}
        Voxels that touch by a corner, an edge or a face are one component; in 2D 26 and 18 mean 8 and 6 means 4.

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


def overlapping_pairs(prediction: Regions, reference: Regions, shape: Sequence[int]) -> list[Pair]:
    """All pairs of regions that share voxels, by reference number; O(voxels of both)."""
    lookup = np.full(int(np.prod(shape)), -1, np.int32)  # of the prediction's regions
    lookup[prediction.at] = prediction.place
    there = lookup[reference.at]
    shared = there >= 0
    code = reference.place[shared].astype(np.int64) * len(prediction.numbers) + there[shared]
    codes, _, counts = _counted(code)
    r, p = codes // max(1, len(prediction.numbers)), codes % max(1, len(prediction.numbers))
    iou = counts / (reference.voxels[r] + prediction.voxels[p] - counts)
    columns = (reference.numbers[r], prediction.numbers[p], counts, iou)
    return [Pair(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]


def _counted(values: Array) -> tuple[Array, Array, Array]:
    """The distinct values, rising; of each value its place among them; and how often each is there."""
    if values.size and values.min() >= 0 and values.max() < max(SPARSE, values.size):
        values = values.astype(np.intp, copy=False)
        counts = np.bincount(values)
        numbers = np.flatnonzero(counts)
        if len(numbers) and numbers[0] + len(numbers) - 1 == numbers[-1]:  # no gaps, as from components
            return numbers, values - numbers[0], counts[numbers]
        table = np.zeros(len(counts), np.int32)
        table[numbers] = np.arange(len(numbers))
        return numbers, table[values], counts[numbers]
    numbers, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return numbers, place, counts


# ---------------------------------------------------------------------------------------------------------------------
# One to one


def greedy_pairs(close: Sequence[Pair]) -> list[Pair]:
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


def optimal_pairs(close: Sequence[Pair]) -> list[Pair]:
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
    rows = {n: i for i, n in enumerate(dict.fromkeys(t.reference for t in group))}
    columns = {n: i for i, n in enumerate(dict.fromkeys(t.prediction for t in group))}
    by_place = {(rows[t.reference], columns[t.prediction]): t for t in group}
    gain = np.zeros((len(rows), len(columns)))
    for place, pair in by_place.items():
        gain[place] = pair.iou
    chosen = zip(*(a.tolist() for a in linear_sum_assignment(gain, maximize=True)), strict=True)
    return [by_place[place] for place in chosen if place in by_place]
