"""Data sets: which files belong to which subject, and how subjects are split.

A data set is a folder with ``images/`` and ``labels/``, a Decathlon or nnU-Net folder (``imagesTr``, ``labelsTr``,
``dataset.json``), or a CSV. Nothing here opens an image: :func:`medseg.check` looks inside.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.dataset_json import declared_channels, declared_labels, path_inside, read_header

__all__ = ["Case", "Dataset", "folds", "labelled_folds", "load_dataset"]

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
IMAGE_FOLDERS = ("images", "imagestr")
LABEL_FOLDERS = ("labels", "masks", "labelstr")
CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net names channel files case_0000, case_0001


@dataclass(frozen=True)
class Case:
    """One subject of a data set.

    Parameters
    ----------
    id : str
        Unique in the data set; fit for a file name.
    images : tuple of Path
        One file per channel, in the order of the channels; or one file (or DICOM folder) that holds them all.
    label : Path or None
        The reference label map, None where there is none.
    group : str
        Cases of one group (patient) stay together when the set is split; the id where nothing is known.
    unknown : tuple of int
        Labels that nobody drew in this case: where the label file does not hold them they are unknown, not absent.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    group: str
    unknown: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Cases sorted by id, with what the data set declares about them.

    Parameters
    ----------
    name : str
        Its own name, else the name of the folder or CSV.
    root : Path
        The folder that holds it.
    cases : tuple of Case
        Sorted by id.
    channels : tuple of str
        Names of the image channels ("CT", "FLAIR", ...), "image" where nothing is declared.
    labels : mapping of int to str, or None
        Declared structures by number, without the background; None where nothing is declared.
    """

    name: str
    root: Path
    cases: tuple[Case, ...]
    channels: tuple[str, ...] = ("image",)
    labels: Mapping[int, str] | None = None


def load_dataset(path: str | os.PathLike[str], *, group: str | None = None) -> Dataset:
    """Find the cases of a data set.

    Parameters
    ----------
    path : path
        A folder with ``images/`` and ``labels/`` (also ``masks/``, ``imagesTr``/``labelsTr``; sub-folders are searched;
        a folder of .dcm files counts as one image), with or without the ``dataset.json`` of the Medical Segmentation
        Decathlon or of nnU-Net; or a CSV with columns ``case,image[,image_2...][,label][,group]`` and paths relative
        to the CSV.
    group : str, optional
        Regular expression with one capture group that finds the patient in the id of a case, so that cases of one
        patient stay on one side of a split: ``"(.+?)-IM-"``. Goes before the column ``group`` of a CSV.

    Returns
    -------
    Dataset
        At least one case. A folder without labels gives cases whose label is None.

    Raises
    ------
    FileNotFoundError
        If the path, an image or a label is missing; the message names the files.
    ValueError
        If the folder is of no known layout, two cases share an id, or ``dataset.json``, the CSV or ``group`` is wrong.

    Notes
    -----
    Only file names are looked at: the cost grows with the number of files, not with their size.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data set must exist, got {path}; check the path")
    dataset = _from_folder(path) if path.is_dir() else _from_csv(path)
    if not dataset.cases:
        raise ValueError(f"data set must hold at least one case, got none in {path}")
    _require_distinct(dataset.cases)
    cases = dataset.cases if group is None else _grouped(dataset.cases, group)
    return replace(dataset, cases=tuple(sorted(cases, key=lambda c: c.id)))


def folds(cases: Iterable[Case], k: int = 5, seed: int = 12345) -> list[tuple[tuple[Case, ...], tuple[Case, ...]]]:
    """Split cases into k folds: each case is in the validation part of exactly one.

    Parameters
    ----------
    cases : iterable of Case
        In any order: they are sorted by id first.
    k : int
        Number of folds, at least 2.
    seed : int
        Of the shuffle. Where every case is a group of its own the folds are those of scikit-learn's
        ``KFold(k, shuffle=True, random_state=seed)`` on the sorted ids, as in nnU-Net, so that results compare.
        Otherwise shuffled groups are dealt, largest first, to the fold that has the fewest cases yet.

    Returns
    -------
    list of (train, validation)
        Tuples of cases sorted by id; no group is on both sides.

    Raises
    ------
    ValueError
        If k is below 2 or above the number of groups.
    """
    ordered = sorted(cases, key=lambda c: c.id)
    groups = sorted({c.group for c in ordered})
    if not 2 <= k <= len(groups):
        raise ValueError(
            f"number of folds must be between 2 and the number of groups ({len(groups)}), got {k}; "
            "use fewer folds or more patients"
        )
    generator = np.random.RandomState(seed)  # scikit-learn's folds need the legacy generator
    order = np.arange(len(groups))
    generator.shuffle(order)
    size = Counter(c.group for c in ordered)
    fold_of: dict[str, int] = {}
    if len(groups) == len(ordered):
        by_id = [c.group for c in ordered]
        for fold, part in enumerate(np.array_split(order, k)):
            fold_of.update((by_id[i], fold) for i in part)
    else:
        counts = [0] * k
        for name in sorted((groups[i] for i in order), key=lambda g: -size[g]):
            fold = counts.index(min(counts))
            fold_of[name] = fold
            counts[fold] += size[name]
    return [
        (
            tuple(c for c in ordered if fold_of[c.group] != fold),
            tuple(c for c in ordered if fold_of[c.group] == fold),
        )
        for fold in range(k)
    ]


def labelled_folds(dataset: Dataset, k: int = 5) -> list[tuple[tuple[Case, ...], tuple[Case, ...]]]:
    """The folds of the cases that have a label: see :func:`folds`."""
    return folds([c for c in dataset.cases if c.label is not None], k)


def stem(name: str) -> str:
    """A file name without its image suffix (".nii.gz" counts as one)."""
    lower = name.lower()
    return next((name[: -len(s)] for s in (*SUFFIXES, ".dcm") if lower.endswith(s)), name)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _from_folder(root: Path) -> Dataset:
    images, labels = _subfolder(root, IMAGE_FOLDERS), _subfolder(root, LABEL_FOLDERS)
    if images is None:
        raise ValueError(
            f"data set must be a folder with images/ (or imagesTr/) and labels/, got {root} without; "
            "or list the files in a CSV with columns case,image,label"
        )
    header = read_header(root / "dataset.json")
    channels = declared_channels(header, root / "dataset.json")
    if "training" in header:
        cases = list(_listed(root, header["training"]))
    else:
        cases = list(_paired(images, labels, has_channels=bool(header) or images.name.lower() == "imagestr"))
    counts = {len(c.images) for c in cases}
    if channels is None:
        most = max(counts, default=1)
        channels = ("image",) if most == 1 else tuple(f"channel {n}" for n in range(most))
    for case in cases:
        if len(case.images) not in (1, len(channels)) or len(counts) > 1:
            raise ValueError(
                f"every case must have one image file per channel {list(channels)}, got {len(case.images)} for "
                f"{case.id!r} in {images}; add the missing files"
            )
    return Dataset(
        name=str(header.get("name") or root.resolve().name),
        root=root,
        cases=tuple(cases),
        channels=channels,
        labels=declared_labels(header.get("labels"), root / "dataset.json"),
    )


def _subfolder(root: Path, names: Sequence[str]) -> Path | None:
    found = sorted(p for p in root.iterdir() if p.is_dir() and p.name.lower() in names)
    if len(found) > 1:
        raise ValueError(
            f"data set must have one folder of {', '.join(names)}, got {[p.name for p in found]} in {root}; "
            "move one away, or list the files in a CSV"
        )
    return found[0] if found else None


def _paired(images: Path, labels: Path | None, has_channels: bool) -> Iterator[Case]:
    """Cases of images and labels of the same relative name, sub-folders searched."""
    label_of = _files(labels, is_image=False) if labels else {}
    channels_of: dict[str, list[Path]] = defaultdict(list)
    for name, path in _files(images, is_image=True).items():
        match = CHANNEL.fullmatch(name)
        is_channel = match and (match[1] in label_of or (has_channels and name not in label_of))
        channels_of[match[1] if match and is_channel else name].append(path)
    if labels:
        _require_pairs(channels_of.keys(), label_of.keys(), images, labels)
    short = [n.rsplit("/", 1)[-1] for n in channels_of]
    is_unique = len(set(short)) == len(short)
    for name, paths in channels_of.items():
        case = name.rsplit("/", 1)[-1] if is_unique else name.replace("/", "_")
        yield Case(case, tuple(sorted(paths)), label_of.get(name), case)


def _files(folder: Path, is_image: bool) -> dict[str, Path]:
    """Image or label files below a folder by relative name without suffix; hidden files are passed over."""
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(d for d in folders if not d.startswith("."))
        base = Path(parent)
        if is_image and base != folder and any(n.lower().endswith(".dcm") for n in names):
            paths, folders[:] = [base], []  # a DICOM series is one image
        else:
            suffixes = SUFFIXES if is_image else (*SUFFIXES, ".dcm")
            paths = [base / n for n in sorted(names) if n.lower().endswith(suffixes) and not n.startswith(".")]
        for path in paths:
            relative = path.relative_to(folder)
            key = (relative.parent / (relative.name if path == base else stem(path.name))).as_posix()
            if key in found:
                raise ValueError(
                    f"two cases must not share one id, got {found[key]} and {path} for {key!r}; rename or remove one"
                )
            found[key] = path
    return found


def _require_pairs(images: Iterable[str], labels: Iterable[str], image_folder: Path, label_folder: Path) -> None:
    without_label, without_image = sorted(set(images) - set(labels)), sorted(set(labels) - set(images))
    if without_label:
        raise FileNotFoundError(
            f"every image must have a label of the same name in {label_folder}, got none for {_some(without_label)}; "
            "add them, or list the cases in a CSV where a label may stay empty"
        )
    if without_image:
        raise FileNotFoundError(
            f"every label must have an image of the same name in {image_folder}, got none for {_some(without_image)}; "
            "add the images or remove the labels"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The list in dataset.json


def _listed(root: Path, entries: Any) -> Iterator[Case]:
    """Cases of the list "training" of a Decathlon folder."""
    if not isinstance(entries, list):
        raise ValueError(
            f"training must be a list, got {type(entries).__name__} in {root / 'dataset.json'}; correct it"
        )
    missing: list[str] = []
    for entry in entries:
        if not isinstance(entry, dict) or "image" not in entry or "label" not in entry:
            raise ValueError(
                f"each training case must be an object with image and label, got {entry!r} in {root / 'dataset.json'}"
            )
        image, label = path_inside(root, entry["image"]), path_inside(root, entry["label"])
        images = [image]
        if not image.exists():  # nnU-Net version 1 lists case.nii.gz for the files case_0000.nii.gz, case_0001.nii.gz
            base = stem(image.name)
            siblings = sorted(image.parent.iterdir()) if image.parent.is_dir() else []
            images = [p for p in siblings if (m := CHANNEL.fullmatch(stem(p.name))) and m[1] == base]
        missing += [str(entry["image"])] if not images else []
        missing += [str(entry["label"])] if not label.exists() else []
        case = stem(image.name)
        yield Case(case, tuple(images), label, case)
    if missing:
        raise FileNotFoundError(
            f"files listed in {root / 'dataset.json'} must exist, got none for {_some(missing)}; "
            "add them or remove them from the list"
        )


# ---------------------------------------------------------------------------------------------------------------------
# CSV


def _from_csv(path: Path) -> Dataset:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data set must be a folder or a CSV in UTF-8, got {path}; save it as UTF-8") from error
    first = text.partition("\n")[0]
    reader = csv.DictReader(text.splitlines(), delimiter=";" if "," not in first and ";" in first else ",")
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    columns = _image_columns(reader.fieldnames, path)
    cases, missing = [], []
    for number, raw in enumerate(reader, start=2):
        row = {k: (v or "").strip() for k, v in raw.items() if k and not isinstance(v, list)}
        if None in raw or not row["case"] or not all(row[c] for c in columns):
            raise ValueError(
                f"each row must fill {', '.join(('case', *columns))} and no more columns than the header has, "
                f"got row {number} of {path}; correct it"
            )
        images = tuple(path.parent / row[c] for c in columns)
        label = path.parent / row["label"] if row.get("label") else None
        missing += [str(p) for p in (*images, label) if p is not None and not p.exists()]
        cases.append(Case(row["case"], images, label, row.get("group") or row["case"]))
    if missing:
        raise FileNotFoundError(
            f"files listed in {path} must exist, got none for {_some(missing)}; paths are relative to the CSV"
        )
    return Dataset(name=path.stem, root=path.parent, cases=tuple(cases), channels=tuple(columns))


def _image_columns(header: Sequence[str], path: Path) -> list[str]:
    columns = sorted((c for c in header if re.fullmatch(r"image(_\d+)?", c)), key=lambda c: int(c[6:] or 1))
    unknown = sorted(set(header) - {"case", "label", "group", *columns})
    if "case" not in header or "image" not in columns or unknown or len(set(header)) < len(header):
        raise ValueError(
            f"columns must be case,image[,image_2...][,label][,group], got {','.join(header) or 'none'} in {path}; "
            "rename or remove the others"
        )
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Checks on all layouts


def _require_distinct(cases: Iterable[Case]) -> None:
    first: dict[str, Case] = {}
    for case in cases:
        if not case.id or "/" in case.id or "\\" in case.id or case.id in (".", ".."):
            raise ValueError(f"id of a case must be fit for a file name, got {case.id!r}; rename it")
        other = first.setdefault(case.id, case)
        if other is not case:
            raise ValueError(
                f"two cases must not share one id, got {other.images[0]} and {case.images[0]} for {case.id!r}; "
                "rename one"
            )


def _grouped(cases: Iterable[Case], pattern: str) -> list[Case]:
    """Cases with the group that the pattern finds in their ids."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"group must be a regular expression, got {pattern!r} ({error}); correct it") from error
    if expression.groups != 1:
        raise ValueError(
            f"group must have one capture group, got {expression.groups} in {pattern!r}; "
            "put brackets around the part that names the patient"
        )
    matches = {c.id: expression.search(c.id) for c in cases}
    unmatched = sorted(i for i, m in matches.items() if not m or not m[1])
    if unmatched:
        raise ValueError(f"group {pattern!r} must match every case, got no match for {_some(unmatched)}; widen it")
    return [replace(c, group=m[1]) for c in cases if (m := matches[c.id])]


def _some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
