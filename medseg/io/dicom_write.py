"""Writing an image as a DICOM series: one file a slice, anonymous, integers exact."""

from __future__ import annotations

import os
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid
from pydicom.valuerep import format_number_as_ds

from medseg.geometry import SKEW_TOLERANCE
from medseg.io.dicom import lps_to_ras
from medseg.io.files import atomic_folder
from medseg.volume import DicomError, Volume

__all__ = ["write_series"]

_CLASSES = {"CT": CTImageStorage, "MR": MRImageStorage}


def write_series(
    volume: Volume,
    folder: str | os.PathLike[str],
    *,
    force: bool = False,
    description: str = "",
    modality: str | None = None,
) -> None:
    """Write an image as a DICOM CT or MR series, one file a slice (``0001.dcm`` ...), of an anonymous patient.

    Whole numbers that span less than 65536 are stored exactly; others are rounded to 16 bits over their range, which a
    warning tells. Time and memory: one copy of the voxels.

    Parameters
    ----------
    volume : Volume
        One channel; a sheared grid is kept as it is (DICOM states each slice's position).
    folder : path
        The new folder.
    force : bool
        Whether an existing folder may be replaced.
    description : str
        SeriesDescription.
    modality : str, optional
        "CT" or "MR"; by default that of the volume, else "MR".

    Raises
    ------
    DicomError
        If the volume has several channels, values that are not finite, or rows not at right angles to columns.
    FileExistsError
        If the folder exists and ``force`` is not set.
    """
    if volume.channels != 1:
        raise DicomError(f"image must have one channel to become a DICOM series, got {volume.channels}")
    array = volume.array[0]
    if not np.isfinite(array).all():
        raise DicomError("image must have finite values to become a DICOM series, got NaN or infinity")
    kind = (modality or volume.modality or "MR").upper()
    if kind not in _CLASSES:
        kind = "MR"
    geometry = volume.geometry
    if abs(float(geometry.direction[:, 0] @ geometry.direction[:, 1])) > SKEW_TOLERANCE:
        raise DicomError("rows and columns must be at right angles in DICOM, got a grid sheared within its slices")
    stored, slope, intercept = _stored(array)
    affine = lps_to_ras(volume.geometry.affine)
    with atomic_folder(Path(folder), force) as target:
        common = _common(kind, description)
        for k in range(stored.shape[2]):
            header = FileDataset("", common, file_meta=FileMetaDataset(), preamble=b"\0" * 128)
            _slice(header, affine, volume.geometry.spacing, k, kind)
            header.RescaleSlope, header.RescaleIntercept = _ds(slope), _ds(intercept)
            header.Columns, header.Rows = stored.shape[0], stored.shape[1]
            header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
            header.PixelRepresentation = int(stored.dtype.kind == "i")
            header.PixelData = np.ascontiguousarray(stored[:, :, k].T).astype(stored.dtype.newbyteorder("<")).tobytes()
            header.save_as(target / f"{k + 1:04d}.dcm", enforce_file_format=True)


def _ds(value: float) -> str:
    """A number as a decimal string of at most 16 characters."""
    return format_number_as_ds(float(value) + 0.0)


def _stored(array: NDArray[Any]) -> tuple[NDArray[Any], float, float]:
    """16-bit integers, slope and intercept: exact for whole numbers that span less than 65536."""
    low, high = float(array.min()), float(array.max())
    whole = array.dtype.kind in "iub" or bool(np.array_equal(array, np.round(array)))
    if whole and low >= -32768 and high <= 32767:
        return array.astype(np.int16), 1.0, 0.0
    if whole and high - low <= 65535:
        return (array.astype(np.int64) - int(low)).astype(np.uint16), 1.0, low
    slope = float(_ds(max((high - low) / 65534, 1e-12)))
    intercept = float(_ds(low))
    warnings.warn(
        f"values are rounded to steps of {slope:.3g}: a DICOM series holds 16 bits a voxel", UserWarning, stacklevel=3
    )
    return (
        np.clip(np.round((array.astype(np.float64) - intercept) / slope), 0, 65535).astype(np.uint16),
        slope,
        intercept,
    )


def _common(kind: str, description: str) -> Dataset:
    now, header = datetime.now(), Dataset()
    header.SOPClassUID, header.Modality, header.SeriesDescription = _CLASSES[kind], kind, description[:64]
    header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    header.PatientName, header.PatientID, header.PatientBirthDate, header.PatientSex = "Anonymous^", "ANON", "", ""
    header.StudyDate, header.StudyTime = now.strftime("%Y%m%d"), now.strftime("%H%M%S")
    header.StudyID, header.AccessionNumber, header.ReferringPhysicianName = "1", "", ""
    header.SeriesNumber, header.AcquisitionNumber, header.Manufacturer = 1, 1, "medseg"
    header.PositionReferenceIndicator, header.PatientPosition, header.Laterality = "", "HFS", ""
    header.ImageType = ["DERIVED", "SECONDARY", "AXIAL"] if kind == "CT" else ["DERIVED", "SECONDARY", "OTHER"]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    if kind == "CT":
        header.KVP, header.RescaleType = None, "HU"
    else:
        header.ScanningSequence, header.SequenceVariant, header.ScanOptions = "RM", "NONE", ""
        header.MRAcquisitionType, header.EchoTime, header.EchoTrainLength, header.RepetitionTime = (
            "3D",
            None,
            None,
            None,
        )
    return header


def _slice(header: FileDataset, affine: NDArray[Any], spacing: tuple[float, float, float], k: int, kind: str) -> None:
    row, column = affine[:3, 0] / spacing[0], affine[:3, 1] / spacing[1]
    position = affine[:3, 3] + k * affine[:3, 2]
    gap = abs(float(np.dot(np.cross(row, column), affine[:3, 2])))
    header.SOPInstanceUID, header.InstanceNumber = generate_uid(), k + 1
    header.ImagePositionPatient = [_ds(float(v)) for v in position]
    header.ImageOrientationPatient = [_ds(float(v)) for v in (*row, *column)]
    header.PixelSpacing = [_ds(spacing[1]), _ds(spacing[0])]
    header.SliceThickness = _ds(gap)
    header.file_meta.MediaStorageSOPClassUID = _CLASSES[kind]
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
