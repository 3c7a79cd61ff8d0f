"""Evaluation of predictions on files, folders or label maps: rows per case and structure, a summary with intervals."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

from medseg.case_files import Source, Sources, case_pairs, declared_names, is_made_up, is_many, paired, sources
from medseg.case_reading import read_case
from medseg.case_scores import (
    CaseRows,
    ScoringOptions,
    Structures,
    Surface,
    empty_row,
    require_names,
    row_of,
    score,
    score_case,
)
from medseg.lesions import Lesions
from medseg.scores import Evaluation, Row
from medseg.volume import Structure

__all__ = ["Evaluation", "Lesions", "Surface", "evaluate", "score_case"]

MOST_WORKERS = 8  # cases scored at a time, one per processor; each holds its two label maps in memory
UNEXPECTED = (RuntimeError, MemoryError, ArithmeticError, LookupError)  # of one case, which does not end the others
NOTHING_DRAWN = "reference must hold a structure to be scored by labels_present, got none"


def evaluate(
    prediction: Sources,
    reference: Sources,
    *,
    structures: Structures | None = None,
    tolerance_mm: float = 1.0,
    surface: bool | Surface = True,
    lesions: bool | Lesions = False,
    labels_present: bool | Mapping[str, Collection[int]] = False,
    resample: bool = False,
    common_only: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compare predictions with references, in mm, on the grid of the reference.

    Parameters
    ----------
    prediction, reference : LabelMap, path, or mapping of case id to these
        Two label maps or files (NIfTI, NRRD, MHA, PNG, DICOM-SEG, RTSTRUCT, a folder of masks ``<number>_<name>``), or
        two folders of such, which are matched by case id, the file name without its suffix. Of a case that a folder holds
        in several formats one is read: NIfTI before NRRD, MetaImage, masks, a picture, SEG and RTSTRUCT.
    structures : mapping of number to name, sequence of numbers or names, or path of a dataset.json, optional
        What to score; all structures of either label map by default. Structures whose name both sides have are matched
        by it; where no name is in common, by number. A second structure of one name is called "name (number)". Those
        that no file names are called as dataset.json, in the folder of the references (or else of the predictions) or the
        one above, says.
    tolerance_mm : float (mm)
        Tolerance of the normalised surface Dice.
    surface : bool or Surface
        Whether, and by which definition, to measure surface distances.
    lesions : bool or Lesions
        Whether, and by which rule, to count the lesions (connected components) of each structure that were found. Where
        a prediction holds probabilities (float layers, an image of probabilities, or one beside the label map, SEG,
        RTSTRUCT or folder of masks, named ``<case>_probabilities.nii.gz``), soft Dice, Brier score and calibration error
        are measured too. Their channels are the background and the structures that the file names; without names, those
        of the label map beside, ``structures``, dataset.json or the reference that are as many, in the order of their
        numbers, else 1 to n. A
        file beside a prediction that cannot be used leaves its reason under "note".
    labels_present : bool, or mapping of case id to numbers of structures
        For partially labelled references: score in each case only the structures that its reference holds, or those
        that somebody drew in the cases named (others are scored in full).
    resample : bool
        Put predictions, and their probabilities, on another grid onto that of the reference, instead of refusing them;
        what lies outside of it is not judged.
    common_only : bool
        Leave out cases that only one side has, instead of listing them as failed.
    progress : callable, optional
        Called with the number of cases done and of all cases.

    Returns
    -------
    Evaluation
        Its ``write(folder)`` makes metrics.json and metrics.csv, its ``to_pandas()`` a DataFrame. In a folder or
        mapping, a case that fails is a row with its reason and the others go on.

    Raises
    ------
    ValueError
        If an option is none, two folders share no case, or the one pair given cannot be compared (GeometryError where the
        grids differ or, for surface distances, are skewed).
    FileNotFoundError
        If there is no such file or folder.

    Notes
    -----
    As many cases (structures of one pair) are worked on at a time as there are processors, at most 8, and let go of when
    done: memory is that of their label maps, and of the rows.
    """
    drawn = labels_present if isinstance(labels_present, Mapping) else {}
    declared = declared_names(reference, prediction)
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    many = is_many(prediction) and is_many(reference)
    how = ScoringOptions(structures, tolerance_mm, surface, lesions, labels_present is True, resample, declared,
                         threads=1 if many else workers)  # fmt: skip
    names = tuple(own for own in (how.structures, declared) if isinstance(own, Mapping))

    def scored(case: str, pair: tuple[Source, Source]) -> CaseRows:
        return score(case, read_case(*pair, names), how, known=drawn.get(case))

    if many:
        pairs = paired(sources(prediction, "prediction"), sources(reference, "reference"), common_only)
        found = dict(zip(pairs, _score_all(pairs, scored, workers, progress), strict=True))
    else:
        ((name, pair),) = case_pairs(prediction, reference).items()
        found = {name: scored(name, pair)}
    scored_rows = {case: one for case, one in found.items() if not any("error" in row for row in one.structures)}
    try:
        require_names(how, frozenset().union(*(one.names for one in scored_rows.values())))
    except ValueError as problem:
        if not many:
            raise
        found |= {case: _failure(case, str(problem)) for case in scored_rows}
    rows = {case: one.structures for case, one in found.items()}
    found_lesions = [row for one in found.values() for row in one.lesions]
    if not how.instances:
        _named_alike([*(row for own in rows.values() for row in own), *found_lesions], declared)
    settings = how.settings() | {"common_only": common_only}
    if drawn:
        settings["labels_present"] = {case: sorted(numbers) for case, numbers in drawn.items()}
    return Evaluation(tuple(_completed(rows, drawn, how)), tuple(found_lesions), settings)


def _score_all(
    pairs: Mapping[str, tuple[Source, Source] | str],
    score: Callable[[str, tuple[Source, Source]], CaseRows],
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> list[CaseRows]:
    """Rows of all cases, in the order of the cases."""

    def attempt(case: str) -> CaseRows:
        pair = pairs[case]
        if isinstance(pair, str):
            return _failure(case, pair)
        try:
            return score(case, pair)
        except (ValueError, TypeError, OSError) as error:
            return _failure(case, str(error))
        except UNEXPECTED as error:
            return _failure(case, f"{type(error).__name__}: {error}".removesuffix(": "))

    rows: dict[str, CaseRows] = {}
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(attempt, case): case for case in pairs}
        try:
            for done, future in enumerate(as_completed(waiting), 1):
                rows[waiting[future]] = future.result()
                if progress is not None:
                    progress(done, len(pairs))
        finally:  # an interrupted evaluation does not begin the cases that are left
            pool.shutdown(cancel_futures=True)
    return [rows[case] for case in pairs]


def _failure(case: str, reason: str) -> CaseRows:
    empty = row_of(case, Structure(1, ""), {})
    return CaseRows([{**empty, "label": None, "error": reason}], [])


def _named_alike(rows: list[Row], declared: Mapping[int, str]) -> None:
    """Give a structure that some files, or the data set, name and others only number its name everywhere."""
    names: dict[int, set[str]] = {}
    for row in rows:
        if "error" not in row and not is_made_up(row["structure"], row["label"]):
            names.setdefault(row["label"], set()).add(row["structure"])
    taken = {(row["case"], row["structure"]): row["label"] for row in rows}
    for row in rows:
        known = names.get(row["label"], {declared[row["label"]]} if row["label"] in declared else set())
        if "error" not in row and is_made_up(row["structure"], row["label"]) and len(known) == 1:
            (name,) = known
            while taken.setdefault((row["case"], name), row["label"]) != row["label"]:
                name = f"{name} ({row['label']})"
            row["structure"] = name


def _completed(rows: Mapping[str, list[Row]], drawn: Mapping[str, Collection[int]], how: ScoringOptions) -> list[Row]:
    """The rows with one more, undefined, for each structure that a case lacks and others have: no case gets lost.

    Where all cases are empty and nothing names a structure, it is the number 1.
    """
    known = {row["structure"]: row["label"] for own in rows.values() for row in own if "error" not in row}
    known = known or {name: number for number, name in how.declared.items()} or {"label 1": 1}
    full: list[Row] = []
    for case, own in rows.items():
        present = {row["structure"] for row in own}
        if not how.labels_present and not (own and "error" in own[0]):
            wanted = [(n, name) for name, n in known.items() if name not in present and n in drawn.get(case, (n,))]
            own = own + [empty_row(case, Structure(n, name), how) for n, name in wanted]
        full += own or _failure(case, NOTHING_DRAWN).structures
    return full
