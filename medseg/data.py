"""Data sets: which files belong to which subject, what is declared about them, and how subjects are split.

A data set is a folder with ``images/`` and ``labels/``, a Decathlon or nnU-Net folder (``imagesTr``, ``labelsTr``,
``dataset.json``), or a CSV. Nothing here opens an image, but :func:`mark_absent` the labels: :func:`medseg.check`
looks inside.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from medseg.cases import Case, Dataset, some
from medseg.dataset_csv import dataset_of_csv
from medseg.dataset_folder import dataset_of_folder
from medseg.io import is_dicom, is_mask_folder, read_channels, read_labels
from medseg.volume import LabelMap, Volume, present_labels

__all__ = [
    "Case", "Dataset", "folds", "labelled_folds", "load_dataset", "mark_absent", "read_case_labels", "read_reference",
]  # fmt: skip


def load_dataset(
    path: str | os.PathLike[str],
    *,
    group: str | None = None,
    absent: Literal["background", "unknown"] = "background",
) -> Dataset:
    """Find the cases of a data set.

    Parameters
    ----------
    path : path
        A folder with ``images/`` and ``labels/`` (also ``masks/``, ``imagesTr``/``labelsTr``; sub-folders are searched;
        a folder of .dcm files counts as one image), with or without the ``dataset.json`` of the Medical Segmentation
        Decathlon or of nnU-Net; or a CSV with columns ``case,image[,image_2...][,label][,group][,unknown]`` and paths
        relative to the CSV, with or without a ``dataset.json`` beside it that names channels and labels.
    group : str, optional
        Regular expression with one capture group that finds the patient in the id of a case, so that cases of one
        patient stay on one side of a split: ``"(.+?)-IM-"``. Goes before the column ``group`` of a CSV.
    absent : "background" or "unknown"
        What a label means that a case does not hold: that there is nothing of it, or that nobody drew it there
        (:func:`mark_absent`, which reads every label file).

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
    Labels may be partial: the column ``unknown`` (numbers or names, separated by ";"), or the key "unknown" of
    ``dataset.json`` ({"case": [numbers or names]}), says what nobody drew in a case. A channel may be missing: an empty
    cell of the CSV, or no file ``case_0001`` where other cases have one. A label may be a folder of masks
    ``<number>_<name>.nii.gz``, as ``medseg convert --split`` writes them.

    Only file names are looked at unless ``absent`` is "unknown": the cost grows with the number of files.
    """
    if absent not in ("background", "unknown"):
        raise ValueError(f"absent must be 'background' or 'unknown', got {absent!r}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"data set must exist, got {path}; check the path")
    dataset = dataset_of_folder(path) if path.is_dir() else dataset_of_csv(path)
    if not dataset.cases:
        raise ValueError(f"data set must hold at least one case, got none in {path}")
    _require_distinct(dataset.cases)
    cases = dataset.cases if group is None else _grouped(dataset.cases, group)
    dataset = replace(dataset, cases=tuple(sorted(cases, key=lambda c: c.id)))
    return mark_absent(dataset) if absent == "unknown" else dataset


def mark_absent(
    dataset: Dataset, *, workers: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Dataset:
    """The same data set, where every label that a case's file does not hold is unknown in that case.

    Parameters
    ----------
    dataset : Dataset
        Its declared labels count, and those that any of its cases holds.
    workers : int, optional
        Threads, by default one per CPU up to 8; each holds one label map at a time.
    progress : callable, optional
        Called with the number of cases done and their total.

    Raises
    ------
    ValueError, OSError
        If a label file cannot be read.

    Notes
    -----
    Reads every label file once and keeps only the numbers found: time grows with bytes.
    """
    labelled = [c for c in dataset.cases if c.label is not None]
    present: dict[str, set[int]] = {}
    pool = ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1))
    try:
        for case, numbers in zip(labelled, pool.map(_numbers_in, labelled), strict=True):
            present[case.id] = numbers
            if progress:
                progress(len(present), len(labelled))
    finally:
        pool.shutdown(cancel_futures=True)
    every = set(dataset.labels or ()).union(*present.values()) - {0, dataset.ignore}
    cases = (
        replace(c, unknown=tuple(sorted({*c.unknown, *(every - present[c.id])}))) if c.id in present else c
        for c in dataset.cases
    )
    return replace(dataset, cases=tuple(cases))


def _numbers_in(case: Case) -> set[int]:
    image = next(p for p in case.images if p is not None)
    needs_image = case.label is not None and _is_placed_on_image(case.label)
    labels = read_case_labels(case, read_channels([image]) if needs_image else None)
    if labels.is_layered:
        return {s.number for s, layer in zip(labels.structures, labels.array, strict=True) if layer.any()}
    return set(present_labels(labels.array))


def read_case_labels(case: Case, image: Volume | None = None) -> LabelMap:
    """Read the label map of a case, on the grid of its image where one is given: see :func:`read_reference`.

    Raises
    ------
    ValueError
        If the case has no label, or its grid is not the image's (GeometryError).
    """
    if case.label is None:
        raise ValueError(f"case must have a label, got none for {case.id}")
    return read_reference(case.label, image, case.id)


def read_reference(path: str | os.PathLike[str], image: Volume | None, case: str) -> LabelMap:
    """Read a label map on the grid of its image.

    Parameters
    ----------
    path : path
        A file, a DICOM-SEG or RTSTRUCT, or a folder of masks.
    image : Volume or None
        Its image, on whose grid the labels must lie; a SEG or RTSTRUCT is put on it. Without it every label map keeps
        the grid of its file.
    case : str
        For messages.

    Raises
    ------
    GeometryError
        If its grid is not the image's.
    """
    labels = read_labels(path, like=image if _is_placed_on_image(Path(path)) else None)
    if image is None:
        return labels
    image.geometry.require_close(labels.geometry, f"label map and image of case {case}")
    return replace(labels, geometry=image.geometry)


def _is_placed_on_image(label: Path) -> bool:
    return is_dicom(label) and not is_mask_folder(label)


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
        raise ValueError(f"group {pattern!r} must match every case, got no match for {some(unmatched)}; widen it")
    return [replace(c, group=m[1]) for c in cases if (m := matches[c.id])]
