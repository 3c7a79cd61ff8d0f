"""The grid on which a stack of slices lies, or the reason why it lies on none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.io.dicom_frames import Frame
from medseg.volume import DicomError, Geometry, GeometryError

__all__ = ["NotRegular", "grid_of", "lps_to_ras", "normal_of", "picture_grid", "positions_along", "regular_grid"]

Floats = NDArray[np.float64]
SNAP_MM = 0.01  # positions are written with few digits: what lies closer than this to a straight grid is on it
UNEVEN = 0.05  # slices may lie this part of their distance off the regular grid; more is refused
MAX_GAP = 4  # times the usual distance of slices, beyond which nothing is interpolated
NOTEWORTHY = 0.01  # and from this part on it is reported


class NotRegular(ValueError):
    """The slices of a stack lie on no regular grid."""

    on_a_line: bool = False  # unevenly spaced, but in line: they could be resampled


def lps_to_ras(values: ArrayLike) -> Floats:
    """Points or vectors (..., 3), or a 4x4 affine, in RAS+ instead of LPS+ millimetres; its own inverse."""
    values = np.array(values, np.float64)
    if values.shape[-2:] == (4, 4):
        values[..., :2, :] *= -1
    else:
        values[..., :2] *= -1
    return values


def normal_of(frame: Frame) -> Floats:
    """Unit normal (LPS) of a slice: direction of rows x direction of columns."""
    axes = np.asarray(frame.axes, np.float64)
    normal = np.cross(axes[:3], axes[3:])
    return np.asarray(normal / np.linalg.norm(normal))


def positions_along(frames: Sequence[Frame], normal: Floats) -> Floats:
    """Position (mm) of each slice along the normal."""
    return np.asarray(np.array([f.position for f in frames], np.float64) @ normal)


def picture_grid(frame: Frame) -> Geometry:
    """A grid for an image without a place in the patient: the pixel spacing, if known, at the origin."""
    di, dj = frame.spacing or (1.0, 1.0)
    return Geometry((*frame.shape, 1), lps_to_ras(np.diag([di, dj, frame.thickness or 1.0, 1.0])))


def grid_of(frames: Sequence[Frame]) -> tuple[Geometry, list[str]]:
    """The grid of slices sorted along their normal, kept sheared where the gantry was tilted, and what is odd about it.

    Raises
    ------
    NotRegular
        If the slices are unevenly spaced or do not lie on one line; the message tells the positions.
    """
    first, normal, quirks = frames[0], normal_of(frames[0]), []
    points = np.array([f.position for f in frames], np.float64)
    along = points @ normal
    if len(frames) == 1:
        step = normal * (first.thickness or 1.0)
        if first.thickness is None:
            quirks.append("single slice of unknown thickness: 1 mm taken")
    else:
        step = (points[-1] - points[0]) / (len(frames) - 1)
        off = np.linalg.norm(points - points[0] - np.arange(len(frames))[:, None] * step, axis=1)
        gap = float(step @ normal)
        if off.max() > max(SNAP_MM, UNEVEN * gap):
            problem = NotRegular(_uneven(along, off))
            problem.on_a_line = _beside(points) <= max(SNAP_MM, 0.1 * min(first.spacing or (1.0,)))
            raise problem
        if off.max() > max(SNAP_MM, NOTEWORTHY * gap):
            quirks.append(f"slices lie up to {off.max():.3f} mm off an even spacing of {gap:.4g} mm")
        sideways = step - gap * normal
        if np.linalg.norm(sideways) * (len(frames) - 1) <= SNAP_MM:
            step = gap * normal
    affine = np.eye(4)
    row, column = np.asarray(first.axes[:3]), np.asarray(first.axes[3:])  # type: ignore[index]
    di, dj = first.spacing or (1.0, 1.0)
    affine[:3, 0], affine[:3, 1], affine[:3, 2], affine[:3, 3] = row * di, column * dj, step, points[0]
    try:
        geometry = Geometry((*first.shape, len(frames)), lps_to_ras(affine))
    except GeometryError as error:
        raise NotRegular(str(error)) from None
    if geometry.is_skewed:
        angle = np.degrees(np.arccos(min(1.0, float(step @ normal) / float(np.linalg.norm(step)))))
        quirks.append(f"gantry tilt of {angle:.1f} degrees: the sheared grid is kept (medseg.straighten resamples it)")
    return geometry, quirks


def _beside(points: Floats) -> float:
    """Largest distance (mm) of a position from the line through the first and the last."""
    line = points[-1] - points[0]
    line = line / np.linalg.norm(line)
    offset = points - points[0]
    return float(np.linalg.norm(offset - np.outer(offset @ line, line), axis=1).max())


def regular_grid(frames: Sequence[Frame], array: NDArray[Any]) -> tuple[NDArray[Any], Geometry, str]:
    """Unevenly spaced slices of one line, interpolated linearly between neighbours onto the usual spacing.

    Parameters
    ----------
    frames : sequence of Frame
        The K slices, sorted along their normal.
    array : (C, I, J, K)
        Their voxels.

    Returns
    -------
    array : (C, I, J, L)
        Of the same type; integers are rounded.
    geometry : Geometry
        From the first to the last slice; sheared where the slices are.
    note : str
        What was done.

    Raises
    ------
    DicomError
        If a gap is more than :data:`MAX_GAP` times the usual one: nothing can be known of what lies there.
    """
    first, points = frames[0], np.array([f.position for f in frames], np.float64)
    along = points @ normal_of(first)
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if gaps.max() > MAX_GAP * usual:
        raise DicomError(
            f"gaps must be at most {MAX_GAP} times the usual {usual:.4g} mm to be filled, got {gaps.max():.4g} mm; "
            "read its slices separately (--slices)"
        )
    count = round(float(along[-1] - along[0]) / usual) + 1
    where = np.linspace(along[0], along[-1], count)
    below = np.clip(np.searchsorted(along, where, "right") - 1, 0, len(frames) - 2)
    weight = (where - along[below]) / gaps[below]
    made = np.empty((count, *array.shape[2:0:-1], array.shape[0]), array.dtype).transpose(3, 2, 1, 0)
    for k, (b, w) in enumerate(zip(below.tolist(), weight.tolist(), strict=True)):
        value = (1 - w) * array[..., b] + w * array[..., b + 1]
        made[..., k] = np.rint(value) if array.dtype.kind in "iu" else value
    affine = np.eye(4)
    di, dj = first.spacing or (1.0, 1.0)
    affine[:3, 0], affine[:3, 1] = np.asarray(first.axes[:3]) * di, np.asarray(first.axes[3:]) * dj  # type: ignore[index]
    affine[:3, 2], affine[:3, 3] = (points[-1] - points[0]) / (count - 1), points[0]
    geometry = Geometry((*first.shape, count), lps_to_ras(affine))
    note = f"{len(frames)} unevenly spaced slices resampled to {count}, {geometry.spacing[2]:.4g} mm apart"
    return made, geometry, note


def _uneven(along: Floats, off: Floats) -> str:
    gaps = np.diff(along)
    shown = ", ".join(f"{p:.2f}" for p in along[:24]) + (", ..." if len(along) > 24 else "")
    usual = float(np.median(gaps))
    odd = [k for k, g in enumerate(gaps) if abs(g - usual) > UNEVEN * usual]
    if not odd:
        return (
            f"slices must lie on one line, got some up to {off.max():.2f} mm beside it; positions along the normal "
            f"{shown} mm"
        )
    places = "; ".join(f"{gaps[k]:.4g} mm between {along[k]:.2f} and {along[k + 1]:.2f}" for k in odd[:5])
    missing = "slices missing? " if all(gaps[k] > usual for k in odd) else ""
    more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
    return (
        f"slices must be evenly spaced, got gaps of {usual:.4g} mm but {places}{more} ({missing}positions along the "
        f"normal {shown} mm)"
    )
