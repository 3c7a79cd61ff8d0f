"""A frame: one 2D image with its place in the patient and what tells it from others; and its fields, checked.

A frame is one slice: an image of its own file, a frame of a multi-frame object, a plane of a dose grid, or a tile of a
mosaic. Positions are LPS mm here, as DICOM states them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from medseg.io.dicom_header import Header, Item
from medseg.volume import DicomError

__all__ = [
    "Frame",
    "Vector",
    "axes_of",
    "classic_frame",
    "component_of",
    "echo_of",
    "moment_of",
    "pixel_spacing",
    "position_of",
    "positive",
    "rescale_of",
]

Vector = tuple[float, ...]
_COMPONENTS = {
    "M": "magnitude", "MAGNITUDE": "magnitude", "P": "phase", "PHASE": "phase", "PHASE MAP": "phase",
    "R": "real", "REAL": "real", "I": "imaginary", "IMAGINARY": "imaginary",
}  # fmt: skip
_GE_COMPONENTS = ("magnitude", "phase", "real", "imaginary")
LARGEST = 1e25  # of slopes and intercepts: products with 32-bit values stay within float32


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


@lru_cache(4096)
def position_of(values: Vector) -> Vector | None:
    if len(values) != 3:
        return None
    if not all(map(math.isfinite, values)) or max(map(abs, values)) > 1e7:
        raise DicomError(f"ImagePositionPatient must be finite millimetres, got {values}")
    return values


@lru_cache(4096)
def axes_of(values: Vector) -> Vector | None:
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


def pixel_spacing(item: Item) -> Vector | None:
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        spacing = _spacing(item.numbers(keyword))
        if spacing is not None:
            return spacing
    return None


def positive(item: Item, *keywords: str) -> float | None:
    for keyword in keywords:
        value = item.number(keyword)
        if value is not None and 1e-6 < abs(value) < 1e6:
            return abs(value)
    return None


def rescale_of(item: Item) -> tuple[float, float]:
    slope, intercept = item.number("RescaleSlope", 1.0), item.number("RescaleIntercept", 0.0)
    if slope is None or intercept is None or not (abs(slope) < LARGEST and abs(intercept) < LARGEST):
        raise DicomError(f"rescale slope and intercept must be finite, got {slope} and {intercept}")
    return slope, intercept


@lru_cache(1024)
def component_of(types: tuple[str, ...], complex_component: str, ge_type: int) -> str:
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


def moment_of(item: Item, *keywords: tuple[str, str]) -> str:
    """The first date and time known, as text that sorts in time."""
    for date, time in keywords:
        if time in item:
            return (item.text(date) if date else "") + item.text(time)
    return ""


def classic_frame(header: Header, shape: tuple[int, int]) -> Frame:
    item = header.item
    types = item.texts("ImageType")
    component = component_of(
        types, item.text("ComplexImageComponent"), _ge_type(header) if item.text("Modality") == "MR" else -1
    )
    slope, intercept = rescale_of(item)
    if "DoseGridScaling" in item:
        slope, intercept = float(item.number("DoseGridScaling") or 1.0), 0.0
        if not abs(slope) < LARGEST:
            raise DicomError(f"DoseGridScaling must be finite, got {slope} in {header.file.name}")
    return Frame(
        header,
        0,
        shape,
        position_of(item.numbers("ImagePositionPatient")),
        axes_of(item.numbers("ImageOrientationPatient")),
        pixel_spacing(item),
        positive(item, "SliceThickness", "SpacingBetweenSlices"),
        slope,
        intercept,
        None,
        {"echo": echo_of(item), "component": component, "stack": item.text("StackID")},
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
            "acquisition time": moment_of(item, ("", "AcquisitionDateTime"), ("AcquisitionDate", "AcquisitionTime")),
            "content time": moment_of(item, ("ContentDate", "ContentTime")),
        },
        item.integer("InstanceNumber"),
    )


def echo_of(item: Item) -> float | None:
    time = item.number("EchoTime")
    return round(time, 3) if time is not None else item.number("EchoNumbers")
