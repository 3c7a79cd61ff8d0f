"""From headers to frames: each 2D image of a file with its place in the patient and what tells it from others.

A frame is one slice: an image of its own file (classic), a frame of an enhanced multi-frame object (functional groups,
per frame before shared before top level), a plane of a dose grid, or a tile of a mosaic. Positions are LPS mm here, as
DICOM states them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from medseg.io.dicom_header import Header, Item
from medseg.io.dicom_mosaic import siemens_tiles, uih_tiles
from medseg.volume import DicomError

__all__ = ["Frame", "frames_of", "object_kind_of"]

Vector = tuple[float, ...]
_SEG = {"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"}
_RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
_RTDOSE = "1.2.840.10008.5.1.4.1.1.481.2"
_NM = "1.2.840.10008.5.1.4.1.1.20"
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_COMPONENTS = {
    "M": "magnitude", "MAGNITUDE": "magnitude", "P": "phase", "PHASE": "phase", "PHASE MAP": "phase",
    "R": "real", "REAL": "real", "I": "imaginary", "IMAGINARY": "imaginary",
}  # fmt: skip
_GE_COMPONENTS = ("magnitude", "phase", "real", "imaginary")
MAX_FRAMES = 1 << 20
_LARGEST = 1e25  # of slopes and intercepts: products with 32-bit values stay within float32


@dataclass(slots=True, eq=False)
class Frame:
    """One 2D image.

    Parameters
    ----------
    header : Header
        Of the file that holds it.
    index : int
        Number of the frame in the file, from 0.
    shape : (I, J)
        Columns and rows.
    position : (3,) tuple or None
        LPS position (mm) of the centre of its first pixel; None without a place in the patient.
    axes : (6,) tuple or None
        LPS unit vectors along which the column and the row index grow.
    spacing : (2,) tuple or None
        Distance (mm) of neighbouring pixels along i and j.
    thickness : float or None
        What the header says of the distance of slices or their thickness (mm).
    slope, intercept : float
        Value = stored value * slope + intercept.
    tile : (row, column) or None
        Where it begins in the picture of a mosaic.
    split : dict
        Echo, component, stack: frames that differ in one belong to different volumes.
    order : dict
        What may tell images at one position apart (time, diffusion ...), most telling first.
    """

    header: Header
    index: int
    shape: tuple[int, int]
    position: Vector | None
    axes: Vector | None
    spacing: Vector | None
    thickness: float | None
    slope: float = 1.0
    intercept: float = 0.0
    tile: tuple[int, int] | None = None
    split: dict[str, Hashable] = field(default_factory=dict)
    order: dict[str, Hashable] = field(default_factory=dict)
    instance: int = 0

    @property
    def order_key(self) -> tuple[Hashable, ...]:
        """Everything that may tell two images at one position apart, but for the file they came from."""
        return tuple(v for k, v in self.order.items() if k != "file")

    @property
    def name(self) -> str:
        """For messages: file and frame."""
        return self.header.file.name if self.index == 0 else f"{self.header.file.name} frame {self.index + 1}"


def object_kind_of(header: Header) -> str:
    """What a file holds: "image", "seg", "rtstruct" or "other"."""
    sop_class = header.item.text("SOPClassUID")
    if sop_class in _SEG:
        return "seg"
    if sop_class == _RTSTRUCT:
        return "rtstruct"
    return "image" if header.pixels is not None and "Rows" in header.item else "other"


def frames_of(header: Header) -> list[Frame]:
    """The frames of one image file.

    Raises
    ------
    DicomError
        If the header states something impossible (no rows, NaN positions, more frames than functional groups).
    """
    item = header.item
    shape = item.integer("Columns"), item.integer("Rows")
    count = item.integer("NumberOfFrames", 1)
    if not (0 < shape[0] <= 65535 and 0 < shape[1] <= 65535 and 0 < count <= MAX_FRAMES):
        raise DicomError(
            f"image must have rows, columns and frames, got {shape[1]}, {shape[0]}, {count} in {header.file.name}"
        )
    if header.pixels is not None and header.pixels.length is not None:
        bits = count * shape[0] * shape[1] * max(1, item.integer("SamplesPerPixel", 1)) * item.integer("BitsAllocated")
        available = min(header.pixels.length, _stream_bytes(header) - header.pixels.offset)
        if (bits + 7) // 8 > available and not _subsampled(item):
            raise DicomError(
                f"pixel data must hold {(bits + 7) // 8} bytes, got {available} in {header.file.name} (truncated?)"
            )
    if header.pixels is not None and header.pixels.length is None:
        available = _stream_bytes(header) - header.pixels.offset
        if 8 * count > available:  # each frame is at least one fragment, which has a head of 8 bytes
            raise DicomError(f"{available} bytes of pixel data must hold the frames, got {count} in {header.file.name}")
    types = item.texts("ImageType")
    if item.text("SOPClassUID") == _WHOLE_SLIDE:
        raise DicomError(f"image must be radiological, got a whole slide in {header.file.name}")
    if "PerFrameFunctionalGroupsSequence" in item.sequences:
        return _enhanced(header, shape, count)
    if item.text("SOPClassUID") == _RTDOSE and count > 1:
        return _dose(header, shape, count)
    if "MOSAIC" in types:
        return _tiled(header, siemens_tiles(header, shape[1], shape[0]))
    if "VFRAME" in types:
        return _tiled(header, uih_tiles(header, shape[1], shape[0]))
    if count > 1:
        return _multiframe(header, shape, count)
    return [_classic(header, shape)]


def _stream_bytes(header: Header) -> int:
    return header.inflated or header.file.size


def _subsampled(item: Item) -> bool:
    return item.text("PhotometricInterpretation") in ("YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420")


@lru_cache(4096)
def _position(values: Vector) -> Vector | None:
    if len(values) != 3:
        return None
    if not all(map(math.isfinite, values)) or max(map(abs, values)) > 1e7:
        raise DicomError(f"ImagePositionPatient must be finite millimetres, got {values}")
    return values


@lru_cache(4096)
def _axes(values: Vector) -> Vector | None:
    if len(values) != 6 or not any(values):
        return None
    row, column = np.array(values[:3]), np.array(values[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if not all(abs(n - 1) < 0.01 for n in lengths) or not abs(row @ column) < 0.01:
        raise DicomError(f"ImageOrientationPatient must be two unit vectors at right angles, got {values}")
    if max(abs(n - 1) for n in lengths) > 1e-4:  # few digits: the direction is right, the length is not
        return (*(row / lengths[0]).tolist(), *(column / lengths[1]).tolist())
    return values


@lru_cache(4096)
def _spacing(values: Vector) -> Vector | None:
    """Distances along i and j from (row spacing, column spacing) as DICOM orders them."""
    if len(values) != 2:
        return None
    if not all(1e-6 < v < 1e5 for v in values):
        raise DicomError(f"PixelSpacing must be two positive numbers of millimetres, got {values}")
    return values[1], values[0]


def _pixel_spacing(item: Item) -> Vector | None:
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = _spacing(item.numbers(keyword))
        if spacing is not None:
            return spacing
    return None


def _positive(item: Item, *keywords: str) -> float | None:
    for keyword in keywords:
        value = item.number(keyword)
        if value is not None and 1e-6 < abs(value) < 1e6:
            return abs(value)
    return None


def _rescale(item: Item) -> tuple[float, float]:
    slope, intercept = item.number("RescaleSlope", 1.0), item.number("RescaleIntercept", 0.0)
    if slope is None or intercept is None or not (abs(slope) < _LARGEST and abs(intercept) < _LARGEST):
        raise DicomError(f"rescale slope and intercept must be finite, got {slope} and {intercept}")
    return slope, intercept


@lru_cache(1024)
def _component(types: tuple[str, ...], complex_component: str, ge_type: int) -> str:
    """ "magnitude", "phase", "real", "imaginary", or "" where nothing says so."""
    if complex_component.upper() in _COMPONENTS:
        return _COMPONENTS[complex_component.upper()]
    if 0 <= ge_type < 4:
        return _GE_COMPONENTS[ge_type]
    for value in types[2:]:
        word = value.upper()
        known = _COMPONENTS.get(word) or (_COMPONENTS.get(word[:1]) if word[1:2] == "_" else None)
        if known:
            return known
    return ""


def _ge_type(header: Header) -> int:
    element = header.find_private(0x0043, "GEMS_PARM_01", 0x2F)
    if element is None or len(element.value) < 2:
        return -1
    return int.from_bytes(element.value[:2], "little" if header.little else "big", signed=True)


def _when(item: Item, *keywords: tuple[str, str]) -> str:
    """The first date and time known, as text that sorts in time."""
    for date, time in keywords:
        if time in item:
            return (item.text(date) if date else "") + item.text(time)
    return ""


def _classic(header: Header, shape: tuple[int, int]) -> Frame:
    item = header.item
    types = item.texts("ImageType")
    component = _component(types, item.text("ComplexImageComponent"), _ge_type(header))
    slope, intercept = _rescale(item)
    if "DoseGridScaling" in item:
        slope, intercept = float(item.number("DoseGridScaling") or 1.0), 0.0
        if not abs(slope) < _LARGEST:
            raise DicomError(f"DoseGridScaling must be finite, got {slope} in {header.file.name}")
    return Frame(
        header,
        0,
        shape,
        _position(item.numbers("ImagePositionPatient")),
        _axes(item.numbers("ImageOrientationPatient")),
        _pixel_spacing(item),
        _positive(item, "SliceThickness", "SpacingBetweenSlices"),
        slope,
        intercept,
        None,
        {"echo": _echo(item), "component": component, "stack": item.text("StackID")},
        {
            "image type": types,
            "temporal position": item.number("TemporalPositionIdentifier"),
            "diffusion": (item.number("DiffusionBValue"), item.numbers("DiffusionGradientOrientation")),
            "trigger time": item.number("TriggerTime"),
            "inversion time": item.number("InversionTime"),
            "flip angle": item.number("FlipAngle"),
            "repetition time": item.number("RepetitionTime"),
            "kernel": item.text("ConvolutionKernel"),
            "acquisition number": item.number("AcquisitionNumber"),
            "acquisition time": _when(item, ("", "AcquisitionDateTime"), ("AcquisitionDate", "AcquisitionTime")),
            "content time": _when(item, ("ContentDate", "ContentTime")),
        },
        item.integer("InstanceNumber"),
    )


def _echo(item: Item) -> float | None:
    time = item.number("EchoTime")
    return round(time, 3) if time is not None else item.number("EchoNumbers")


def _tiled(header: Header, tiles: tuple[int, int, list[tuple[int, int, tuple[float, float, float]]]]) -> list[Frame]:
    """The tiles of a mosaic as frames of their own."""
    high, wide, places = tiles
    base = _classic(header, (wide, high))
    if base.axes is None:
        raise DicomError(f"mosaic must state its orientation, got none in {header.file.name}")
    order: dict[str, Hashable] = {**base.order, "file": _file_key(header)}
    return [
        Frame(
            header, 0, base.shape, _position(place), base.axes, base.spacing, base.thickness, base.slope,
            base.intercept, (row, column), base.split, order, base.instance,
        )
        for row, column, place in places
    ]  # fmt: skip


def _file_key(header: Header) -> tuple[int, str]:
    return header.item.integer("InstanceNumber"), str(header.file.path) + header.file.name


def _dose(header: Header, shape: tuple[int, int], count: int) -> list[Frame]:
    """The planes of a dose grid: offsets along the normal from the first, or absolute z for axial grids."""
    item, base = header.item, _classic(header, shape)
    offsets = item.numbers("GridFrameOffsetVector")
    if len(offsets) != count or base.position is None or base.axes is None:
        raise DicomError(
            f"GridFrameOffsetVector must hold one offset per frame and the grid a position, got {len(offsets)} offsets "
            f"for {count} frames in {header.file.name}"
        )
    start, axes = np.array(base.position), np.array(base.axes)
    normal = np.cross(axes[:3], axes[3:])
    steps = np.array(offsets)
    if offsets[0] != 0:  # PS3.3 C.8.8.3.2: then they are z coordinates of an axial grid
        if abs(normal[2]) < 1 - 1e-6 or abs(offsets[0] - start[2]) > 0.01:
            raise DicomError(
                f"GridFrameOffsetVector must begin with 0 or the grid's own z, got {offsets[0]} in {header.file.name}"
            )
        steps = (steps - start[2]) * normal[2]
    return _stacked(base, [tuple((start + s * normal).tolist()) for s in steps])


def _stacked(base: Frame, positions: list[Vector]) -> list[Frame]:
    return [
        Frame(
            base.header, k, base.shape, _position(position), base.axes, base.spacing, base.thickness, base.slope,
            base.intercept, None, base.split, base.order, base.instance,
        )
        for k, position in enumerate(positions)
    ]  # fmt: skip


def _multiframe(header: Header, shape: tuple[int, int], count: int) -> list[Frame]:
    """Frames without functional groups: reconstructed NM has a place for each, others (cine, captures) have none."""
    item, base = header.item, _classic(header, shape)
    detector = item.items("DetectorInformationSequence")
    gap = item.number("SpacingBetweenSlices")
    if item.text("SOPClassUID") == _NM and "RECON TOMO" in item.texts("ImageType") and detector and gap:
        start, axes = (detector[0].numbers(k) for k in ("ImagePositionPatient", "ImageOrientationPatient"))
        base.axes = _axes(axes)
        if base.axes is not None and len(start) == 3:
            # PS3.3 C.8.4.15: a positive spacing stacks behind the first slice, along row x column.
            normal = np.cross(base.axes[:3], base.axes[3:])
            return _stacked(base, [tuple((np.array(start) + k * gap * normal).tolist()) for k in range(count)])
    base.position = None
    return [
        Frame(
            header, k, shape, None, None, base.spacing, base.thickness, base.slope, base.intercept, None,
            base.split, base.order, base.instance,
        )
        for k in range(count)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Enhanced multi-frame


class _Groups:
    """Functional groups of one frame: its own, then the shared ones, then the top level (some writers put them there)."""

    def __init__(self, own: Item, shared: Item | None, top: Item) -> None:
        self.places = [own, shared] if shared is not None else [own]
        self.top = top

    def find(self, sequence: str, keyword: str) -> Item:
        for place in self.places:
            for name in (sequence, "UnassignedPerFrameConvertedAttributesSequence",
                         "UnassignedSharedConvertedAttributesSequence"):  # fmt: skip
                items = place.sequences.get(name)
                if items and keyword in items[0]:
                    return items[0]
        return self.top


def _enhanced(header: Header, shape: tuple[int, int], count: int) -> list[Frame]:
    item = header.item
    own, shared = item.items("PerFrameFunctionalGroupsSequence"), item.items("SharedFunctionalGroupsSequence")
    if len(own) != count:
        raise DicomError(
            f"multi-frame image must have one functional group per frame, got {len(own)} for {count} frames in "
            f"{header.file.name}"
        )
    key = _file_key(header)
    return [_enhanced_frame(header, k, shape, _Groups(o, shared[0] if shared else None, item), key)
            for k, o in enumerate(own)]  # fmt: skip


def _enhanced_frame(header: Header, index: int, shape: tuple[int, int], groups: _Groups, key: Hashable) -> Frame:
    top, find = header.item, groups.find
    measures = find("PixelMeasuresSequence", "PixelSpacing")
    values = find("PixelValueTransformationSequence", "RescaleSlope")
    kind = next(
        (f for s in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")
         if "FrameType" in (f := find(s, "FrameType"))), top,
    )  # fmt: skip
    types = kind.texts("FrameType") or top.texts("ImageType")
    part = find("MRImageFrameTypeSequence", "ComplexImageComponent").text("ComplexImageComponent")
    echo = find("MREchoSequence", "EffectiveEchoTime").number("EffectiveEchoTime")
    content = "FrameContentSequence"
    diffusion = find("MRDiffusionSequence", "DiffusionBValue")
    direction = diffusion.items("DiffusionGradientDirectionSequence")
    slope, intercept = _rescale(values)
    return Frame(
        header,
        index,
        shape,
        _position(find("PlanePositionSequence", "ImagePositionPatient").numbers("ImagePositionPatient")),
        _axes(find("PlaneOrientationSequence", "ImageOrientationPatient").numbers("ImageOrientationPatient")),
        _pixel_spacing(measures),
        _positive(measures, "SliceThickness", "SpacingBetweenSlices"),
        slope,
        intercept,
        None,
        {
            "echo": round(echo, 3) if echo is not None else _echo(find("", "EchoTime")),
            "component": _component(types, part, -1),
            "stack": find(content, "StackID").text("StackID"),
        },
        {
            "image type": types,
            "file": key,
            "temporal position": find(content, "TemporalPositionIndex").number("TemporalPositionIndex")
            or find("", "TemporalPositionIdentifier").number("TemporalPositionIdentifier"),
            "diffusion": (
                diffusion.number("DiffusionBValue"),
                direction[0].numbers("DiffusionGradientOrientation") if direction else (),
            ),
            "trigger time": find("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime").number(
                "NominalCardiacTriggerDelayTime"
            ),
            "inversion time": find("", "InversionTime").number("InversionTime"),
            "acquisition number": find(content, "FrameAcquisitionNumber").number("FrameAcquisitionNumber")
            or top.number("AcquisitionNumber"),
            "acquisition time": find(content, "FrameAcquisitionDateTime").text("FrameAcquisitionDateTime"),
            "content time": _when(top, ("ContentDate", "ContentTime")),
        },
        find("", "InstanceNumber").integer("InstanceNumber") * MAX_FRAMES + index,
    )
