"""The label maps of many cases: which files belong together, and what structures a data set names."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from medseg.dataset_json import declared_labels, read_header
from medseg.io import is_dicom, is_mask_folder, supported_suffix
from medseg.volume import LabelMap

__all__ = [
    "PROBABILITIES",
    "Source",
    "Sources",
    "case_id",
    "case_pairs",
    "declared_in",
    "declared_names",
    "format_rank",
    "is_made_up",
    "is_many",
    "paired",
    "sources",
]

Source = LabelMap | str | os.PathLike[str]
Sources = Source | Mapping[str, Source]
PROBABILITIES = "_probabilities"  # ends the names of files of probabilities, as predict writes them
FORMATS = ((".nii.gz", ".nii"), (".nrrd", ".nhdr"), (".mha", ".mhd"))  # the first that a case has is read
MASKS, PICTURE, SEG, RTSTRUCT, SOFT = range(len(FORMATS), len(FORMATS) + 5)  # then these
log = logging.getLogger("medseg")


def is_many(side: Sources) -> bool:
    if isinstance(side, LabelMap | Mapping):
        return isinstance(side, Mapping)
    return Path(side).is_dir() and not is_mask_folder(side)  # masks of one case are one side


def case_pairs(prediction: Sources, reference: Sources) -> dict[str, tuple[Source, Source]]:
    """Prediction and reference of the cases that both sides have, by case id."""
    if is_many(prediction) and is_many(reference):
        found = paired(sources(prediction, "prediction"), sources(reference, "reference"), True)
        return {case: pair for case, pair in found.items() if not isinstance(pair, str)}
    if isinstance(prediction, Mapping) or isinstance(reference, Mapping):
        raise TypeError(f"both sides must hold many cases, got {type(prediction)} and {type(reference)}")
    name = next((case_id(s) for s in (reference, prediction) if not isinstance(s, LabelMap)), "case")
    return {name: (prediction, reference)}


def case_id(path: str | os.PathLike[str]) -> str:
    """Name of a file without its suffix."""
    name = Path(path).absolute().name
    for suffix in (".rtstruct.dcm", ".seg.dcm", ".dcm", supported_suffix(path)):
        if suffix and name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def format_rank(path: Path) -> int:
    """Which of several files of one case is read: the lowest. NIfTI, NRRD, MetaImage, a folder of masks, a picture, a SEG,
    an RTSTRUCT, and last probabilities; -1 for what is no label map."""
    if path.is_dir():
        return MASKS if is_mask_folder(path) else -1
    suffix = supported_suffix(path)
    if not suffix:
        rank = RTSTRUCT if path.name.lower().endswith(".rtstruct.dcm") else SEG
        return rank if is_dicom(path) else -1
    if case_id(path).endswith(PROBABILITIES):
        return SOFT
    return next((n for n, suffixes in enumerate(FORMATS) if suffix in suffixes), PICTURE)


def sources(side: Sources, what: str) -> dict[str, Source]:
    """Label maps or files by case id; of a case in several formats the one that :func:`format_rank` says."""
    if isinstance(side, Mapping):
        return dict(side)
    if isinstance(side, LabelMap):
        raise TypeError(f"{what} must hold many cases, got one label map")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(p for p in Path(side).iterdir() if not p.name.startswith(".")):
        if (rank := format_rank(path)) < 0:
            continue
        case = case_id(path).removesuffix(PROBABILITIES) if rank == SOFT else case_id(path)
        own = found.setdefault(case, {})
        if rank in own:
            raise ValueError(f"case ids must be unique in a folder, got {own[rank].name} and {path.name} in {side}")
        own[rank] = path
    if not found:
        raise FileNotFoundError(f"{what} folder must hold label maps, got none in {side}")
    chosen: dict[str, Source] = {case: own[min(own)] for case, own in found.items()}
    unread = [p.name for own in found.values() for rank, p in own.items() if min(own) < rank < SOFT]
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        log.info("%s%s not read: %s holds these cases in another format", unread[0], more, side)
    return chosen


def declared_names(*sides: Sources) -> dict[int, str]:
    """Names of structures by number, from the dataset.json in the folder of label maps or the one above; else none.

    The first side that has one counts.
    """
    for side in sides:
        if isinstance(side, LabelMap | Mapping):
            continue
        folder = Path(side) if Path(side).is_dir() else Path(side).parent
        for root in (folder, folder.absolute().parent):
            if header := read_header(root):
                return declared_labels(header, root / "dataset.json").labels or {}
    return {}


def is_made_up(name: str, number: int) -> bool:
    """Whether a structure has this name only because no file names it."""
    return name == f"label {number}"


def declared_in(path: str | os.PathLike[str]) -> dict[int, str]:
    """Names of structures by number that a dataset.json declares.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it declares none.
    """
    path = Path(path)
    if path.name != "dataset.json" or not path.is_file():
        raise FileNotFoundError(f"structures must be declared by a dataset.json, got {path}; check the name")
    names = declared_labels(read_header(path.parent), path).labels
    if not names:
        raise ValueError(f'labels must be declared like {{"background": 0, "liver": 1}}, got none in {path}')
    return names


def paired(
    predictions: Mapping[str, Source], references: Mapping[str, Source], common_only: bool
) -> dict[str, tuple[Source, Source] | str]:
    """Prediction and reference by case id, or the reason why a case has none."""
    if not predictions.keys() & references.keys():
        ids = [next(iter(side), "none") for side in (predictions, references)]
        raise ValueError(f"predictions and references must share case ids, got {ids[0]!r} ... and {ids[1]!r} ...")
    pairs: dict[str, tuple[Source, Source] | str] = {}
    for case in sorted(predictions.keys() | references.keys()):
        if case in predictions and case in references:
            pairs[case] = predictions[case], references[case]
        elif not common_only:
            pairs[case] = f"{'prediction' if case in references else 'reference'} must exist for every case, got none"
    return pairs
