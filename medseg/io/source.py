"""What SEG and RTSTRUCT objects take over from the image series that they belong to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import UID, generate_uid

from medseg.io.dicom import lps_to_ras, source_frames
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
    series' UID (the same for each object made from it). Images without a place in the patient get none.

    Raises
    ------
    DicomError
        If the series cannot be read or its images have no UIDs to refer to.
    """
    geometry, frames = source_frames(path, series)
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"):
        if not frames[0][0].get(keyword):
            raise DicomError(
                f"{keyword} of the source must be given, as objects refer to it by that, got none in {path}"
            )
    return geometry, [_plain(header, number, k, geometry) for k, (header, number) in enumerate(frames)]


def _plain(header: Dataset, number: int, k: int, geometry: Geometry) -> Dataset:
    out = Dataset()
    for keyword, default in STUDY_KEYWORDS.items():
        setattr(out, keyword, deepcopy(header.get(keyword)) or default)
    for keyword in (*_OPTIONAL, "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"):
        if header.get(keyword) not in (None, ""):
            setattr(out, keyword, deepcopy(header.get(keyword)))
    if int(header.get("NumberOfFrames") or 1) > 1:
        out.ReferencedFrameNumber = number
    out.StudyInstanceUID = out.StudyInstanceUID or generate_uid(entropy_srcs=[str(header.SeriesInstanceUID), "study"])
    out.Modality = str(header.get("Modality") or "OT")
    out.Columns, out.Rows = geometry.shape[:2]
    out.PixelSpacing = [geometry.spacing[1], geometry.spacing[0]]
    position = _numbers(header, "ImagePositionPatient", 3)
    if len(position) or "PerFrameFunctionalGroupsSequence" in header or "SharedFunctionalGroupsSequence" in header:
        here = lps_to_ras(geometry.to_world((0, 0, k)))
        # an image's own numbers, where they are its slice's (a mosaic's are not), so that nothing is rounded twice
        own = len(position) and np.abs(np.asarray(position) - here).max() < 0.01 * min(geometry.spacing)
        spacing, turn = _numbers(header, "PixelSpacing", 2), _numbers(header, "ImageOrientationPatient", 6)
        out.ImagePositionPatient = list(position) if own else here.tolist()
        out.ImageOrientationPatient = (
            list(turn) if own and len(turn) else lps_to_ras(geometry.direction.T)[:2].ravel().tolist()
        )
        out.PixelSpacing = list(spacing) if own and len(spacing) else out.PixelSpacing
        out.FrameOfReferenceUID = frame_of_reference(header)
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
