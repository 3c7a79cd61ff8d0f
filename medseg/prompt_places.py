"""Boxes and points that users give, in voxels or in mm, checked against the image that they are on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medseg.volume import Geometry

__all__ = ["Units", "voxel_box", "voxel_points"]

Array = NDArray[Any]
Units = Literal["voxel", "mm"]
EDGE = 0.5  # voxels beyond the centre of the last one that still belong to the image
MOST = 0.9  # share of each side of an image above which a box of voxels is suspicious
FLAT = 1e-6


def voxel_box(geometry: Geometry, box: ArrayLike, units: Units = "voxel") -> Array:
    """A box in index coordinates, checked.

    Parameters
    ----------
    geometry : Geometry
        Grid of the image.
    box : (6,) x0, y0, z0, x1, y1, z1, or (4,) x0, y0, x1, y1 for an image of one slice
        With "voxel" two opposite corners i0, j0, k0, i1, j1, k1: centres of voxels, both inside the box. With "mm"
        RAS+ world coordinates. A box that is flat along one axis is on one slice.
    units : "voxel" or "mm"
        Of the numbers.

    Returns
    -------
    (6,) float64 array
        i0, j0, k0, i1, j1, k1. Of a box in mm on an oblique grid it is the smallest that holds its corners.

    Raises
    ------
    ValueError
        If the box is inverted, empty (flat along two axes), not finite or outside of the image. Where the numbers would
        fit in the other units, the message says so.
    """
    given = np.asarray(box, np.float64).ravel()
    if given.shape == (4,) and 1 in geometry.shape:
        flat = geometry.shape.index(1)
        zero = 0.0 if units == "voxel" else float(geometry.origin[_world_axis(geometry, flat)])
        at = flat if units == "voxel" else _world_axis(geometry, flat)
        given = np.concatenate([np.insert(given[:2], at, zero), np.insert(given[2:], at, zero)])
    said = ",".join(f"{v:g}" for v in given)
    if units not in ("voxel", "mm"):
        raise ValueError(f"units must be voxel or mm, got {units!r}")
    if given.shape != (6,) or not np.isfinite(given).all():
        raise ValueError(f"box must be six numbers x0,y0,z0,x1,y1,z1 (four on an image of one slice), got {said}")
    low, high = given[:3], given[3:]
    if (low > high).any():
        raise ValueError(f"box must have x0 <= x1, y0 <= y1 and z0 <= z1, got {said}; swap its corners")
    found = _box(geometry, given, units)
    if not _inside(geometry, found.reshape(2, 3)):
        raise ValueError(
            f"box must lie in the image ({_extent(geometry, units)}), got {said} {units}{_other(geometry, given, units)}"
        )
    flat_axes = int(np.count_nonzero(found[3:] - found[:3] < FLAT))
    if flat_axes > 1:
        raise ValueError(f"box must have an extent along two axes at least, got {said}, which is empty")
    sides = (found[3:] - found[:3] + 1) * np.asarray(geometry.spacing)
    wide = found[3:] - found[:3] + 1 > MOST * np.asarray(geometry.shape)
    likely_mm = units == "voxel" and wide[np.asarray(geometry.shape) > 1].all()
    if likely_mm and _inside(geometry, _box(geometry, given, "mm").reshape(2, 3)):
        size = " x ".join(f"{s:.0f}" for s in sides)
        warnings.warn(
            f"box {said} in voxels is {size} mm, nearly the whole image: if these are mm, say so (units mm)",
            stacklevel=3,
        )
    return found


def voxel_points(geometry: Geometry, points: ArrayLike, units: Units = "voxel", what: str = "point") -> Array:
    """Points (N, 3) in index coordinates, checked: i, j, k of voxels, or RAS+ mm.

    Raises
    ------
    ValueError
        If one is not finite or not in the image.
    """
    given = np.atleast_2d(np.asarray(points, np.float64))
    if given.ndim != 2 or given.shape[1] not in (2, 3) or not len(given) or not np.isfinite(given).all():
        raise ValueError(f"{what} must be three finite numbers x,y,z each, got an array of shape {given.shape}")
    if given.shape[1] == 2:
        if geometry.shape[2] != 1 or units != "voxel":
            raise ValueError(f"{what} must be three numbers x,y,z on a volume, got two")
        given = np.pad(given, ((0, 0), (0, 1)))
    found = given if units == "voxel" else geometry.to_index(given)
    if not _inside(geometry, found):
        first = next(g for g, f in zip(given, found, strict=True) if not _inside(geometry, f[None]))
        said = ",".join(f"{v:g}" for v in first)
        raise ValueError(
            f"{what} must lie in the image ({_extent(geometry, units)}), got {said} {units}"
            f"{_other(geometry, np.tile(first, 2), units)}"
        )
    return np.asarray(found)


def _box(geometry: Geometry, given: Array, units: Units) -> Array:
    """Index coordinates of the corners; flat in the world means flat on the grid."""
    if units == "voxel":
        return given
    ends = given.reshape(2, 3)
    choices = np.array(list(product((0, 1), repeat=3)))
    corners = geometry.to_index(ends[choices, np.arange(3)])
    low, high = corners.min(0), corners.max(0)
    for axis in range(3):
        world = _world_axis(geometry, axis)
        if ends[1, world] - ends[0, world] < FLAT:
            low[axis] = high[axis] = (low[axis] + high[axis]) / 2
    return np.concatenate([low, high])


def _world_axis(geometry: Geometry, axis: int) -> int:
    """The world axis (x, y, z) that is nearest to an index axis."""
    return next(w for w, pair in enumerate(("RL", "AP", "SI")) if geometry.orientation[axis] in pair)


def _inside(geometry: Geometry, index: Array) -> bool:
    return bool((index >= -EDGE).all() and (index <= np.asarray(geometry.shape) - 1 + EDGE).all())


def _extent(geometry: Geometry, units: Units) -> str:
    if units == "voxel":
        return "0 to " + ", ".join(str(n - 1) for n in geometry.shape) + " voxels"
    low, high = geometry.corners.min(0), geometry.corners.max(0)
    return ", ".join(f"{a} {x:.0f} to {y:.0f}" for a, x, y in zip("xyz", low, high, strict=True)) + " mm, RAS+"


def _other(geometry: Geometry, given: Sequence[float] | Array, units: Units) -> str:
    """What to do where the numbers make sense in the other units, or as the LPS coordinates that DICOM uses."""
    given = np.asarray(given, np.float64)
    other: Units = "mm" if units == "voxel" else "voxel"
    if _inside(geometry, _box(geometry, given, other).reshape(2, 3)):
        return f"; it would lie there in {other}: check the units"
    flipped = np.concatenate([*(np.sort(given.reshape(2, 3) * (-1, -1, 1), axis=0))])
    if units == "mm" and _inside(geometry, _box(geometry, flipped, "mm").reshape(2, 3)):
        return "; it would lie there in LPS coordinates, as DICOM has them: change the signs of x and y"
    return "; check it against medseg info"
