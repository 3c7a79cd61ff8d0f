"""The command that compares masks: evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tyro.conf import Positional

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
    lesions: bool = False,
    instances: bool = False,
    matching: Literal["iou", "optimal", "overlap"] = "iou",
    min_iou: float = 0.5,
    connectivity: Literal[26, 18, 6] = 26,
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
    label maps add soft Dice, Brier score and calibration error.

    Args:
        prediction: a label map or a folder of them
        reference: a label map or a folder of them (matched by file name)
        out: folder for metrics.json, metrics.csv, lesions.csv and report.html; or a file of rows, .csv or .parquet
        image: scan or folder of scans of the same names, shown in the report
        compare: other predictions or folders of them, compared case by case with the first; all are ranked
        lesions: count the connected components that were found, missed and made up
        instances: the values of label maps are instances of one kind (cells, say): PQ, F1, AP50, AP75, mean AP
        matching: of lesions: one to one by highest IoU, one to one with the largest sum of IoUs, or any shared voxel
        min_iou: least IoU of a lesion with its match
        connectivity: voxels of one lesion touch by a corner (26), an edge (18) or a face (6)
        definition: of a surface: border voxels; the same, distances of both directions pooled; or elements by area
        missing: distance where one side lacks a structure: the diagonal of the image, or none
        tolerance_mm: tolerance of the normalised surface Dice, in mm
        labels_present: score only structures that the reference of the case holds
        resample: put predictions on another grid onto that of the reference
        common_only: leave out cases that one side lacks
        json: print JSON
        force: overwrite outputs
    """
    for path in (prediction, reference, *compare, *([image] if image else [])):
        if not path.exists():
            raise FileNotFoundError(f"file or folder must exist, got {path}; check the name")
    rule = medseg.lesions.Lesions(matching, min_iou, connectivity, instances=instances)
    if out is not None and out.suffix:
        medseg.scores.require_rows(out, force)
    elif out is not None:
        medseg.report_evaluation.require_free_outputs(out, force)
    runs = {}
    with bar("evaluating") as progress:
        for side in dict.fromkeys((prediction, *compare)):
            runs[str(side)] = medseg.evaluate(
                side, reference, tolerance_mm=tolerance_mm, surface=medseg.evaluation.Surface(definition, missing),
                lesions=rule if lesions or instances else False, labels_present=labels_present, resample=resample,
                common_only=common_only, progress=progress,
            )  # fmt: skip
    found = runs.pop(str(prediction))
    if out is not None and out.suffix:
        medseg.scores.write_rows(found.rows, out, found.columns, force=force)
    elif out is not None:
        medseg.report_evaluation.write_evaluation(
            out, found, prediction, reference, image=image, others=runs, resample=resample, force=force
        )
    show_evaluation(found, json, runs)
    return 1 if found.failed else 0
