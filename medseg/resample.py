"""Images and label maps on other grids: resample, reorient, crop, pad, straighten.

All return new values whose voxels lie exactly where their geometry says. Where every new voxel centre is an old one
(flips, permutations, crops), voxels are copied, never interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from medseg.sampling import Block, IndexMap, Interpolation, blocks, coefficients
from medseg.volume import Geometry, GeometryError, LabelMap, Volume, present_labels

__all__ = ["crop", "pad", "reorient", "resample_to", "straighten"]

Array = NDArray[Any]
Value = TypeVar("Value", Volume, LabelMap)

_TIE = 1e-6  # classes whose weights differ by less are equal, whatever the rounding
_BLOCK = {
    "nearest": 128,
    "linear": 64,
    "cubic": 64,
    "labels": 32,
}  # voxels a side: matrix products over a narrow band of weights
_GATHER_BLOCK = 48


def resample_to(
    value: Value,
    geometry: Geometry,
    interpolation: Interpolation | None = None,
    fill: float = 0.0,
    device: str | torch.device = "cpu",
) -> Value:
    """Put an image or label map on another grid.

    Parameters
    ----------
    value : Volume or LabelMap
        Voxels (C, I, J, K), labels (I, J, K) or layers (S, I, J, K).
    geometry : Geometry
        The grid wanted: any position, direction, spacing (mm) and shape.
    interpolation : "nearest", "linear" or "cubic", optional
        Default "linear". "cubic" (images only) is the interpolating B-spline of order 3 with mirror boundaries. For
        exclusive labels "linear" interpolates the indicator of each class and takes the largest (the smaller number
        where two are equal); boolean layers become those above one half.
    fill : float
        Value outside the source grid; the outer half voxel still counts as inside. Labels get 0 there.
    device : str
        Where the arithmetic of "linear" and "cubic" runs, block by block.

    Returns
    -------
    Volume or LabelMap
        float32 after "linear" and "cubic" of an image; else of the type of ``value``.

    Raises
    ------
    ValueError
        If the interpolation is unknown, or cubic for labels.

    Notes
    -----
    Nothing is smoothed before a reduction. Memory beyond input and output is a few megabytes, and one float32 copy of a
    channel for cubic on grids whose axes are not parallel. Time grows with the voxels of the target, and for labels with
    the number of classes that meet in a block.

    References
    ----------
    Unser, Aldroubi, Eden, "B-spline signal processing", 1993, doi:10.1109/78.193220.
    """
    mode = interpolation or "linear"
    if mode not in ("nearest", "linear", "cubic"):
        raise ValueError(f"interpolation must be nearest, linear or cubic, got {mode!r}")
    if isinstance(value, LabelMap):
        if mode == "cubic":
            raise ValueError("interpolation of labels must be nearest or linear, got 'cubic'")
        fill = 0.0
    grids = _Grids(value.geometry, geometry, value.array)
    is_image = isinstance(value, Volume)
    dtype = np.dtype(np.float32) if is_image and mode != "nearest" else value.array.dtype
    whole = grids.map.whole_shift()
    if whole:
        array = grids.copied(whole, dtype, fill)
    elif mode == "nearest":
        array = grids.nearest(fill)
    elif isinstance(value, LabelMap) and not value.is_layered:
        array = grids.classes(torch.device(device))
    else:
        array = grids.interpolated(mode, fill, torch.device(device))
    return replace(value, array=array, geometry=geometry)


class _Grids:
    """Source voxels and target grid, with the axes of both in the order of the source's memory."""

    def __init__(self, source: Geometry, target: Geometry, array: Array) -> None:
        matrix = np.linalg.inv(source.affine) @ target.affine
        channels = array if array.ndim == 4 else array[None]
        order = sorted(range(3), key=lambda a: -abs(channels.strides[a + 1]))
        linear = matrix[:3, :3][order]
        # The target axis that runs most along each source axis, in turn: then the matrix is diagonal where it can be.
        along = _matching(np.abs(linear * np.asarray(target.shape)))
        self.array, self.is_single = channels.transpose(0, *(a + 1 for a in order)), array.ndim == 3
        self.shape = tuple(target.shape[a] for a in along)
        self.back = np.argsort(along).tolist()
        self.map = IndexMap(linear[:, along], matrix[:3, 3][order], self.array.shape[1:], self.shape)

    def _finish(self, out: Array) -> Array:
        out = out.transpose(0, *(a + 1 for a in self.back))
        return out[0] if self.is_single else out

    def copied(self, whole: tuple[Array, Array], dtype: np.dtype[Any], fill: float) -> Array:
        """Every target centre is a source centre, by these signs and shifts."""
        out = np.full((len(self.array), *self.shape), fill, dtype)
        to: list[slice] = []
        take: list[slice] = []
        for sign, shift, n_in, n_out in zip(*whole, self.map.source, self.shape, strict=True):
            index = sign * np.arange(n_out) + shift
            valid = np.flatnonzero((index >= 0) & (index < n_in))
            if not valid.size:
                return self._finish(out)
            to.append(slice(int(valid[0]), int(valid[-1]) + 1))
            start, stop = int(index[valid[0]]), int(index[valid[-1]]) + int(sign)
            take.append(slice(start, None if stop < 0 else stop, int(sign)))
        out[(slice(None), *to)] = self.array[(slice(None), *take)]
        return self._finish(out)

    def nearest(self, fill: float) -> Array:
        out = np.empty((len(self.array), *self.shape), self.array.dtype)
        for rows in blocks(self.shape, _BLOCK["nearest"] if self.map.is_separable else _GATHER_BLOCK):
            index, inside = self.map.nearest(rows)
            part = np.stack([channel[tuple(index)] for channel in self.array])
            out[(slice(None), *rows)] = part if inside is None else np.where(inside, part, self.array.dtype.type(fill))
        return self._finish(out)

    def interpolated(self, mode: str, fill: float, device: torch.device) -> Array:
        """Channel by channel within each block; boolean layers are cut at one half."""
        is_mask = self.array.dtype == bool
        channels = list(self.array)
        if mode == "cubic" and not self.map.is_separable:
            channels = [coefficients(c, device) for c in channels]
        can_be_infinite = np.issubdtype(self.array.dtype, np.floating)
        out = np.empty((len(channels), *self.shape), bool if is_mask else np.float32)
        for rows in blocks(self.shape, _BLOCK[mode] if self.map.is_separable else _GATHER_BLOCK):
            block = self.map.block(rows, mode, device)
            if block is None:
                out[(slice(None), *rows)] = fill
                continue
            for c, channel in enumerate(channels):
                values = _tensor(channel[block.columns], device)
                todo = block
                if mode == "linear" and can_be_infinite and not bool(torch.isfinite(values.sum())):
                    todo = self.map.block(rows, mode, device, local=True) or block
                    values = _tensor(channel[todo.columns], device)
                result = todo.apply(values).cpu().numpy()
                if todo.inside is not None:
                    result = np.where(todo.inside, result, np.float32(fill))
                out[(c, *rows)] = result > 0.5 + _TIE if is_mask else result
        return self._finish(out)

    def classes(self, device: torch.device) -> Array:
        """The class of the largest interpolated indicator; a running maximum over the classes met in a block."""
        labels = self.array[0]
        out = np.zeros((1, *self.shape), labels.dtype)
        for rows in blocks(self.shape, _BLOCK["labels"] if self.map.is_separable else _GATHER_BLOCK):
            block = self.map.block(rows, "linear", device)
            if block is not None:
                winner = _winner(block, np.ascontiguousarray(labels[block.columns]), device)
                out[(0, *rows)] = winner if block.inside is None else np.where(block.inside, winner, 0)
        return self._finish(out)


def _winner(block: Block, labels: Array, device: torch.device) -> Array | int:
    """The label of the largest weight at each target voxel of a block."""
    if labels.min() == labels.max():
        return int(labels.flat[0])
    first, *others = present_labels(labels)

    def weight_of(number: int) -> torch.Tensor:
        return block.apply(torch.from_numpy((labels == number).astype(np.float32)).to(device))

    best = total = weight_of(others[0])
    winner = np.full(best.shape, others[0], labels.dtype)
    for number in others[1:]:
        weight = weight_of(number)
        better = weight > best + _TIE
        winner[better.cpu().numpy()] = number
        best, total = torch.where(better, weight, best), total + weight
    # The indicators add up to one: the first class has what the others leave.
    winner[(1 - total >= best - _TIE).cpu().numpy()] = first
    return winner


def _tensor(array: Array, device: torch.device) -> torch.Tensor:
    """A writable contiguous float32 copy on the device."""
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C")).to(device)


def _matching(weight: Array) -> list[int]:
    """A column for each row, the largest entries first."""
    weight, found = weight.copy(), [0, 0, 0]
    for _ in range(3):
        row, column = np.unravel_index(int(weight.argmax()), (3, 3))
        found[int(row)] = int(column)
        weight[row, :] = weight[:, column] = -1
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Grids made from the value's own


def reorient(value: Value, orientation: str = "RAS") -> Value:
    """Flip and permute the index axes so that they point as said, exactly.

    Parameters
    ----------
    value : Volume or LabelMap
        What to turn; oblique axes count as the world axis that they are nearest to.
    orientation : str
        Three letters of R/L, A/P, S/I: where i, j, k shall grow to.

    Raises
    ------
    ValueError
        If the letters do not name each world axis once.
    """
    return resample_exactly(value, value.geometry.reoriented(orientation))


def crop(value: Value, start: Sequence[int], stop: Sequence[int]) -> Value:
    """The voxels ``start <= index < stop`` (i, j, k), which must lie within the grid.

    Raises
    ------
    GeometryError
        If the box is empty or reaches beyond the grid; use :func:`pad` for that.
    """
    shape = value.geometry.shape
    if not all(0 <= a < b <= n for a, b, n in zip(start, stop, shape, strict=True)):
        raise GeometryError(f"box to crop must lie within {shape}, got {tuple(start)} to {tuple(stop)}")
    return resample_exactly(value, value.geometry.cropped(start, stop))


def pad(value: Value, before: Sequence[int], after: Sequence[int], fill: float = 0.0) -> Value:
    """Add voxels of the value ``fill`` (0 for labels) before and after the grid along i, j, k.

    Raises
    ------
    GeometryError
        If a number is negative; use :func:`crop` for that.
    """
    if min(*before, *after) < 0:
        raise GeometryError(f"numbers of voxels to pad must not be negative, got {tuple(before)} and {tuple(after)}")
    stop = [n + b for n, b in zip(value.geometry.shape, after, strict=True)]
    return resample_exactly(value, value.geometry.cropped([-n for n in before], stop), fill)


def resample_exactly(value: Value, geometry: Geometry, fill: float = 0.0) -> Value:
    """Copy voxels to a grid whose centres are all centres of the value's own grid, within it or beyond.

    Raises
    ------
    GeometryError
        If they are not.
    """
    grids = _Grids(value.geometry, geometry, value.array)
    whole = grids.map.whole_shift()
    if not whole:
        raise GeometryError(f"voxel centres of {geometry} must be those of {value.geometry}; use medseg.resample_to")
    array = grids.copied(whole, value.array.dtype, 0.0 if isinstance(value, LabelMap) else fill)
    return replace(value, array=array, geometry=geometry)


def straighten(value: Value, interpolation: Interpolation | None = None, fill: float | None = None) -> Value:
    """Resample a skewed grid (a gantry tilt) to the straight one that covers it; a straight one is returned as it is.

    Axis i keeps its direction; j is turned to a right angle with it, k to a right angle with both. The spacing is the
    distance between neighbouring rows and slices, so that tilted slices stay slices.

    Parameters
    ----------
    value : Volume or LabelMap
        What to straighten; told in ``meta["quirks"]``.
    interpolation : str, optional
        As in :func:`resample_to`.
    fill : float, optional
        Value of an image outside the skewed grid; default the smallest voxel, which is air in CT. Labels get 0.
    """
    old = value.geometry
    if not old.is_skewed:
        return value
    axes = old.affine[:3, :3]
    straight, upper = np.linalg.qr(axes)  # columns of ``straight``: Gram-Schmidt directions of i, j, k
    straight, upper = straight * np.sign(np.diag(upper)), upper * np.sign(np.diag(upper))[:, None]
    spacing = np.diag(upper)
    corners = np.round((old.corners @ straight) / spacing, 6)
    low, high = corners.min(0), corners.max(0)
    shape = np.ceil(high - low - 1e-3).astype(int) + 1
    geometry = Geometry.from_parts(shape.tolist(), spacing, straight @ (low * spacing), straight)
    if fill is None:
        fill = 0.0 if isinstance(value, LabelMap) else float(value.array.min())
    quirk = f"grid was skewed; resampled from {old.shape} to a straight grid of {geometry.shape}"
    meta = {**value.meta, "quirks": (*value.meta.get("quirks", ()), quirk)}
    return replace(resample_to(value, geometry, interpolation, fill), meta=meta)
