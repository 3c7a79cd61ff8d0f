"""Reading and writing: one function each for images and label maps, whatever the format.

The format follows from the name (or, for DICOM, from the content), and its module loads on first use: reading a NIfTI
file imports neither pydicom nor SimpleITK.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from medseg.io.info import VolumeInfo
from medseg.volume import DicomError, Geometry, LabelMap, Volume

__all__ = [
    "VolumeInfo",
    "is_dicom",
    "is_mask_folder",
    "list_series",
    "read",
    "read_channels",
    "read_labels",
    "supported_suffix",
    "write",
]

PathLike = str | os.PathLike[str]

_FORMATS = {
    ".nii.gz": "nifti",
    ".nii": "nifti",
    ".nrrd": "itk",
    ".nhdr": "itk",
    ".mha": "itk",
    ".mhd": "itk",
    ".png": "picture",
    ".jpg": "picture",
    ".jpeg": "picture",
    ".tif": "picture",
    ".tiff": "picture",
    ".bmp": "picture",
}
_MASK = re.compile(r"[1-9]\d*_.")
_DICOM_SUFFIXES = (".dcm", ".ima", ".zip")


def _module(name: str) -> Any:
    return import_module(f"medseg.io.{name}")


def __getattr__(name: str) -> Any:
    if name == "convert":  # builds on this module, so it loads when it is asked for
        return _module(name)
    raise AttributeError(f"module 'medseg.io' has no attribute {name!r}")


def supported_suffix(path: PathLike) -> str:
    """The suffix of a file that a reader other than DICOM's takes (".nii.gz"), "" for any other name."""
    name = Path(path).name.lower()
    return next((suffix for suffix in _FORMATS if name.endswith(suffix)), "")


def is_dicom(path: PathLike) -> bool:
    """Whether the DICOM reader takes it: a folder, .dcm, .ima, .zip, DICOMDIR, or a file that begins like DICOM."""
    path = Path(path)
    if path.is_dir() or path.name.upper() == "DICOMDIR" or path.name.lower().endswith(_DICOM_SUFFIXES):
        return True
    if supported_suffix(path) or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(132)
    # Old files lack the preamble and begin with group 0002 or 0008, in either byte order.
    return head[128:] == b"DICM" or head[:2] in (b"\x02\x00", b"\x08\x00", b"\x00\x08")


def is_mask_folder(path: PathLike) -> bool:
    """Whether it is a folder that holds image files, all of them named ``<number>_<name>`` as masks of structures are."""
    path = Path(path)
    if not path.is_dir():
        return False
    names = [p.name for p in path.iterdir() if not p.name.startswith(".")]
    return bool(names) and all(supported_suffix(n) and _MASK.match(n) for n in names)


def _existing(path: PathLike) -> Path:
    if not Path(path).exists():
        raise FileNotFoundError(f"input must exist, got {path}; check the name")
    return Path(path)


def _format(path: PathLike) -> Any:
    """The module that reads and writes files of this name."""
    suffix = supported_suffix(path)
    if not suffix:
        raise ValueError(f"name of an image must end in {' '.join(_FORMATS)} or be DICOM, got {path}")
    return _module(_FORMATS[suffix])


def read(path: PathLike, series: str | None = None) -> Volume:
    """Read an image on its native grid.

    Parameters
    ----------
    path : path
        A NIfTI, NRRD, MetaImage, PNG, TIFF, JPEG or BMP file; a DICOM file, folder, .zip or DICOMDIR.
    series : str, optional
        SeriesInstanceUID (or its unambiguous end) where a DICOM folder holds several.

    Returns
    -------
    Volume
        Voxels (C, I, J, K) in the units of the file (HU for CT) on the scanner's grid. ``meta["quirks"]`` tells what
        was unusual.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not a readable image (GeometryError, DicomError for grids and DICOM).
    """
    path = _existing(path)
    if is_dicom(path):
        dicom = _module("dicom")
        kind = dicom.object_kind(path) if path.is_file() and path.suffix.lower() != ".zip" else "image"
        if kind in ("seg", "rtstruct"):
            raise DicomError(f"image must not be a {kind.upper()} object, got {path}; use medseg.read_labels")
        volume: Volume = dicom.read_series(path, series)
        return volume
    if series is not None:
        raise ValueError(f"series must be given for DICOM only, got {series!r} for {path}")
    volume = _format(path).read_volume(path)
    return volume


def read_channels(paths: Sequence[PathLike | None]) -> Volume:
    """Read the channels of one image from one file each (or from one file that holds them all).

    Parameters
    ----------
    paths : sequence of path or None
        None for a channel that is missing: its voxels are 0, and ``meta["missing_channels"]`` holds its index.

    Raises
    ------
    GeometryError
        If the files do not lie on one grid; the message tells how far apart their corners are.
    ValueError
        If every channel is missing, or one is and a file holds several.
    """
    there = [path for path in paths if path is not None]
    if not there:
        raise ValueError(f"image must have at least one channel, got none of {len(paths)}")
    first, *others = volumes = [read(path) for path in there]
    for path, volume in zip(there[1:], others, strict=True):
        first.geometry.require_close(volume.geometry, f"channels {Path(there[0]).name} and {Path(path).name}")
    if len(paths) == 1:
        return first
    if len(there) == len(paths):
        return replace(first, array=np.concatenate([volume.array for volume in volumes]))
    several = next((path for path, volume in zip(there, volumes, strict=True) if volume.channels > 1), None)
    if several is not None:
        raise ValueError(f"files must hold one channel each where another is missing, got several in {several}")
    array = np.zeros((len(paths), *first.geometry.shape), np.result_type(*(v.array.dtype for v in volumes)))
    array[[n for n, path in enumerate(paths) if path is not None]] = [volume.array[0] for volume in volumes]
    missing = tuple(n for n, path in enumerate(paths) if path is None)
    return replace(first, array=array, meta={**first.meta, "missing_channels": missing})


def read_labels(
    path: PathLike, like: PathLike | Geometry | Volume | LabelMap | None = None, *, allow_mismatch: bool = False
) -> LabelMap:
    """Read a label map: integers or layers, with the names of the structures where the file has them.

    Parameters
    ----------
    path : path
        A NIfTI, NRRD, MetaImage, PNG, TIFF or BMP file, a DICOM-SEG or RTSTRUCT (or the folder that holds just one), or
        a folder of masks ``<number>_<name>.nii.gz``, one per structure.
    like : path, Geometry, Volume or LabelMap, optional
        The grid: a SEG or RTSTRUCT is put on it; labels that have a grid of their own must lie on it within 0.01 mm.
    allow_mismatch : bool
        Whether a SEG or RTSTRUCT of another frame of reference than ``like`` is put on it all the same.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the values are not labels or the file is not readable (GeometryError, DicomError for grids and DICOM).
    """
    path = _existing(path)
    grid, identity = _grid(like)
    if is_mask_folder(path):
        labels: LabelMap = _module("masks").read_masks(path)
    elif is_dicom(path):
        path, kind = _labels_object(path)
        read_object = _module("dicom_seg").read_seg if kind == "seg" else _module("rtstruct").read_rtstruct
        found: LabelMap = read_object(path, grid, series=identity, allow_mismatch=allow_mismatch)
        return found
    else:
        labels = _format(path).read_label_map(path)
    if grid is None:
        return labels
    labels.geometry.require_close(grid, f"label map {path} and the grid asked for")
    return replace(labels, geometry=grid)


def _grid(like: PathLike | Geometry | Volume | LabelMap | None) -> tuple[Geometry | None, Any]:
    """The grid that is meant, and for a DICOM series what identifies it (a SeriesIdentity)."""
    if like is None or isinstance(like, Geometry):
        return like, None
    if isinstance(like, Volume | LabelMap):
        frame = str(like.meta.get("frame_of_reference_uid", ""))
        return like.geometry, _module("placing").SeriesIdentity(frame) if frame else None
    path = _existing(like)
    if is_dicom(path):
        grid, headers = _module("dicom").source_series(path)
        return grid, _module("placing").SeriesIdentity.of(headers)
    return _format(path).describe(path).geometry, None


def _labels_object(path: Path) -> tuple[Path, str]:
    """The one SEG or RTSTRUCT file that ``path`` is or holds, and its kind."""
    dicom = _module("dicom")
    files = sorted(p for p in path.iterdir() if p.is_file() and is_dicom(p)) if path.is_dir() else [path]
    found = [(p, kind) for p in files if (kind := dicom.object_kind(p)) in ("seg", "rtstruct")]
    if len(found) != 1:
        names = ", ".join(p.name for p, _ in found) or "none"
        raise DicomError(
            f"labels must be one DICOM-SEG or RTSTRUCT object, got {names} in {path}; name the file itself"
        )
    return found[0]


def write(
    value: Volume | LabelMap,
    path: PathLike,
    source: PathLike | None = None,
    *,
    series: str | None = None,
    force: bool = False,
) -> None:
    """Write an image or a label map; the name decides the format.

    Parameters
    ----------
    value : Volume or LabelMap
        What to write.
    path : path
        An image file name; for an image also a folder (no suffix, a trailing "/", or ".dcm"), filled with a DICOM
        series; for labels also ``*.rtstruct.dcm`` (RTSTRUCT) or any other ``*.dcm`` (DICOM-SEG).
    source : path, optional
        The DICOM series on which labels lie; required for SEG and RTSTRUCT, not used by other formats.
    series : str, optional
        Which one, where the source holds several; as in :func:`read`.
    force : bool
        Whether an existing file may be replaced.

    Raises
    ------
    FileExistsError
        If the output exists and ``force`` is not set.
    ValueError
        If the format cannot hold the value, or the source is missing.
    OSError
        If the output cannot be written; nothing is left under its name then.
    """
    name = os.fspath(path).lower()
    if isinstance(value, LabelMap) and name.endswith(".dcm"):
        kind = "rtstruct" if name.endswith(".rtstruct.dcm") else "seg"
        if source is None:
            raise ValueError(
                f"source must name the DICOM series on which the labels lie, got none for {path}; give its folder "
                "(--like SERIES)"
            )
        if kind == "seg":
            _module("dicom_seg_write").write_seg(value, path, _existing(source), series=series, force=force)
        else:
            _module("rtstruct_write").write_rtstruct(value, path, _existing(source), series=series, force=force)
    elif isinstance(value, Volume) and (name.endswith((".dcm", "/", os.sep)) or not Path(path).suffix):
        _module("dicom_write").write_series(value, path, force=force)
    else:
        _format(path).write(value, Path(path), force=force)


def list_series(path: PathLike) -> list[VolumeInfo]:
    """What images are in a file, DICOM folder, .zip or DICOMDIR, or folder of image files; reads headers only.

    A file of a folder that cannot be read is listed too, with the reason among its quirks.

    Raises
    ------
    FileNotFoundError
        If there is no such path, or the folder holds no file.
    ValueError
        If nothing in it is an image, or the one file given cannot be read.
    """
    path = _existing(path)
    if not path.is_dir():
        if is_dicom(path):
            return list(_module("dicom").list_series(path))
        return [_format(path).describe(path)]
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"folder must hold images, got no file in {path}")
    images = [_describe(p) for p in files if supported_suffix(p)]
    if not images or any(is_dicom(p) for p in files if not supported_suffix(p)):
        images = [*_module("dicom").list_series(path), *images]
    return images


def _describe(path: Path) -> VolumeInfo:
    try:
        info: VolumeInfo = _format(path).describe(path)
    except (ValueError, OSError) as error:
        info = VolumeInfo(str(path), "", "", "", (), (), [], (f"not readable: {error}",))
    return info
