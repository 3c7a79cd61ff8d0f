"""DICOM Segmentation objects (SEG): BINARY, FRACTIONAL and LABELMAP, read as label maps."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from skimage.color import lab2rgb

from medseg.io.dicom import lps_to_ras
from medseg.io.placing import Canvas, Plane, SeriesIdentity, clean_errors, planes_of
from medseg.io.seg_frames import FrameLayout, frames
from medseg.volume import Code, DicomError, Geometry, GeometryError, LabelMap, Structure, present_labels

__all__ = ["ORIGINAL_NUMBER", "SEG_UIDS", "read_seg"]

Array = NDArray[Any]
SEG_UIDS = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
BACKGROUND = "125040"  # DCM code: type of the segment that is no structure
ORIGINAL_NUMBER = "medseg label {}"  # segment description of our files, where segment numbers must be 1..N
SAME_PLACE = 1e-3  # mm: frames closer than this lie in one place
LONGEST_GAP = 4096  # slices that may be missing in all before the positions are called nonsense


@dataclass(frozen=True)
class _Frames:
    """Where the frames lie: RAS position of each first pixel, steps (mm) down the rows and right along the columns."""

    corners: Array  # (N, 3)
    down: Array
    right: Array
    between: tuple[float, ...]  # spacing between slices as stated, best guess first

    @property
    def normal(self) -> Array:
        across = np.cross(self.right, self.down)
        return np.asarray(across / np.linalg.norm(across))


def read_seg(
    path: str | os.PathLike[str],
    like: Geometry | None = None,
    *,
    series: SeriesIdentity | None = None,
    allow_mismatch: bool = False,
) -> LabelMap:
    """Read a DICOM Segmentation object.

    Parameters
    ----------
    path : path
        The SEG file.
    like : Geometry, optional
        The grid to put it on, normally that of the source series: frames are placed by position, slices without a frame
        are empty. Without it the frames' own grid is taken, slices between them filled in.
    series : SeriesIdentity, optional
        The series that ``like`` belongs to; a segmentation of another frame of reference is refused.
    allow_mismatch : bool
        Whether to take the positions at their word all the same.

    Returns
    -------
    LabelMap
        Exclusive labels; one bool layer per segment where segments share a voxel; one layer of float32 in 0..1 per
        segment for FRACTIONAL. Numbers are segment numbers (those of the label map, in files that medseg wrote).
        ``meta["referenced_series_uids"]`` names the source.

    Raises
    ------
    DicomError
        If the file is broken, no SEG, or of another frame of reference.
    GeometryError
        If its frames do not lie on the voxels of ``like``.

    Notes
    -----
    One frame is decoded at a time; memory is that of the label map (of all layers where segments overlap).
    """
    with clean_errors("DICOM-SEG", path):
        dataset = pydicom.dcmread(path, force=True)
        if str(dataset.get("SOPClassUID", "")) not in SEG_UIDS:
            raise DicomError(f"segmentation must be a DICOM-SEG object, got something else in {path}")
        _check_frame_of_reference(dataset, series, allow_mismatch, path)
        quirks: list[str] = []
        kind = str(dataset.get("SegmentationType", "BINARY"))
        structures = tuple(_structures(dataset, kind, quirks))
        layout = FrameLayout.of(dataset)
        placed = _positions(dataset, layout.count)
        what = f"frames of {os.path.basename(path)} and the grid"
        grid, planes = _place(placed, layout, like, what, dataset, quirks)
        if kind == "LABELMAP":
            array, structures = _read_label_frames(dataset, grid, planes, structures, quirks, what)
            labels = LabelMap(array, grid, structures)
        elif kind == "FRACTIONAL":
            array = _read_fractions(dataset, grid, planes, structures, what)
            labels = LabelMap(array, grid, structures)
        else:
            labels = _read_masks(dataset, grid, planes, structures, what)
        labels = replace(_own_numbers(labels, dataset), meta=_meta(dataset, path, kind, quirks))
    for quirk in quirks:
        warnings.warn(f"{os.path.basename(path)}: {quirk}", stacklevel=2)
    return labels


def _meta(dataset: Dataset, path: str | os.PathLike[str], kind: str, quirks: list[str]) -> dict[str, Any]:
    referenced = [str(s.get("SeriesInstanceUID", "")) for s in dataset.get("ReferencedSeriesSequence") or ()]
    return {
        "modality": "SEG",
        "path": str(path),
        "segmentation_type": kind,
        "series_uid": str(dataset.get("SeriesInstanceUID", "")),
        "frame_of_reference_uid": str(dataset.get("FrameOfReferenceUID", "")),
        "referenced_series_uids": tuple(dict.fromkeys(uid for uid in referenced if uid)),
        "description": str(dataset.get("SeriesDescription") or dataset.get("ContentDescription") or ""),
        "quirks": tuple(quirks),
    }


def _check_frame_of_reference(
    dataset: Dataset, series: SeriesIdentity | None, allow: bool, path: str | os.PathLike[str]
) -> None:
    frame = str(dataset.get("FrameOfReferenceUID") or "")
    if series is not None and series.frame_of_reference and frame and frame != series.frame_of_reference and not allow:
        raise DicomError(
            f"frame of reference of the segmentation must be that of the image series {series.frame_of_reference}, "
            f"got {frame} in {path}; give the series it was made on, or --allow-mismatch to trust the positions"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Segments


def _structures(dataset: Dataset, kind: str, quirks: list[str]) -> list[Structure]:
    """The segments that are structures; the background of a LABELMAP is none."""
    padding = dataset.get("PixelPaddingValue") if kind == "LABELMAP" else None
    found: dict[int, Structure] = {}
    for item in dataset.get("SegmentSequence") or ():
        number, type_ = int(item.SegmentNumber), _code(item, "SegmentedPropertyTypeCodeSequence")
        if kind == "LABELMAP" and (number == 0 or number == padding or (type_ and type_.value == BACKGROUND)):
            continue
        if number < 1 or number in found:
            raise DicomError(f"segment numbers must be distinct and at least 1, got {number} again or too low")
        name = str(item.get("SegmentLabel") or f"segment {number}").strip()
        structure = Structure(
            number,
            name,
            category=_code(item, "SegmentedPropertyCategoryCodeSequence"),
            type=type_,
            region=_code(item, "AnatomicRegionSequence"),
            tracking_uid=str(item.get("TrackingUID") or ""),
        )
        color = _rgb(item.get("RecommendedDisplayCIELabValue"))
        found[number] = replace(structure, color=color) if color else structure
    if not found:
        quirks.append("no segment is described")
    return [found[n] for n in sorted(found)]


def _code(item: Dataset, keyword: str) -> Code | None:
    sequence = item.get(keyword) or ()
    for code in sequence:
        value = code.get("CodeValue") or code.get("LongCodeValue") or ""
        return Code(str(value), str(code.get("CodingSchemeDesignator", "")), str(code.get("CodeMeaning", "")))
    return None


def _rgb(value: Any) -> tuple[int, int, int] | None:
    """sRGB of a CIELab colour as DICOM encodes it: L* 0..100 and a*, b* -128..127 over 0..65535 each."""
    if value is None or len(value) != 3:
        return None
    lightness, a, b = (float(v) / 65535 for v in value)
    rgb = np.round(lab2rgb(np.array([100 * lightness, 255 * a - 128, 255 * b - 128])) * 255).astype(int).tolist()
    return rgb[0], rgb[1], rgb[2]


def _own_numbers(labels: LabelMap, dataset: Dataset) -> LabelMap:
    """Give segments of a file that medseg wrote the numbers that they had in the label map."""
    if str(dataset.get("ManufacturerModelName", "")) != "medseg":
        return labels
    pattern = re.escape(ORIGINAL_NUMBER).replace(r"\{\}", r"(\d+)")
    known: dict[int, int] = {}
    for item in dataset.get("SegmentSequence") or ():
        match = re.fullmatch(pattern, str(item.get("SegmentDescription") or ""))
        if match:
            known[int(item.SegmentNumber)] = int(match[1])
    numbers = {s.number: known.get(s.number, s.number) for s in labels.structures}
    if all(a == b for a, b in numbers.items()) or len(set(numbers.values())) < len(numbers):
        return labels
    structures = tuple(replace(s, number=numbers[s.number]) for s in labels.structures)
    if labels.is_layered:
        return replace(labels, structures=structures)
    largest = max(numbers.values())
    table = np.arange(max(numbers) + 1, dtype=np.uint8 if largest < 256 else np.uint16 if largest < 65536 else np.int32)
    for old, new in numbers.items():
        table[old] = new
    return replace(labels, array=table[labels.array], structures=structures)


# ---------------------------------------------------------------------------------------------------------------------
# Geometry


def _group(dataset: Dataset, frame: Dataset, keyword: str) -> Dataset | None:
    """A functional group of a frame: its own, or the one that all frames share."""
    for item in frame.get(keyword) or ():
        return item
    for shared in dataset.get("SharedFunctionalGroupsSequence") or ():
        for item in shared.get(keyword) or ():
            return item
    return None


def _positions(dataset: Dataset, count: int) -> _Frames | None:
    """Where each frame lies; None for a segmentation of a plain 2D image, which has no position in the patient."""
    items = list(dataset.get("PerFrameFunctionalGroupsSequence") or ())
    items = items or [Dataset()] * (1 if count == 1 else 0)
    if len(items) < count:
        raise DicomError(f"functional groups must describe the {count} frames of the header, got {len(items)}")
    planes = [_group(dataset, item, "PlanePositionSequence") for item in items[:count]]
    corners = [p.get("ImagePositionPatient") if p is not None else None for p in planes]
    orientations = {_numbers(_group(dataset, i, "PlaneOrientationSequence"), "ImageOrientationPatient") for i in items}
    measures = _group(dataset, items[0], "PixelMeasuresSequence")
    if all(c is None for c in corners) and orientations == {()}:
        if any("PlanePositionSlideSequence" in item for item in items):
            raise DicomError("segmentation must be of a patient image, got one of a microscope slide")
        return None
    if any(c is None or len(c) != 3 for c in corners) or () in orientations:
        raise DicomError("every frame of a segmentation must state position and orientation, got some without")
    spacing = _numbers(measures, "PixelSpacing")
    if len(spacing) != 2 or min(spacing) <= 0 or not np.isfinite(spacing).all():
        raise DicomError(f"pixel spacing of a segmentation must be two positive lengths, got {spacing}")
    turns = np.array(sorted(orientations))
    if np.ptp(turns, axis=0).max() > 1e-3:
        raise DicomError(f"frames of a segmentation must have one orientation, got {len(turns)}")
    right, down = lps_to_ras(turns[0].reshape(2, 3) / np.linalg.norm(turns[0].reshape(2, 3), axis=1, keepdims=True))
    if abs(float(right @ down)) > 1e-3:
        raise DicomError(f"rows and columns of a frame must be at right angles, got {turns[0].tolist()}")
    between = [_numbers(measures, k) for k in ("SpacingBetweenSlices", "SliceThickness")]
    return _Frames(
        lps_to_ras(np.array(corners, np.float64)),
        down * spacing[0],
        right * spacing[1],
        tuple(abs(b[0]) for b in between if b and np.isfinite(b[0]) and b[0] != 0),
    )


def _numbers(group: Dataset | None, keyword: str) -> tuple[float, ...]:
    value = group.get(keyword) if group is not None else None
    if value is None or value == "":
        return ()
    return tuple(
        float(v) for v in (value if isinstance(value, list | tuple | pydicom.multival.MultiValue) else [value])
    )


def _place(
    placed: _Frames | None, layout: FrameLayout, like: Geometry | None, what: str, dataset: Dataset, quirks: list[str]
) -> tuple[Geometry, list[Plane]]:
    """The grid, and where on it each frame lies."""
    shape = (layout.rows, layout.columns)
    if placed is not None:
        grid = like if like is not None else _own_grid(placed, layout, quirks)
        planes = planes_of(grid, placed.corners, placed.down, placed.right, shape, what)
        first: dict[tuple[int, int, int], Array] = {}
        for plane, corner in zip(planes, placed.corners, strict=True):
            if np.abs(first.setdefault(plane.at, corner) - corner).max() > SAME_PLACE:
                raise GeometryError(f"{what} must have the same slices, got frames between those of the grid")
        return grid, planes
    segments = len(dataset.get("SegmentSequence") or ())
    if layout.count > max(segments, 1):
        raise DicomError(f"frames without a position must be one per segment, got {layout.count} for {segments}")
    quirks.append("frames have no position in the patient; read as a 2D image")
    flat = (layout.columns, layout.rows, 1)
    if like is not None and like.shape != flat:
        raise GeometryError(f"{what} must have the same size, got {flat} and {like.shape}")
    spacing = (1.0, 1.0)
    for shared in dataset.get("SharedFunctionalGroupsSequence") or ():
        stated = _numbers(_group(dataset, shared, "PixelMeasuresSequence"), "PixelSpacing")
        spacing = (stated[0], stated[1]) if len(stated) == 2 and min(stated) > 0 else spacing
    affine = lps_to_ras(np.diag([spacing[1], spacing[0], 1.0, 1.0]))
    grid = like if like is not None else Geometry(flat, affine)
    return grid, [Plane((2, 1, 0), (1, 1), (0, 0, 0))] * layout.count


def _own_grid(placed: _Frames, layout: FrameLayout, quirks: list[str]) -> Geometry:
    """The grid of the frames themselves, slices without a frame filled in; sheared where the positions are."""
    distance = placed.corners @ placed.normal
    order = np.argsort(distance, kind="stable")
    levels = distance[order][np.concatenate([[True], np.diff(distance[order]) > SAME_PLACE])]
    first, last = placed.corners[order[0]], placed.corners[order[-1]]
    step = _slice_step(levels, placed.between)
    count = round((levels[-1] - levels[0]) / step) + 1
    if count > LONGEST_GAP + 4 * len(levels):
        raise DicomError(f"positions of the frames must be those of one volume, got {count} slices for {len(levels)}")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 3] = placed.right, placed.down, first
    affine[:3, 2] = (last - first) / (count - 1) if count > 1 else placed.normal * step
    if count > len(levels):
        quirks.append(f"{count - len(levels)} of {count} slices have no frame; they are empty")
    return Geometry((layout.columns, layout.rows, count), affine)


def _slice_step(levels: Array, stated: tuple[float, ...]) -> float:
    """Spacing of the slices (mm): what is stated if the positions are multiples of it, else what divides the gaps."""
    if len(levels) == 1:
        return stated[0] if stated else 1.0
    gaps = np.diff(levels)
    for step in (*stated[:1], gaps.min(), *stated[1:], *(gaps.min() / n for n in (2, 3, 4))):
        index = (levels - levels[0]) / step
        count = round(float(index[-1]))
        if count >= len(levels) - 1 and np.abs(index * count / index[-1] - np.round(index)).max() < 0.02:
            return float((levels[-1] - levels[0]) / count)
    raise DicomError(
        f"slices of the frames must be evenly spaced, got gaps of {gaps.min():.3f} to {gaps.max():.3f} mm; "
        "give the grid to put them on (--like)"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Voxels


def _segment_numbers(dataset: Dataset, planes: list[Plane], structures: Sequence[Structure]) -> list[int]:
    """Which segment each frame belongs to, which must be described."""
    items = list(dataset.get("PerFrameFunctionalGroupsSequence") or ()) or [Dataset()]
    known = {s.number for s in structures}
    numbers: list[int] = []
    for item in items[: len(planes)]:
        group = _group(dataset, item, "SegmentIdentificationSequence")
        if group is None and len(known) != 1:
            raise DicomError("every frame of a segmentation must name its segment, got one that does not")
        numbers.append(int(group.ReferencedSegmentNumber) if group is not None else min(known))
    unknown = sorted(set(numbers) - known)
    if unknown:
        raise DicomError(f"frames must belong to segments that are described, got segment {unknown[0]}")
    return numbers


def _outside(what: str, lost: int) -> GeometryError:
    return GeometryError(f"{what} must overlap in full, got {lost} labelled voxels outside; read it on its own grid")


def _read_masks(
    dataset: Dataset, grid: Geometry, planes: list[Plane], structures: Sequence[Structure], what: str
) -> LabelMap:
    numbers = _segment_numbers(dataset, planes, structures)
    canvas = Canvas(grid, structures)
    lost = 0
    for frame, number, plane in zip(frames(dataset), numbers, planes, strict=True):
        lost += canvas.paint(number, plane, frame if frame.dtype == bool else frame != 0)
    if lost:
        raise _outside(what, lost)
    return canvas.finish({})


def _read_fractions(
    dataset: Dataset, grid: Geometry, planes: list[Plane], structures: Sequence[Structure], what: str
) -> Array:
    numbers = _segment_numbers(dataset, planes, structures)
    largest = float(dataset.get("MaximumFractionalValue") or 255)
    rows = {s.number: n for n, s in enumerate(structures)}
    layers = np.zeros((len(structures), *grid.shape[::-1]), np.float32).transpose(0, 3, 2, 1)
    for frame, number, plane in zip(frames(dataset), numbers, planes, strict=True):
        found = plane.view(layers[rows[number]], frame.shape)
        inside = found is not None and frame[found[1]].shape == frame.shape
        if not inside and (found is None or np.count_nonzero(frame) > np.count_nonzero(frame[found[1]])):
            raise _outside(what, int(np.count_nonzero(frame)))
        if found is not None:
            np.maximum(found[0], frame[found[1]] / np.float32(largest), out=found[0])
    return np.minimum(layers, 1, out=layers)


def _read_label_frames(
    dataset: Dataset, grid: Geometry, planes: list[Plane], structures: Sequence[Structure], quirks: list[str], what: str
) -> tuple[Array, tuple[Structure, ...]]:
    """The voxels of a LABELMAP, and its structures: those described, and those only found."""
    layout = FrameLayout.of(dataset)
    array = np.zeros(grid.shape[::-1], np.uint8 if layout.bits <= 8 else np.uint16).T
    known = {s.number for s in structures}
    background = [
        int(i.SegmentNumber) for i in dataset.get("SegmentSequence") or () if int(i.SegmentNumber) not in known
    ]
    padding = dataset.get("PixelPaddingValue")
    for frame, plane in zip(frames(dataset), planes, strict=True):
        values = frame.astype(array.dtype)
        for value in {*background, *([int(padding)] if padding is not None else [])} - {0}:
            values[values == value] = 0
        found = plane.view(array, values.shape)
        lost = int(np.count_nonzero(values)) - int(np.count_nonzero(values[found[1]]) if found is not None else 0)
        if lost:
            raise _outside(what, lost)
        if found is not None:
            view, mine = found
            inside = values[mine]
            if np.any((view != 0) & (inside != 0) & (view != inside)):
                raise DicomError("frames of a LABELMAP must not contradict each other, got two labels for one voxel")
            np.copyto(view, inside, where=inside != 0)
    extra = [n for n in present_labels(array) if n > 0 and n not in known]
    if extra:
        quirks.append(f"labels {extra[:10]} are not described; kept as 'label N'")
    return array, (*structures, *(Structure(n, f"label {n}") for n in extra))
