"""What is known of an image without reading its voxels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from medseg.volume import Geometry

__all__ = ["VolumeInfo"]


def _json_value(value: Any) -> Any:
    """Tuples as lists and what JSON has no number for (NaN, infinity) as None."""
    if isinstance(value, list | tuple):
        return [_json_value(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True)
class VolumeInfo:
    """One image in a file or DICOM folder: where it is, its grid, and what is odd about it.

    Parameters
    ----------
    path : str
        File, or folder of the series.
    series : str
        SeriesInstanceUID; "" outside DICOM.
    description : str
        SeriesDescription, or what the file says of itself.
    modality : str
        DICOM modality ("CT", "MR", ...); "" where the file does not say.
    shape : (I, J, K), or (C, I, J, K) where there are several channels
        Number of voxels; () when the grid is unknown.
    spacing_mm : (3,) tuple of float
        Distance between voxel centres along i, j, k; NaN where unknown.
    affine : list of 4 lists of 4 float
        Index of a voxel centre to RAS+ millimetres; [] when unknown.
    quirks : tuple of str
        Sentences on what is unusual or had to be decided.
    name : str
        What ``--series`` takes and ``medseg convert`` calls the file; "" outside DICOM.
    """

    path: str
    series: str
    description: str
    modality: str
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    affine: list[list[float]]
    quirks: tuple[str, ...] = ()
    name: str = ""

    @property
    def geometry(self) -> Geometry:
        """The grid (without channels)."""
        return Geometry(self.shape[-3:], self.affine)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """The fields of the contract as JSON types; NaN becomes None."""
        return {
            "path": self.path,
            "series": self.series,
            "description": self.description,
            "modality": self.modality,
            "shape": _json_value(self.shape),
            "spacing_mm": _json_value(self.spacing_mm),
            "affine": _json_value(self.affine),
            "quirks": list(self.quirks),
        }
