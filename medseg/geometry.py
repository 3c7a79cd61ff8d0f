"""Grids of voxels in patient space, and our errors.

Index axes are ``i, j, k``; world coordinates are RAS+ millimetres (x grows to the patient's Right, y to the Anterior, z to
the Superior); an index names the *centre* of a voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Array", "DicomError", "Geometry", "GeometryError", "frozen"]

Array = NDArray[Any]
Shape = tuple[int, int, int]
SKEW_TOLERANCE = 1e-4  # largest |cosine| between two axes of a grid that is still called straight


class GeometryError(ValueError):
    """Two grids do not fit, or a grid is not one that the operation can work on."""


class DicomError(ValueError):
    """A DICOM file or series is not what it must be."""


def frozen(array: Array) -> Array:
    """A view that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


# ---------------------------------------------------------------------------------------------------------------------
# Geometry


@dataclass(frozen=True, eq=False)
class Geometry:
    """A grid of voxels in patient space.

    Parameters
    ----------
    shape : (I, J, K)
        Number of voxels along each index axis; a 2D image has K = 1.
    affine : (4, 4) array of float64
        Maps the index of a voxel centre ``(i, j, k, 1)`` to RAS+ millimetres.

    Raises
    ------
    GeometryError
        If the shape is not three positive integers, or the affine is not finite, not invertible, or not affine.

    Examples
    --------
    >>> g = Geometry((4, 5, 6), np.diag([0.5, 0.5, 3.0, 1.0]))
    >>> g.spacing, g.orientation
    ((0.5, 0.5, 3.0), 'RAS')
    """

    shape: Shape
    affine: Array

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise GeometryError(f"shape of a grid must be three positive integers, got {tuple(self.shape)}")
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise GeometryError(f"affine of a grid must be a finite 4x4 matrix, got {affine.tolist()}")
        if not np.allclose(affine[3], (0, 0, 0, 1), atol=1e-9):
            raise GeometryError(f"last row of an affine must be 0 0 0 1, got {affine[3].tolist()}")
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        if min(lengths) == 0 or abs(np.linalg.det(affine[:3, :3] / np.where(lengths == 0, 1, lengths))) < 1e-6:
            raise GeometryError(f"affine of a grid must be invertible, got {affine.tolist()}")
        affine[3] = (0, 0, 0, 1)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "affine", frozen(affine))

    @classmethod
    def from_parts(
        cls, shape: Sequence[int], spacing: ArrayLike, origin: ArrayLike = (0, 0, 0), direction: ArrayLike | None = None
    ) -> Geometry:
        """Make a grid from spacing (mm), origin (RAS mm of voxel 0, 0, 0) and direction (3x3, unit columns)."""
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(np.eye(3) if direction is None else direction) * np.asarray(spacing, float)
        affine[:3, 3] = np.asarray(origin, float)
        return cls(tuple(shape), affine)  # type: ignore[arg-type]

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Distance (mm) between neighbouring voxel centres along i, j, k."""
        a, b, c = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return a, b, c

    @property
    def origin(self) -> tuple[float, float, float]:
        """RAS+ position (mm) of the centre of voxel (0, 0, 0)."""
        x, y, z = self.affine[:3, 3].tolist()
        return x, y, z

    @property
    def direction(self) -> Array:
        """(3, 3) array: column a is the unit vector, in RAS+, along which index axis a grows."""
        return np.asarray(self.affine[:3, :3] / np.asarray(self.spacing))

    @cached_property
    def orientation(self) -> str:
        """Three letters: where each index axis points, "RAS" for a grid aligned with the world axes."""
        direction = self.direction
        best = max(permutations(range(3)), key=lambda p: sum(abs(direction[p[a], a]) for a in range(3)))
        return "".join("RAS"[w] if direction[w, a] > 0 else "LPI"[w] for a, w in enumerate(best))

    @cached_property
    def is_skewed(self) -> bool:
        """Whether the axes are not at right angles (a gantry tilt, say)."""
        direction = self.direction
        return bool(np.abs(direction.T @ direction - np.eye(3)).max() > SKEW_TOLERANCE)

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel (mm3)."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def corners(self) -> Array:
        """(8, 3) RAS+ positions (mm) of the centres of the eight corner voxels, k fastest."""
        return self.to_world(list(product(*((0, n - 1) for n in self.shape))))

    def to_world(self, index: ArrayLike) -> Array:
        """RAS+ positions (mm) of indices; both (..., 3)."""
        return np.asarray(np.asarray(index, np.float64) @ self.affine[:3, :3].T + self.affine[:3, 3])

    def to_index(self, world: ArrayLike) -> Array:
        """Continuous indices of RAS+ positions (mm); both (..., 3)."""
        inverse = np.linalg.inv(self.affine)
        return np.asarray(np.asarray(world, np.float64) @ inverse[:3, :3].T + inverse[:3, 3])

    def corner_distance(self, other: Geometry) -> float:
        """Largest distance (mm) between corresponding corners; infinite when the shapes differ."""
        if self.shape != other.shape:
            return float("inf")
        return float(np.linalg.norm(self.corners - other.corners, axis=1).max())

    def is_close(self, other: Geometry, tolerance_mm: float = 0.01) -> bool:
        """Whether both grids have one shape and no corner lies more than ``tolerance_mm`` apart."""
        return self.corner_distance(other) <= tolerance_mm

    def require_close(self, other: Geometry, what: str, tolerance_mm: float = 0.01) -> None:
        """Raise a GeometryError that tells shapes and corner distance unless both grids are close.

        ``what`` names both in the message: "label map and image of case_07".
        """
        if self.shape != other.shape:
            raise GeometryError(
                f"{what} must lie on the same grid, got shapes {self.shape} and {other.shape}; "
                "resample one onto the other (medseg.resample_to)"
            )
        distance = self.corner_distance(other)
        if distance > tolerance_mm:
            raise GeometryError(
                f"{what} must lie on the same grid, got corners up to {distance:.3f} mm apart; "
                "resample one onto the other (medseg.resample_to)"
            )

    def require_straight(self, what: str) -> None:
        """Raise a GeometryError when the grid is skewed."""
        if self.is_skewed:
            raise GeometryError(f"{what} must have axes at right angles, got a skewed grid; use medseg.straighten")

    def cropped(self, start: Sequence[int], stop: Sequence[int]) -> Geometry:
        """The grid of voxels ``start <= index < stop``; may reach beyond this grid (then it is padded)."""
        shift = np.eye(4)
        shift[:3, 3] = start
        return Geometry(tuple(b - a for a, b in zip(start, stop, strict=True)), self.affine @ shift)  # type: ignore[arg-type]

    def reoriented(self, orientation: str) -> Geometry:
        """The same voxels with index axes in the order and direction of the letters ("RAS"); see ``orientation``.

        Raises
        ------
        GeometryError
            If the letters do not name each world axis once.
        """
        letters, have, pairs = orientation.upper(), self.orientation, ("RL", "AP", "SI")
        if len(letters) != 3 or sorted(n for c in letters for n in range(3) if c in pairs[n]) != [0, 1, 2]:
            raise GeometryError(f"orientation must be three letters of R/L, A/P and S/I, got {orientation!r}")
        axes = [next(a for a in range(3) if any({c, have[a]} <= set(pair) for pair in pairs)) for c in letters]
        turn = np.zeros((4, 4))
        turn[3, 3] = 1
        for new, old in enumerate(axes):
            flipped = letters[new] != have[old]
            turn[old, new], turn[old, 3] = (-1, self.shape[old] - 1) if flipped else (1, 0)
        return Geometry(tuple(self.shape[a] for a in axes), self.affine @ turn)  # type: ignore[arg-type]

    def with_spacing(self, spacing: Sequence[float]) -> Geometry:
        """A grid over exactly the same box (outer voxel faces stay in place) with about the spacing given (mm).

        The number of voxels is rounded, so the spacing that results is ``old spacing * old shape / new shape``.
        """
        if min(spacing) <= 0 or not np.isfinite(spacing).all():
            raise GeometryError(f"spacing must be positive, got {tuple(spacing)}")
        old, target = np.asarray(self.shape), np.asarray(spacing, float)
        shape = np.maximum(1, np.round(old * np.asarray(self.spacing) / target)).astype(int)
        return self.with_shape(tuple(shape.tolist()))

    def with_shape(self, shape: Sequence[int]) -> Geometry:
        """A grid of the shape given over exactly the same box (outer voxel faces stay in place)."""
        factor = np.asarray(self.shape) / np.asarray(shape)
        scale = np.diag([*factor, 1.0])
        scale[:3, 3] = (factor - 1) / 2
        return Geometry(tuple(shape), self.affine @ scale)  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Geometry):
            return NotImplemented
        return self.shape == other.shape and bool(np.array_equal(self.affine, other.affine))

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))

    def __repr__(self) -> str:
        shape, spacing = (" x ".join(f"{n:g}" for n in np.round(v, 4)) for v in (self.shape, self.spacing))
        skewed = ", skewed" if self.is_skewed else ""
        return f"Geometry({shape}, {spacing} mm, {self.orientation}{skewed})"
