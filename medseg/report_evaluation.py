"""The report of an evaluation: summary, distributions, the worst and median cases as pictures, failures, comparison."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from medseg.case_files import Source, Sources, format_rank, is_many, sources
from medseg.distribution import MOST_DRAWN, distribution_picture
from medseg.evaluation import evaluate
from medseg.io import is_mask_folder
from medseg.io.files import require_free
from medseg.report import METRIC_NAMES, metrics_blocks
from medseg.report_cases import Images, case_pictures
from medseg.report_html import Facts, Picture, Section, Text, write_report
from medseg.report_scores import (
    case_table,
    comparison_blocks,
    lesion_blocks,
    note_blocks,
    rules,
    summary_tables,
)
from medseg.scores import FILES, Evaluation
from medseg.statistics import RunComparison

__all__ = ["evaluate_predictions", "references_of", "report_of_evaluation", "require_free_outputs", "write_evaluation"]

DRAWN = ("dice", "nsd", "hd95_mm")


def require_free_outputs(folder: str | os.PathLike[str], force: bool = False) -> None:
    """Refuse a folder that holds a file of :func:`write_evaluation` already, unless ``force`` is set.

    Raises
    ------
    FileExistsError
    """
    for name in (*FILES, "report.html"):
        require_free(Path(folder) / name, force)


def write_evaluation(
    folder: str | os.PathLike[str],
    evaluation: Evaluation,
    prediction: Sources,
    reference: Sources,
    *,
    comparison: RunComparison | None = None,
    force: bool = False,
    **options: Any,
) -> None:
    """Write the files of :meth:`medseg.scores.Evaluation.write` and then report.html into a folder.

    Takes the options of :func:`report_of_evaluation`.

    Raises
    ------
    FileExistsError
        If one of them exists and ``force`` is not set.
    """
    require_free_outputs(folder, force)
    evaluation.write(folder, comparison=comparison.as_rows() if comparison else None, force=force)
    report_of_evaluation(
        Path(folder) / "report.html", evaluation, prediction, reference, comparison=comparison, force=force, **options
    )


def references_of(reference: str | os.PathLike[str], cases: Collection[str]) -> dict[str, Source]:
    """The references of the cases that are predicted, those of others left out; or, of one case, the file itself.

    Raises
    ------
    FileNotFoundError
        If there is no such file or folder.
    ValueError
        If no case has a reference, or the file of one is given for several cases.
    """
    if not Path(reference).exists():
        raise FileNotFoundError(f"reference must exist, got {reference}; check the name")
    if is_many(reference):
        found = {case: label for case, label in sources(reference, "reference").items() if case in cases}
        if not found:
            raise ValueError(f"references must share case ids with what is predicted, got none in {reference}")
        return found
    if len(cases) > 1:
        raise ValueError(
            f"reference must be a folder for several predictions, got the file {reference} for {len(cases)}"
        )
    return dict.fromkeys(cases, reference)


def evaluate_predictions(
    folder: str | os.PathLike[str],
    predictions: Mapping[str, Sequence[Path]],
    reference: str | os.PathLike[str],
    *,
    failed: Mapping[str, str] = MappingProxyType({}),
    image: Images | None = None,
    force: bool = False,
) -> Evaluation:
    """Evaluate what a prediction wrote, and write tables and report into its folder.

    Parameters
    ----------
    folder : path
        For the files of :func:`write_evaluation`.
    predictions : mapping of case id to paths
        The files written, of any format; of each case the one is evaluated that comes first as in a folder of
        :func:`medseg.evaluate`, or the folder of masks that it lies in.
    reference : path
        As for :func:`references_of`, whose errors it raises.
    failed : mapping of case id to reason
        Cases that could not be predicted: rows with the reason.
    image, force
        As for :func:`report_of_evaluation`.
    """
    references = references_of(reference, {*predictions, *failed})
    labels: dict[str, Source] = {}
    for case, paths in predictions.items():
        path = min(paths, key=format_rank)
        is_mask = path.parent.name == case and is_mask_folder(path.parent)
        labels[case] = path.parent if is_mask else path
    found = evaluate(labels, references)
    rows = [{**row, "error": failed[row["case"]]} if row["case"] in failed else row for row in found.rows]
    found = replace(found, rows=tuple(rows))
    write_evaluation(folder, found, labels, references, image=image, force=force, title="Prediction")
    return found


def report_of_evaluation(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    prediction: Sources,
    reference: Sources,
    *,
    image: Images | None = None,
    comparison: RunComparison | None = None,
    resample: bool = False,
    title: str = "Evaluation",
    force: bool = False,
) -> None:
    """Write a report on an evaluation as one HTML file.

    Parameters
    ----------
    path : path
        The HTML file.
    evaluation : Evaluation
    prediction, reference
        What was evaluated, as for :func:`medseg.evaluate`; only the cases that are shown are read again.
    image : Volume, path, folder, or mapping or function of case id to these, optional
        Scans to show below the contours; a case without one is shown on black.
    comparison : RunComparison, optional
        With other runs on the same references.
    resample : bool
        As for :func:`medseg.evaluate`.
    title : str
    force : bool
        Whether an existing file may be replaced.

    Raises
    ------
    FileExistsError
        If the file exists and ``force`` is not set.
    """
    cases, failed = {row["case"] for row in evaluation.rows}, {row["case"]: row["error"] for row in evaluation.failed}
    structures = [e["structure"] for e in evaluation.summary[:-1]]
    facts = Facts({
        "cases scored": len(cases) - len(failed), "cases failed": len(failed), "structures": len(structures),
        "mean Dice": evaluation.mean("dice"), "mean HD95 (mm)": evaluation.mean("hd95_mm"),
    })  # fmt: skip
    pictures, colors = case_pictures(evaluation, prediction, reference, image, resample)
    summary, rows, *rest = metrics_blocks(evaluation, colors)
    tables = [*summary_tables(evaluation, colors), *note_blocks(evaluation)]
    sections = [Section("Summary", [facts, summary, *rules(evaluation), *tables])]
    if failed:
        note = Text(f"{len(failed)} of {len(cases)} cases could not be scored and count in no mean.")
        sections.append(Section("Failed cases", [note, *rest]))
    if lesions := lesion_blocks(evaluation, colors):
        sections.append(Section("Instances" if evaluation.are_instances else "Lesions", lesions))
    drawn = {m: METRIC_NAMES[m] for m in DRAWN if any(np.isfinite(r.get(m, np.nan)) for r in evaluation.rows)}
    if drawn:
        what = (
            "Boxes: quartiles; whiskers: 1.5 interquartile ranges; one point per case; triangles: a structure missing."
        )
        if len(structures) > MOST_DRAWN:
            what += f" The first {MOST_DRAWN} of {len(structures)} structures."
        plot = Picture(distribution_picture(evaluation.rows, drawn, colors), what, f"Spread over cases. {what}")
        sections.append(Section("Distribution", [plot]))
    if comparison:
        sections.append(Section("Comparison", comparison_blocks(comparison)))
    if pictures:
        sections.append(Section("Worst and median cases", pictures))
    sections.append(Section("All cases", [case_table(evaluation), rows]))
    write_report(path, sections, title=title, force=force)
