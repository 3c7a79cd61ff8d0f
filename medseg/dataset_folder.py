"""Data sets in folders: pairs of files of the same name, Decathlon, nnU-Net."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg.cases import SUFFIXES, Case, Dataset, some, stem
from medseg.dataset_json import declared_channels, declared_labels, declared_unknown, path_inside, read_header
from medseg.io import is_mask_folder

__all__ = ["dataset_of_folder"]

IMAGE_FOLDERS = ("images", "imagestr")
LABEL_FOLDERS = ("labels", "masks", "labelstr")
CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net names channel files case_0000, case_0001


def dataset_of_folder(root: Path) -> Dataset:
    """The cases of a folder, unsorted."""
    images, labels = _subfolder(root, IMAGE_FOLDERS), _subfolder(root, LABEL_FOLDERS)
    if images is None:
        raise ValueError(
            f"data set must be a folder with images/ (or imagesTr/) and labels/, got {root} without; "
            "or list the files in a CSV with columns case,image,label"
        )
    header, path = read_header(root), root / "dataset.json"
    if "training" in header:
        cases = list(_listed(root, header["training"]))
    else:
        cases = list(_paired(images, labels, has_channels=path.is_file() or images.name.lower() == "imagestr"))
    declared = declared_labels(header, path)
    unknown = declared_unknown(header, declared.labels, path)
    strangers = sorted(set(unknown) - {c.id for c in cases})
    if strangers and not header.get("contoured"):  # that list may cover more than is at hand
        raise ValueError(f"unknown must name cases of the set, got {some(strangers)} in {path}; correct it")
    cases, channels = _complete(cases, declared_channels(header, path), images)
    return Dataset(
        name=str(header.get("name") or root.resolve().name),
        root=root,
        cases=tuple(replace(c, unknown=unknown.get(c.id, ())) for c in cases),
        channels=channels,
        labels=declared.labels,
        regions=declared.regions,
        ignore=declared.ignore,
    )


def _complete(
    cases: Sequence[Case], channels: tuple[str, ...] | None, folder: Path
) -> tuple[list[Case], tuple[str, ...]]:
    """Cases with one image per channel, None for those they lack, and the names of the channels."""
    most = max((len(c.images) for c in cases), default=1)
    have = {n for c in cases for n, p in enumerate(c.images) if p is not None}
    if channels is None:
        channels = ("image",) if most == 1 else tuple(f"channel {n}" for n in range(most))
    single = [c for c in cases if len(c.images) == 1 and not _is_channel(c)]
    wrong = [c for c in cases if c not in single and len(c.images) > len(channels)]
    wrong += single if len(single) < len(cases) and len(channels) > 1 else []
    if wrong or (len(single) < len(cases) and have != set(range(len(channels)))):
        case = wrong[0] if wrong else cases[0]
        raise ValueError(
            f"every channel of {list(channels)} must have image files, and every case files of these channels alone, "
            f"got {len(case.images)} for {case.id!r} in {folder}; add, rename or remove files"
        )
    full = [
        c if c in single else replace(c, images=c.images + (None,) * (len(channels) - len(c.images))) for c in cases
    ]
    return full, channels


def _is_channel(case: Case) -> bool:
    """Whether the one image of a case is named as channel 0 of it."""
    path = case.images[0]
    match = CHANNEL.fullmatch(stem(path.name)) if path is not None else None
    return bool(match and match[2] == "0000" and not case.id.endswith("_0000"))


def _by_channel(paths: Iterable[Path]) -> tuple[Path | None, ...]:
    """Channel files in their order, None where a number is left out; other files as they are."""
    found = {int(m[2]): p for p in sorted(paths) if (m := CHANNEL.fullmatch(stem(p.name)))}
    return tuple(found.get(n) for n in range(max(found) + 1))


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
    files = _files(images)
    names = {*files, *(m[1] for name in files if (m := CHANNEL.fullmatch(name)))}
    label_of = _files(labels, names) if labels else {}
    channels_of: dict[str, list[Path]] = defaultdict(list)
    numbered = set()
    for name, path in files.items():
        match = CHANNEL.fullmatch(name)
        if match and (match[1] in label_of or (has_channels and name not in label_of)):
            numbered.add(name := match[1])
        channels_of[name].append(path)
    if labels:
        _require_pairs(channels_of.keys(), label_of.keys(), images, labels)
    short = [n.rsplit("/", 1)[-1] for n in channels_of]
    is_unique = len(set(short)) == len(short)
    for name, paths in channels_of.items():
        case = name.rsplit("/", 1)[-1] if is_unique else name.replace("/", "_")
        yield Case(case, _by_channel(paths) if name in numbered else tuple(paths), label_of.get(name), case)


def _files(folder: Path, images: Container[str] | None = None) -> dict[str, Path]:
    """Image files, or label files of named images, by relative name without suffix; hidden files are passed over.

    A folder of a DICOM series is one image; a folder of masks ``<number>_<name>``, named as an image, is one label.
    """
    found: dict[str, Path] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(d for d in folders if not d.startswith("."))
        base = Path(parent)
        if images is None:
            is_one = base != folder and any(n.lower().endswith(".dcm") for n in names)
        else:
            is_one = base.relative_to(folder).as_posix() in images and is_mask_folder(base)
        if is_one:
            paths, folders[:] = [base], []
        else:
            suffixes = SUFFIXES if images is None else (*SUFFIXES, ".dcm")
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
            f"every image must have a label of the same name in {label_folder}, got none for {some(without_label)}; "
            "add them, or list the cases in a CSV where a label may stay empty"
        )
    if without_image:
        raise FileNotFoundError(
            f"every label must have an image of the same name in {image_folder}, got none for {some(without_image)}; "
            "add the images or remove the labels"
        )


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
        images: tuple[Path | None, ...] = (image,)
        if not image.exists():  # nnU-Net version 1 lists case.nii.gz for the files case_0000.nii.gz, case_0001.nii.gz
            base = stem(image.name)
            siblings = sorted(image.parent.iterdir()) if image.parent.is_dir() else []
            parts = [p for p in siblings if (m := CHANNEL.fullmatch(stem(p.name))) and m[1] == base]
            images = _by_channel(parts) if parts else ()
        missing += [str(entry["image"])] if not images else []
        missing += [str(entry["label"])] if not label.exists() else []
        case = stem(image.name)
        yield Case(case, images, label, case)
    if missing:
        raise FileNotFoundError(
            f"files listed in {root / 'dataset.json'} must exist, got none for {some(missing)}; "
            "add them or remove them from the list"
        )
