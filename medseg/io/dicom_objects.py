"""From the header of a file to its frames, one way for each kind of image object.

Classic images, enhanced multi-frame objects (functional groups: per frame before shared before top level), dose grids,
reconstructed nuclear medicine, mosaics; frames of other multi-frame objects have no place in the patient.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from medseg.io.dicom_frames import (
    Frame,
    Vector,
    axes_of,
    classic_frame,
    component_of,
    echo_of,
    moment_of,
    pixel_spacing,
    position_of,
    positive,
    rescale_of,
)
from medseg.io.dicom_header import Header, Item
from medseg.io.dicom_mosaic import Tile, siemens_tiles, uih_tiles
from medseg.volume import DicomError

__all__ = ["frames_of", "object_kind_of"]

_SEG = {"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"}
_RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
_RTDOSE = "1.2.840.10008.5.1.4.1.1.481.2"
_NM = "1.2.840.10008.5.1.4.1.1.20"
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
MAX_FRAMES = 1 << 20


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
    return [classic_frame(header, shape)]


def _stream_bytes(header: Header) -> int:
    return header.inflated or header.file.size


def _subsampled(item: Item) -> bool:
    return item.text("PhotometricInterpretation") in ("YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420")


def _tiled(header: Header, tiles: tuple[int, int, list[Tile]]) -> list[Frame]:
    """The tiles of a mosaic as frames of their own."""
    high, wide, places = tiles
    base = classic_frame(header, (wide, high))
    if base.axes is None:
        raise DicomError(f"mosaic must state its orientation, got none in {header.file.name}")
    order: dict[str, Hashable] = {**base.order, "file": _file_key(header)}
    return [
        Frame(
            header, 0, base.shape, position_of(place), base.axes, base.spacing, base.thickness, base.slope,
            base.intercept, (row, column), base.split, order, base.instance,
        )
        for row, column, place in places
    ]  # fmt: skip


def _file_key(header: Header) -> tuple[int, str]:
    return header.item.integer("InstanceNumber"), str(header.file.path) + header.file.name


def _dose(header: Header, shape: tuple[int, int], count: int) -> list[Frame]:
    """The planes of a dose grid: offsets along the normal from the first, or absolute z for axial grids."""
    item, base = header.item, classic_frame(header, shape)
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
            base.header, k, base.shape, position_of(position), base.axes, base.spacing, base.thickness, base.slope,
            base.intercept, None, base.split, base.order, base.instance,
        )
        for k, position in enumerate(positions)
    ]  # fmt: skip


def _multiframe(header: Header, shape: tuple[int, int], count: int) -> list[Frame]:
    """Frames without functional groups: reconstructed NM has a place for each, others (cine, captures) have none."""
    item, base = header.item, classic_frame(header, shape)
    detector = item.items("DetectorInformationSequence")
    gap = item.number("SpacingBetweenSlices")
    if item.text("SOPClassUID") == _NM and "RECON TOMO" in item.texts("ImageType") and detector and gap:
        start, axes = (detector[0].numbers(k) for k in ("ImagePositionPatient", "ImageOrientationPatient"))
        base.axes = axes_of(axes)
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
    slope, intercept = rescale_of(values)
    return Frame(
        header,
        index,
        shape,
        position_of(find("PlanePositionSequence", "ImagePositionPatient").numbers("ImagePositionPatient")),
        axes_of(find("PlaneOrientationSequence", "ImageOrientationPatient").numbers("ImageOrientationPatient")),
        pixel_spacing(measures),
        positive(measures, "SliceThickness", "SpacingBetweenSlices"),
        slope,
        intercept,
        None,
        {
            "echo": round(echo, 3) if echo is not None else echo_of(find("", "EchoTime")),
            "component": component_of(types, part, -1),
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
            "content time": moment_of(top, ("ContentDate", "ContentTime")),
        },
        find("", "InstanceNumber").integer("InstanceNumber") * MAX_FRAMES + index,
    )
