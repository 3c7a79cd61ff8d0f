"""What SEG and RTSTRUCT objects take over from the image series that they belong to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID, generate_uid

from medseg.io.dicom import source_series
from medseg.volume import DicomError, Geometry

__all__ = ["STUDY_KEYWORDS", "image_headers"]

# Patient, study and frame of reference: every object of a study states them alike. Empty where the source does not say.
STUDY_KEYWORDS = {
    "PatientName": "", "PatientID": "", "PatientBirthDate": "", "PatientSex": "", "StudyInstanceUID": "", "StudyID": "",
    "StudyDate": "", "StudyTime": "", "AccessionNumber": "", "ReferringPhysicianName": "",
}  # fmt: skip
_OPTIONAL = (
    "SpecificCharacterSet", "PatientAge", "PatientSize", "PatientWeight", "PatientIdentityRemoved",
    "DeidentificationMethod", "StudyDescription", "PositionReferenceIndicator", "LossyImageCompression",
    "LossyImageCompressionRatio", "LossyImageCompressionMethod", "SliceThickness",
)  # fmt: skip


def image_headers(path: str | os.PathLike[str], series: str | None = None) -> tuple[Geometry, list[Dataset]]:
    """The grid of a series, and for each slice k a small header in the form of a plain single-frame image.

    Frames of a multi-frame image become one header each, with its ReferencedFrameNumber. What anonymisers take away and
    every object must have is put back: empty patient and study attributes, and a frame of reference derived from the
    series' UID (the same for each object made from it). Slices without a position keep none.

    Raises
    ------
    DicomError
        If the series cannot be read or its images have no UIDs to refer to.
    """
    geometry, headers = source_series(path, series)
    if len(headers) != geometry.shape[2]:
        raise DicomError(
            f"source series must have one image for each of its {geometry.shape[2]} slices, got {len(headers)} in {path}"
        )
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"):
        if not headers[0].get(keyword):
            raise DicomError(
                f"{keyword} of the source series must be given, got none in {path}; it cannot be referred to"
            )
    return geometry, [_plain(header, headers[0], geometry) for header in headers]


def _plain(header: Dataset, first: Dataset, geometry: Geometry) -> Dataset:
    out = Dataset()
    for keyword, default in STUDY_KEYWORDS.items():
        setattr(out, keyword, deepcopy(first.get(keyword)) or default)
    for keyword in _OPTIONAL:
        if first.get(keyword) not in (None, ""):
            setattr(out, keyword, deepcopy(first.get(keyword)))
    for keyword in ("SOPClassUID", "SOPInstanceUID", "ReferencedFrameNumber"):
        if header.get(keyword):
            setattr(out, keyword, header.get(keyword))
    out.SeriesInstanceUID = first.SeriesInstanceUID
    out.StudyInstanceUID = out.StudyInstanceUID or generate_uid(entropy_srcs=[str(first.SeriesInstanceUID), "study"])
    out.Modality = str(first.get("Modality") or "OT")
    out.Columns, out.Rows = geometry.shape[:2]
    spacing = _numbers(header, "PixelSpacing", 2)
    out.PixelSpacing = list(spacing) if len(spacing) else [geometry.spacing[1], geometry.spacing[0]]
    position, orientation = _numbers(header, "ImagePositionPatient", 3), _numbers(header, "ImageOrientationPatient", 6)
    if len(position) and len(orientation):
        out.ImagePositionPatient, out.ImageOrientationPatient = list(position), list(orientation)
        out.FrameOfReferenceUID = frame_of_reference(first)
    return out


def frame_of_reference(header: Dataset) -> UID:
    """That of the series; where it has none, one made from the series' UID."""
    stated = header.get("FrameOfReferenceUID")
    return UID(str(stated)) if stated else generate_uid(entropy_srcs=[str(header.SeriesInstanceUID), "frame"])


def _numbers(header: Dataset, keyword: str, count: int) -> Sequence[float]:
    value = header.get(keyword)
    if value is None or len(value) != count:
        return ()
    numbers = np.asarray(value, np.float64)
    return tuple(numbers.tolist()) if np.isfinite(numbers).all() else ()
