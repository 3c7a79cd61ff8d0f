"""DICOM RT Structure Sets (RTSTRUCT): contours read as masks on a grid."""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset

from medseg.contours import fill_polygons
from medseg.io.dicom import lps_to_ras
from medseg.io.placing import Canvas, Plane, SeriesIdentity, clean_errors
from medseg.volume import Code, DicomError, Geometry, LabelMap, Structure, default_color

__all__ = ["RTSTRUCT_UID", "read_rtstruct"]

Array = NDArray[Any]
RTSTRUCT_UID = "1.2.840.10008.5.1.4.1.1.481.3"
AREAS = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR", "INTERPOLATED_PLANAR")  # contour types that bound an area
CONTOUR_DATA, ROI_CONTOURS, CONTOURS = 0x30060050, 0x30060039, 0x30060040
FLAT = 0.5  # slices: how far the vertices of one contour may spread across the slice that holds it
SAME_PLANE = 0.02  # slices: contours closer than this lie in one plane


@dataclass
class _Roi:
    """One region of interest as the file has it."""

    structure: Structure
    frame: str  # frame of reference UID, "" where the file does not say
    contours: list[Array] = field(default_factory=list)  # (n, 3) vertices, RAS mm
    skipped: Counter[str] = field(default_factory=Counter)  # why contours were left out


def read_rtstruct(
    path: str | os.PathLike[str],
    like: Geometry | None = None,
    *,
    series: SeriesIdentity | None = None,
    allow_mismatch: bool = False,
) -> LabelMap:
    """Read the contours of an RT Structure Set as masks on a grid.

    A voxel belongs to a structure when its centre is inside the contour; contours in one plane combine by XOR. Contours
    are placed by their position alone, never by the UIDs of the images they refer to. What cannot be a mask (points,
    open lines, contours beside the grid) is left out, and said in a warning and in ``meta["quirks"]``.

    Parameters
    ----------
    path : path
        The RTSTRUCT file.
    like : Geometry
        The grid: normally that of the image series on which the contours were drawn.
    series : SeriesIdentity, optional
        That series; structures that state another frame of reference than it has are not on this grid.
    allow_mismatch : bool
        Whether to take the positions at their word all the same.

    Returns
    -------
    LabelMap
        Exclusive labels where no voxel is shared, else one bool layer per structure. The numbers are the ROI numbers.

    Raises
    ------
    DicomError
        If the file is broken or no RTSTRUCT, there is no grid, or all structures have another frame of reference.

    Notes
    -----
    Of several planes of contours within one slice (a set drawn on thinner slices) the one nearest to the voxel centres
    counts. Time and memory grow with the contours' boxes, not with the grid.
    """
    if like is None:
        raise DicomError(
            f"grid of an RTSTRUCT must be given, as contours have none, got none for {path}; "
            "name the image series or a file on its grid (--like)"
        )
    with clean_errors("RTSTRUCT", path):
        dataset = pydicom.dcmread(path, force=True)
        if str(dataset.get("SOPClassUID", "")) != RTSTRUCT_UID and str(dataset.get("Modality", "")) != "RTSTRUCT":
            raise DicomError(f"structure set must be an RTSTRUCT object, got something else in {path}")
        rois, quirks = _read_rois(dataset)
        if series is not None:
            quirks += _foreign_images(dataset, series)
            if series.frame_of_reference and not allow_mismatch:
                rois = _in_frame(rois, series.frame_of_reference, quirks, path)
        canvas = Canvas(like, [roi.structure for roi in rois])
        for roi in rois:
            _draw(roi, canvas)
        quirks += _sum_up(rois)
        meta = {
            "modality": "RTSTRUCT",
            "path": str(path),
            "series_uid": str(dataset.get("SeriesInstanceUID", "")),
            "frame_of_reference_uid": next((roi.frame for roi in rois if roi.frame), ""),
            "referenced_series_uids": _referenced_series(dataset),
            "description": str(dataset.get("StructureSetLabel", "")),
            "quirks": tuple(quirks),
        }
        labels = canvas.finish(meta)
    for quirk in quirks:
        warnings.warn(f"{os.path.basename(path)}: {quirk}", stacklevel=2)
    return labels


# ---------------------------------------------------------------------------------------------------------------------
# The file


def _read_rois(dataset: Dataset) -> tuple[list[_Roi], list[str]]:
    frames = {str(f.get("FrameOfReferenceUID", "")) for f in dataset.get("ReferencedFrameOfReferenceSequence") or ()}
    frames |= {str(dataset.get("FrameOfReferenceUID", ""))}
    frames.discard("")
    only = frames.pop() if len(frames) == 1 else ""
    codes = {_integer(o, "ReferencedROINumber"): _code(o) for o in dataset.get("RTROIObservationsSequence") or ()}
    quirks: list[str] = []
    rois: dict[int, _Roi] = {}
    for item in dataset.get("StructureSetROISequence") or ():
        number = _integer(item, "ROINumber")
        if number in rois:
            quirks.append(f"two structures have the number {number}; the second was left out")
            continue
        name = str(item.get("ROIName") or f"ROI {number}").strip()
        frame = str(item.get("ReferencedFrameOfReferenceUID") or only)
        rois[number] = _Roi(Structure(max(number, 1), name, type=codes.get(number)), frame)
    for item in dataset.get("ROIContourSequence") or ():
        number = _integer(item, "ReferencedROINumber")
        if number not in rois:
            quirks.append(
                f"contours of number {number} have no entry in the list of structures; kept as 'ROI {number}'"
            )
            rois[number] = _Roi(Structure(max(number, 1), f"ROI {number}"), only)
        _read_contours(item, rois[number])
    _number(rois, quirks)
    return list(rois.values()), quirks


def _number(rois: dict[int, _Roi], quirks: list[str]) -> None:
    """Give structures whose number cannot be a label (0, negative) the next free one."""
    free = max([0, *rois]) + 1
    for number, roi in rois.items():
        if number < 1:
            s = roi.structure
            roi.structure = Structure(free, s.name, s.color, type=s.type)
            quirks.append(f"structure {s.name!r} has the number {number}; it became {free}")
            free += 1


def _read_contours(item: Dataset, roi: _Roi) -> None:
    s = roi.structure
    color = item.get("ROIDisplayColor")
    rgb = (
        [min(255, max(0, int(c))) for c in color] if color is not None and len(color) == 3 else default_color(s.number)
    )
    roi.structure = Structure(s.number, s.name, (rgb[0], rgb[1], rgb[2]), type=s.type)
    for contour in item.get("ContourSequence") or ():
        kind = str(contour.get("ContourGeometricType", "CLOSED_PLANAR")).upper()
        if kind not in AREAS:
            roi.skipped[f"of type {kind}"] += 1
            continue
        try:
            vertices = _vertices(contour)
        except ValueError:
            roi.skipped["with unreadable vertices"] += 1
            continue
        if len(vertices) < 3:
            roi.skipped["of fewer than three points"] += 1
        else:
            roi.contours.append(vertices)


def _vertices(contour: Dataset) -> Array:
    """(n, 3) RAS positions; numbers are read from the raw text, as pydicom's own decimals are slow by the million."""
    if CONTOUR_DATA not in contour:
        return np.zeros((0, 3))
    element = contour.get_item(CONTOUR_DATA)
    if isinstance(element, RawDataElement):
        text = (element.value or b"").rstrip(b" \0")
        values = np.array(text.split(b"\\")).astype(np.float64) if text else np.zeros(0)
    else:
        values = np.array(element.value if element.value is not None else (), np.float64)
    if values.size % 3 or not np.isfinite(values).all() or np.abs(values).max(initial=0) > 1e6:
        raise ValueError("not positions")
    return lps_to_ras(values.reshape(-1, 3))


def _integer(item: Dataset, keyword: str) -> int:
    value = item.get(keyword)
    if value is None or value == "":
        raise DicomError(f"{keyword} of a structure must be a number, got none")
    return int(value)


def _code(observation: Dataset) -> Code | None:
    for item in observation.get("RTROIIdentificationCodeSequence") or ():
        value, scheme = str(item.get("CodeValue", "")), str(item.get("CodingSchemeDesignator", ""))
        if value:
            return Code(value, scheme, str(item.get("CodeMeaning", "")))
    return None


def _referenced_series(dataset: Dataset) -> tuple[str, ...]:
    found = [
        str(series.get("SeriesInstanceUID", ""))
        for frame in dataset.get("ReferencedFrameOfReferenceSequence") or ()
        for study in frame.get("RTReferencedStudySequence") or ()
        for series in study.get("RTReferencedSeriesSequence") or ()
    ]
    return tuple(dict.fromkeys(uid for uid in found if uid))


def _foreign_images(dataset: Dataset, series: SeriesIdentity) -> list[str]:
    """Whether the contours refer to other images than those at hand: harmless, as positions count, but worth saying."""
    named = {
        str(image.get("ReferencedSOPInstanceUID", ""))
        for roi in dataset.get("ROIContourSequence") or ()
        for contour in roi.get("ContourSequence") or ()
        for image in contour.get("ContourImageSequence") or ()
    }
    if not named:
        return ["contours do not say on which images they were drawn; placed by position"]
    missing = len(named - series.images)
    if series.images and missing:
        return [f"{missing} of {len(named)} images that contours refer to are not in the series; placed by position"]
    return []


def _in_frame(rois: list[_Roi], frame: str, quirks: list[str], path: str | os.PathLike[str]) -> list[_Roi]:
    """The structures of the series' frame of reference, or that state none."""
    other = [roi for roi in rois if roi.frame not in ("", frame)]
    if other and len(other) == len(rois):
        raise DicomError(
            f"frame of reference of the structures must be that of the image series {frame}, got {other[0].frame} "
            f"in {path}; give the series they were drawn on, or --allow-mismatch to trust the positions"
        )
    if other:
        names = ", ".join(repr(roi.structure.name) for roi in other[:5])
        quirks.append(f"{len(other)} structures lie in another frame of reference and were left out ({names})")
    return [roi for roi in rois if roi.frame in ("", frame)]


# ---------------------------------------------------------------------------------------------------------------------
# Onto the grid


def _draw(roi: _Roi, canvas: Canvas) -> None:
    """Fill the contours of one structure, plane by plane."""
    shape = canvas.grid.shape
    planes: dict[tuple[int, int], list[tuple[float, Array]]] = defaultdict(list)  # (axis, slice): (offset, polygon)
    for world in roi.contours:
        index = canvas.grid.to_index(world)
        spread = np.ptp(index, axis=0)
        axis = 2 if spread[2] <= FLAT else int(np.argmin(spread))
        if spread[axis] > FLAT:
            roi.skipped["not in a plane of the grid"] += 1
            continue
        at = float(index[:, axis].mean())
        k = int(np.floor(at + 0.5))
        low, high = index.min(axis=0), index.max(axis=0)
        if not 0 <= k < shape[axis]:
            roi.skipped["on slices that the grid does not have"] += 1
        elif (np.delete(high, axis) < -0.5).any() or (np.delete(low - shape, axis) > -0.5).any():
            roi.skipped["beside the grid"] += 1
        else:
            if (np.delete(low, axis) <= -1).any() or (np.delete(high - shape, axis) >= 0).any():  # past a centre
                roi.skipped["clipped at the border"] += 1
            planes[axis, k].append((at - k, np.delete(index, axis, axis=1)[:, ::-1]))
    for (axis, k), found in planes.items():
        nearest = min(abs(offset) for offset, _ in found)
        level = next(offset for offset, _ in found if abs(offset) == nearest)
        polygons = [p for offset, p in found if abs(offset - level) <= SAME_PLANE]
        roi.skipped["in a second plane of one slice"] += len(found) - len(polygons)
        down, right = (a for a in (2, 1, 0) if a != axis)
        box, mask = fill_polygons(polygons, (shape[down], shape[right]))
        if mask.any():
            plane = Plane((axis, down, right), (1, 1), (k, box[0].start, box[1].start))
            canvas.paint(roi.structure.number, plane, mask)


def _sum_up(rois: list[_Roi]) -> list[str]:
    """One sentence for each thing that happened, with the structures that it happened to."""
    happened: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for roi in rois:
        for why, count in roi.skipped.items():
            if count:
                happened[why].append((roi.structure.name, count))
    said = []
    for why, found in happened.items():
        names = ", ".join(f"{name!r} {count}" for name, count in found[:8]) + (", ..." if len(found) > 8 else "")
        total = sum(count for _, count in found)
        what = "kept in part" if why.startswith("clipped") else "left out"
        said.append(f"{total} contours {why} were {what} ({names})")
    return said
