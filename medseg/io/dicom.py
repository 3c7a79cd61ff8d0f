"""DICOM image series as volumes: what is in a folder, read on the scanner's own grid, or refused with the reason.

A series becomes as many volumes as it has orientations, echoes, image types and time points (see
:mod:`medseg.io.dicom_group`). What is no regular grid of slices is refused, unless it is asked to be resampled or to be
given as separate slices. Gantry-tilted series keep their sheared grid. Warnings tell what was skipped or decided; they
never hold names, ids or UIDs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pydicom
from pydicom.dataset import Dataset

from medseg.io.dicom_decode import DECODE_ERRORS
from medseg.io.dicom_grid import lps_to_ras, regular_grid
from medseg.io.dicom_group import Stack
from medseg.io.dicom_header import Header
from medseg.io.dicom_pixels import Voxels, read_voxels
from medseg.io.dicom_scan import Scan, as_slices, info_of, kind_of_file, listing, scan, select, tell
from medseg.io.dicom_suv import suv_factors
from medseg.io.info import VolumeInfo
from medseg.volume import DicomError, Geometry, Volume

__all__ = [
    "list_series",
    "lps_to_ras",
    "object_kind",
    "read_all",
    "read_series",
    "source_frames",
    "source_series",
    "volumes_of",
]

PathLike = str | os.PathLike[str]
_UNITS = {"CT": "HU", "RTDOSE": "Gy"}


def object_kind(path: PathLike) -> str:
    """What one DICOM file holds: "image", "seg", "rtstruct" or "other"."""
    return kind_of_file(path)


def list_series(path: PathLike, *, show_patient: bool = False) -> list[VolumeInfo]:
    """The volumes in a DICOM folder, file, zip or DICOMDIR, one row each; reads headers only.

    ``show_patient`` begins the names with the patient's id and name. What would be refused is listed too, with the reason
    as its first quirk and an empty shape. Some 0.1 ms a file.

    Raises
    ------
    FileNotFoundError
        If there is no such path.
    DicomError
        If nothing in it is a DICOM image.
    """
    found = scan(path, show_patient)
    tell(found.path.name, found.notes)
    return [info_of(s) for s in found.stacks]


def volumes_of(path: PathLike) -> list[VolumeInfo]:
    """As :func:`list_series`, without a word on what was skipped."""
    return [info_of(s) for s in scan(path).stacks]


def read_series(
    path: PathLike, series: str | None = None, *, resample: bool = False, slices: bool = False, suv: bool = False
) -> Volume:
    """Read the one volume of a DICOM folder, file, zip or DICOMDIR, or the one that ``series`` names.

    Parameters
    ----------
    path : path
        Where to look; subfolders are included.
    series : str, optional
        A name that ``medseg info`` shows ("3_T1_e2"), a SeriesInstanceUID (or its end), or a series number.
    resample : bool
        Put unevenly spaced slices on a regular grid by linear interpolation instead of refusing them.
    slices : bool
        Accept a single slice of a series that is no volume.
    suv : bool
        Give PET as standardised uptake values by body weight (g/ml).

    Returns
    -------
    Volume
        (C, I, J, K) voxels in the units of the file (HU, Bq/ml, Gy ...); integers stay integers where no slope makes
        fractions of them. ``meta`` holds "modality", "path", "series_uid", "frame_of_reference_uid", "description",
        "name", "units", "quirks" and, where the file states one, "padding" (the value of voxels outside the image).

    Raises
    ------
    FileNotFoundError
        If there is no such path.
    DicomError
        If there is no such volume or several, its slices are no regular grid, or its pixel data are damaged.
    """
    found = scan(path)
    stacks = select(found, series)
    if slices:
        stacks = [part for s in stacks for part in (as_slices(s) if s.problem else [s])]
    good = [s for s in stacks if not s.problem or (resample and s.uneven)]
    if len(good) != 1:
        if len(stacks) == 1:
            raise DicomError(_refusal(stacks[0], found))
        raise DicomError(
            f"input must hold one volume, got {listing(stacks)} in {found.path.name}; name one with --series"
        )
    notes = [f"{s.name} left out: {s.problem}" for s in stacks if s is not good[0]]
    volume = _read(good[0], found, suv)
    tell(found.path.name, [*found.notes, *notes])
    tell(good[0].name, volume.meta["warnings"])
    return volume


def _refusal(stack: Stack, found: Scan) -> str:
    remedy = "--resample puts them on a regular grid" if stack.uneven else "--slices reads them separately"
    return f"{stack.problem} in {stack.name} of {found.path.name}; {remedy}"


def read_all(
    path: PathLike,
    series: str | None = None,
    *,
    resample: bool = False,
    slices: bool = False,
    suv: bool = False,
    show_patient: bool = False,
) -> Iterator[tuple[VolumeInfo, Volume | DicomError]]:
    """Read every volume of a DICOM folder, one at a time; one that is refused comes as its error.

    Parameters and errors are those of :func:`read_series`; ``show_patient`` begins the names with the patient's id and
    name. Memory: one volume.
    """
    found = scan(path, show_patient)
    tell(found.path.name, found.notes)
    for stack in select(found, series):
        for part in as_slices(stack) if slices and stack.problem and not (resample and stack.uneven) else [stack]:
            if part.problem and not (resample and part.uneven):
                yield info_of(part), DicomError(_refusal(part, found))
                continue
            try:
                volume = _read(part, found, suv)
            except DicomError as error:
                yield info_of(part), error
            else:
                yield info_of(part), volume


def _read(stack: Stack, found: Scan, suv: bool) -> Volume:
    header, geometry = stack.frames[0].header, stack.geometry
    item = header.item
    modality = item.text("Modality")
    units = _UNITS.get(modality, item.text("Units"))
    factors = None
    if suv:
        factors, units = suv_factors(stack.frames), "SUVbw"
    voxels = read_voxels(stack.frames, factors)
    array, said = voxels.array, [*stack.quirks, *voxels.notes, *_padding_note(voxels)]
    if item.text("PhotometricInterpretation") == "MONOCHROME1":
        said.append("MONOCHROME1: high values are dark")
    if geometry is None:
        array, geometry, note = regular_grid(stack.frames, array)
        said.append(note)
    meta: dict[str, Any] = {
        "modality": modality,
        "path": str(found.path),
        "series_uid": item.text("SeriesInstanceUID"),
        "frame_of_reference_uid": item.text("FrameOfReferenceUID"),
        "description": header.label("SeriesDescription"),
        "name": stack.name,
        "units": units,
        "quirks": (*said, *stack.facts),
        "warnings": tuple(said),
        "family": stack.family,
        "time": stack.time,
    }
    if voxels.padding is not None:
        meta["padding"] = voxels.padding
    return Volume(array, geometry, meta)


def _padding_note(voxels: Voxels) -> list[str]:
    if not voxels.padded:
        return []
    share = 100 * voxels.padded / voxels.array[0].size
    return [f"{share:.1f} % of the voxels hold the padding value {voxels.padding:g} (no image there)"]


def source_series(path: PathLike, series: str | None = None) -> tuple[Geometry, list[Dataset]]:
    """The grid of a volume and the whole header, without pixel data, of the file that holds each slice k.

    For writers that refer to the slices. A multi-frame file appears once per slice, as the same object.

    Raises
    ------
    DicomError
        As :func:`read_series`.
    """
    geometry, frames = source_frames(path, series)
    return geometry, [header for header, _ in frames]


def source_frames(path: PathLike, series: str | None = None) -> tuple[Geometry, list[tuple[Dataset, int]]]:
    """As :func:`source_series`, with the number (from 1) of the frame within its file."""
    found = scan(path)
    stacks = [s for s in select(found, series) if s.geometry is not None]
    if len(stacks) != 1:
        refused = select(found, series)
        if len(refused) == 1:
            raise DicomError(_refusal(refused[0], found))
        raise DicomError(
            f"source must hold one volume, got {listing(refused)} in {found.path.name}; name one with --series"
        )
    stack = stacks[0]
    headers = {id(f.header): f.header for f in stack.frames}
    datasets = {key: _dataset(header) for key, header in headers.items()}
    geometry = stack.geometry
    if geometry is None:
        raise DicomError(_refusal(stack, found))
    return geometry, [(datasets[id(f.header)], f.index + 1) for f in stack.frames]


def _dataset(header: Header) -> Dataset:
    try:
        with header.file.open() as stream:
            return pydicom.dcmread(stream, stop_before_pixels=True, force=True)
    except DECODE_ERRORS as error:
        raise DicomError(f"header must be readable, got {type(error).__name__} in {header.file.name}") from error
