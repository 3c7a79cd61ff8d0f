"""Writing DICOM RT Structure Sets whose contours give the masks back, read back and compared before they get their name."""

from __future__ import annotations

import os
import struct
import warnings
from dataclasses import replace
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.charset import convert_encodings
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import UID, ImplicitVRLittleEndian, generate_uid

from medseg import __version__
from medseg.contours import ContourStyle, HoleStyle, stack_to_polygons
from medseg.io.dicom_codes import UNKNOWN, described
from medseg.io.files import atomic_path, require_free
from medseg.io.placing import clean_errors, on_grid
from medseg.io.rtstruct import RTSTRUCT_UID, read_rtstruct
from medseg.io.source import STUDY_KEYWORDS, image_headers
from medseg.volume import DicomError, Geometry, LabelMap, Structure

__all__ = ["write_rtstruct"]

Array = NDArray[Any]
STUDY_COMPONENT = "1.2.840.10008.3.1.2.3.1"  # the class that the standard wants for the referenced study
CHARACTERS = "ISO_IR 192"  # UTF-8
DECIMALS = 8  # of a coordinate in mm: with five digits before the point and a sign, a DS has at most 15 characters


def write_rtstruct(
    labels: LabelMap,
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    series: str | None = None,
    style: ContourStyle = "edge",
    holes: HoleStyle = "xor",
    force: bool = False,
) -> None:
    """Write the contours of a label map as an RT Structure Set of its source series.

    Parameters
    ----------
    labels : LabelMap
        The structures, which may overlap; their grid may be a flipped, permuted, cropped or padded form of the source's.
    path : path
        The new file.
    source : path
        The image series: folder, file, zip or DICOMDIR.
    series : str, optional
        Which one, where the source holds several.
    style : "edge" or "smooth"
        Contours along the voxel edges, which enclose exactly the voxels' area, or smooth ones for people to look at.
        Either gives the mask back by the rule that a voxel is in when its centre is (Dice 1).
    holes : "xor" or "keyhole"
        Holes as contours of their own, or joined to the outer contour by a channel of no width.
    force : bool
        Whether an existing file may be replaced.

    Raises
    ------
    GeometryError
        If the voxels are not those of the source.
    DicomError
        If the source cannot be referred to, or the file does not read back equal.

    Notes
    -----
    Each contour lies in the plane of one image, at that image's own position and orientation. The file is implicit VR
    little endian, as contours may be longer than the 64 KiB that a decimal string can have in explicit VR.
    """
    require_free(path, force)
    if not labels.structures:
        raise ValueError(f"label map must have at least one structure to become an RTSTRUCT, got none for {path}")
    geometry, headers = image_headers(source, series)
    if any("ImagePositionPatient" not in h for h in headers):
        raise DicomError(f"images of the source must have a position in the patient, got none in {source}")
    labels = on_grid(labels, geometry, f"label map and source series {source}")
    if labels.is_layered and labels.array.dtype != bool:
        warnings.warn(f"{os.path.basename(path)}: probabilities were cut at 0.5", stacklevel=2)
        labels = replace(labels, array=labels.array >= 0.5)
    with clean_errors("RTSTRUCT", path):
        dataset = _header(labels, headers)
        dataset.ROIContourSequence = [
            _roi_contours(s, _encode_contours(labels.mask(s.number), headers, style, holes)) for s in labels.structures
        ]
        dataset.set_original_encoding(True, True, convert_encodings(CHARACTERS))
    with atomic_path(path, force) as temporary:
        dataset.save_as(temporary, enforce_file_format=True)
        _verify(labels, temporary, geometry)


# ---------------------------------------------------------------------------------------------------------------------
# Modules of the object


def _header(labels: LabelMap, headers: list[Dataset]) -> FileDataset:
    """Everything but the contours."""
    first, now = headers[0], datetime.now()
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID(RTSTRUCT_UID), generate_uid()
    meta.TransferSyntaxUID = ImplicitVRLittleEndian
    out = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    out.SpecificCharacterSet = CHARACTERS
    out.SOPClassUID, out.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    for keyword in STUDY_KEYWORDS:
        setattr(out, keyword, first.get(keyword))
    out.Modality, out.SeriesInstanceUID, out.SeriesNumber, out.InstanceNumber = "RTSTRUCT", generate_uid(), 9002, 1
    out.SeriesDescription, out.OperatorsName = "Contours", ""
    out.Manufacturer = out.ManufacturerModelName = "medseg"
    out.SoftwareVersions = __version__
    out.FrameOfReferenceUID, out.PositionReferenceIndicator = first.FrameOfReferenceUID, ""
    out.StructureSetLabel = "medseg"
    out.StructureSetDate = out.SeriesDate = out.InstanceCreationDate = now.strftime("%Y%m%d")
    out.StructureSetTime = out.SeriesTime = out.InstanceCreationTime = now.strftime("%H%M%S")
    out.ApprovalStatus = "UNAPPROVED"
    out.ReferencedFrameOfReferenceSequence = [_referenced_frame(headers)]
    out.StructureSetROISequence = [
        _dataset(
            ROINumber=s.number,
            ReferencedFrameOfReferenceUID=first.FrameOfReferenceUID,
            ROIName=s.name[:64],
            ROIGenerationAlgorithm="AUTOMATIC",
        )
        for s in labels.structures
    ]
    out.RTROIObservationsSequence = [_observation(n, s) for n, s in enumerate(labels.structures, 1)]
    return out


def _dataset(**attributes: Any) -> Dataset:
    out = Dataset()
    for keyword, value in attributes.items():
        setattr(out, keyword, value)
    return out


def _referenced_frame(headers: list[Dataset]) -> Dataset:
    images: dict[str, Dataset] = {}
    for h in headers:
        image = _dataset(ReferencedSOPClassUID=h.SOPClassUID, ReferencedSOPInstanceUID=h.SOPInstanceUID)
        images.setdefault(str(h.SOPInstanceUID), image)
    series = _dataset(SeriesInstanceUID=headers[0].SeriesInstanceUID, ContourImageSequence=list(images.values()))
    study = _dataset(
        ReferencedSOPClassUID=STUDY_COMPONENT,
        ReferencedSOPInstanceUID=headers[0].StudyInstanceUID,
        RTReferencedSeriesSequence=[series],
    )
    return _dataset(FrameOfReferenceUID=headers[0].FrameOfReferenceUID, RTReferencedStudySequence=[study])


def _observation(number: int, structure: Structure) -> Dataset:
    s, _ = described(structure)
    out = _dataset(
        ObservationNumber=number,
        ReferencedROINumber=s.number,
        ROIObservationLabel=s.name[:16],
        RTROIInterpretedType="",
        ROIInterpreter="",
    )
    if s.type is not None and s.type != UNKNOWN:
        code = _dataset(CodeValue=s.type.value, CodingSchemeDesignator=s.type.scheme, CodeMeaning=s.type.meaning[:64])
        out.RTROIIdentificationCodeSequence = [code]
    return out


def _roi_contours(structure: Structure, contours: bytes) -> Dataset:
    out = _dataset(ROIDisplayColor=list(described(structure)[0].color), ReferencedROINumber=structure.number)
    if contours:
        tag = Tag(0x3006, 0x0040)  # ContourSequence
        out[tag] = RawDataElement(tag, "SQ", len(contours), contours, 0, True, True)
        out.set_original_encoding(True, True, convert_encodings(CHARACTERS))  # so that bytes are written as they are
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Contours, encoded directly: objects for each of thousands of contours would take most of the time


def _encode_contours(mask: Array, headers: list[Dataset], style: ContourStyle, holes: HoleStyle) -> bytes:
    """Items of the ContourSequence of one structure; empty where the mask is."""
    found = [(k, ring) for k, rings in stack_to_polygons(mask.T, style, holes).items() for ring in rings]
    if not found:
        return b""
    points = np.concatenate([_positions(headers[k], ring) for k, ring in found])
    text, ends = _decimal_strings(points)
    stops = ends[np.cumsum([3 * len(ring) for _, ring in found]) - 1].tolist()
    items, start = [], 0
    for number, ((k, ring), stop) in enumerate(zip(found, stops, strict=True), 1):
        image = _element(0x0008, 0x1150, str(headers[k].SOPClassUID).encode(), b"\0")
        image += _element(0x0008, 0x1155, str(headers[k].SOPInstanceUID).encode(), b"\0")
        if "ReferencedFrameNumber" in headers[k]:
            image += _element(0x0008, 0x1160, str(headers[k].ReferencedFrameNumber).encode())
        item = _element(0x3006, 0x0016, _element(0xFFFE, 0xE000, image))
        item += _element(0x3006, 0x0042, b"CLOSED_PLANAR")
        item += _element(0x3006, 0x0046, str(len(ring)).encode())
        item += _element(0x3006, 0x0048, str(number).encode())
        item += _element(0x3006, 0x0050, text[start : stop - 1])  # without the separator behind the last number
        items.append(_element(0xFFFE, 0xE000, item))
        start = stop
    return b"".join(items)


def _element(group: int, element: int, value: bytes, pad: bytes = b" ") -> bytes:
    """One data element or item in implicit VR little endian."""
    value += pad * (len(value) % 2)
    return struct.pack("<HHI", group, element, len(value)) + value


def _positions(header: Dataset, ring: Array) -> Array:
    """(n, 3) LPS positions (mm) of (row, column) vertices in the plane of one image."""
    right, down = np.reshape(np.asarray(header.ImageOrientationPatient, float), (2, 3))
    down_mm, right_mm = (float(v) for v in header.PixelSpacing)
    origin = np.asarray(header.ImagePositionPatient, float)
    return np.asarray(origin + ring[:, 1:] * (right * right_mm) + ring[:, :1] * (down * down_mm))


def _decimal_strings(values: Array) -> tuple[bytes, Array]:
    r"""Numbers as DICOM decimal strings, each followed by a backslash, and where each ends.

    Digits are made for all numbers at once: one column of a byte table each, of which leading and trailing zeros go.

    Raises
    ------
    DicomError
        If a position is 100 m or more from the origin.
    """
    flat = values.ravel()
    if not np.isfinite(flat).all() or np.abs(flat).max(initial=0) >= 99999:
        raise DicomError("positions of contours must be less than 100 m from the origin of the patient's coordinates")
    scaled = np.rint(np.abs(flat) * 10**DECIMALS).astype(np.int64)
    whole, part = (scaled // 10**DECIMALS).astype(np.int32), (scaled % 10**DECIMALS).astype(np.int32)
    table = np.empty((len(flat), DECIMALS + 8), np.uint8)
    keep = np.ones(table.shape, bool)
    table[:, 0], keep[:, 0] = ord("-"), (flat < 0) & (scaled > 0)
    for column in range(5, 0, -1):
        keep[:, column] = (whole > 0) | (column == 5)
        whole, digit = np.divmod(whole, 10)
        table[:, column] = digit + ord("0")
    table[:, 6], keep[:, 6] = ord("."), part > 0
    trailing = np.ones(len(flat), bool)
    for column in range(6 + DECIMALS, 6, -1):
        part, digit = np.divmod(part, 10)
        trailing &= digit == 0
        table[:, column], keep[:, column] = digit + ord("0"), ~trailing
    table[:, -1] = ord("\\")
    return table[keep].tobytes(), np.cumsum(keep.sum(axis=1))


# ---------------------------------------------------------------------------------------------------------------------
# The proof


def _verify(labels: LabelMap, path: os.PathLike[str], geometry: Geometry) -> None:
    """Read the file onto the source's grid and compare every voxel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_rtstruct(path, geometry)
    if [(s.number, s.name[:64].strip()) for s in labels.structures] != [(s.number, s.name) for s in found.structures]:
        raise DicomError("RTSTRUCT must read back with the same structures, got others; it was not written")
    if not labels.is_layered and not found.is_layered:
        equal = np.array_equal(labels.array, found.array)
    else:
        equal = all(np.array_equal(labels.mask(s.number), found.mask(s.number)) for s in labels.structures)
    if not equal:
        raise DicomError("RTSTRUCT must read back equal voxel for voxel, got differences; it was not written")
