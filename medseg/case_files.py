"""The label maps of many cases: which files belong together, and how they are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from medseg.dataset_json import declared_labels, read_header
from medseg.io import is_dicom, is_mask_folder, read, read_labels, supported_suffix
from medseg.probability_maps import labels_of, layers_of
from medseg.volume import LabelMap

__all__ = [
    "Source",
    "Sources",
    "case_id",
    "case_pairs",
    "is_many",
    "paired",
    "read_pair",
    "read_probabilities",
    "sources",
]

Source = LabelMap | str | os.PathLike[str]
Sources = Source | Mapping[str, Source]
SOFT = "_probabilities"  # ends the names of files of probabilities, as predict writes them


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


def read_pair(prediction: Source, reference: Source) -> tuple[LabelMap, LabelMap]:
    """Both label maps; SEG and RTSTRUCT objects are put on the grid of the other side."""
    gridless = [_takes_a_grid(source) for source in (prediction, reference)]
    if gridless == [False, True]:
        p = _read_prediction(prediction)[0]
        return p, _read(reference, p)
    r = _read(reference)
    return _read_prediction(prediction, r if gridless[0] else None)[0], r


def read_probabilities(prediction: Source) -> LabelMap | None:
    """The probabilities behind a prediction, one float layer per structure, where there is a file of them.

    That is the file itself, or ``<case>_probabilities.nii.gz`` beside it. Layers in a file of overlapping structures, or
    a LabelMap, hold their probabilities themselves: None.
    """
    if isinstance(prediction, LabelMap) or is_dicom(prediction):
        return None
    beside = Path(prediction).with_name(f"{case_id(prediction)}{SOFT}.nii.gz")
    if beside.is_file():
        labels, soft = _read_prediction(beside)
        return labels if soft is None and labels.is_layered else soft
    return _read_prediction(prediction)[1]


def _takes_a_grid(source: Source) -> bool:
    return not isinstance(source, LabelMap) and is_dicom(source) and not is_mask_folder(source)


def _read(source: Source, like: LabelMap | None = None) -> LabelMap:
    return source if isinstance(source, LabelMap) else read_labels(source, like=like)


def _read_prediction(source: Source, like: LabelMap | None = None) -> tuple[LabelMap, LabelMap | None]:
    """The label map, and the probabilities where the file is an image of these."""
    try:
        return _read(source, like), None
    except ValueError:
        if isinstance(source, LabelMap) or is_dicom(source) or not Path(source).is_file():
            raise
        image = read(source)
        inside = image.array.dtype.kind == "f" and image.array.min() > -1e-6 and image.array.max() < 1 + 1e-6
        if not inside:
            raise
    return labels_of(image), layers_of(image)


def case_id(path: str | os.PathLike[str]) -> str:
    """Name of a file without its suffix."""
    name = Path(path).name
    for suffix in (".rtstruct.dcm", ".seg.dcm", ".dcm", supported_suffix(path)):
        if suffix and name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def sources(side: Sources, what: str) -> dict[str, Source]:
    """Label maps or files by case id."""
    if isinstance(side, Mapping):
        return dict(side)
    if isinstance(side, LabelMap):
        raise TypeError(f"{what} must hold many cases, got one label map")
    kinds: tuple[dict[str, Source], ...] = ({}, {}, {})  # label maps before DICOM objects before probabilities
    for path in sorted(p for p in Path(side).iterdir() if not p.name.startswith(".")):
        is_image = is_mask_folder(path) if path.is_dir() else bool(supported_suffix(path))
        if not is_image and (path.is_dir() or not is_dicom(path)):
            continue
        case = case_id(path)
        is_soft = is_image and case.endswith(SOFT)
        group, case = kinds[2 if is_soft else 0 if is_image else 1], case.removesuffix(SOFT) if is_soft else case
        if case in group:
            names = f"{Path(str(group[case])).name} and {path.name}"
            raise ValueError(f"case ids must be unique in a folder, got {names} in {side}")
        group[case] = path
    found = {**kinds[2], **kinds[1], **kinds[0]}
    if not found:
        raise FileNotFoundError(f"{what} folder must hold label maps, got none in {side}")
    return found


def declared_names(side: Sources) -> dict[int, str]:
    """Names of structures by number, from the dataset.json in the folder of label maps or the one above; else none."""
    if isinstance(side, LabelMap | Mapping):
        return {}
    folder = Path(side) if Path(side).is_dir() else Path(side).parent
    for root in (folder, folder.absolute().parent):
        if header := read_header(root):
            return declared_labels(header, root / "dataset.json").labels or {}
    return {}


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
