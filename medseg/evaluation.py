"""Evaluation of predictions on files, folders or label maps: rows per case and structure, a summary with intervals."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.calibration import probability_scores
from medseg.io import is_dicom, read_labels, supported_suffix
from medseg.lesions import Lesions, match_lesions
from medseg.metrics import Missing, structure_scores
from medseg.resample import resample_to
from medseg.scores import COLUMNS, ON_DEMAND, VOLUMES, Evaluation, Row
from medseg.surface import Definition
from medseg.volume import LabelMap, Structure, union

__all__ = [
    "Evaluation",
    "Lesions",
    "Surface",
    "aligned_pair",
    "case_id",
    "case_pairs",
    "evaluate",
    "read_pair",
    "score_case",
]

Source = LabelMap | str | os.PathLike[str]
Sources = Source | Mapping[str, Source]

MOST_WORKERS = 8  # cases scored at a time, one per processor; each holds its two label maps in memory


@dataclass(frozen=True)
class Surface:
    """How surface distances are measured: see :func:`medseg.metrics.surface_scores`."""

    definition: Definition = "voxel"
    missing: Missing = "diagonal"


def evaluate(
    prediction: Sources,
    reference: Sources,
    *,
    structures: Mapping[int, str] | Sequence[int | str] | None = None,
    tolerance_mm: float = 1.0,
    surface: bool | Surface = True,
    lesions: bool | Lesions = False,
    labels_present: bool = False,
    resample: bool = False,
    common_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare predictions with references, in mm, on the grid of the reference.

    Parameters
    ----------
    prediction, reference : LabelMap, path, or mapping of case id to these
        Two label maps or files (NIfTI, NRRD, MHA, PNG, DICOM-SEG, RTSTRUCT), or two folders of such files, which are
        matched by case id, the file name without its suffix; a SEG or RTSTRUCT beside an image file of the same id is
        not read.
    structures : mapping of number to name, or sequence of numbers or names, optional
        What to score; all structures of either label map by default. Structures are matched by name where each name of
        the prediction is also one of the reference, else by number.
    tolerance_mm : float (mm)
        Tolerance of the normalised surface Dice.
    surface : bool or Surface
        Whether, and by which definition, to measure surface distances.
    lesions : bool or Lesions
        Whether, and by which rule, to count the lesions (connected components) of each structure that were found. Where
        a prediction holds probabilities (float layers), soft Dice, Brier score and calibration error are measured too.
    labels_present : bool
        Score in each case only the structures that its reference holds (partially labelled references).
    resample : bool
        Put predictions on another grid onto that of the reference, instead of refusing them.
    common_only : bool
        Leave out cases that only one side has, instead of listing them as failed.
    progress : callable, optional
        Called with the number of cases done and of all cases.

    Returns
    -------
    Evaluation
        Its ``write(folder)`` makes metrics.json and metrics.csv. In a folder or mapping, a case that fails is a row with
        its reason and the others go on.

    Raises
    ------
    ValueError
        If two folders share no case, or the one pair given cannot be compared (GeometryError where the grids differ or,
        for surface distances, are skewed).
    FileNotFoundError
        If there is no such file or folder.
    """
    how = Surface() if surface is True else surface or None

    def score(case: str, pair: tuple[Source, Source]) -> list[Row]:
        p, r = read_pair(*pair)
        return score_case(
            case, p, r, structures=structures, tolerance_mm=tolerance_mm, surface=how or False, lesions=lesions,
            labels_present=labels_present, resample=resample,
        )  # fmt: skip

    if _is_many(prediction) and _is_many(reference):
        pairs = _pairs(_sources(prediction, "prediction"), _sources(reference, "reference"), common_only)
        rows = _score_all(pairs, score, progress)
        _named_alike(rows)
        result = Evaluation(tuple(rows if labels_present else _completed(rows)))
    else:
        ((name, pair),) = case_pairs(prediction, reference).items()
        result = Evaluation(tuple(score(name, pair)))
    return result


def score_case(
    case: str,
    prediction: LabelMap,
    reference: LabelMap,
    *,
    structures: Mapping[int, str] | Sequence[int | str] | None = None,
    tolerance_mm: float = 1.0,
    surface: bool | Surface = False,
    lesions: bool | Lesions = False,
    labels_present: bool = False,
    known: Collection[int] | None = None,
    resample: bool = False,
) -> list[Row]:
    """Rows of one case, one per structure: see :func:`evaluate`.

    ``known`` are the numbers of the structures that somebody drew in the reference: no other is scored, and one of them
    that the reference does not hold is truly absent. All are known by default.

    Raises
    ------
    GeometryError
        If the grids differ (unless ``resample``), or surface distances are asked for on a skewed grid.
    """
    prediction, reference = aligned_pair(case, prediction, reference, resample)
    what, grid = f"prediction and reference of {case}", reference.geometry
    how = Surface() if surface is True else surface
    if how:
        grid.require_straight(f"{what}, for surface distances,")
    wanted = _chosen(prediction, reference, structures, labels_present)
    wanted = wanted if known is None else [s for s in wanted if s.number in known]
    options: dict[str, Any] = {"tolerance_mm": tolerance_mm, "surface": bool(how)}
    if how:
        options.update(definition=how.definition, missing=how.missing)
    spacing = grid.spacing if how else (1.0, 1.0, grid.voxel_mm3)  # without distances, also right on skewed grids
    numbers = [s.number for s in wanted]
    if not prediction.is_layered and not reference.is_layered:
        scores = structure_scores(prediction.array, reference.array, numbers, spacing, **options)
    else:
        pairs = ((_mask(prediction, n), _mask(reference, n)) for n in numbers)
        scores = [structure_scores(p, r, [1], spacing, **options)[0] for p, r in pairs]
    scores = [dict(score) for score in scores]
    rule = Lesions() if lesions is True else lesions
    for number, score in zip(numbers, scores, strict=True):
        if rule:
            masks = (_mask(prediction, number), _mask(reference, number))
            score.update(match_lesions(*masks, spacing, rule).scores())
        if prediction.is_layered and prediction.array.dtype != bool and number in prediction.names:
            layer = [s.number for s in prediction.structures].index(number)
            score.update(probability_scores(prediction.array[layer][None], _mask(reference, number)[None])[0])
    return [_row(case, s, score) for s, score in zip(wanted, scores, strict=True)]


def aligned_pair(
    case: str, prediction: LabelMap, reference: LabelMap, resample: bool = False
) -> tuple[LabelMap, LabelMap]:
    """The prediction with the numbers, and with ``resample`` on the grid, of the reference; and the reference.

    Raises
    ------
    GeometryError
        If the grids differ (unless ``resample``).
    """
    prediction = _matched(prediction, reference)
    if resample and not prediction.geometry.is_close(reference.geometry):
        prediction = resample_to(prediction, reference.geometry)
    prediction.geometry.require_close(reference.geometry, f"prediction and reference of {case}")
    return prediction, reference


def _row(case: str, structure: Structure, score: Mapping[str, float]) -> Row:
    row: Row = {"case": case, "structure": structure.name, "label": structure.number}
    row.update({key: score.get(key, np.nan) for key in COLUMNS[3:-1]})
    volume, true = (row[key] for key in VOLUMES)
    row["volume_difference_mm3"] = volume - true
    row["volume_difference"] = (volume - true) / true if true > 0 else np.nan
    row.update({key: score[key] for key in ON_DEMAND if key in score})
    return row


def _mask(labels: LabelMap, number: int) -> NDArray[Any]:
    return labels.mask(number) if number in labels.names else np.zeros(labels.geometry.shape, bool)


def _made_up(name: str, number: int) -> bool:
    return name == f"label {number}"


def _matched(prediction: LabelMap, reference: LabelMap) -> LabelMap:
    """The prediction with the numbers of the reference, where all its names are names of the reference."""
    number_of = {s.name: s.number for s in reference.structures}
    named = [s for s in prediction.structures if not _made_up(s.name, s.number)]
    if len(named) < len(prediction.structures) or not all(s.name in number_of for s in named):
        return prediction
    if len({s.name for s in named}) < len(named) or all(s.number == number_of[s.name] for s in named):
        return prediction
    moved = tuple(replace(s, number=number_of[s.name]) for s in named)
    if prediction.is_layered:
        return replace(prediction, structures=moved)
    array = np.zeros(prediction.geometry.shape, reference.array.dtype if not reference.is_layered else np.int32)
    for old, new in zip(named, moved, strict=True):
        array[prediction.array == old.number] = new.number
    return replace(prediction, array=array, structures=moved)


def _chosen(
    prediction: LabelMap,
    reference: LabelMap,
    structures: Mapping[int, str] | Sequence[int | str] | None,
    labels_present: bool,
) -> list[Structure]:
    """Structures to score, by number; names of the reference before those of the prediction, made-up names last."""
    both = sorted((*reference.structures, *prediction.structures), key=lambda s: _made_up(s.name, s.number))
    found = {s.number: s for s in union(both)}
    if isinstance(structures, Mapping):
        found = {n: replace(found.get(n, Structure(n, name)), name=name) for n, name in structures.items()}
    elif structures is not None:
        by_name = {s.name: s for s in found.values()}
        asked = [by_name.get(key) if isinstance(key, str) else found.get(key, Structure(key, f"label {key}"))
                 for key in structures]  # fmt: skip
        unknown = [key for key, s in zip(structures, asked, strict=True) if s is None]
        if unknown:
            raise ValueError(f"structures must be among {sorted(by_name)}, got {unknown}")
        found = {s.number: s for s in asked if s is not None}
    if labels_present:
        found = {n: s for n, s in found.items() if n in reference.names and _mask(reference, n).any()}
    return [found[n] for n in sorted(found)]


# ---------------------------------------------------------------------------------------------------------------------
# Many cases


def _is_many(side: Sources) -> bool:
    if isinstance(side, LabelMap | Mapping):
        return isinstance(side, Mapping)
    return Path(side).is_dir()


def case_pairs(prediction: Sources, reference: Sources) -> dict[str, tuple[Source, Source]]:
    """Prediction and reference of the cases that both sides have, by case id."""
    if _is_many(prediction) and _is_many(reference):
        found = _pairs(_sources(prediction, "prediction"), _sources(reference, "reference"), True)
        return {case: pair for case, pair in found.items() if not isinstance(pair, str)}
    if isinstance(prediction, Mapping) or isinstance(reference, Mapping):
        raise TypeError(f"both sides must hold many cases, got {type(prediction)} and {type(reference)}")
    name = next((case_id(s) for s in (reference, prediction) if not isinstance(s, LabelMap)), "case")
    return {name: (prediction, reference)}


def read_pair(prediction: Source, reference: Source) -> tuple[LabelMap, LabelMap]:
    """Both label maps; SEG and RTSTRUCT objects are put on the grid of the other side."""
    gridless = [not isinstance(source, LabelMap) and is_dicom(source) for source in (prediction, reference)]
    if gridless == [False, True]:
        p = _read(prediction)
        return p, _read(reference, p)
    r = _read(reference)
    return _read(prediction, r if gridless[0] else None), r


def _read(source: Source, like: LabelMap | None = None) -> LabelMap:
    return source if isinstance(source, LabelMap) else read_labels(source, like=like)


def case_id(path: str | os.PathLike[str]) -> str:
    """Name of a file without its suffix."""
    name = Path(path).name
    for suffix in (".rtstruct.dcm", ".seg.dcm", ".dcm", supported_suffix(path)):
        if suffix and name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _sources(side: Sources, what: str) -> dict[str, Source]:
    """Label maps or files by case id."""
    if isinstance(side, Mapping):
        return dict(side)
    if isinstance(side, LabelMap):
        raise TypeError(f"{what} must hold many cases, got one label map")
    files = [p for p in sorted(Path(side).iterdir()) if p.is_file() and not p.name.startswith(".")]
    found: dict[str, Source] = {}
    for dicom in (False, True):
        group: dict[str, Path] = {}
        for path in files:
            if not (supported_suffix(path) or is_dicom(path)) or bool(supported_suffix(path)) == dicom:
                continue
            if (case := case_id(path)) in group:
                raise ValueError(
                    f"case ids must be unique in a folder, got {group[case].name} and {path.name} in {side}"
                )
            group[case] = path
        found = {**group, **found}
    if not found:
        raise FileNotFoundError(f"{what} folder must hold label maps, got none in {side}")
    return found


def _pairs(
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


def _score_all(
    pairs: Mapping[str, tuple[Source, Source] | str],
    score: Callable[[str, tuple[Source, Source]], list[Row]],
    progress: Callable[[int, int], None] | None,
) -> list[Row]:
    """Rows of all cases, in the order of the cases."""

    def attempt(case: str) -> list[Row]:
        pair = pairs[case]
        if isinstance(pair, str):
            return [_failure(case, pair)]
        try:
            return score(case, pair)
        except (ValueError, TypeError, OSError) as error:
            return [_failure(case, str(error))]

    rows: dict[str, list[Row]] = {}
    with ThreadPoolExecutor(min(MOST_WORKERS, os.cpu_count() or 1)) as pool:
        waiting = {pool.submit(attempt, case): case for case in pairs}
        for done, future in enumerate(as_completed(waiting), 1):
            rows[waiting[future]] = future.result()
            if progress is not None:
                progress(done, len(pairs))
    return [row for case in pairs for row in rows[case]]


def _failure(case: str, reason: str) -> Row:
    empty = _row(case, Structure(1, ""), {})
    return {**empty, "label": None, "error": reason}


def _named_alike(rows: list[Row]) -> None:
    """Give a structure that some files name and others only number its name everywhere."""
    names: dict[int, set[str]] = {}
    for row in rows:
        if "error" not in row and not _made_up(row["structure"], row["label"]):
            names.setdefault(row["label"], set()).add(row["structure"])
    for row in rows:
        known = names.get(row["label"], set())
        if "error" not in row and _made_up(row["structure"], row["label"]) and len(known) == 1:
            (row["structure"],) = known


def _completed(rows: list[Row]) -> list[Row]:
    """The rows with one more, undefined, for each structure that a case lacks and others have."""
    label_of = {row["structure"]: row["label"] for row in rows if "error" not in row}
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    full: list[Row] = []
    for case, own in by_case.items():
        present = {row["structure"] for row in own}
        absent = [] if "error" in own[0] else [name for name in label_of if name not in present]
        full += own + [_row(case, Structure(label_of[n], n), dict.fromkeys(VOLUMES, 0.0)) for n in absent]
    return full
