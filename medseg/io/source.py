"""What SEG and RTSTRUCT objects take over from the image series that they belong to."""

from __future__ import annotations

import os
import re
from copy import deepcopy

import numpy as np
from numpy.typing import NDArray
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
    "LossyImageCompressionRatio", "LossyImageCompressionMethod",
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
    first = frames[0][0]
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"):
        if not first.get(keyword):
            raise DicomError(
                f"{keyword} of the source must be given, as objects refer to it by that, got none in {path}"
            )
    shared = _shared(first, geometry)
    return geometry, [_plain(shared, header, number, k, geometry) for k, (header, number) in enumerate(frames)]


def _shared(first: Dataset, geometry: Geometry) -> Dataset:
    """What all images of the series have in common, as the first states it."""
    out = Dataset()
    for keyword, default in STUDY_KEYWORDS.items():
        setattr(out, keyword, _valid(keyword, first.get(keyword), default))
    for keyword in (*_OPTIONAL, "SeriesInstanceUID"):
        odd = keyword == "PatientAge" and not re.fullmatch(r"\d{3}[DWMY]", str(first.get(keyword)))
        if first.get(keyword) not in (None, "") and not odd:
            setattr(out, keyword, deepcopy(first.get(keyword)))
    out.StudyInstanceUID = out.StudyInstanceUID or generate_uid(entropy_srcs=[str(first.SeriesInstanceUID), "study"])
    out.Modality = str(first.get("Modality") or "OT")
    out.Columns, out.Rows = geometry.shape[:2]
    out.PixelSpacing = [geometry.spacing[1], geometry.spacing[0]]
    across = np.cross(geometry.direction[:, 0], geometry.direction[:, 1])
    # slices lie nearer along their normal than along the step of a tilted gantry
    out.SpacingBetweenSlices = float(abs(geometry.affine[:3, 2] @ (across / np.linalg.norm(across))))
    thickness = first.get("SliceThickness")
    out.SliceThickness = float(thickness) if thickness else out.SpacingBetweenSlices
    grouped = "PerFrameFunctionalGroupsSequence" in first or "SharedFunctionalGroupsSequence" in first
    stated = _numbers(first, "ImagePositionPatient", 3)
    if len(stated) or grouped or (geometry.shape[2] > 1 and first.get("FrameOfReferenceUID")):
        out.FrameOfReferenceUID = frame_of_reference(first)
        turn = _numbers(first, "ImageOrientationPatient", 6)
        axes = lps_to_ras(geometry.direction.T[:2]).ravel()
        agrees = len(turn) and np.abs(turn - axes).max() < 1e-4
        out.ImageOrientationPatient = list(turn) if agrees else axes.tolist()
    return out


def _plain(shared: Dataset, header: Dataset, number: int, k: int, geometry: Geometry) -> Dataset:
    """The header of one slice."""
    out = Dataset()
    out.update(shared)
    out.SOPClassUID, out.SOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    if int(header.get("NumberOfFrames") or 1) > 1:
        out.ReferencedFrameNumber = number
    if "FrameOfReferenceUID" in out:
        here = lps_to_ras(geometry.to_world((0, 0, k)))
        stated = _numbers(header, "ImagePositionPatient", 3)
        # an image's own numbers, where they are its slice's (a mosaic's are not), so that nothing is rounded twice
        agrees = len(stated) and np.abs(stated - here).max() < 0.01 * min(geometry.spacing)
        out.ImagePositionPatient = list(stated) if agrees else here.tolist()
    return out


def _valid(keyword: str, value: object, default: str) -> object:
    """A value of the source, or what is left of it when it is not what the standard allows."""
    text = str(value or "")
    if keyword.endswith("Date"):
        return text if re.fullmatch(r"\d{8}", text) else default
    if keyword.endswith("Time"):
        return text if re.fullmatch(r"\d{2,6}(\.\d{1,6})?", text) else default
    if keyword in ("StudyID", "AccessionNumber"):
        return text[:16]
    return deepcopy(value) if text else default


def frame_of_reference(header: Dataset) -> UID:
    """That of the series; where it has none, one made from the series' UID."""
    stated = header.get("FrameOfReferenceUID")
    return UID(str(stated)) if stated else generate_uid(entropy_srcs=[str(header.SeriesInstanceUID), "frame"])


def _numbers(header: Dataset, keyword: str, count: int) -> NDArray[np.float64]:
    value = header.get(keyword)
    numbers = np.asarray(value if value is not None else (), np.float64)
    return numbers if numbers.shape == (count,) and np.isfinite(numbers).all() else np.zeros(0)
