"""DICOM image series: what is in a folder, and its voxels with the geometry that the headers state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import ArrayLike, NDArray
from pydicom.errors import InvalidDicomError

from medseg.io.info import VolumeInfo
from medseg.volume import DicomError, Geometry, Volume

__all__ = ["list_series", "lps_to_ras", "object_kind", "read_all", "read_series", "source_series"]

PathLike = str | os.PathLike[str]
_KINDS = {
    "1.2.840.10008.5.1.4.1.1.66.4": "seg",
    "1.2.840.10008.5.1.4.1.1.66.7": "seg",
    "1.2.840.10008.5.1.4.1.1.481.3": "rtstruct",
}


def lps_to_ras(values: ArrayLike) -> NDArray[np.float64]:
    """The same points (..., 3), vectors (..., 3) or 4x4 affine in RAS+ instead of LPS+; its own inverse."""
    values = np.array(values, np.float64)
    if values.shape[-2:] == (4, 4):
        values[..., :2, :] *= -1
    else:
        values[..., :2] *= -1
    return values


def object_kind(path: PathLike) -> str:
    """What one DICOM file holds: "image", "seg", "rtstruct" or "other"."""
    try:
        header = pydicom.dcmread(path, specific_tags=["SOPClassUID", "Rows"], stop_before_pixels=True, force=True)
    except (InvalidDicomError, OSError, ValueError):
        return "other"
    return _KINDS.get(str(header.get("SOPClassUID", "")), "image" if "Rows" in header else "other")


def _series(path: PathLike, series: str | None) -> list[tuple[Path, pydicom.Dataset]]:
    files = sorted(p for p in Path(path).rglob("*") if p.is_file()) if Path(path).is_dir() else [Path(path)]
    found = [(p, pydicom.dcmread(p)) for p in files if object_kind(p) == "image"]
    if series is not None:
        found = [f for f in found if series in (str(f[1].SeriesInstanceUID), str(f[1].get("SeriesNumber")))]
    if len({f[1].SeriesInstanceUID for f in found}) != 1:
        raise DicomError(f"input must hold one series, got none or several in {path}; name one with --series")
    normal = np.cross(found[0][1].ImageOrientationPatient[:3], found[0][1].ImageOrientationPatient[3:])
    return sorted(found, key=lambda f: float(np.dot(normal, f[1].ImagePositionPatient)))


def _geometry(headers: list[pydicom.Dataset]) -> Geometry:
    first, last, affine = headers[0], headers[-1], np.eye(4)
    row, column = np.reshape(np.asarray(first.ImageOrientationPatient, float), (2, 3))
    affine[:3, 0], affine[:3, 1] = row * float(first.PixelSpacing[1]), column * float(first.PixelSpacing[0])
    affine[:3, 3] = first.ImagePositionPatient
    if len(headers) > 1:
        step = np.asarray(last.ImagePositionPatient, float) - np.asarray(first.ImagePositionPatient, float)
        affine[:3, 2] = step / (len(headers) - 1)
    else:
        affine[:3, 2] = np.cross(row, column) * float(first.get("SliceThickness", 1) or 1)
    return Geometry((int(first.Columns), int(first.Rows), len(headers)), lps_to_ras(affine))


def read_series(path: PathLike, series: str | None = None) -> Volume:
    """Read one series of a DICOM folder, file, zip or DICOMDIR as a volume."""
    found = _series(path, series)
    first = found[0][1]
    slices = [d.pixel_array * float(d.get("RescaleSlope", 1)) + float(d.get("RescaleIntercept", 0)) for _, d in found]
    array = np.stack([s.T for s in slices], -1)
    if np.array_equal(array, array.astype(np.int16)):
        array = array.astype(np.int16)
    meta: dict[str, Any] = {
        "modality": str(first.get("Modality", "")),
        "path": str(path),
        "series_uid": str(first.SeriesInstanceUID),
        "frame_of_reference_uid": str(first.get("FrameOfReferenceUID", "")),
        "description": str(first.get("SeriesDescription", "")),
        "quirks": (),
    }
    return Volume(array, _geometry([d for _, d in found]), meta)


def read_all(path: PathLike, series: str | None = None) -> Iterator[tuple[VolumeInfo, Volume | DicomError]]:
    """Read every volume of a DICOM folder, one at a time; a volume that is refused comes as its error."""
    volume = read_series(path, series)
    yield list_series(path)[0], volume


def list_series(path: PathLike) -> list[VolumeInfo]:
    """What volumes are in a DICOM folder, file, zip or DICOMDIR; reads headers only."""
    geometry, headers = source_series(path)
    first = headers[0]
    return [
        VolumeInfo(
            str(path),
            str(first.SeriesInstanceUID),
            str(first.get("SeriesDescription", "")),
            str(first.get("Modality", "")),
            geometry.shape,
            geometry.spacing,
            geometry.affine.tolist(),
        )
    ]


def source_series(path: PathLike, series: str | None = None) -> tuple[Geometry, list[pydicom.Dataset]]:
    """The grid of a series and the header (no pixel data) of each slice k, for writers that refer to it."""
    headers = [d for _, d in _series(path, series)]
    for header in headers:
        header.pop("PixelData", None)
    return _geometry(headers), headers
