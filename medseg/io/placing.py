"""Putting slices, masks and label maps onto a grid: by position, exactly, or not at all."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException, InvalidDicomError

from medseg.volume import DicomError, Geometry, GeometryError, LabelMap, Structure

__all__ = ["Canvas", "Plane", "SeriesIdentity", "clean_errors", "on_grid", "planes_of", "signed_permutation"]

Array = NDArray[Any]
TOLERANCE = 0.05  # voxels: how far rounding in a file may move a grid that is still the same grid

# What pydicom and the codecs raise on files that are not what they claim to be.
_BROKEN = (
    AttributeError, EOFError, IndexError, KeyError, MemoryError, NotImplementedError, OverflowError, RecursionError,
    RuntimeError, TypeError, ValueError, struct.error, zlib.error, BytesLengthException, InvalidDicomError,
)  # fmt: skip


@contextlib.contextmanager
def clean_errors(what: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever a broken file provokes in pydicom and the codecs into a DicomError that names the file."""
    try:
        yield
    except (DicomError, GeometryError):
        raise
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's own: no such file, no permission, no space
        # the text may quote the patient's data, so only its kind is told
        raise DicomError(
            f"{what} must be a valid DICOM object, got a broken one ({type(error).__name__}) in {path}"
        ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Label maps


def signed_permutation(source: Geometry, target: Geometry) -> tuple[Array, Array] | None:
    """How voxels of one grid fall on those of another, where they do so exactly (within 0.05 voxel).

    Returns
    -------
    (3, 3) array, (3,) array of int, or None
        ``target index = matrix @ source index + shift``, the matrix with one entry of +1 or -1 in each row and column;
        None when the grids do not coincide so.
    """
    mapping = np.linalg.inv(target.affine) @ source.affine
    matrix, shift = np.round(mapping[:3, :3]).astype(int), np.round(mapping[:3, 3])
    if not (np.abs(matrix).sum(axis=0) == 1).all() or not (np.abs(matrix).sum(axis=1) == 1).all():
        return None
    ends = np.array([(0, 0, 0), *np.diag(np.asarray(source.shape) - 1)])
    error = ends @ (mapping[:3, :3] - matrix).T + (mapping[:3, 3] - shift)
    return (matrix, shift.astype(int)) if np.abs(error).max() <= TOLERANCE else None


def on_grid(labels: LabelMap, target: Geometry, what: str) -> LabelMap:
    """The same label map on a grid whose voxels coincide with its own: flipped, permuted, cropped or padded.

    Raises
    ------
    GeometryError
        If the voxels do not coincide, or labelled ones lie outside the target grid.
    """
    found = signed_permutation(labels.geometry, target)
    if found is None:
        labels.geometry.require_close(target, what)
        raise GeometryError(f"{what} must lie on the same voxels; resample one onto the other (medseg.resample_to)")
    matrix, shift = found
    axes = [int(a) for a in np.argmax(np.abs(matrix), axis=1)]  # target axis t runs along source axis axes[t]
    signs = [int(matrix[t, a]) for t, a in enumerate(axes)]
    lead = labels.array.ndim - 3
    array = labels.array.transpose(*range(lead), *(lead + a for a in axes))
    array = array[(slice(None),) * lead + tuple(slice(None, None, s) for s in signs)]
    shape = array.shape[lead:]
    start = [int(o) - n + 1 if s < 0 else int(o) for o, n, s in zip(shift, shape, signs, strict=True)]
    if shape == target.shape and not any(start):
        return replace(labels, array=array, geometry=target)
    low = [max(s, 0) for s in start]
    high = [max(lo, min(s + n, size)) for lo, s, n, size in zip(low, start, shape, target.shape, strict=True)]
    inside = (slice(None),) * lead + tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
    if np.count_nonzero(array) != np.count_nonzero(array[inside]):
        raise GeometryError(f"{what} must agree on where voxels are labelled, got some outside the grid of the source")
    out = np.zeros((*array.shape[:lead], *target.shape), array.dtype)
    out[(slice(None),) * lead + tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = array[inside]
    return replace(labels, array=out, geometry=target)


@dataclass(frozen=True)
class SeriesIdentity:
    """What identifies the image series that a grid belongs to: its frame of reference and the UIDs of its images."""

    frame_of_reference: str = ""
    images: frozenset[str] = frozenset()

    @classmethod
    def of(cls, headers: Sequence[Dataset]) -> SeriesIdentity:
        """From the headers of the series."""
        frame = str(headers[0].get("FrameOfReferenceUID") or "") if headers else ""
        return cls(frame, frozenset(str(h.get("SOPInstanceUID", "")) for h in headers))


# ---------------------------------------------------------------------------------------------------------------------
# Slices


@dataclass(frozen=True)
class Plane:
    """Where a 2D frame lies in a grid: the slice across one axis, and how rows and columns run along the two others."""

    axes: tuple[int, int, int]  # grid axes of: the normal, the frame's rows (downwards), its columns (rightwards)
    signs: tuple[int, int]
    at: tuple[int, int, int]  # index of the frame's first pixel, in the order of ``axes``

    def view(self, array: Array, shape: tuple[int, int]) -> tuple[Array, tuple[slice, slice]] | None:
        """The part of an (I, J, K) array that a frame of this shape covers, and which part of the frame that is."""
        k, *starts = self.at
        if not 0 <= k < array.shape[self.axes[0]]:
            return None
        plane = array.transpose(self.axes)[k]
        there, mine = [], []
        for start, sign, count, size in zip(starts, self.signs, shape, plane.shape, strict=True):
            first = max(0, -start) if sign > 0 else max(0, start - size + 1)  # first pixel of the frame in the grid
            last = min(count, size - start) if sign > 0 else min(count, start + 1)
            if last <= first:
                return None
            a, b = start + sign * first, start + sign * (last - 1)
            there.append(slice(a, b + sign if b + sign >= 0 else None, sign))
            mine.append(slice(first, last))
        return plane[tuple(there)], (mine[0], mine[1])


def planes_of(
    grid: Geometry, corners: Array, down: Array, right: Array, shape: tuple[int, int], what: str
) -> list[Plane]:
    """Where frames fall on the slices of a grid.

    Parameters
    ----------
    grid : Geometry
        The grid.
    corners : (N, 3) array
        RAS+ position (mm) of the first pixel of each frame.
    down, right : (3,) array
        Steps (mm) from one row to the next, and from one column to the next.
    shape : (rows, columns)
        Size of the frames.

    Raises
    ------
    GeometryError
        If the pixels do not coincide with voxels of the grid within 0.05 voxel.
    """
    inverse = np.linalg.inv(grid.affine[:3, :3])
    steps = np.stack([inverse @ down, inverse @ right])
    unit = np.round(steps).astype(int)
    if not (np.abs(unit).sum(axis=1) == 1).all() or not (np.abs(unit).sum(axis=0) <= 1).all():
        raise GeometryError(f"{what} must lie on the voxels of the grid given, got frames turned or scaled against it")
    first = grid.to_index(corners)
    at = np.round(first)
    reach = np.asarray(shape) - 1
    ends = np.array([(0, 0), (reach[0], 0), (0, reach[1]), tuple(reach)]) @ (steps - unit)
    error = float(np.abs((first - at)[:, None] + ends[None]).max(initial=0))
    if error > TOLERANCE:
        raise GeometryError(
            f"{what} must lie on the voxels of the grid given, got frames up to {error:.2f} voxel beside them; "
            "read it on its own grid and resample"
        )
    rows, columns = (int(np.argmax(np.abs(u))) for u in unit)
    axes = (3 - rows - columns, rows, columns)
    signs = (int(unit[0, rows]), int(unit[1, columns]))
    return [Plane(axes, signs, (int(p[axes[0]]), int(p[axes[1]]), int(p[axes[2]]))) for p in at]


class Canvas:
    """Collects masks of structures on a grid: exclusive labels as long as no voxel is shared, bool layers from then on.

    Memory is that of one label map, or of one bool layer per structure (untouched layers cost nothing).
    """

    def __init__(self, grid: Geometry, structures: Sequence[Structure]) -> None:
        self.grid = grid
        self.structures = tuple(structures)
        self._row = {s.number: n for n, s in enumerate(self.structures)}
        largest = max(self._row, default=0)
        dtype = np.uint8 if largest < 256 else np.uint16 if largest < 65536 else np.int32
        # voxels of a slice lie together (k slowest): slices are painted one by one, and files store them so
        self._labels: Array = np.zeros(grid.shape[::-1], dtype).T
        self._layers: Array | None = None

    def paint(self, number: int, plane: Plane, mask: Array) -> int:
        """Set the voxels of a structure where a (rows, columns) bool mask is set; returns how many fell outside."""
        array = self._labels if self._layers is None else self._layers[self._row[number]]
        found = plane.view(array, mask.shape)
        if found is None:
            return int(np.count_nonzero(mask))
        view, mine = found
        inside = mask[mine]
        lost = 0 if inside.shape == mask.shape else int(np.count_nonzero(mask) - np.count_nonzero(inside))
        if self._layers is not None:
            view |= inside
        elif np.any(inside & (view != 0) & (view != number)):
            self._to_layers()
            self.paint(number, plane, mask)
        else:
            np.copyto(view, number, where=inside)
        return lost

    def _to_layers(self) -> None:
        count = len(self.structures)
        self._layers = np.zeros((count, *self.grid.shape[::-1]), bool).transpose(0, 3, 2, 1)
        for number, row in self._row.items():
            np.equal(self._labels, number, out=self._layers[row])

    def finish(self, meta: Mapping[str, Any]) -> LabelMap:
        """The label map."""
        return LabelMap(self._labels if self._layers is None else self._layers, self.grid, self.structures, meta)
