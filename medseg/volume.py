"""The data model: images and label maps on grids in patient space.

Everything in medseg that has voxels is a :class:`Volume` (an image) or a :class:`LabelMap` (structures), and each lies
on a :class:`Geometry`. All three are frozen values: operations return new ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from medseg.geometry import Array, DicomError, Geometry, GeometryError, frozen
from medseg.preview import planes_png

__all__ = ["Code", "DicomError", "Geometry", "GeometryError", "LabelMap", "Structure", "Volume", "default_color"]


@dataclass(frozen=True, eq=False)
class Volume:
    """An image: voxels of one or more channels on a grid.

    Parameters
    ----------
    array : (C, I, J, K) or (I, J, K)
        Voxels in the units of the file (HU for CT); a missing channel axis is added.
    geometry : Geometry
        The grid.
    meta : mapping
        What the reader knows beyond that. Keys in use: "modality" ("CT", "MR", ...), "path", "series_uid",
        "frame_of_reference_uid", "description", "quirks" (tuple of sentences), and, for probabilities, "structures": of all
        channels, or where these are one more, of all but the first, which is the background.
    """

    array: Array
    geometry: Geometry
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        array = np.asarray(self.array)
        if array.ndim == 3:
            array = array[None]
        if array.ndim != 4 or array.shape[1:] != self.geometry.shape:
            raise GeometryError(f"voxels must have shape (C, *{self.geometry.shape}) as their grid, got {array.shape}")
        if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
            raise TypeError(f"voxels must be numbers, got {array.dtype}")
        object.__setattr__(self, "array", frozen(array))
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return int(self.array.shape[0])

    @property
    def modality(self) -> str:
        """DICOM modality ("CT", "MR", ...) or "" where the file does not say."""
        return str(self.meta.get("modality", ""))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.array, dtype=dtype, copy=True) if copy else np.asarray(self.array, dtype=dtype)

    def __repr__(self) -> str:
        return f"Volume({self.array.dtype}, C={self.channels}, {self.geometry!r})"

    def _repr_png_(self) -> bytes:
        return planes_png(np.asarray(self.array[0], np.float32), self.geometry.spacing, self.geometry.orientation)


# ---------------------------------------------------------------------------------------------------------------------
# Label maps


class Code(NamedTuple):
    """A coded concept: value, coding scheme ("SCT") and meaning."""

    value: str
    scheme: str
    meaning: str


_PALETTE = (
    (230, 75, 60), (60, 150, 230), (75, 190, 90), (245, 190, 50), (155, 90, 200), (50, 195, 190), (240, 130, 180),
    (150, 110, 70), (130, 200, 40), (90, 100, 220), (250, 140, 40), (120, 145, 160),
)  # fmt: skip


def default_color(number: int) -> tuple[int, int, int]:
    """A distinct colour (R, G, B in 0..255) for the structure of this number."""
    return _PALETTE[(number - 1) % len(_PALETTE)]


@dataclass(frozen=True)
class Structure:
    """One labelled structure: its number in the label map, name, colour and, where known, DICOM codes."""

    number: int
    name: str
    color: tuple[int, int, int] = (-1, -1, -1)
    category: Code | None = None
    type: Code | None = None
    region: Code | None = None
    tracking_uid: str = ""

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ValueError(f"number of a structure must be at least 1, got {self.number} for {self.name!r}")
        if self.color == (-1, -1, -1):
            object.__setattr__(self, "color", default_color(self.number))


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Structures on a grid.

    Parameters
    ----------
    array : (I, J, K) of integers, or (S, I, J, K) of bool or float
        Either exclusive labels (0 is background, the others are numbers of structures), or one layer per structure, in
        the order of ``structures``, where structures may overlap: bool masks, or probabilities in 0..1.
    geometry : Geometry
        The grid.
    structures : sequence of Structure
        Sorted by number for exclusive labels; made up from the values present ("label 3") when not given.
    meta : mapping
        As in :class:`Volume`.
    """

    array: Array
    geometry: Geometry
    structures: tuple[Structure, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        array, structures = np.asarray(self.array), tuple(self.structures)
        if array.shape[-3:] != self.geometry.shape or array.ndim not in (3, 4):
            raise GeometryError(f"labels must have the shape {self.geometry.shape} of their grid, got {array.shape}")
        if array.ndim == 3:
            if array.dtype == bool:
                array = array.view(np.uint8)
            if not np.issubdtype(array.dtype, np.integer):
                raise TypeError(f"labels must be integers, got {array.dtype}")
            structures = structures or tuple(Structure(n, f"label {n}") for n in present_labels(array) if n > 0)
            structures = tuple(sorted(structures, key=lambda s: s.number))
        else:
            structures = structures or tuple(Structure(n + 1, f"label {n + 1}") for n in range(len(array)))
            if array.dtype != bool and not np.issubdtype(array.dtype, np.floating):
                raise TypeError(f"layers must be bool or float, got {array.dtype}")
            if len(structures) != len(array):
                raise ValueError(f"layers must be one per structure, got {len(array)} for {len(structures)} structures")
        numbers = [s.number for s in structures]
        if len(set(numbers)) != len(numbers):
            raise ValueError(f"structures must have distinct numbers, got {numbers}")
        object.__setattr__(self, "array", frozen(array))
        object.__setattr__(self, "structures", structures)
        object.__setattr__(self, "meta", MappingProxyType(dict(self.meta)))

    @property
    def is_layered(self) -> bool:
        """Whether there is one layer per structure (which may overlap) instead of exclusive labels."""
        return self.array.ndim == 4

    @property
    def names(self) -> dict[int, str]:
        """Name of each structure by its number."""
        return {s.number: s.name for s in self.structures}

    def structure(self, which: int | str) -> Structure:
        """The structure of this number or name."""
        for s in self.structures:
            if which in (s.number, s.name):
                return s
        raise ValueError(f"structure must be one of {self.names}, got {which!r}")

    def mask(self, which: int | str) -> Array:
        """(I, J, K) bool mask of one structure, by number or name (a probability layer is cut at 0.5)."""
        s = self.structure(which)
        if not self.is_layered:
            return np.asarray(self.array == s.number)
        layer = self.array[self.structures.index(s)]
        return layer if layer.dtype == bool else np.asarray(layer >= 0.5)

    def exclusive(self) -> LabelMap:
        """The same structures as exclusive labels.

        Raises
        ------
        ValueError
            If two structures share a voxel.
        """
        if not self.is_layered:
            return self
        largest = max((s.number for s in self.structures), default=0)
        kind = np.uint8 if largest < 256 else np.uint16 if largest < 65536 else np.int32
        labels = np.zeros(self.geometry.shape, kind)
        for s in self.structures:
            mask = self.mask(s.number)
            taken = labels[mask]
            if taken.any():
                other = self.names[int(taken[taken > 0][0])]
                raise ValueError(
                    f"structures must not overlap in one label map, got {s.name!r} over {other!r}; "
                    "write one mask per structure instead (--split)"
                )
            labels[mask] = s.number
        return replace(self, array=labels)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.array, dtype=dtype, copy=True) if copy else np.asarray(self.array, dtype=dtype)

    def __repr__(self) -> str:
        kind = f"{len(self.structures)} layers" if self.is_layered else f"{len(self.structures)} structures"
        return f"LabelMap({self.array.dtype}, {kind}, {self.geometry!r})"

    def _repr_png_(self) -> bytes:
        if self.is_layered:
            labels = np.zeros(self.geometry.shape, np.int32)
            for s in self.structures:
                labels[self.mask(s.number)] = s.number
        else:
            labels = self.array
        colours = np.zeros((max([0, *self.names]) + 1, 3), np.uint8)
        for s in self.structures:
            colours[s.number] = s.color
        colours = colours[np.clip(labels, 0, len(colours) - 1)]
        return planes_png(colours, self.geometry.spacing, self.geometry.orientation)


def present_labels(array: Array) -> list[int]:
    """Sorted values of an integer array; marks them instead of sorting where the range allows, O(voxels)."""
    low, high = (int(array.min()), int(array.max())) if array.size else (0, -1)
    if low >= 0 and high < 1 << 20:
        seen = np.zeros(high + 1, bool)
        flat = array.ravel(order="K")
        for start in range(0, flat.size, 1 << 20):
            seen[flat[start : start + (1 << 20)]] = True
        return [int(v) for v in np.flatnonzero(seen)]
    return [int(v) for v in np.unique(array)]


def union(structures: Iterable[Structure]) -> tuple[Structure, ...]:
    """Structures by number, the first of each number kept."""
    found: dict[int, Structure] = {}
    for s in structures:
        found.setdefault(s.number, s)
    return tuple(found[n] for n in sorted(found))
