"""Writing DICOM Segmentation objects through highdicom, read back and compared before they get their name."""

from __future__ import annotations

import os
import struct
import warnings
from copy import copy
from dataclasses import replace
from typing import Any, Literal

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom.charset import convert_encodings
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import correct_ambiguous_vr, write_dataset
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes
from pydicom.tag import Tag
from pydicom.uid import ComputedRadiographyImageStorage, CTImageStorage, generate_uid
from skimage.color import rgb2lab

from medseg import __version__
from medseg.io.dicom_codes import described
from medseg.io.dicom_seg import ORIGINAL_NUMBER, read_seg
from medseg.io.files import atomic_path, require_free
from medseg.io.placing import clean_errors, on_grid
from medseg.io.source import image_headers
from medseg.volume import Code, DicomError, Geometry, LabelMap, Structure, present_labels

__all__ = ["SegKind", "write_seg"]

Array = NDArray[Any]
SegKind = Literal["binary", "labelmap", "fractional"]
_STAND_IN = "2.25.0."  # no real UID begins so
LEVELS = 255  # steps of a FRACTIONAL segmentation


def write_seg(
    labels: LabelMap,
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    series: str | None = None,
    kind: SegKind = "binary",
    force: bool = False,
) -> None:
    """Write a DICOM Segmentation object on the grid of its source series.

    Parameters
    ----------
    labels : LabelMap
        The structures; their grid may be a flipped, permuted, cropped or padded form of the source's.
    path : path
        The new file.
    source : path
        The image series: folder, file, zip or DICOMDIR.
    series : str, optional
        Which one, where the source holds several.
    kind : "binary", "labelmap" or "fractional"
        One bit a voxel and structure, overlaps allowed (every viewer reads it); one number a voxel (small and fast,
        exclusive structures, few viewers yet); or probabilities in steps of 1/255.
    force : bool
        Whether an existing file may be replaced.

    Raises
    ------
    ValueError
        If there is no structure, or structures overlap in a "labelmap".
    GeometryError
        If the voxels are not those of the source.
    DicomError
        If the source cannot be referred to, or the file does not read back equal.

    Notes
    -----
    Codes come from the structures, else from their names (``medseg.io.dicom_codes``). Empty slices are left out; a
    structure without voxels is described but has no frame. Structures are numbered 1..N as the standard wants; other
    numbers are kept in the segment description and restored on reading.
    """
    require_free(path, force)
    if kind not in ("binary", "labelmap", "fractional"):
        raise ValueError(f"kind of segmentation must be binary, labelmap or fractional, got {kind!r}")
    if not labels.structures:
        raise ValueError(f"label map must have at least one structure to become a DICOM-SEG, got none for {path}")
    geometry, headers = image_headers(source, series)
    labels = _suited(on_grid(labels, geometry, f"label map and source series {source}"), kind, path)
    with clean_errors("DICOM-SEG", path):
        segmentation = _make(labels, headers, kind)
    with atomic_path(path, force) as temporary:
        segmentation.save_as(temporary)
        _verify(labels, temporary, geometry, kind)


def _suited(labels: LabelMap, kind: SegKind, path: str | os.PathLike[str]) -> LabelMap:
    """The label map in the form that the kind stores: exclusive where possible, bool or float layers otherwise."""
    fractions = labels.is_layered and labels.array.dtype != bool
    if fractions and kind != "fractional":
        warnings.warn(
            f"{os.path.basename(path)}: probabilities were cut at 0.5; kind fractional keeps them", stacklevel=3
        )
        labels = replace(labels, array=labels.array >= 0.5)
    if not labels.is_layered or (fractions and kind == "fractional"):
        out = labels
    else:
        try:
            out = labels.exclusive()
        except ValueError as error:
            if kind == "labelmap":
                raise ValueError(
                    f"{error}; a segmentation of kind binary keeps overlapping structures apart"
                ) from error
            out = labels
    present = None if out.is_layered else set(present_labels(out.array))
    empty = [
        s.name
        for n, s in enumerate(out.structures)
        if not (out.array[n].any() if present is None else s.number in present)
    ]
    if empty:
        names = ", ".join(repr(n) for n in empty[:8]) + (", ..." if len(empty) > 8 else "")
        warnings.warn(f"{os.path.basename(path)}: structures without a voxel are only named ({names})", stacklevel=3)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The object


def _make(labels: LabelMap, headers: list[Dataset], kind: SegKind) -> hd.seg.Segmentation:
    numbers = [s.number for s in labels.structures]
    stored = numbers if kind == "labelmap" else list(range(1, len(numbers) + 1))
    pixels = _pixels(labels, stored)
    if not pixels.any():
        pixels = pixels[:1]  # nothing to store: one slice says so for all
    images = [_stand_in(header, k) for k, header in enumerate(headers)]
    first = headers[0]
    between = float(first.SpacingBetweenSlices) if "FrameOfReferenceUID" in first else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about styles of patient names and the like in the source
        segmentation = hd.seg.Segmentation(
            source_images=images[: len(pixels)],
            pixel_array=pixels,
            segmentation_type=kind.upper(),
            segment_descriptions=[_description(s, n) for s, n in zip(labels.structures, stored, strict=True)],
            series_instance_uid=generate_uid(),
            series_number=9001,
            sop_instance_uid=generate_uid(),
            instance_number=1,
            manufacturer="medseg",
            manufacturer_model_name="medseg",
            software_versions=__version__,
            device_serial_number="0",
            max_fractional_value=LEVELS,
            content_label="SEGMENTATION",
            content_description="Segmentation by medseg",
            pixel_measures=hd.PixelMeasuresSequence(
                [float(v) for v in first.PixelSpacing], float(first.SliceThickness), between
            ),
            further_source_images=images[len(pixels) :] or None,
            series_description="Segmentation",
            specific_character_set="ISO_IR 192",
        )
    _refer_to(segmentation, headers)
    return segmentation


def _pixels(labels: LabelMap, stored: list[int]) -> Array:
    """(K, rows, columns) stored numbers, or (K, rows, columns, S) layers."""
    if labels.is_layered:
        return labels.array.transpose(3, 2, 1, 0)
    numbers = [s.number for s in labels.structures]
    dtype = np.uint8 if max(stored) < 256 else np.uint16
    if max(stored) > 65535:
        raise DicomError(f"numbers of structures must be at most 65535 in a DICOM-SEG, got {max(stored)}")
    array = labels.array.T
    if stored == numbers and array.dtype == dtype:
        return array
    largest = max(max(numbers), int(array.max(initial=0)))
    if largest < 1 << 20:
        table = np.zeros(largest + 1, dtype)
        table[numbers] = stored
        return np.asarray(table[array])
    out = np.zeros(array.shape, dtype)
    for number, value in zip(numbers, stored, strict=True):
        out[array == number] = value
    return out


def _description(structure: Structure, stored: int) -> hd.seg.SegmentDescription:
    s, side = described(structure)
    if s.category is None or s.type is None:
        raise DicomError(f"structure must have a category and a type, got none for {s.name!r}")
    lab = rgb2lab(np.asarray(s.color, np.float64)[None] / 255)[0]
    description = hd.seg.SegmentDescription(
        segment_number=stored,
        segment_label=s.name[:64],
        segmented_property_category=_concept(s.category),
        segmented_property_type=_concept(s.type),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence(
            name="medseg", family=codes.DCM.ArtificialIntelligence, version=__version__
        ),
        tracking_uid=s.tracking_uid or generate_uid(),
        tracking_id=s.name[:64] or f"label {s.number}",
        anatomic_regions=[_concept(s.region)] if s.region else None,
        display_color=hd.color.CIELabColor(*(float(v) for v in np.clip(lab, (0, -128, -128), (100, 127, 127)))),
    )
    if s.number != stored:
        description.SegmentDescription = ORIGINAL_NUMBER.format(s.number)
    if side is not None:
        modifier = _concept(side)
        if s.region is not None:
            description.AnatomicRegionSequence[0].AnatomicRegionModifierSequence = [modifier]
        else:
            description.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
    return description


def _concept(code: Code) -> hd.sr.CodedConcept:
    return hd.sr.CodedConcept(code.value, code.scheme or "99MEDSEG", code.meaning or code.value)


def _stand_in(header: Dataset, k: int) -> Dataset:
    """A slice as an image of its own for highdicom, whatever file it is part of; named by its number."""
    out = Dataset()
    out.update({tag: copy(element) for tag, element in header.items()})  # setting a value would reach the original
    out.SOPInstanceUID = f"{_STAND_IN}{k + 1}"
    if "FrameOfReferenceUID" in header:
        out.SOPClassUID = CTImageStorage
    else:
        out.SOPClassUID = ComputedRadiographyImageStorage  # of those that need no place in the patient
    return out


def _refer_to(segmentation: Dataset, headers: list[Dataset]) -> None:
    """Put the real images, and the frames in them, where the references name the stand-ins; each image once."""
    for series in segmentation.get("ReferencedSeriesSequence") or ():
        once: dict[str, Dataset] = {}
        for image in series.ReferencedInstanceSequence:
            _name(image, headers)
            image.pop("ReferencedFrameNumber", None)  # of all frames of an object, the object is what is named
            once.setdefault(str(image.ReferencedSOPInstanceUID), image)
        series.ReferencedInstanceSequence = list(once.values())
    # The groups of thousands of frames are written as bytes: source and position, which the frames of a slice share,
    # are encoded once a slice (pydicom takes a millisecond a frame, half of the time of the whole object).
    slices: dict[int, tuple[bytes, bytes]] = {}
    items = []
    for group in segmentation.PerFrameFunctionalGroupsSequence:
        index = group.FrameContentSequence[0].DimensionIndexValues
        values = [int(v) for v in (index if isinstance(index, list | MultiValue) else [index])]
        if values[-1] not in slices:
            for derivation in group.get("DerivationImageSequence") or ():
                for image in derivation.SourceImageSequence:
                    _name(image, headers)
            slices[values[-1]] = _encoded(group, "DerivationImageSequence"), _encoded(group, "PlanePositionSequence")
        source, position = slices[values[-1]]
        content = struct.pack(f"<HH2sH{len(values)}I", 0x0020, 0x9157, b"UL", 4 * len(values), *values)
        item = source + _sequence(0x0020, 0x9111, _item(content)) + position
        for segment in group.get("SegmentIdentificationSequence") or ():
            number = struct.pack("<HH2sHH", 0x0062, 0x000B, b"US", 2, int(segment.ReferencedSegmentNumber))
            item += _sequence(0x0062, 0x000A, _item(number))
        items.append(_item(item))
    tag, value = Tag(0x5200, 0x9230), b"".join(items)  # PerFrameFunctionalGroupsSequence
    del segmentation[tag]
    correct_ambiguous_vr(segmentation, True)
    segmentation[tag] = RawDataElement(tag, "SQ", len(value), value, 0, False, True)
    # bytes are written as they are where the encoding is said to be the file's
    segmentation.set_original_encoding(False, True, convert_encodings(segmentation.SpecificCharacterSet))


def _encoded(group: Dataset, keyword: str) -> bytes:
    """One element of a dataset in explicit VR little endian; nothing where it is missing."""
    if keyword not in group:
        return b""
    alone, buffer = Dataset(), DicomBytesIO()
    alone[keyword] = group[keyword]
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, alone)
    return buffer.getvalue()


def _item(content: bytes) -> bytes:
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


def _sequence(group: int, element: int, items: bytes) -> bytes:
    return struct.pack("<HH2sHI", group, element, b"SQ", 0, len(items)) + items


def _name(image: Dataset, headers: list[Dataset]) -> None:
    uid = str(image.ReferencedSOPInstanceUID)
    if not uid.startswith(_STAND_IN):
        return  # named before: frames may share the item
    header = headers[int(uid.removeprefix(_STAND_IN)) - 1]
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    if "ReferencedFrameNumber" in header:
        image.ReferencedFrameNumber = header.ReferencedFrameNumber


# ---------------------------------------------------------------------------------------------------------------------
# The proof


def _verify(labels: LabelMap, path: os.PathLike[str], geometry: Geometry, kind: SegKind) -> None:
    """Read the file onto the source's grid, by world position, and compare every voxel."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_seg(path, geometry)
    if [(s.number, s.name[:64]) for s in labels.structures] != [(s.number, s.name) for s in found.structures]:
        raise DicomError("DICOM-SEG must read back with the same structures, got others; it was not written")
    if kind == "fractional":
        worst = 0.0
        for n, s in enumerate(labels.structures):
            wanted = labels.array[n] if labels.is_layered else labels.mask(s.number)
            worst = max(worst, float(np.abs(found.array[n] - wanted.astype(np.float32)).max(initial=0)))
        equal = worst <= 0.5 / LEVELS + 1e-6
    elif not labels.is_layered and not found.is_layered:
        equal = np.array_equal(labels.array, found.array)
    else:
        equal = all(np.array_equal(labels.mask(s.number), found.mask(s.number)) for s in labels.structures)
    if not equal:
        raise DicomError("DICOM-SEG must read back equal voxel for voxel, got differences; it was not written")
