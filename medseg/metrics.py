"""Metrics of segmentations: overlap, volume and surface distance, per structure; arrays or tensors in, numbers out.

Nothing here knows of files or grids; spacing is an argument, in mm, one number per array axis. numpy arrays and CPU
tensors are worked on in place (no copy of the volume); tensors on another device stay there.

The contract of the undefined:
where a structure is in neither mask every metric is NaN; where it is in one mask only, the
overlaps and the normalised surface Dice are 0 and the distances follow a named rule, so that missing a structure never
improves a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.surface import DEFAULT_DEFINITION, Definition, surface_distances

__all__ = [
    "Overlap",
    "SurfaceScores",
    "confusion",
    "dice",
    "iou",
    "overlap",
    "precision",
    "recall",
    "structure_boxes",
    "structure_scores",
    "surface_scores",
]

Array = NDArray[Any]
Box = tuple[slice, ...]
Labels = Array | torch.Tensor
Missing = Literal["diagonal", "nan"]
SLAB = 1 << 17  # voxels looked at together: small enough for the cache
LARGEST_LABEL = 1 << 20
HOST = "cpu"  # tensors on any other device stay there
SLACK_MM = 1e-4  # distances are float32: 3 x 0.8 mm must count as within a tolerance of 2.4 mm


class Overlap(NamedTuple):
    """Voxels per structure, each an (S,) array of int64: in both masks, in the prediction, in the reference."""

    both: Array
    prediction: Array
    reference: Array


class SurfaceScores(NamedTuple):
    """Surface metrics of one structure (mm, and a share in 0..1)."""

    hd_mm: float
    hd95_mm: float
    assd_mm: float
    nsd: float


# ---------------------------------------------------------------------------------------------------------------------
# Overlap


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
    return _scan(*_label_pair(prediction, reference), labels)[0]


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
        return _overlap(confusion(prediction, reference, labels))
    return _stack([_overlap(_scan(p, r, (1,))[0]) for p, r in _layer_pairs(prediction, reference)])


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


# ---------------------------------------------------------------------------------------------------------------------
# Surface


def surface_scores(
    prediction: Labels,
    reference: Labels,
    spacing: Sequence[float],
    *,
    tolerance_mm: float = 1.0,
    definition: Definition = DEFAULT_DEFINITION,
    missing: Missing = "diagonal",
) -> SurfaceScores:
    """Hausdorff distance, its 95th percentile, average symmetric surface distance and normalised surface Dice.

    Parameters
    ----------
    prediction, reference : (*spatial) bool, 1 to 3 axes
        Masks of one structure; an axis of length 1 is left out (a slice is scored in 2D).
    spacing : sequence of float (mm)
        Distance between voxels along each axis.
    tolerance_mm : float (mm)
        Tolerance t of the normalised surface Dice, at least 0.
    definition : {"voxel", "pooled", "area"}
        What a surface is and how HD95 joins both directions. With elements x_i of weight w_i on the surface P of the
        prediction and y_j of weight v_j on that of the reference, R, directed distances a_i = min_j |x_i - y_j| and
        b_j = min_i |x_i - y_j|, and P95 a (weighted) percentile:

        - "voxel": elements are the voxels of the mask that touch its outside by a face (the edge of the image is
          outside), w = v = 1; HD95 = max(P95(a), P95(b)) (as MONAI and MetricsReloaded [2]_).
        - "pooled": the same voxels; HD95 = P95 of a and b together (as medpy and panoptica, after [3]_).
        - "area": elements lie between the voxels, weighted by their area (mm2); HD95 = max of both weighted percentiles
          (as DeepMind's surface-distance [1]_).

        Throughout HD = max(max a, max b), ASSD = (sum w a + sum v b) / (sum w + sum v) and
        NSD = (sum of w where a <= t + sum of v where b <= t) / (sum w + sum v) [1]_. The default is the one nearest to the
        exact distances, weighted by area, between the meshes of the masks: the smallest error over HD, HD95, ASSD and
        NSD together (workflows/bench/surface_definitions.py; "area" is slightly nearer for HD95 alone).
    missing : {"diagonal", "nan"}
        Distances where one mask is empty: the diagonal of the image in mm, or NaN; NSD is 0.

    Returns
    -------
    SurfaceScores
        NaN throughout where both masks are empty.

    Notes
    -----
    Exact on anisotropic grids. Work is confined to the box around both masks: time and memory grow with its voxels.

    References
    ----------
    .. [1] Nikolov et al., J Med Internet Res 2021, doi:10.2196/26151
    .. [2] Maier-Hein et al., Nat Methods 2024, doi:10.1038/s41592-023-02151-z
    .. [3] Taha & Hanbury, BMC Med Imaging 2015, doi:10.1186/s12880-015-0068-x
    """
    prediction, reference = _label_pair(prediction, reference)
    _require_lengths(spacing, prediction.ndim, tolerance_mm)
    _, box = _scan(prediction, reference, (1,))
    return _surface(prediction, reference, 1, box[0], spacing, tolerance_mm, definition, missing)


def _surface(
    prediction: Labels,
    reference: Labels,
    label: int,
    box: Box | None,
    spacing: Sequence[float],
    tolerance_mm: float,
    definition: Definition,
    missing: Missing,
) -> SurfaceScores:
    """Surface metrics of the voxels of one label, looked for in ``box`` only."""
    if box is None:
        return SurfaceScores(np.nan, np.nan, np.nan, np.nan)
    kept = [axis for axis, n in enumerate(prediction.shape) if n > 1] or [0]
    crop = tuple(box[axis] if axis in kept else 0 for axis in range(prediction.ndim))
    masks = _mask(prediction[crop], label), _mask(reference[crop], label)
    if not (bool(masks[0].any()) and bool(masks[1].any())):
        diagonal = float(np.linalg.norm([n * s for n, s in zip(prediction.shape, spacing, strict=True)]))
        worst = diagonal if missing == "diagonal" else np.nan
        return SurfaceScores(worst, worst, worst, 0.0)
    a, b = surface_distances(*masks, [spacing[axis] for axis in kept], definition)
    within = a.within(tolerance_mm + SLACK_MM) + b.within(tolerance_mm + SLACK_MM)
    hd95 = a.joined(b).percentile(95) if definition == "pooled" else max(a.percentile(95), b.percentile(95))
    size = a.size + b.size
    return SurfaceScores(max(a.largest, b.largest), hd95, (a.total + b.total) / size, within / size)


def _mask(labels: Labels, label: int) -> Any:
    """Voxels of one label; none where the type of the labels cannot hold it (torch would compare modulo its range)."""
    if isinstance(labels, torch.Tensor) and labels.dtype != torch.bool and label > torch.iinfo(labels.dtype).max:
        return torch.zeros_like(labels, dtype=torch.bool)
    return labels == label


# ---------------------------------------------------------------------------------------------------------------------
# Everything at once


def structure_scores(
    prediction: Labels,
    reference: Labels,
    labels: Sequence[int] | None,
    spacing: Sequence[float],
    *,
    tolerance_mm: float = 1.0,
    surface: bool = True,
    definition: Definition = DEFAULT_DEFINITION,
    missing: Missing = "diagonal",
) -> list[dict[str, float]]:
    """All metrics of each structure, in one pass over the voxels and one look at the box around each structure.

    Parameters
    ----------
    prediction, reference, labels
        As in :func:`overlap`.
    spacing, tolerance_mm, definition, missing
        As in :func:`surface_scores`.
    surface : bool
        Whether to measure surface distances (most of the time).

    Returns
    -------
    list of S dict
        Keys iou, dice, precision, recall, volume_mm3, reference_volume_mm3 and, with ``surface``, hd_mm, hd95_mm,
        assd_mm, nsd.
    """
    scores: list[SurfaceScores] = []
    options = (spacing, tolerance_mm, definition, missing)
    if labels is not None:
        prediction, reference = _label_pair(prediction, reference)
        _require_lengths(spacing, prediction.ndim, tolerance_mm)
        matrix, boxes = _scan(prediction, reference, labels)
        counts = _overlap(matrix)
        if surface:
            scores = [_surface(prediction, reference, n, box, *options) for n, box in zip(labels, boxes, strict=True)]
    else:
        _require_lengths(spacing, prediction.ndim - 1, tolerance_mm)
        parts = []
        for p, r in _layer_pairs(prediction, reference):
            matrix, boxes = _scan(p, r, (1,))
            parts.append(_overlap(matrix))
            if surface:
                scores.append(_surface(p, r, 1, boxes[0], *options))
        counts = _stack(parts)
    voxel_mm3 = float(np.prod(spacing))
    columns = {
        "iou": iou(counts),
        "dice": dice(counts),
        "precision": precision(counts),
        "recall": recall(counts),
        "volume_mm3": counts.prediction * voxel_mm3,
        "reference_volume_mm3": counts.reference * voxel_mm3,
    }
    rows = [{key: float(column[s]) for key, column in columns.items()} for s in range(len(counts.both))]
    for row, score in zip(rows, scores, strict=False):
        row.update(score._asdict())
    return rows


def structure_boxes(prediction: Labels, reference: Labels, labels: Sequence[int]) -> list[Box | None]:
    """The box (one slice per axis) around each label in either map, None where it is in neither; one pass, O(voxels)."""
    return _scan(*_label_pair(prediction, reference), labels)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Checks, and the pass over the voxels


def _require_lengths(spacing: Sequence[float], axes: int, tolerance_mm: float) -> None:
    if len(spacing) != axes or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing must be {axes} positive numbers (mm), got {tuple(spacing)}")
    if not tolerance_mm >= 0:  # NaN is refused, too
        raise ValueError(f"tolerance_mm must be 0 or more (mm), got {tolerance_mm}")


def _label_pair(prediction: Labels, reference: Labels) -> tuple[Labels, Labels]:
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


def _layer_pairs(prediction: Labels, reference: Labels) -> list[tuple[Labels, Labels]]:
    p, r = _label_pair(prediction, reference)
    if p.dtype not in (bool, torch.bool) or r.dtype not in (bool, torch.bool):
        raise TypeError(f"layers must be bool, got {p.dtype} and {r.dtype}; give labels for label maps")
    return list(zip(p, r, strict=True))


def _overlap(matrix: Array) -> Overlap:
    return Overlap(np.diagonal(matrix)[1:].copy(), matrix.sum(0)[1:], matrix.sum(1)[1:])


def _stack(parts: Sequence[Overlap]) -> Overlap:
    return Overlap(*(np.array([int(part[n][0]) for part in parts], np.int64) for n in range(3)))


def _scan(prediction: Labels, reference: Labels, labels: Sequence[int]) -> tuple[Array, list[Box | None]]:
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
