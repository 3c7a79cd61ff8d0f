"""The command that compares masks: evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

import medseg
from medseg.cli.show import bar, show_evaluation

__all__ = ["evaluate"]


def evaluate(
    prediction: Positional[Path],
    reference: Positional[Path],
    *,
    out: Path | None = None,
    image: Path | None = None,
    compare: tuple[Path, ...] = (),
    structures: Annotated[str | None, arg(metavar="dataset.json|1=NAME,2=NAME|NAME,2")] = None,
    lesions: bool = False,
    instances: bool = False,
    matching: Literal["iou", "optimal", "overlap"] = "iou",
    min_iou: float = 0.5,
    connectivity: Literal[26, 18, 6] = 26,
    sizes_mm3: tuple[float, ...] = (10.0, 100.0, 1000.0),
    definition: Literal["voxel", "pooled", "area"] = "voxel",
    missing: Literal["diagonal", "nan"] = "diagonal",
    tolerance_mm: float = 1.0,
    labels_present: bool = False,
    resample: bool = False,
    common_only: bool = False,
    json: bool = False,
    force: bool = False,
) -> int:
    """Compare predictions with references: rows per case and structure, summary with confidence intervals.

    Exit code 1 when a case could not be scored. Files of probabilities (<case>_probabilities.nii.gz) beside or in place of
    label maps add soft Dice, Brier score and calibration error. Of a case that a folder holds in several formats one is
    read: NIfTI before NRRD, MetaImage, masks, a picture, SEG and RTSTRUCT.

    Args:
        prediction: a label map or a folder of them
        reference: a label map or a folder of them (matched by file name)
        out: folder for metrics.json, metrics.csv, lesions.csv, comparison.csv and report.html; or a file of rows, .csv or
            .parquet
        image: scan or folder of scans of the same names, shown in the report
        compare: other predictions or folders of them, compared case by case with the first; all are ranked
        structures: what to score, and names for label files without: a dataset.json, numbers with names, or some of the
            structures by name or number
        lesions: count the connected components that were found, missed and made up
        instances: the values of label maps are instances of one kind (cells, say): PQ, F1, AP50, AP75, mean AP
        matching: of lesions: one to one by highest IoU, one to one with the largest sum of IoUs, or any shared voxel
        min_iou: least IoU of a lesion with its match
        connectivity: voxels of one lesion touch by a corner (26), an edge (18) or a face (6)
        sizes_mm3: limits, rising, of the classes of size by which the sensitivity for lesions is told, in mm3
        definition: of a surface: border voxels; the same, distances of both directions pooled; or elements by area
        missing: distance where one side lacks a structure: the diagonal of the image, or none
        tolerance_mm: tolerance of the normalised surface Dice, in mm
        labels_present: score only structures that the reference of the case holds
        resample: put predictions on another grid onto that of the reference; what lies outside of it is not judged
        common_only: leave out cases that one side lacks
        json: print JSON
        force: overwrite outputs
    """
    for path in (prediction, reference, *compare, *([image] if image else [])):
        if not path.exists():
            raise FileNotFoundError(f"file or folder must exist, got {path}; check the name")
    if len({path.resolve() for path in (prediction, *compare)}) <= len(compare):
        raise ValueError(
            f"compare must name other predictions, each once, got {prediction} and {', '.join(map(str, compare))}"
        )
    rule = medseg.lesions.Lesions(matching, min_iou, connectivity, sizes_mm3, instances)
    _require_use(rule, lesions=lesions, instances=instances)
    rows = out if out is not None and _is_file_of_rows(out) else None
    if image is not None and (out is None or rows is not None):
        raise ValueError(f"image must go with a report, got --out {out}; name a folder")
    if rows is not None:
        medseg.scores.require_rows(rows, force)
    elif out is not None:
        medseg.report_evaluation.require_free_outputs(out, force)
    found = {}
    with bar("evaluating") as progress:
        for side in (prediction, *compare):
            found[str(side)] = medseg.evaluate(
                side, reference, structures=_structures(structures), tolerance_mm=tolerance_mm,
                surface=medseg.evaluation.Surface(definition, missing), lesions=rule if lesions or instances else False,
                labels_present=labels_present, resample=resample, common_only=common_only, progress=progress,
            )  # fmt: skip
    this = found.pop(str(prediction))
    runs = medseg.statistics.compare_runs(this, found) if found else None
    if rows is not None:
        medseg.scores.write_rows(this.rows, rows, this.columns, force=force)
    elif out is not None:
        medseg.report_evaluation.write_evaluation(
            out, this, prediction, reference, image=image, comparison=runs, resample=resample, force=force
        )
    show_evaluation(this, json, runs)
    return 1 if this.failed else 0


def _structures(text: str | None) -> Any:
    """A path of a dataset.json, names by number, or numbers and names."""
    if text is None or text.endswith(".json"):
        return text
    parts = [part.strip() for part in text.split(",") if part.strip()]
    pairs = [part.partition("=") for part in parts]
    if parts and all(n.strip().isdigit() and name.strip() for n, _, name in pairs):
        return {int(n): name.strip() for n, _, name in pairs}
    if not parts or any("=" in part for part in parts):
        raise ValueError(f"structures must be a dataset.json, 1=NAME,2=NAME or NAME,2, got {text!r}")
    return [int(part) if part.isdigit() else part for part in parts]


def _require_use(rule: Any, *, lesions: bool, instances: bool) -> None:
    """Refuse options that would be without effect."""
    usual = medseg.lesions.Lesions()
    if rule != usual and not (lesions or instances):
        raise ValueError(
            "matching, min-iou, connectivity and sizes-mm3 must go with --lesions or --instances, got neither"
        )
    if instances and rule.connectivity != usual.connectivity:
        raise ValueError("connectivity must go with --lesions, got --instances, whose numbers are taken as they are")
    if rule.rule == "overlap" and rule.min_iou != usual.min_iou:
        raise ValueError("min-iou must go with --matching iou or optimal, got overlap, which takes any shared voxel")


def _is_file_of_rows(out: Path) -> bool:
    """Whether ``--out`` means a file; a folder may have a dot in its name, but hardly the suffix of another table."""
    suffix = out.suffix.lower()
    if suffix in (".json", ".html", ".txt", ".tsv", ".xls", ".xlsx") and not out.is_dir():
        raise ValueError(f"out must be a folder or end in .csv or .parquet, got {out}")
    return suffix in medseg.scores.ROW_FILES and not out.is_dir()
