"""A repaired copy of a data set, with a log of every change. Originals are only read."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medseg.cases import Case, Dataset, stem
from medseg.inspection import GRID_TOLERANCE_MM, READ_ERRORS, Finding, LabelFile, read_label_file
from medseg.io import read, write
from medseg.io.files import atomic_folder
from medseg.resample import resample_to
from medseg.volume import Geometry, LabelMap

__all__ = ["Repair", "write_repaired"]

Array = NDArray[Any]
LABEL_FAULTS = frozenset(
    {
        "lossy label",
        "NaN or infinity in label",
        "labels not integer",
        "labels stored as float",
        "image and label differ in grid",
    }
)
SAME_GRID = 0.1  # grids of one shape whose corners differ by less than this part of a voxel differ by rounding only
TWO_FILES = (".mhd", ".nhdr")  # headers whose voxels lie in another file


class Repair(NamedTuple):
    """One change: in which case and file of the copy, what was done, and the values before and after."""

    case: str
    file: str
    what: str
    detail: str


def write_repaired(dataset: Dataset, findings: Iterable[Finding], out: Path) -> list[Repair]:
    """Write a copy of a data set in nnU-Net's layout in which what can be repaired is repaired.

    Images are copied as they are, but for NaN and infinity, which become the smallest finite value of their channel.
    Labels are copied unless they are wrong: then lossy ones are cut at 128, soft ones at 0.5, NaN is background, whole
    numbers stored as float become integers, and labels on another grid are put on the image's, where both overlap.
    ``repairs.json`` logs each change and lists what was found and not repaired; ``cases.csv`` is written too where
    cases have groups or lack labels, which the folders cannot tell.

    Parameters
    ----------
    dataset : Dataset
        What to copy.
    findings : iterable of Finding
        What :func:`medseg.check` said on it.
    out : Path
        New folder; appears whole or not at all.

    Returns
    -------
    list of Repair
        In the order of the cases.

    Raises
    ------
    FileExistsError
        If ``out`` exists.
    OSError
        If it cannot be written.
    """
    findings = list(findings)
    faults: dict[str, set[str]] = {}
    for f in findings:
        faults.setdefault(f.case, set()).add(f.what)
    repairs: list[Repair] = []
    with atomic_folder(out) as folder:
        rows = []
        for case in dataset.cases:
            copied, done = _copy_case(case, faults.get(case.id, set()), folder)
            rows.append(copied)
            repairs += done
        _write_headers(dataset, rows, folder)
        mended = {(r.case, fault) for r in repairs for fault in _mended(r)}
        log = {
            "source": str(dataset.root.resolve()),
            "repairs": [r._asdict() for r in repairs],
            "not_repaired": [f._asdict() for f in findings if (f.case, f.what) not in mended],
        }
        (folder / "repairs.json").write_text(json.dumps(log, indent=1), encoding="utf-8")
    return repairs


def _mended(repair: Repair) -> tuple[str, ...]:
    """The kinds of finding that a repair settles."""
    return {
        "cut at 128": ("lossy label",),
        "cut at 0.5": ("labels not integer",),
        "NaN or infinity filled": ("NaN or infinity in image",),
        "NaN or infinity made background": ("NaN or infinity in label",),
        "stored as integers": ("labels stored as float",),
        "put on the image's grid": ("image and label differ in grid",),
    }.get(repair.what, ())


def _copy_case(case: Case, faults: set[str], folder: Path) -> tuple[Case, list[Repair]]:
    repairs: list[Repair] = []
    images: list[Path | None] = []
    for number, source in enumerate(case.images):
        if source is None:
            images.append(None)
            continue
        name = f"imagesTr/{case.id}_{number:04d}"
        images.append(_copy_image(case, source, folder, name, "NaN or infinity in image" in faults, repairs))
    label = None
    if case.label is not None:
        mended = None
        if faults & (LABEL_FAULTS):
            mended, done = _mend_label(case, case.label)
        if mended is None:
            label = _copy_file(case, case.label, folder, f"labelsTr/{case.id}", repairs)
        else:
            is_picture = mended.geometry.shape[2] == 1 and not case.label.name.lower().endswith((".nii.gz", ".nii"))
            suffix = _suffix(case.label)
            name = f"labelsTr/{case.id}{'.png' if is_picture else '.nii.gz' if suffix in TWO_FILES else suffix}"
            write(mended, folder / name)
            label = Path(name)
            repairs += [Repair(case.id, name, what, detail) for what, detail in done]
    return Case(case.id, tuple(images), label, case.group, case.unknown), repairs


def _suffix(path: Path) -> str:
    return "" if path.is_dir() else path.name[len(stem(path.name)) :].lower()


def _copy_file(case: Case, source: Path, folder: Path, name: str, repairs: list[Repair]) -> Path:
    """Copy a file or DICOM folder; a header with its voxels elsewhere is written anew as one file."""
    suffix = _suffix(source)
    target = Path(name + (".nii.gz" if suffix in TWO_FILES else suffix))
    (folder / target).parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, folder / target)
    elif suffix in TWO_FILES:
        value: Any = read(source)
        if name.startswith("labelsTr"):
            value = LabelMap(value.array[0], value.geometry)
        write(value, folder / target)
        repairs.append(Repair(case.id, str(target), "written as one file", f"{source.name} -> {target.name}"))
    else:
        shutil.copy2(source, folder / target)
        (folder / target).chmod(0o644)
    return target


def _copy_image(case: Case, source: Path, folder: Path, name: str, may_be_broken: bool, repairs: list[Repair]) -> Path:
    if may_be_broken:
        volume = read(source)
        is_bad = ~np.isfinite(volume.array)
        if is_bad.any():
            array, floors = np.array(volume.array), []
            for channel, bad in zip(array, is_bad, strict=True):
                floors.append(float(channel[~bad].min()) if not bad.all() else 0.0)
                channel[bad] = floors[-1]
            target = Path(name + (".nii.gz" if _suffix(source) in ("", *TWO_FILES) else _suffix(source)))
            write(replace(volume, array=array), folder / target)
            values = ", ".join(f"{v:g}" for v in floors)
            detail = f"{int(is_bad.sum())} voxels -> {values}, the smallest finite value of the channel"
            repairs.append(Repair(case.id, str(target), "NaN or infinity filled", detail))
            return target
    return _copy_file(case, source, folder, name, repairs)


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def _mend_label(case: Case, path: Path) -> tuple[LabelMap | None, list[tuple[str, str]]]:
    """The label as it should be and what was done to it; None where it must stay or needs nothing."""
    try:
        geometry = read(next(p for p in case.images if p is not None)).geometry
        label = read_label_file(path, geometry)
    except READ_ERRORS:
        return None, []
    if label.layered is not None:
        return None, []
    values, done = _mend_values(label)
    if values is None:
        return None, []
    mended, moved = _mend_grid(LabelMap(values, label.geometry), geometry)
    if not done and not moved:
        return None, []
    return mended, done + moved


def _mend_values(label: LabelFile) -> tuple[Array | None, list[tuple[str, str]]]:
    values, done = label.values, []
    if label.is_lossy:
        different = len(np.unique(values))
        cut = np.asarray(values >= 128).astype(np.uint8)
        return cut, [("cut at 128", f"{different} different values -> 0 and 1, {int(cut.sum())} voxels of 1")]
    if np.issubdtype(values.dtype, np.floating):
        bad = ~np.isfinite(values)
        if bad.any():
            values = np.where(bad, 0, values)
            done.append(("NaN or infinity made background", f"{int(bad.sum())} voxels -> 0"))
        rounded = np.round(values)
        if np.array_equal(rounded, values):
            before, values = values.dtype, _smallest(rounded)
            done.append(("stored as integers", f"{before} -> {values.dtype}"))
        elif values.min() >= 0 and values.max() <= 1:
            values = np.asarray(values >= 0.5).astype(np.uint8)
            done.append(("cut at 0.5", f"shares of a voxel -> 0 and 1, {int(values.sum())} voxels of 1"))
        else:
            return None, []
    return (values.astype(np.uint8) if values.dtype == bool else values), done


def _smallest(values: Array) -> Array:
    """Whole numbers in the smallest integer type that holds them."""
    low, high = float(values.min()), float(values.max())
    kinds = (np.uint8, np.uint16, np.int16, np.int32, np.int64)
    return values.astype(next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max))


def _mend_grid(labels: LabelMap, geometry: Geometry) -> tuple[LabelMap, list[tuple[str, str]]]:
    distance = labels.geometry.corner_distance(geometry)
    if distance <= GRID_TOLERANCE_MM:
        return labels, []
    if distance < SAME_GRID * min(geometry.spacing):
        detail = f"headers rounded apart by {distance:.3f} mm -> the image's header, voxels as they were"
        return replace(labels, geometry=geometry), [("put on the image's grid", detail)]
    moved = resample_to(labels, geometry)
    before = np.count_nonzero(labels.array) * labels.geometry.voxel_mm3
    after = np.count_nonzero(moved.array) * geometry.voxel_mm3
    if not after:
        return labels, []
    detail = f"resampled from {labels.geometry.shape} to {geometry.shape}, {before:.0f} mm3 -> {after:.0f} mm3"
    return moved, [("put on the image's grid", detail)]


# ---------------------------------------------------------------------------------------------------------------------
# What the folder says about itself


def _write_headers(dataset: Dataset, cases: Sequence[Case], folder: Path) -> None:
    header: dict[str, Any] = {"name": dataset.name, "numTraining": len(cases)}
    header["channel_names"] = {str(n): name for n, name in enumerate(dataset.channels)}
    if dataset.regions:
        header["labels"] = {"background": 0, **{name: list(labels) for name, labels in dataset.regions.items()}}
        header["regions_class_order"] = list(range(1, len(dataset.regions) + 1))
    elif dataset.labels is not None:
        names = list(dataset.labels.values())
        if len(set(names)) == len(names) and "background" not in names:
            header["labels"] = {"background": 0, **{name: n for n, name in dataset.labels.items()}}
        else:
            header["labels"] = {"0": "background", **{str(n): name for n, name in dataset.labels.items()}}
    if dataset.ignore is not None and "labels" in header:
        header["labels"].update(
            {"ignore": dataset.ignore} if "background" in header["labels"] else {str(dataset.ignore): "ignore"}
        )
    unknown = {c.id: list(c.unknown) for c in cases if c.unknown}
    header |= {"unknown": unknown} if unknown else {}
    endings = {_suffix(folder / p) for c in cases for p in (*c.images, c.label) if p is not None}
    if len(endings) == 1:
        header["file_ending"] = endings.pop()
    (folder / "dataset.json").write_text(json.dumps(header, indent=1, ensure_ascii=False), encoding="utf-8")
    splits = dataset.root / "splits_final.json"
    if splits.is_file():
        shutil.copyfile(splits, folder / splits.name)
    if any(c.group != c.id or c.label is None for c in cases):
        columns = ["image", *(f"image_{n}" for n in range(2, max(len(c.images) for c in cases) + 1))]
        with (folder / "cases.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["case", *columns, "label", "group"])
            writer.writerows([c.id, *(p or "" for p in c.images), c.label or "", c.group] for c in cases)
