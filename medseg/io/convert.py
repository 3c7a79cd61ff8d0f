"""The work behind ``medseg convert``: images and label maps from any format into any other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom

from medseg.io import is_dicom, list_series, read, read_labels, supported_suffix, write
from medseg.io.dicom import object_kind, read_all, source_series, volumes_of
from medseg.io.dicom_decode import DECODE_ERRORS
from medseg.io.dicom_scan import safe_name
from medseg.io.dicom_seg import read_seg
from medseg.io.dicom_seg_write import SegKind, write_seg
from medseg.io.files import require_free
from medseg.io.placing import SeriesIdentity
from medseg.io.rtstruct import read_rtstruct
from medseg.io.rtstruct_write import write_rtstruct
from medseg.volume import DicomError, Geometry, LabelMap, Structure, Volume

__all__ = ["ConvertOptions", "convert"]

PathLike = str | os.PathLike[str]
Format = Literal["nifti", "nrrd", "dicom", "seg", "rtstruct"]
_SUFFIXES = {"nifti": ".nii.gz", "nrrd": ".nrrd", "seg": ".seg.dcm", "rtstruct": ".rtstruct.dcm"}


@dataclass(frozen=True)
class ConvertOptions:
    """How to convert.

    Parameters
    ----------
    series : str, optional
        The one DICOM series wanted: name, SeriesInstanceUID (or its end) or number.
    like : path, optional
        Source series or image on whose grid labels lie.
    labels : bool
        The source is a label map (DICOM-SEG and RTSTRUCT always are).
    to : "nifti", "nrrd", "dicom", "seg" or "rtstruct", optional
        Format, where the name of the output does not say.
    split : bool
        One mask per label, ``<number>_<label>``; probabilities stay probabilities.
    four_d : bool
        The time points of a series in one 4D file.
    resample : bool
        Unevenly spaced slices on a regular grid; sheared grids made straight.
    slices : bool
        What is no volume as separate slices.
    suv : bool
        PET as standardised uptake values by body weight.
    seg_type : "binary", "labelmap" or "fractional"
        Kind of DICOM-SEG to write.
    allow_mismatch : bool
        Labels of another frame of reference are accepted.
    show_patient : bool
        File names begin with the id and the name of the patient.
    force : bool
        Outputs may be overwritten.
    """

    series: str | None = None
    like: PathLike | None = None
    labels: bool = False
    to: Format | None = None
    split: bool = False
    four_d: bool = False
    resample: bool = False
    slices: bool = False
    suv: bool = False
    seg_type: SegKind = "binary"
    allow_mismatch: bool = False
    show_patient: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.to is not None and self.to not in ("dicom", *_SUFFIXES):
            raise ValueError(f"format must be one of dicom, {', '.join(_SUFFIXES)}, got {self.to!r}")


def convert(src: PathLike, dst: PathLike, **options: Any) -> list[Path]:
    """Convert an image or a label map.

    Parameters
    ----------
    src : path
        An image or label file, or a DICOM folder, zip or DICOMDIR.
    dst : path
        A file, whose suffix decides the format; or a folder (ending in "/", or existing), which gets one file per
        volume, ``<series number>_<description>[_e<echo>][_<type>][_t<time>].nii.gz``. An image to a name without suffix
        becomes a DICOM series.
    **options
        Those of :class:`ConvertOptions`.

    Returns
    -------
    list of Path
        The files (or the DICOM folder) written. Volumes that had to be refused are told in warnings as long as others
        could be written.

    Raises
    ------
    FileNotFoundError
        If the source does not exist.
    FileExistsError
        If an output exists and ``force`` is not set.
    ValueError
        If the source is not readable (DicomError, GeometryError), holds several volumes for one file, or the format
        cannot hold it.
    """
    chosen = ConvertOptions(**options)
    source = Path(src)
    if not source.exists():
        raise FileNotFoundError(f"input must exist, got {source}; check the name")
    kind = object_kind(source) if source.is_file() and is_dicom(source) else ""
    if chosen.labels or chosen.split or kind in ("seg", "rtstruct"):
        return _convert_labels(source, dst, chosen, kind)
    if chosen.to in ("seg", "rtstruct"):
        raise ValueError(f"image must not become a {chosen.to}, got {source}; say --labels where it is a label map")
    return _convert_images(source, dst, chosen)


def _is_folder(dst: PathLike) -> bool:
    return os.fspath(dst).endswith(("/", os.sep)) or Path(dst).is_dir()


# ---------------------------------------------------------------------------------------------------------------------
# Images


def _convert_images(source: Path, dst: PathLike, chosen: ConvertOptions) -> list[Path]:
    volumes = _volumes(source, chosen)
    if _is_folder(dst) and chosen.to != "dicom":
        return _write_folder(volumes, source, Path(dst), chosen)
    if chosen.to in ("nifti", "nrrd") and not supported_suffix(dst):
        raise ValueError(f"name must end in {_SUFFIXES[chosen.to]}, got {dst}")
    require_free(Path(dst), chosen.force)
    found = [(name, volume) for name, volume in volumes]
    good = [volume for _, volume in found if isinstance(volume, Volume)]
    if len(found) == 1 and not good:
        raise found[0][1]  # type: ignore[misc]
    if len(good) != 1:
        names = ", ".join(name for name, _ in found[:20])
        raise DicomError(
            f"input must hold one volume to become one file, got {names} in {source.name}; name one with --series, or "
            'give a folder (ending in "/")'
        )
    for name, problem in found:
        if isinstance(problem, DicomError):
            warnings.warn(f"{name}: left out: {problem}", UserWarning, stacklevel=3)
    path = Path(dst)
    write(good[0], path if supported_suffix(path) else os.fspath(dst).rstrip("/") + "/", force=chosen.force)
    return [path]


def _volumes(source: Path, chosen: ConvertOptions) -> Iterator[tuple[str, Volume | DicomError]]:
    """Name and voxels (or the refusal) of every image asked for."""
    if is_dicom(source):
        found = read_all(
            source, chosen.series, resample=chosen.resample, slices=chosen.slices, suv=chosen.suv,
            show_patient=chosen.show_patient,
        )  # fmt: skip
        pairs: Iterator[tuple[str, Volume | DicomError]] = ((info.name, volume) for info, volume in found)
        if chosen.resample:
            pairs = ((name, _straight(volume)) for name, volume in pairs)
        yield from _series(pairs) if chosen.four_d else pairs
        return
    yield source.name[: -len(supported_suffix(source)) or None], read(source, chosen.series)


def _straight(volume: Volume | DicomError) -> Volume | DicomError:
    """The volume on a straight grid, if it is skewed; the resampler, and torch with it, loads only then."""
    if isinstance(volume, DicomError) or not volume.geometry.is_skewed:
        return volume
    straight: Volume = import_module("medseg.resample").straighten(volume)
    said = *volume.meta["warnings"], f"sheared grid resampled to a straight one of {straight.geometry.shape} voxels"
    return replace(straight, meta={**straight.meta, "warnings": said})


def _series(pairs: Iterator[tuple[str, Volume | DicomError]]) -> Iterator[tuple[str, Volume | DicomError]]:
    """The time points of one series as the channels of one image, where they share a grid."""
    waiting: list[tuple[str, Volume]] = []

    def joined() -> Iterator[tuple[str, Volume | DicomError]]:
        if len(waiting) == 1 or any(not v.geometry.is_close(waiting[0][1].geometry) for _, v in waiting):
            yield from waiting
        elif waiting:
            name, first = waiting[0]
            array = np.concatenate([v.array for _, v in waiting])
            yield name.rsplit("_t", 1)[0], replace(first, array=array)

    for name, volume in pairs:
        time = isinstance(volume, Volume) and volume.meta.get("time") and volume.channels == 1
        if waiting and not (
            time and isinstance(volume, Volume) and volume.meta["family"] == waiting[0][1].meta["family"]
        ):
            yield from joined()
            waiting.clear()
        if time and isinstance(volume, Volume):
            waiting.append((name, volume))
        else:
            yield name, volume
    yield from joined()


def _write_folder(
    volumes: Iterator[tuple[str, Volume | DicomError]], source: Path, folder: Path, chosen: ConvertOptions
) -> list[Path]:
    suffix = _SUFFIXES[chosen.to or "nifti"]
    written: list[Path] = []
    refused: list[DicomError] = []
    said: set[tuple[str, str]] = set()
    for name, volume in volumes:
        if isinstance(volume, DicomError):
            refused.append(volume)
            continue
        path = folder / f"{name}{suffix}"
        require_free(path, chosen.force)
        for sentence in volume.meta.get("warnings", ()):
            key = name.rsplit("_t", 1)[0], sentence  # once for all time points
            if key not in said:
                said.add(key)
                warnings.warn(f"{name}: {sentence}", UserWarning, stacklevel=4)
        write(volume, path, force=chosen.force)
        written.append(path)
    if refused and not written:
        raise (
            refused[0]
            if len(refused) == 1
            else DicomError(f"input must hold a volume, got {len(refused)} refused in {source.name}: {refused[0]}")
        )
    for problem in refused:
        warnings.warn(f"refused: {problem}", UserWarning, stacklevel=4)
    return written


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def _convert_labels(source: Path, dst: PathLike, chosen: ConvertOptions, kind: str) -> list[Path]:
    to = chosen.to or _format_of(dst)
    folder = _is_folder(dst) or chosen.split
    path = Path(dst) / f"{_stem(source)}{_SUFFIXES[to]}" if folder else Path(dst)
    if to in ("seg", "rtstruct") and chosen.split:
        raise ValueError(f"--split must write image files, got format {to}; one object holds all structures")
    if not chosen.split:
        require_free(path, chosen.force)
    labels = _labels(source, chosen, kind)
    if chosen.split:
        return write_masks(labels, Path(dst), _SUFFIXES[to], chosen.force)
    if to not in ("seg", "rtstruct"):
        write(labels, path, force=chosen.force)
        return [path]
    if chosen.like is None:
        raise ValueError(f"source series must be given for a {to}, got none; name its folder (--like SERIES)")
    path.parent.mkdir(parents=True, exist_ok=True)
    series = chosen.series or _only_series(Path(chosen.like), source, kind)
    if to == "seg":
        write_seg(labels, path, chosen.like, series=series, kind=chosen.seg_type, force=chosen.force)
    else:
        write_rtstruct(labels, path, chosen.like, series=series, force=chosen.force)
    return [path]


def _format_of(dst: PathLike) -> Format:
    name = os.fspath(dst).lower()
    if name.endswith(".rtstruct.dcm"):
        return "rtstruct"
    if name.endswith(".dcm"):
        return "seg"
    return "nrrd" if name.endswith((".nrrd", ".nhdr")) else "nifti"


def _stem(path: Path) -> str:
    name = path.name
    for suffix in (".seg.dcm", ".rtstruct.dcm", supported_suffix(path) or path.suffix):
        if suffix and name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _labels(source: Path, chosen: ConvertOptions, kind: str) -> LabelMap:
    """The label map, on the grid of ``--like`` where one is given."""
    if kind not in ("seg", "rtstruct"):
        return read_labels(source, None if chosen.like is None else _grid(Path(chosen.like), chosen.series)[0])
    grid: Geometry | None = None
    identity: SeriesIdentity | None = None
    if chosen.like is not None:
        grid, identity = _grid(Path(chosen.like), chosen.series or _only_series(Path(chosen.like), source, kind))
    reader = read_seg if kind == "seg" else read_rtstruct
    return reader(source, grid, series=identity, allow_mismatch=chosen.allow_mismatch)


def _grid(like: Path, series: str | None) -> tuple[Geometry, SeriesIdentity | None]:
    if not like.exists():
        raise FileNotFoundError(f"--like must exist, got {like}; check the name")
    if not is_dicom(like):
        return list_series(like)[0].geometry, None
    geometry, headers = source_series(like, series)
    return geometry, SeriesIdentity.of(headers)


def _only_series(like: Path, source: Path, kind: str) -> str | None:
    """The volume of ``--like`` to which the labels refer, where it holds several and they name just one."""
    if not is_dicom(like):
        return None
    volumes = [v for v in volumes_of(like) if v.affine]
    if len(volumes) == 1 or kind not in ("seg", "rtstruct"):
        return None
    try:
        dataset = pydicom.dcmread(source, stop_before_pixels=True, force=True)
        named = {str(e.value) for e in dataset.iterall() if e.keyword == "SeriesInstanceUID"}
    except DECODE_ERRORS as error:
        raise DicomError(f"labels must be readable, got {type(error).__name__} in {source.name}") from error
    referred = [v for v in volumes if v.series in named]
    return referred[0].name if len(referred) == 1 else None


def mask_paths(structures: Sequence[Structure], folder: Path, suffix: str) -> list[Path]:
    """``<number>_<label>`` of each structure."""
    return [folder / f"{s.number}_{safe_name(s.name) or 'label'}{suffix}" for s in structures]


def write_masks(labels: LabelMap, folder: Path, suffix: str, force: bool) -> list[Path]:
    """One file per structure: a mask of 0 and 1, or its probabilities."""
    paths = mask_paths(labels.structures, folder, suffix)
    for path in paths:
        require_free(path, force)
    for s, path in zip(labels.structures, paths, strict=True):
        write(_one(labels, s), path, force=force)
    return paths


def _one(labels: LabelMap, structure: Structure) -> LabelMap | Volume:
    layer = labels.array[labels.structures.index(structure)] if labels.is_layered else None
    if layer is not None and layer.dtype != bool:
        return Volume(layer, labels.geometry, {**labels.meta, "description": structure.name})
    mask = labels.mask(structure.number).astype(np.uint8)
    return LabelMap(mask, labels.geometry, (replace(structure, number=1),), labels.meta)
