"""Compare a folder of predictions with a folder of references and print the summary with its intervals.

python workflows/evaluate_folder.py PREDICTIONS REFERENCES --out OUT
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

import medseg


@dataclass(frozen=True)
class Recipe:
    """What is compared, and how."""

    predictions: Positional[Path]
    """Folder of label maps (NIfTI, NRRD, MHA, PNG, DICOM-SEG, RTSTRUCT)."""
    references: Positional[Path]
    """Folder of label maps with the same names."""
    out: Path = Path("evaluation")
    """Folder for metrics.json, metrics.csv and report.html."""
    tolerance_mm: float = 1.0
    """Tolerance of the normalised surface Dice (mm)."""
    common_only: bool = False
    """Leave out cases that only one folder has."""


def main(recipe: Recipe) -> None:
    """Evaluate, write the table and print its summary."""
    evaluation = medseg.evaluate(
        recipe.predictions,
        recipe.references,
        tolerance_mm=recipe.tolerance_mm,
        common_only=recipe.common_only,
    )
    medseg.report_evaluation.write_evaluation(recipe.out, evaluation, recipe.predictions, recipe.references)
    for row in evaluation.summary:
        low, high = row["iou"]["ci95"]
        print(
            f"{row['structure']:20s} IoU {row['iou']['mean']:.3f} [{low:.3f}, {high:.3f}]  "
            f"Dice {row['dice']['mean']:.3f}  HD95 {row['hd95_mm']['mean']:.2f} mm  "
            f"({row['n_defined']} of {row['n']} cases)"
        )
    for row in evaluation.failed:
        print(f"failed: {row['case']}: {row['error']}")


if __name__ == "__main__":
    main(tyro.cli(Recipe))
