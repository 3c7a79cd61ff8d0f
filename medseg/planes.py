"""Slices of a volume as a radiologist sees them, whatever the order of its axes, and the way back.

A slice is (H, W): rows run to the Posterior or Inferior, columns to the Left (axial, coronal) or Posterior (sagittal).
A scan that is stored in another order gives the same slices; oblique grids follow their nearest patient axes. Pixel
(row, column) = (y, x).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.volume import Geometry

__all__ = ["PLANES", "Planes"]

Array = NDArray[Any]
PLANES = {"sagittal": "RL", "coronal": "AP", "axial": "SI"}  # the patient axis that a plane is across
THICK = 1.5  # a step between slices wider than pixels by more than this says how a volume was scanned
ANISOTROPY = 1.02  # pixels whose sides differ by more are made square for the model


@dataclass(frozen=True)
class Planes:
    """The slices of a grid across one of its axes.

    Parameters
    ----------
    geometry : Geometry
        The grid.
    axis : 0, 1 or 2
        Index axis that the slices are across.
    """

    geometry: Geometry
    axis: int

    @classmethod
    def of(cls, geometry: Geometry, axis: int | str | None = None) -> Planes:
        """Planes across an index axis, or by name.

        By default those that were scanned: across the axis whose step is clearly (1.5 times) wider than the other two,
        else axial.

        Raises
        ------
        ValueError
            If there is no such axis.
        """
        across = [next(n for n, pair in enumerate(PLANES.values()) if c in pair) for c in geometry.orientation]
        if axis in PLANES:
            return cls(geometry, across.index(list(PLANES).index(str(axis))))
        if axis is None:
            flat = [a for a in range(3) if geometry.shape[a] == 1]
            widest = int(np.argmax(geometry.spacing))
            clear = geometry.spacing[widest] > THICK * sorted(geometry.spacing)[1]
            return cls(geometry, flat[-1] if flat else widest if clear else across.index(2))
        if axis not in (0, 1, 2):
            raise ValueError(f"axis must be 0, 1, 2, {', '.join(PLANES)}, got {axis!r}")
        return cls(geometry, int(axis))

    @cached_property
    def _turn(self) -> tuple[int, int, bool, bool]:
        """Index axes of rows and columns, and whether each is walked backwards."""
        a, b = (n for n in range(3) if n != self.axis)
        letters = self.geometry.orientation
        rank = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
        columns, rows = sorted((a, b), key=lambda n: rank[letters[n]])
        return rows, columns, letters[rows] in "AS", letters[columns] in "RA"

    @property
    def name(self) -> str:
        """ "axial", "coronal" or "sagittal": the nearest plane of the patient."""
        return next(name for name, pair in PLANES.items() if self.geometry.orientation[self.axis] in pair)

    @property
    def count(self) -> int:
        """Number of slices."""
        return self.geometry.shape[self.axis]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of a slice in pixels."""
        rows, columns, _, _ = self._turn
        return self.geometry.shape[rows], self.geometry.shape[columns]

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """Height and width of a pixel (mm)."""
        rows, columns, _, _ = self._turn
        return self.geometry.spacing[rows], self.geometry.spacing[columns]

    @property
    def step_mm(self) -> float:
        """Distance between slices (mm)."""
        return self.geometry.spacing[self.axis]

    def square_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of a piece of a slice with square pixels: the true proportions in mm, the longest side as it is."""
        height, width = (n * s for n, s in zip(size, self.pixel_mm, strict=True))
        if max(self.pixel_mm) <= ANISOTROPY * min(self.pixel_mm):
            return size
        pixel = max(height, width) / max(size)
        return max(1, round(height / pixel)), max(1, round(width / pixel))

    def take(self, array: Array, number: int) -> Array:
        """Slice ``number`` (..., H, W) of an array (..., I, J, K); a view."""
        rows, columns, up, back = self._turn
        where: tuple[Any, ...] = (..., number, *[slice(None)] * (2 - self.axis))
        plane = array[where]
        plane = plane if rows < columns else np.swapaxes(plane, -1, -2)
        return plane[..., :: -1 if up else 1, :: -1 if back else 1]

    def put(self, array: Array, number: int, plane: Array) -> None:
        """Write a slice (H, W) into an array (I, J, K)."""
        rows, columns, up, back = self._turn
        plane = plane[:: -1 if up else 1, :: -1 if back else 1]
        where: list[Any] = [slice(None)] * 3
        where[self.axis] = number
        array[tuple(where)] = plane if rows < columns else plane.T

    def pixel(self, index: Array) -> Array:
        """(..., 2) pixels x, y of indices (..., 3)."""
        rows, columns, up, back = self._turn
        height, width = self.size
        y, x = index[..., rows], index[..., columns]
        return np.stack([width - 1 - x if back else x, height - 1 - y if up else y], -1)

    def index(self, pixel: Array, number: float) -> Array:
        """(..., 3) indices of pixels x, y (..., 2) on slice ``number``."""
        rows, columns, up, back = self._turn
        height, width = self.size
        x, y = pixel[..., 0], pixel[..., 1]
        out = np.full((*pixel.shape[:-1], 3), number, np.result_type(pixel.dtype, type(number)))
        out[..., columns], out[..., rows] = width - 1 - x if back else x, height - 1 - y if up else y
        return out

    def rectangle(self, box: Array) -> Array:
        """x0, y0, x1, y1 on a slice of a box i0, j0, k0, i1, j1, k1; corners are centres of pixels, both inside."""
        ends = self.pixel(np.asarray(box, np.float64).reshape(2, 3))
        return np.concatenate([ends.min(0), ends.max(0)])
