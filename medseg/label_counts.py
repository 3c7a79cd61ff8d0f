"""Voxels counted by label in one pass, with the box of each; and what follows: IoU, Dice, precision, recall.

Arrays or tensors in; numpy arrays and CPU tensors are worked on in place (no copy of the volume), tensors on another
device stay there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "Box",
    "Labels",
    "Overlap",
    "confusion",
    "counted",
    "dice",
    "iou",
    "label_pair",
    "layer_pairs",
    "overlap",
    "precision",
    "recall",
    "scan",
    "stacked",
    "structure_boxes",
]

Array = NDArray[Any]
Box = tuple[slice, ...]
Labels = Array | torch.Tensor
SLAB = 1 << 17  # voxels looked at together: small enough for the cache
LARGEST_LABEL = 1 << 20
HOST = "cpu"  # tensors on any other device stay there


class Overlap(NamedTuple):
    """Voxels per structure, each an (S,) array of int64: in both masks, in the prediction, in the reference."""

    both: Array
    prediction: Array
    reference: Array


def confusion(prediction: Labels, reference: Labels, labels: Sequence[int]) -> Array:
    """Count voxels by predicted and reference label, in one pass for all labels.

    Parameters
    ----------
    prediction, reference : integer arrays or tensors of one shape
        Label maps of any dimension, on one device.
    labels : sequence of L int
        The labels to tell apart, each at least 1; every other value counts as background.

    Returns
    -------
    (L + 1, L + 1) array of int64
        Voxels by reference label (rows) and predicted label (columns); index 0 is background and everything else.

    Notes
    -----
    O(voxels); only voxels that are not 0 in both maps are looked up. Needs a few MB beyond its arguments.
    """
    return scan(*label_pair(prediction, reference), labels)[0]


def overlap(prediction: Labels, reference: Labels, labels: Sequence[int] | None = None) -> Overlap:
    """Voxels per structure in both masks, in the prediction and in the reference.

    Parameters
    ----------
    prediction, reference : (*spatial) integers, or (S, *spatial) bool
        Label maps with ``labels`` given, else one bool layer per structure (which may overlap).
    labels : sequence of S int, optional
        The structures of label maps.
    """
    if labels is not None:
        return counted(confusion(prediction, reference, labels))
    return stacked([counted(scan(p, r, (1,))[0]) for p, r in layer_pairs(prediction, reference)])


def iou(counts: Overlap) -> Array:
    """Intersection over union (Jaccard) per structure, (S,); NaN where both masks are empty."""
    return _ratio(counts.both, counts.prediction + counts.reference - counts.both)


def dice(counts: Overlap) -> Array:
    """Dice coefficient per structure, (S,); NaN where both masks are empty."""
    return _ratio(2 * counts.both, counts.prediction + counts.reference)


def precision(counts: Overlap) -> Array:
    """Share of the prediction that is right, (S,); 0 where one mask is empty, NaN where both are."""
    return _ratio(counts.both, counts.prediction, counts.reference)


def recall(counts: Overlap) -> Array:
    """Share of the reference that was found (sensitivity), (S,); 0 where one mask is empty, NaN where both are."""
    return _ratio(counts.both, counts.reference, counts.prediction)


def _ratio(top: Array, bottom: Array, other: Array | int = 0) -> Array:
    """top / bottom; 0 where only ``other`` is not 0, NaN where both are 0."""
    empty = np.where(np.asarray(other) > 0, 0.0, np.nan)
    return np.asarray(np.where(bottom > 0, top / np.maximum(bottom, 1), empty))


def structure_boxes(prediction: Labels, reference: Labels, labels: Sequence[int]) -> list[Box | None]:
    """The box (one slice per axis) around each label in either map, None where it is in neither; one pass, O(voxels)."""
    return scan(*label_pair(prediction, reference), labels)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Checks, and the pass over the voxels


def label_pair(prediction: Labels, reference: Labels) -> tuple[Labels, Labels]:
    """Both label maps with their slowest axis in memory first, CPU tensors as arrays; refuses what is no such pair."""
    pair = []
    for name, labels in (("prediction", prediction), ("reference", reference)):
        if isinstance(labels, torch.Tensor):
            if labels.is_floating_point() or labels.is_complex():
                raise TypeError(f"{name} must hold integers or bool, got {labels.dtype}")
            pair.append(labels.numpy() if labels.device.type == HOST else labels)
        else:
            array = np.asarray(labels)
            if array.dtype.kind not in "bui":
                raise TypeError(f"{name} must hold integers or bool, got {array.dtype}")
            pair.append(array)
    p, r = pair
    if tuple(p.shape) != tuple(r.shape):
        raise ValueError(f"prediction and reference must have one shape, got {tuple(p.shape)} and {tuple(r.shape)}")
    if isinstance(p, torch.Tensor) != isinstance(r, torch.Tensor):
        raise ValueError("prediction and reference must be on one device, got one on the CPU and one not")
    return p, r


def layer_pairs(prediction: Labels, reference: Labels) -> list[tuple[Labels, Labels]]:
    p, r = label_pair(prediction, reference)
    if p.dtype not in (bool, torch.bool) or r.dtype not in (bool, torch.bool):
        raise TypeError(f"layers must be bool, got {p.dtype} and {r.dtype}; give labels for label maps")
    return list(zip(p, r, strict=True))


def counted(matrix: Array) -> Overlap:
    return Overlap(np.diagonal(matrix)[1:].copy(), matrix.sum(0)[1:], matrix.sum(1)[1:])


def stacked(parts: Sequence[Overlap]) -> Overlap:
    return Overlap(*(np.array([int(part[n][0]) for part in parts], np.int64) for n in range(3)))


def scan(prediction: Labels, reference: Labels, labels: Sequence[int]) -> tuple[Array, list[Box | None]]:
    """Confusion matrix, and the box around each label in either map (None where it is in neither)."""
    if len(set(labels)) != len(labels) or not all(0 < n <= LARGEST_LABEL for n in labels):
        raise ValueError(f"labels must be distinct numbers from 1 to {LARGEST_LABEL}, got {list(labels)}")
    index_of = np.zeros(max(labels, default=0) + 2, np.intp)  # the last entry stands for all larger values
    index_of[list(labels)] = np.arange(1, len(labels) + 1)
    if isinstance(prediction, torch.Tensor):
        return _scan_device(prediction, torch.as_tensor(reference), index_of, len(labels) + 1)
    return _scan_host(prediction, np.asarray(reference), index_of, len(labels) + 1)


def _scan_host(prediction: Array, reference: Array, index_of: Array, size: int) -> tuple[Array, list[Box | None]]:
    axes = np.argsort([-abs(s) for s in prediction.strides], kind="stable")  # walk through memory as it lies
    p, r = (np.ascontiguousarray(a.transpose(axes)) for a in (prediction, reference))
    seen = [np.zeros((size, n), bool) for n in p.shape]
    matrix = np.zeros(size * size, np.int64)
    step = max(1, SLAB // max(1, p.size // max(1, p.shape[0])))
    for start in range(0, p.shape[0], step):
        at, lengths, pair = _runs(p[start : start + step], r[start : start + step])
        if not at.size:
            continue
        column, row = (index_of[np.clip(values, 0, len(index_of) - 1)] for values in pair)
        matrix += np.bincount(row * size + column, lengths, size * size).astype(np.int64)
        for axis in reversed(range(p.ndim)):
            at, place = (at // p.shape[axis], at % p.shape[axis]) if axis else (at, at + start)
            ends = (place, place + lengths - 1) if axis == p.ndim - 1 else (place,)
            for labels, end in product((row, column), ends):
                seen[axis][labels, end] = True
    matrix[0] += p.size - matrix.sum()
    boxes: list[Box | None] = []
    for label in range(1, size):
        found = {int(a): np.flatnonzero(s[label]) for a, s in zip(axes, seen, strict=True)}
        inside = [found[a] for a in range(p.ndim)]
        boxes.append(tuple(slice(int(f[0]), int(f[-1]) + 1) for f in inside) if inside[0].size else None)
    return matrix.reshape(size, size), boxes


def _runs(p: Array, r: Array) -> tuple[Array, Array, tuple[Array, Array]]:
    """Runs of one pair of labels along the last axis: flat index of the start, length, both labels; no background."""
    line = p.shape[-1]
    p, r = p.reshape(-1), r.reshape(-1)
    at = np.flatnonzero((p != 0) | (r != 0))
    if not at.size:
        return at, at, (at, at)
    values = p[at], r[at]
    new = np.ones(len(at), bool)
    np.not_equal(at[1:] - at[:-1], 1, out=new[1:])
    new[1:] |= (values[0][1:] != values[0][:-1]) | (values[1][1:] != values[1][:-1]) | (at[1:] % line == 0)
    starts = np.flatnonzero(new)
    return at[starts], np.diff(starts, append=len(at)), (values[0][starts], values[1][starts])


def _scan_device(
    prediction: torch.Tensor, reference: torch.Tensor, index_of: Array, size: int
) -> tuple[Array, list[Box | None]]:
    table = torch.as_tensor(index_of, device=prediction.device)
    matrix = torch.zeros(size * size, dtype=torch.int64, device=prediction.device)
    seen = [torch.zeros(size, n, dtype=torch.bool, device=prediction.device) for n in prediction.shape]
    step = max(1, (64 * SLAB) // max(1, prediction[0].numel()))
    for start in range(0, prediction.shape[0], step):
        row, column = (
            table[a[start : start + step].long().clamp(0, len(index_of) - 1)] for a in (reference, prediction)
        )
        matrix += torch.bincount((row * size + column).flatten(), minlength=size * size)
        at = torch.nonzero((row != 0) | (column != 0), as_tuple=True)
        for axis, place in enumerate(at):
            for labels in (row[at], column[at]):
                seen[axis][labels, place + (start if axis == 0 else 0)] = True
    boxes: list[Box | None] = []
    places = [[np.flatnonzero(line) for line in s.cpu().numpy()] for s in seen]
    for label in range(1, size):
        inside = [axis[label] for axis in places]
        boxes.append(tuple(slice(int(f[0]), int(f[-1]) + 1) for f in inside) if inside[0].size else None)
    return matrix.cpu().numpy().reshape(size, size), boxes
