"""Contour one organ of a CT or MR from a box on one slice, and write it for the workstation.

python workflows/contour_organ.py SCAN --box 20,30,80,90,75,80 --name liver --out liver.rtstruct.dcm

SCAN is a file or a DICOM folder; SEG and RTSTRUCT need the folder. The box counts voxels along i, j, k of the scan, both
corners inside; flat along one axis, it lies on a slice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

import medseg


@dataclass(frozen=True)
class Recipe:
    """What to contour, from what, and where it goes."""

    scan: Positional[Path]
    """A file or DICOM folder."""
    box: str
    """i0,j0,k0,i1,j1,k1 around the organ on the slice where it is largest."""
    name: str = "organ"
    """What it is called in the output."""
    out: Path = Path("organ.nii.gz")
    """A label map: .nii.gz, .seg.dcm or .rtstruct.dcm."""
    model: str = "lite-medsam"
    """A promptable model, or the run folder of a fine-tuned one."""
    window: str | None = None
    """What the model sees: soft-tissue, lung, bone, ..., or LOW,HIGH; by default by modality."""


def main(recipe: Recipe) -> None:
    """Contour, write the label map and the log of the prompts, and print the volume."""
    image = medseg.read(recipe.scan)
    session = medseg.PromptSession(image, recipe.model, window=recipe.window)
    session.box(recipe.name, [float(n) for n in recipe.box.split(",")])
    labels = session.labels(progress=lambda done, most: print(f"slice {done} of at most {most}", end="\r"))
    medseg.write(labels, recipe.out, source=recipe.scan)
    session.log.save(recipe.out.with_suffix(".prompts.json"))
    millilitres = labels.mask(recipe.name).sum() * labels.geometry.voxel_mm3 / 1000
    print(f"{recipe.name}: {millilitres:.1f} ml, window {session.window}, written to {recipe.out}")


if __name__ == "__main__":
    main(tyro.cli(Recipe))
