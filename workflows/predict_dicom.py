"""Predict a DICOM folder with a trained run and bring the result back to the scanner's world: DICOM-SEG and RTSTRUCT.

python workflows/predict_dicom.py RUN DICOM_FOLDER --out OUT
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

import medseg


@dataclass(frozen=True)
class Recipe:
    """Which model, which series, where the objects go."""

    run: Positional[Path]
    """Run folder of a training."""
    series: Positional[Path]
    """Folder of one DICOM series."""
    out: Path = Path("predicted")
    """Folder for the label map, the DICOM-SEG and the RTSTRUCT."""
    crf: bool = False
    """Refine slice by slice before the decision."""


def main(recipe: Recipe) -> None:
    """Predict, write three formats, and print the volume of each structure."""
    image = medseg.read(recipe.series)
    labels = medseg.predict(recipe.run, image, crf=recipe.crf)
    for suffix in (".nii.gz", ".seg.dcm", ".rtstruct.dcm"):
        medseg.write(labels, recipe.out / f"segmentation{suffix}", source=recipe.series)
    for structure in labels.structures:
        millilitres = labels.mask(structure.number).sum() * labels.geometry.voxel_mm3 / 1000
        print(f"{structure.name:20s} {millilitres:10.1f} ml")
    print(f"written to {recipe.out}")


if __name__ == "__main__":
    main(tyro.cli(Recipe))
