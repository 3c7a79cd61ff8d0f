"""Metrics of segmentations: overlap, volume and surface distance, per structure; arrays or tensors in, numbers out.

Nothing here knows of files or grids; spacing is an argument, in mm, one number per array axis. numpy arrays and CPU
tensors are worked on in place (no copy of the volume); tensors on another device stay there.

The contract of the undefined: where a structure is in neither mask every metric is NaN; where it is in one mask only, the
overlaps and the normalised surface Dice are 0 and the distances follow a named rule, so that missing a structure never
improves a mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from medseg.label_counts import (
    Box,
    Labels,
    Overlap,
    confusion,
    counted,
    dice,
    iou,
    label_pair,
    layer_pairs,
    overlap,
    precision,
    recall,
    scan,
    stacked,
    structure_boxes,
)
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
    "require_tolerance",
    "structure_boxes",
    "structure_scores",
    "surface_scores",
]

Missing = Literal["diagonal", "nan"]
SLACK_MM = 1e-4  # distances are float32: 3 x 0.8 mm must count as within a tolerance of 2.4 mm


class SurfaceScores(NamedTuple):
    """Surface metrics of one structure (mm, and a share in 0..1)."""

    hd_mm: float
    hd95_mm: float
    assd_mm: float
    nsd: float


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
    prediction, reference = label_pair(prediction, reference)
    _require(prediction.ndim, spacing, tolerance_mm, definition, missing)
    _, box = scan(prediction, reference, (1,))
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
    threads: int = 1,
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
    threads : int
        Structures of label maps whose surfaces are measured at a time, on the CPU; each takes the memory of its box.

    Returns
    -------
    list of S dict
        Keys iou, dice, precision, recall, volume_mm3, reference_volume_mm3 and, with ``surface``, hd_mm, hd95_mm,
        assd_mm, nsd.
    """
    scores: list[SurfaceScores] = []
    options = (spacing, tolerance_mm, definition, missing)
    if labels is not None:
        prediction, reference = label_pair(prediction, reference)
        _require(prediction.ndim, *options)
        matrix, boxes = scan(prediction, reference, labels)
        counts = counted(matrix)
        if surface:
            workers = 1 if isinstance(prediction, torch.Tensor) else max(1, min(threads, len(labels)))
            with ThreadPoolExecutor(workers) as pool:
                own = pool.map(lambda n, box: _surface(prediction, reference, n, box, *options), labels, boxes)
                scores = list(own)
    else:
        _require(prediction.ndim - 1, *options)
        parts = []
        for p, r in layer_pairs(prediction, reference):
            matrix, boxes = scan(p, r, (1,))
            parts.append(counted(matrix))
            if surface:
                scores.append(_surface(p, r, 1, boxes[0], *options))
        counts = stacked(parts)
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


def _require(axes: int, spacing: Sequence[float], tolerance_mm: float, definition: str, missing: str) -> None:
    if len(spacing) != axes or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing must be {axes} positive numbers (mm), got {tuple(spacing)}")
    require_tolerance(tolerance_mm)
    for name, value, kind in (("definition", definition, Definition), ("missing", missing, Missing)):
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")


def require_tolerance(tolerance_mm: float) -> None:
    """Refuse what is no tolerance of a normalised surface Dice (mm)."""
    if not tolerance_mm >= 0:  # NaN is refused, too
        raise ValueError(f"tolerance_mm must be 0 or more (mm), got {tolerance_mm}")
