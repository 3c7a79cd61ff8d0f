"""The report of an evaluation: summary, distributions, the worst and median cases as pictures, failures, comparison."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from medseg.case_files import Source, Sources, case_id, case_pairs, read_pair, sources
from medseg.case_scores import aligned_pair
from medseg.distribution import distribution_picture
from medseg.evaluation import evaluate
from medseg.io import is_mask_folder, read
from medseg.io.files import require_free
from medseg.report import METRIC_NAMES, metrics_blocks
from medseg.report_html import Block, Cell, Facts, Interval, Picture, Section, Table, Text, write_report
from medseg.report_pictures import planes_picture
from medseg.resample import resample_to
from medseg.scores import Evaluation
from medseg.statistics import compare, rank, worst_cases
from medseg.volume import Geometry, LabelMap, Volume

__all__ = ["evaluate_predictions", "report_of_evaluation", "require_free_outputs", "write_evaluation"]

WORST = 3
DRAWN = ("dice", "nsd", "hd95_mm")
LESIONS = {
    "reference_lesions": "lesions", "lesions_found": "found", "false_positives": "false positives",
    "lesion_sensitivity": "sensitivity", "lesion_precision": "precision", "lesion_f1": "F1", "sq": "SQ", "pq": "PQ",
    "ap50": "AP50", "ap": "AP", "merges": "merges", "splits": "splits",
}  # fmt: skip
SURFACES = {
    "voxel": "border voxels, the larger of both directed percentiles",
    "pooled": "border voxels, the percentile of both directions together",
    "area": "elements weighted by their area, the larger of both directed percentiles",
}
Image = Volume | str | os.PathLike[str]
log = logging.getLogger("medseg")
Images = Image | Mapping[str, Image] | Callable[[str], Image]


def require_free_outputs(folder: str | os.PathLike[str], force: bool = False) -> None:
    """Refuse a folder that holds a file of :func:`write_evaluation` already, unless ``force`` is set.

    Raises
    ------
    FileExistsError
    """
    for name in ("metrics.json", "metrics.csv", "lesions.csv", "report.html"):
        require_free(Path(folder) / name, force)


def write_evaluation(
    folder: str | os.PathLike[str],
    evaluation: Evaluation,
    prediction: Sources,
    reference: Sources,
    *,
    force: bool = False,
    **options: Any,
) -> None:
    """Write metrics.json, metrics.csv, lesions.csv (where asked for) and report.html into a folder.

    Takes the options of :func:`report_of_evaluation`.

    Raises
    ------
    FileExistsError
        If one of them exists and ``force`` is not set.
    """
    evaluation.write(folder, force=force)
    report_of_evaluation(Path(folder) / "report.html", evaluation, prediction, reference, force=force, **options)


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
        The files written, of any format; the first of each case is evaluated, or the folder of masks that it lies in.
    reference : path
        A folder of label maps, those of other cases left out; or, of one case, the file.
    failed : mapping of case id to reason
        Cases that could not be predicted: rows with the reason.
    image, force
        As for :func:`report_of_evaluation`.

    Raises
    ------
    ValueError
        If no case has a reference, or the file of one is given for several cases.
    """
    cases = {*predictions, *failed}
    if Path(reference).is_dir():
        references = {case: label for case, label in sources(reference, "reference").items() if case in cases}
    elif len(cases) == 1:
        references = dict.fromkeys(cases, reference)
    else:
        raise ValueError(
            f"reference must be a folder for several predictions, got the file {reference} for {len(cases)}"
        )
    labels: dict[str, Source] = {}
    for case, (path, *_) in predictions.items():
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
    others: Mapping[str, Evaluation] | None = None,
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
    others : mapping of name to Evaluation, optional
        Of other runs on the same references, with which it is compared and ranked.
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
    pictures, colors = _case_pictures(evaluation, prediction, reference, image, resample)
    summary, rows, *rest = metrics_blocks(evaluation, colors)
    sections = [Section("Summary", [facts, summary, *_rules(evaluation), *_lesion_tables(evaluation)])]
    if failed:
        note = Text(f"{len(failed)} of {len(cases)} cases could not be scored and count in no mean.")
        sections.append(Section("Failed cases", [note, *rest]))
    drawn = {m: METRIC_NAMES[m] for m in DRAWN if any(np.isfinite(r.get(m, np.nan)) for r in evaluation.rows)}
    if drawn:
        what = (
            "Boxes: quartiles; whiskers: 1.5 interquartile ranges; one point per case; triangles: a structure missing."
        )
        plot = Picture(distribution_picture(evaluation.rows, drawn, colors), what, f"Spread over cases. {what}")
        sections.append(Section("Distribution", [plot]))
    if others:
        sections.append(Section("Comparison", _comparisons(evaluation, others, list(drawn))))
    if pictures:
        sections.append(Section("Worst and median cases", pictures))
    sections.append(Section("All cases", [_by_case(evaluation), rows]))
    write_report(path, sections, title=title, force=force)


def _are_instances(evaluation: Evaluation) -> bool:
    return bool(evaluation.settings.get("lesions", {}).get("instances", False))


def _rules(evaluation: Evaluation) -> list[Block]:
    """How distances were measured, in words."""
    how = evaluation.settings
    if "surface" not in how:
        return []
    both = [row for row in evaluation.rows if "error" not in row and np.isfinite(row["dice"])]
    missed, false = (sum(row[key] == 0 for row in both) for key in ("volume_mm3", "reference_volume_mm3"))
    stands = "the diagonal of the image" if how["missing"] == "diagonal" else "no distance (these cases do not count)"
    return [
        Text(
            f"Surfaces: {SURFACES[how['surface']]}. NSD: within {how['tolerance_mm']:g} mm. Where one side alone has a "
            f"structure ({missed} missed, {false} made up), Dice, IoU and NSD are 0 and the distances are {stands}."
        )
    ]


def _lesion_tables(evaluation: Evaluation) -> list[Block]:
    if "lesion_f1" not in evaluation.metrics:
        return []
    means: list[list[Cell]] = [
        [entry["structure"], *(entry[m]["mean"] for m in LESIONS)] for entry in evaluation.summary
    ]
    told: list[list[Cell]] = [
        [
            row["case"], row["structure"], f"{row['side']} {row['lesion']}", row["volume_mm3"],
            ", ".join(f"{row[k]:.1f}" for k in ("x_mm", "y_mm", "z_mm")), row["outcome"], row["note"],
        ]
        for row in evaluation.lesions
        if row["note"] or row["outcome"] in ("missed", "false positive")
    ]  # fmt: skip
    head = ["case", "structure", "lesion", "volume (mm³)", "centre (RAS, mm)", "outcome", "merges and splits"]
    what = "Instances" if _are_instances(evaluation) else "Lesions"
    blocks: list[Block] = [Table(f"{what}: means per case", ["structure", *LESIONS.values()], means, is_open=True)]
    if told:
        blocks.append(Table(f"{what} missed, made up, merged or split", head, told))
    return blocks


def _ranking(evaluation: Evaluation, others: Mapping[str, Evaluation]) -> Table:
    rows: list[list[Cell]] = [
        [r.run, r.place, Interval(r.mean_rank, r.low, r.high), r.mean, r.missing]
        for r in rank({"this run": evaluation, **others})
    ]
    head = ["run", "place", "mean rank (95 %)", "mean Dice", "missing"]
    return Table("Ranks by Dice, averaged over cases and structures, the best first", head, rows, True)


def _comparisons(evaluation: Evaluation, others: Mapping[str, Evaluation], metrics: Sequence[str]) -> list[Block]:
    """Ranks, and differences metric by metric; a sentence where runs have nothing in common."""
    blocks: list[Block] = []
    try:
        blocks.append(_ranking(evaluation, others))
    except ValueError as problem:
        blocks.append(Text(f"No ranks: {problem}"))
    for name, other in others.items():
        for metric in metrics:
            try:
                blocks.append(_comparison(name, other, evaluation, metric))
            except ValueError as problem:
                blocks.append(Text(f"No comparison with {name} by {METRIC_NAMES[metric]}: {problem}"))
    return blocks


def _comparison(name: str, other: Evaluation, evaluation: Evaluation, metric: str) -> Table:
    """Paired differences of one metric, structure by structure."""
    rows: list[list[Cell]] = [
        [
            c.structure,
            c.n,
            c.first,
            c.second,
            Interval(c.difference, c.low, c.high),
            f"{c.better} / {c.n}",
            c.p,
            c.p_holm,
        ]
        for c in compare(other, evaluation, metric)
    ]
    head = ["structure", "pairs", "other run", "this run", "difference (95 %)", "better", "p", "p (Holm)"]
    return Table(f"{METRIC_NAMES[metric]}: this run minus {name}, same cases, Wilcoxon signed-rank", head, rows, True)


def _by_case(evaluation: Evaluation) -> Table:
    order: list[list[Cell]] = [[case, value] for case, value in worst_cases(evaluation)]
    return Table("Mean Dice over structures, the worst case first", ["case", "mean Dice"], order)


def _case_pictures(
    evaluation: Evaluation, prediction: Sources, reference: Sources, image: Images | None, resample: bool
) -> tuple[list[Block], dict[str, tuple[int, int, int]]]:
    """Pictures of the worst and the median cases, and the colours of the structures in them."""
    instances = _are_instances(evaluation)
    ordered = [(case, value) for case, value in worst_cases(evaluation) if np.isfinite(value)]
    pairs = case_pairs(prediction, reference)
    chosen = {case: f"number {n} from the worst" for n, (case, _) in enumerate(ordered[:WORST], 1)}
    if ordered:
        chosen.setdefault(ordered[len(ordered) // 2][0], "the median case")
    blocks: list[Block] = []
    colors: dict[str, tuple[int, int, int]] = {}
    scores = dict(ordered)
    for case, why in chosen.items():
        names = {} if instances else {r["label"]: r["structure"] for r in evaluation.rows if r["case"] == case}
        p, r = (_named(side, names) for side in aligned_pair(case, *read_pair(*pairs[case]), resample))
        colors.update({s.name: s.color for s in (*p.structures, *r.structures)})
        scan = _scan(image, case, r)
        shown = planes_picture(scan, p, r, focus="disagreement", zoom=True)
        values = ", ".join(
            f"{row['structure']} {row['dice']:.3f}"
            for row in evaluation.rows
            if row["case"] == case and np.isfinite(row["dice"])
        )
        caption = (
            f"{case}, {why}: mean Dice {scores[case]:.3f} ({values}). Planes in which prediction (solid) and reference "
            "(dashed) differ most."
        )
        blocks.append(Picture(shown, caption, f"Case {case} in three planes, contours of both masks"))
    return blocks, colors


def _named(labels: LabelMap, names: Mapping[int, str]) -> LabelMap:
    """The structures that have rows, called as there; all of them where nothing is named."""
    if not names:
        return labels
    at = [n for n, s in enumerate(labels.structures) if s.number in names]
    kept = tuple(replace(labels.structures[n], name=names[labels.structures[n].number]) for n in at)
    if labels.is_layered:
        return replace(labels, array=labels.array[at], structures=kept)
    scored = np.isin(labels.array, [s.number for s in kept])
    return replace(labels, array=np.where(scored, labels.array, np.zeros((), labels.array.dtype)), structures=kept)


def _scan(image: Images | None, case: str, labels: LabelMap) -> Volume:
    """The scan of a case on the grid of its labels; black where there is none."""
    grid: Geometry = labels.geometry
    found = image
    if isinstance(image, Mapping):
        found = image.get(case)
    elif callable(image):
        found = image(case)
    elif image is not None and not isinstance(image, Volume) and Path(image).is_dir():
        files = [f for f in sorted(Path(image).iterdir()) if case_id(f) in (case, f"{case}_0000")]
        found = files[0] if files else None
    if found is None or isinstance(found, Mapping) or callable(found):
        return Volume(np.zeros(grid.shape, np.uint8), grid)
    try:
        scan = found if isinstance(found, Volume) else read(found)
    except (OSError, ValueError) as problem:  # the tables are worth a report without it
        log.warning("scan of case %s is left out of the report: %s", case, problem)
        return Volume(np.zeros(grid.shape, np.uint8), grid)
    return scan if scan.geometry.is_close(grid) else resample_to(scan, grid)
